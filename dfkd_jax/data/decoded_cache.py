"""Image files decoded once, and the arrays kept for the next run.

They are kept in `$XDG_CACHE_HOME/dfkd_jax` (`~/.cache/dfkd_jax`).
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.files import replacing

RULE = 2
"""Which version of `decode` made an array: what another one made is not used."""

_OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_WITH_ALPHA = ("LA", "PA", "RGBA")
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # I: of Pillow before 11
_PNG_DEPTH = 24  # where a PNG file holds the number of bits of a value


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

    The pixels are those of the same picture as an opaque 8-bit file that lies as it is looked at:
    - values of 16 bits keep their upper 8, and a colour becomes grey by ITU-R 601 luma;
    - an image that its EXIF orientation turns or mirrors is turned or mirrored;
    - of several frames the first counts;
    - an alpha channel that is opaque everywhere is dropped. Transparent pixels are refused, as
      their colours depend on what lies behind, and so are values without a known range.

    Args:
      examples: `size` of them.
      size: their number.
      row: see `row_type`.
      num_classes: labels lie below it.
      resize: whether images of another shape are resized, bilinear and antialiased, each side by a
        factor of its own; otherwise they are refused.

    Raises:
      UserError: an image cannot be decoded, has transparent pixels or values without a range, or
        has another shape or class; names it.
    """
    from PIL import Image

    height, width, channels = shape = row["image"].shape
    mode = "L" if channels == 1 else "RGB"  # a few images of Tiny-ImageNet are grey
    rows = np.empty(size, row)
    images, labels = rows["image"], rows["label"]
    for i, example in zip(range(size), examples, strict=True):
        where, label = example.where, example.label
        try:
            image = Image.open(io.BytesIO(example.encoded))
            image.load()
        except Exception as error:  # each of Pillow's decoders has its own for a broken file
            raise UserError(f"{where} cannot be decoded as an image.") from error
        image = _upright(_eight_bits(image, example, mode), image)
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


def _eight_bits(image: Any, example: Example, mode: str) -> Any:
    """The Pillow image of a file in mode L or RGB, upright or not; see `decode`."""
    from PIL import Image

    is_png = image.format == "PNG"
    transparent = (
        f"{example.where} has transparent pixels or a transparent colour (Pillow's mode "
        f"{image.mode}), and what lies behind is not known; allowed are opaque images."
    )
    if is_png and image.mode not in ("P", *_WITH_ALPHA) and "transparency" in image.info:
        # The colour is given in the file's depth, and Pillow looks for it among values of 8 bits.
        if example.encoded[_PNG_DEPTH] != 8:
            raise UserError(transparent)
    if is_png and image.mode in _SIXTEEN_BITS:  # other formats need not use all 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode not in _OPAQUE + _WITH_ALPHA:
        raise UserError(
            f"{example.where} has Pillow's mode {image.mode}, whose values have no known range; "
            "allowed are images of 8 bits, and PNG files of 16."
        )
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            raise UserError(transparent)
    if image.mode == mode:
        return image
    if mode == "L" and image.mode not in ("1", "RGB"):
        image = image.convert("RGB")  # from a palette Pillow's own luma is rounded otherwise
    return image.convert(mode)


def _upright(image: Any, source: Any) -> Any:
    """The image as the EXIF orientation of `source` says that it is looked at."""
    from PIL import ExifTags, Image

    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # what cannot be read turns nothing, in viewers neither
        return image
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def kept(
    name: str, folder: Path, files: Iterable[Path], row: np.dtype, read: Callable[[], np.ndarray]
) -> np.ndarray:
    """The rows of an earlier `read` of the same files, else those of this one.

    Paths, sizes and times of `files`, which lie in `folder`, are in the cache's name: of files that
    have changed nothing is kept. So is `RULE`.
    """
    stats = [(path, path.stat()) for path in sorted(files)]
    seen = [(path.relative_to(folder).as_posix(), s.st_size, s.st_mtime_ns) for path, s in stats]
    digest = hashlib.sha256(repr((RULE, seen, row)).encode()).hexdigest()[:16]
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
