"""Arrays in one file of safetensors: names, types, shapes and bytes, and nothing that is run."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError


def differences(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with arrays of these names and shapes; empty if nothing is.

    Args:
      found: names and shapes. wanted: likewise.
    """
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "misshapen": [
            f"{name} {shape} instead of {wanted[name]}"
            for name, shape in sorted(found.items())
            if name in wanted and shape != wanted[name]
        ],
    }
    more = {kind: f" and {len(names) - 5} more" * (len(names) > 5) for kind, names in wrong.items()}
    return "; ".join(
        f"{kind} are {', '.join(names[:5])}{more[kind]}" for kind, names in wrong.items() if names
    )


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write them, whole or not at all.

    Raises:
      CannotWrite: the disk is full, or the folder cannot be written.
    """
    ordered = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    with files.replacing(path) as file:
        file.write(save(ordered))


def read(path: Path) -> dict[str, np.ndarray]:
    """All of them, by name.

    Raises:
      UserError: the file is missing or damaged; one sentence.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, AttributeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise UserError(f"{path} is missing or damaged: {reason}.") from error
