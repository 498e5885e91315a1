"""The entries of a `.pt2` archive: JSON and raw numbers, checked before they are believed."""

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dfkd_jax.runtime.errors import UserError

SAVE = (
    "torch.export.save(torch.export.export(model.eval(), (images,), "
    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), 'teacher.pt2')"
)
_DTYPES = {  # by PyTorch's numbers
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float16,
    7: np.float32,
    8: np.float64,
    12: np.bool_,
    13: ml_dtypes.bfloat16,
}
_MOST_JSON = 2**28  # bytes; the graph of a network of a thousand layers has a hundredth of that


class Archive:
    """The entries of an archive, of which nothing is read that is larger than the archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        entries = archive.infolist()
        size = path.stat().st_size
        declared = sum(entry.file_size for entry in entries)
        if declared > size or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise UserError(
                f"{path} is no archive of torch.export.save: it has {size:,} bytes and declares "
                f"{declared:,} bytes of contents, which must be stored without compression."
            )
        # All lie in one folder, of any name.
        self._names = {e.filename.partition("/")[2]: e.filename for e in entries}
        if "models/model.json" not in self._names:
            raise UserError(f"{path} {self._what_it_is()}")
        if self._names.get("byteorder") and self.read("byteorder").strip() != b"little":
            raise UserError(f"{path} was written on a big-endian machine, whose numbers differ.")

    def _what_it_is(self) -> str:
        names = set(self._names) | set(self._names.values())
        if any("serialized_exported_program" in name for name in names):
            return (
                "was written by a PyTorch before 2.8, in a format with pickled weights that is not "
                f"opened; write it again with a newer one: {SAVE}."
            )
        if any("aotinductor" in name for name in names):
            return f"holds compiled code and no graph; write it anew: {SAVE}."
        if any(name.startswith("models/") for name in names):
            return "holds several programs; allowed is one."
        return f"is no archive of torch.export.save; write one by {SAVE}."

    def read(self, name: str) -> bytes:
        """The bytes of an entry; its checksum is compared."""
        return self._archive.read(self._names[name])

    def json(self, name: str) -> Any:
        """What an entry of JSON says."""
        if self._archive.getinfo(self._names[name]).file_size > _MOST_JSON:
            raise UserError(f"{self._path} has a graph of more than {_MOST_JSON:,} bytes.")
        return json.loads(self.read(name))

    def tensors(self, kind: str) -> dict[str, np.ndarray]:
        """The weights, or the constants, by name."""
        listing = f"data/{kind}/model_{kind}_config.json"
        config = self.json(listing)["config"] if listing in self._names else {}
        found = {}
        for name, entry in config.items():
            if entry["use_pickle"]:
                raise UserError(
                    f"{self._path} holds {name[:100]!r} pickled, which is not opened as "
                    "unpickling can run any code; allowed are plain tensors."
                )
            if entry.get("tensor_meta") is None:
                raise UserError(
                    f"{self._path} needs the object {name[:100]!r}; allowed are plain tensors."
                )
            found[name] = self._tensor(f"data/{kind}/{entry['path_name']}", entry["tensor_meta"])
        return found

    def _tensor(self, name: str, facts: Mapping[str, Any]) -> np.ndarray:
        if facts["dtype"] not in _DTYPES:
            raise UserError(f"{self._path} has numbers of PyTorch's type {facts['dtype']!r}.")
        stored = np.frombuffer(self.read(name), _DTYPES[facts["dtype"]])
        shape = tuple(size["as_int"] for size in facts["sizes"])
        strides = tuple(stride["as_int"] for stride in facts["strides"])
        first = facts["storage_offset"]["as_int"]
        if min((0, first, *shape, *strides)) < 0 or len(shape) != len(strides):
            raise ValueError("negative sizes")
        last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        # A stride of 0 would make much of little.
        if math.prod(shape) and (last >= stored.size or math.prod(shape) > stored.size):
            raise UserError(
                f"{self._path} is damaged: {name!r} has {stored.size:,} numbers, of which an array "
                f"of shape {shape} is to be made."
            )
        if not math.prod(shape):
            return np.zeros(shape, stored.dtype)
        view = np.lib.stride_tricks.as_strided(
            stored[first:], shape, [s * stored.itemsize for s in strides], writeable=False
        )
        return np.ascontiguousarray(view).reshape(shape)
