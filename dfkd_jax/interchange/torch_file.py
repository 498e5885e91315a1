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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dfkd_jax.runtime.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts put the state dict."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "resnet.")
"""What wrapping modules (`DataParallel`, `torch.compile`, LRA's 64×64 ResNet) put before names."""

EXPORT = "torch.save(model.state_dict(), 'weights.pt')"
_ZIP = b"PK\x03\x04"


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by name, out of its wrapping and without common prefixes.

    Args:
      path: a file of safetensors or of `torch.save`, told apart by how it begins; what begins like
        neither, by its name.

    Returns:
      Arrays in PyTorch's layout; of torch.save, floating-point ones as float32.

    Raises:
      UserError: the file cannot be read, is damaged, holds something else, or needs a package that
        is not installed; one sentence that names it.
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
    return _arrays(_without_prefixes(_unwrap(content, path)), path, size)


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
    """Refuse the folder that unpacking an archive of `torch.save` gives, and its `data.pkl`."""
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.name == "data.pkl"
    if named and (folder / "data.pkl").is_file() and (folder / "data").is_dir():
        folder = folder.resolve()
        parent, name = shlex.quote(str(folder.parent)), shlex.quote(folder.name)
        raise UserError(
            f"{path} is an unzipped archive of torch.save, or part of one; zip it again without "
            f"compression, cd {parent} && zip -0 -r zipped.pt {name}, and convert zipped.pt."
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


def _unwrap(content: Any, path: Path) -> Mapping[str, Any]:
    """The state dict inside of a training script's dictionary."""
    while isinstance(content, Mapping):
        inner = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = content[inner[0]]
    if isinstance(content, Mapping) and content and all(map(_is_tensor, content.values())):
        return {str(name): value for name, value in content.items()}
    if isinstance(content, Mapping):
        keys = [repr(key)[:50] for key, value in content.items() if not _is_tensor(value)]
        what = f"a dictionary with no tensor at {', '.join(keys[:5])}" if keys else "empty"
    else:
        what = f"a {type(content).__name__}"
    raise UserError(
        f"{path} is no state dict but {what}; allowed is a dictionary of tensors, alone or under "
        f"one of the keys {', '.join(WRAPPERS)}."
    )


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _without_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Take off each prefix that all names share."""
    found = True
    while found:
        found = [p for p in PREFIXES if all(name.startswith(p) for name in state_dict)]
        for prefix in found[:1]:
            state_dict = {name.removeprefix(prefix): a for name, a in state_dict.items()}
    return dict(state_dict)


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
