"""Reading the state dict of a PyTorch checkpoint, `.safetensors` or `torch.save`, as NumPy arrays.

Nothing is unpickled but tensors and plain containers (`torch.load(weights_only=True)`), and what a
file declares is compared with its size before it is read.
"""

import os
import re
import shlex
import struct
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dfkd_jax.runtime.errors import UserError

_DEPTH = 4  # of dictionaries in one another that are searched for weights


class Weights(NamedTuple):
    """Weights found in a file.

    Attributes:
      arrays: in PyTorch's layout, by their names behind the prefix; of torch.save, floating-point
        ones as float32.
      place: what leads to them: the keys of dictionaries, joined by ".", and the prefix.
      left_out: names beside them.
    """

    arrays: dict[str, np.ndarray]
    place: tuple[str, str]
    left_out: tuple[str, ...]


EXPORT = "torch.save(model.state_dict(), 'weights.pt')"
_ZIP = b"PK\x03\x04"


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file that holds nothing else, by name.

    Args:
      path: a file of safetensors or of `torch.save`, told apart by how it begins; what begins like
        neither, by its name.

    Returns:
      Arrays in PyTorch's layout; of torch.save, floating-point ones as float32.

    Raises:
      UserError: the file cannot be read, is damaged, holds something else, or needs a package that
        is not installed; one sentence that names it.
    """
    return read_weights(path, ()).arrays


def read_weights(
    path: str | os.PathLike,
    wanted: Sequence[Collection[str]],
    *,
    key: str | None = None,
    prefix: str | None = None,
) -> Weights:
    """The weights of a network, out of whatever a training library has wrapped them in.

    They are looked for in every dictionary of the file and behind every prefix of its names
    ("module.", "net.backbone."): what has all names of the network is taken.

    Args:
      path: see `read_state_dict`.
      wanted: names of the network's arrays, in each form that they may have; none: whatever is
        there.
      key: the dictionary to look in: "state_dict", or "ema.model" of one in another.
      prefix: the one to look behind.

    Raises:
      UserError: see `read_state_dict`; or the network is there twice, or the key is not there.
    """
    path = Path(path)
    _check_unzipped(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(9)
        if _is_safetensors(path, start):
            content = _read_safetensors(path, start, size)
        else:
            content = _read_torch(path, start, size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    tables = _tables(content, path)
    if key is not None:
        if key not in tables:
            listed = ", ".join(repr(k) for k in tables)
            raise UserError(f"--key is {key!r}; {path} holds weights under {listed}.")
        tables = {key: tables[key]}
    place = _place(tables, wanted, prefix, path)
    table, behind = tables[place[0]], place[1]
    chosen = {n.removeprefix(behind): a for n, a in table.items() if n.startswith(behind)}
    left_out = tuple(name for name in table if not name.startswith(behind))
    return Weights(_arrays(chosen, path, size), place, left_out)


def _tables(content: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Every dictionary of tensors in a file, by the keys that lead to it."""

    def search(value: Any, key: str, depth: int) -> None:
        if not isinstance(value, Mapping) or depth > _DEPTH:
            return
        tensors = {str(name): part for name, part in value.items() if _is_tensor(part)}
        if tensors:
            tables[key] = tensors
        for name, part in value.items():
            if isinstance(name, str):
                search(part, f"{key}.{name}" if key else name, depth + 1)

    tables: dict[str, dict[str, Any]] = {}
    search(content, "", 0)
    if tables:
        return tables
    if not isinstance(content, Mapping):
        what = f"a {type(content).__name__}"
    elif {"state", "param_groups"} <= content.keys():
        what = "the state of an optimizer, without the network's weights"
    else:
        keys = ", ".join(repr(key)[:50] for key in list(content)[:5])
        what = f"a dictionary with no tensor at {keys}" if keys else "empty"
    raise UserError(
        f"{path} is no state dict but {what}; allowed is a dictionary of tensors, as "
        f"{EXPORT} writes it, alone or in others."
    )


def _place(
    tables: Mapping[str, Mapping[str, Any]],
    wanted: Sequence[Collection[str]],
    prefix: str | None,
    path: Path,
) -> tuple[str, str]:
    """Where the wanted names are: (key, prefix); where most of them are, if nowhere all."""
    found: dict[tuple[str, str], float] = {}
    for key, table in tables.items():
        for names in wanted:
            for behind in _prefixes(table, names) if prefix is None else {prefix}:
                share = sum(behind + name in table for name in names) / max(len(names), 1)
                place = (key, behind)
                found[place] = max(share, found.get(place, 0.0))
    whole = [place for place, share in found.items() if share == 1.0]
    if len(whole) > 1:
        shown = [repr(f"{key}: {behind}" if key else behind) for key, behind in whole]
        flags = ["--key"] * (len({key for key, _ in whole}) > 1)
        flags += ["--prefix"] * (len({behind for _, behind in whole}) > 1)
        raise UserError(
            f"{path} holds the network {len(whole)} times, under {', '.join(shown)}; choose one "
            f"with {' and '.join(flags)}."
        )
    if whole:
        return whole[0]
    if found:
        return max(found, key=lambda place: found[place])
    return max(tables, key=lambda key: len(tables[key])), prefix or ""


def _prefixes(table: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """What may stand before the names: whatever stands before some of them."""
    anchors = sorted(names)[:: max(1, len(names) // 8)]
    return {
        name.removesuffix(anchor)
        for anchor in anchors
        for name in table
        if name == anchor or name.endswith(f".{anchor}")
    }


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Whether a file is to be read as safetensors: the length of its header, then JSON."""
    if start.startswith(_ZIP):
        return False
    return start[8:] == b"{" or path.suffix.lower() == ".safetensors"


def _read_safetensors(path: Path, start: bytes, size: int) -> Mapping[str, Any]:
    if len(start) < 8 or 8 + struct.unpack("<Q", start[:8])[0] > size:
        raise UserError(f"{path} is damaged or no safetensors file: its header goes past its end.")
    try:
        return load_file(path)
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no safetensors file: {reason}.") from error


def _read_torch(path: Path, start: bytes, size: int) -> Any:
    if start.startswith(_ZIP):
        _check_zip(path, size)
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} cannot be read as PyTorch is not installed: pip install 'dfkd-jax[torch]'."
        ) from error
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:  # it judges paths by their end
            warnings.simplefilter("ignore")  # on formats that are old but read
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows in as many ways as there are readers
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise UserError(
                f"{path} holds a pickled {refused[1][:100]} (a whole module, or something beside "
                "the weights) and is not opened, as unpickling can run any code; where that class "
                f"is defined, run {EXPORT}, or with a file that you trust and that has the weights "
                f"under 'state_dict', torch.save(torch.load({path.name!r}, weights_only=False)"
                "['state_dict'], 'weights.pt'), and convert the new file."
            ) from error
        raise UserError(
            f"{path} is damaged or no PyTorch checkpoint ({type(error).__name__}); allowed are "
            f"a .safetensors file and what {EXPORT} writes."
        ) from error


def _check_unzipped(path: Path) -> None:
    """Refuse a folder; the one that unpacking an archive of `torch.save` gives by name."""
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.name == "data.pkl"
    if named and (folder / "data.pkl").is_file() and (folder / "data").is_dir():
        folder = folder.resolve()
        parent, name = shlex.quote(str(folder.parent)), shlex.quote(folder.name)
        raise UserError(
            f"{path} is an unzipped archive of torch.save, or part of one; zip it again without "
            f"compression, cd {parent} && zip -0 -r zipped.pt {name}, and convert zipped.pt."
        )
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; allowed is one file, a state dict of torch.save, a .safetensors "
            "file or a .pt2 file."
        )


def _check_zip(path: Path, size: int) -> None:
    """Refuse what torch.load would read without noticing, or only at great cost.

    `torch.save` stores without compression, so contents cannot be larger than their archive; it
    writes checksums, which torch.load does not compare.
    """
    entries = _ask_zip(path, zipfile.ZipFile.infolist)
    if any(Path(entry.filename).name == "constants.pkl" for entry in entries):
        raise UserError(
            f"{path} is a TorchScript program and no state dict; run "
            f"model = torch.jit.load({path.name!r}), then {EXPORT}, and convert the new file."
        )
    declared = sum(entry.file_size for entry in entries)
    if declared > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(
            f"{path} is no archive of torch.save: it has {size:,} bytes and declares {declared:,} "
            "bytes of contents, which must be stored without compression."
        )
    # PyTorch can be told to leave the checksums out; all are 0 then.
    if any(entry.CRC for entry in entries):
        damaged = _ask_zip(path, zipfile.ZipFile.testzip)
        if damaged is not None:
            raise UserError(f"{path} is damaged: {damaged[:100]!r} in it has another checksum.")


def _ask_zip(path: Path, question: Callable[[zipfile.ZipFile], Any]) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            return question(archive)
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged: its archive cannot be read.") from error


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _arrays(state_dict: Mapping[str, Any], path: Path, size: int) -> dict[str, np.ndarray]:
    # A tensor may repeat one stored number (stride 0), so its size is only what it claims.
    numbers = sum(int(np.prod(array.shape, dtype=float)) for array in state_dict.values())
    if numbers > size:
        raise UserError(f"{path} declares {numbers:,} numbers but has only {size:,} bytes.")
    try:
        return {name: _array(array) for name, array in state_dict.items()}
    except (TypeError, RuntimeError) as error:  # sparse, quantised, without data
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise UserError(f"{path} holds tensors that are no plain arrays: {reason}.") from error


def _array(tensor: Any) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        # NumPy has no bfloat16.
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
    return tensor
