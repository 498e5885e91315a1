"""Arrays in one file of safetensors: names, types, shapes and bytes, and nothing that is run."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError


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
