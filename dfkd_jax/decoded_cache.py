"""Image files decoded once, and the arrays kept for the next run.

They are kept in `$XDG_CACHE_HOME/dfkd_jax` (`~/.cache/dfkd_jax`).
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dfkd_jax.errors import UserError
from dfkd_jax.results import replacing


class Example(NamedTuple):
    """An image as its file holds it, and its class."""

    where: str  # what messages call it
    encoded: bytes
    label: int


def row_type(shape: tuple[int, int, int]) -> np.dtype:
    """The type of a decoded example: an image uint8 (H, W, C) and a label int32."""
    return np.dtype([("image", np.uint8, shape), ("label", np.int32)])


def decode(
    examples: Iterable[Example], size: int, row: np.dtype, num_classes: int, *, resize: bool
) -> np.ndarray:
    """Decode `size` images into rows, as grey ones or RGB by the number of channels.

    Args:
      examples: `size` of them.
      size: their number.
      row: see `row_type`.
      num_classes: labels lie below it.
      resize: whether images of another shape are resized, bilinear and antialiased, each side by a
        factor of its own; otherwise they are refused.

    Raises:
      UserError: an image cannot be decoded, or has another shape or class; names it.
    """
    from PIL import Image

    height, width, channels = shape = row["image"].shape
    mode = "L" if channels == 1 else "RGB"  # a few images of Tiny-ImageNet are grey
    rows = np.empty(size, row)
    images, labels = rows["image"], rows["label"]
    for i, (where, encoded, label) in zip(range(size), examples, strict=True):
        try:
            image = Image.open(io.BytesIO(encoded))
            image = image if image.mode == mode else image.convert(mode)
            image.load()
        except Exception as error:  # each of Pillow's decoders has its own for a broken file
            raise UserError(f"{where} cannot be decoded as an image.") from error
        if resize and image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if image.size != (width, height) or not 0 <= label < num_classes:
            raise UserError(
                f"{where} is {image.height}×{image.width} of class {label}, where {height}×{width} "
                f"and a class below {num_classes} are expected."
            )
        images[i] = np.asarray(image).reshape(shape)
        labels[i] = label
    return rows


def kept(
    name: str, folder: Path, files: Iterable[Path], row: np.dtype, read: Callable[[], np.ndarray]
) -> np.ndarray:
    """The rows of an earlier `read` of the same files, else those of this one.

    Paths, sizes and times of `files`, which lie in `folder`, are in the cache's name: of files that
    have changed nothing is kept.
    """
    stats = [(path, path.stat()) for path in sorted(files)]
    seen = [(path.relative_to(folder).as_posix(), s.st_size, s.st_mtime_ns) for path, s in stats]
    digest = hashlib.sha256(repr((seen, row)).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    file = root / "dfkd_jax" / f"{name}-{digest}.npy"
    rows = _read(file, row)
    if rows is None:
        rows = read()
        _write(file, rows)
    return rows


def _read(file: Path, row: np.dtype) -> np.ndarray | None:
    try:
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.ndim == 1 and rows.dtype == row else None


def _write(file: Path, rows: np.ndarray) -> None:
    try:
        with replacing(file) as handle:
            np.save(handle, rows, allow_pickle=False)
    except OSError:
        pass  # a full or read-only disk costs the next run some seconds, not this one its life
