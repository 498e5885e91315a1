"""Labelled images: to train and test teachers, and to test students. No student trains on them.

Whole splits are held in memory as uint8. The first read of a data set decodes its image files; the
decoded arrays are kept in `$XDG_CACHE_HOME/dfkd_jax` (`~/.cache/dfkd_jax`) for the next one.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.results import replacing


class DatasetSpec(NamedTuple):
    """What the networks need to know of a data set."""

    image_shape: tuple[int, int, int]  # (H, W, C) as `load` gives it, padding included
    num_classes: int
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    tfds_name: str | None = None  # None: not read through tensorflow-datasets
    train_split: str = "train"  # the names of the splits in the source
    test_split: str = "test"
    pad: int = 0  # black pixels that `load` adds on each side
    flip: bool = False  # whether a mirrored image keeps its label


class Split(NamedTuple):
    """Images, uint8 (N, H, W, C) in 0..255, and labels, int32 (N,)."""

    images: np.ndarray
    labels: np.ndarray


# Mean and standard deviation per channel.
_DIGITS = (0.3053,), (0.3760,)
_MNIST = (0.1307,), (0.3081,)
_FASHION = (0.2860,), (0.3530,)
_SVHN = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # for both, as the method's authors do
_TINY = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)

SPECS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec((8, 8, 1), 10, *_DIGITS),
    "mnist": DatasetSpec((32, 32, 1), 10, *_MNIST, "mnist", pad=2),
    "fashion_mnist": DatasetSpec((32, 32, 1), 10, *_FASHION, "fashion_mnist", pad=2, flip=True),
    "svhn": DatasetSpec((32, 32, 3), 10, *_SVHN, "svhn_cropped"),
    "cifar10": DatasetSpec((32, 32, 3), 10, *_CIFAR, "cifar10", flip=True),
    "cifar100": DatasetSpec((32, 32, 3), 100, *_CIFAR, "cifar100", flip=True),
    # The labels of Tiny-ImageNet's own "test" folder were never published.
    "tiny_imagenet": DatasetSpec((64, 64, 3), 200, *_TINY, test_split="val", flip=True),
}


def spec(name: str) -> DatasetSpec:
    """The data set's facts; ValueError if there is no data set of that name."""
    if name not in SPECS:
        raise ValueError(f"config.dataset.name is {name!r} but must be one of {', '.join(SPECS)}.")
    return SPECS[name]


def check_prepared(name: str, data_dir: str | os.PathLike | None = None) -> None:
    """Return if both splits of the data set are there; reads no images.

    Args:
      name: a key of `SPECS`.
      data_dir: the folder of prepared data sets; None for `$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`.

    Raises:
      ValueError: no data set of that name.
      FileNotFoundError: it is not prepared; says how to prepare it.
    """
    if name != "digits":
        _source_dir(name, data_dir)


def load(name: str, split: str, data_dir: str | os.PathLike | None = None) -> Split:
    """Read one split whole.

    Args:
      name: a key of `SPECS`.
      split: "train" or "test".
      data_dir: see `check_prepared`.

    Returns:
      N images of `spec(name).image_shape`, and their labels, in the source's order.

    Raises:
      ValueError: no data set or split of that name, or the files hold something else.
      FileNotFoundError: the data set is not prepared; says how to prepare it.
    """
    facts = spec(name)
    if split not in ("train", "test"):
        raise ValueError(f"the split is {split!r} but must be 'train' or 'test'.")
    if name == "digits":
        return _load_digits(split)
    source = _source_dir(name, data_dir)
    cache = _cache_file(name, split, source)
    height, width, channels = facts.image_shape
    stored = (height - 2 * facts.pad, width - 2 * facts.pad, channels)
    row = np.dtype([("image", np.uint8, stored), ("label", np.int32)])
    rows = _read_cache(cache, row)
    if rows is None:
        read = _read_tiny_imagenet if facts.tfds_name is None else _read_tfds
        source_split = facts.train_split if split == "train" else facts.test_split
        size, examples = read(source, source_split)
        rows = _decode(examples, size, row, name, facts.num_classes)
        _write_cache(cache, rows)
    sides = (facts.pad, facts.pad)
    # `pad` also copies the images out of the rows, to be contiguous.
    images = np.pad(rows["image"], ((0, 0), sides, sides, (0, 0)))
    return Split(images, np.ascontiguousarray(rows["label"]))


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images / 255 − mean) / std.

    Args:
      images: uint8 (..., C) in 0..255.
      mean: C means of the images in [0, 1].
      std: C standard deviations of the same.

    Returns:
      float32 of the same shape.

    Raises:
      ValueError: the images are not uint8, so perhaps already normalised.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images to normalise must be uint8, not {images.dtype}.")
    scaled = jnp.asarray(images, jnp.float32) / 255.0
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Normalised images, float (..., C), back to [0, 1]; what lies outside is clipped."""
    return jnp.clip(images * jnp.asarray(std) + jnp.asarray(mean), 0.0, 1.0)


def _load_digits(split: str) -> Split:
    from sklearn.datasets import load_digits  # here, as it costs half a second

    digits = load_digits()
    images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # they hold 0..16
    labels = digits.target.astype(np.int32)
    # A third of each class. RandomState, as its stream is frozen across NumPy versions.
    shuffle = np.random.RandomState(0).permutation
    test = np.zeros(labels.size, bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        test[shuffle(members)[: round(members.size / 3)]] = True
    chosen = test if split == "test" else ~test
    return Split(images[chosen], labels[chosen])


def _source_dir(name: str, data_dir: str | os.PathLike | None) -> Path:
    """The folder with the data set's files, checked to be complete."""
    facts = spec(name)
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(data_dir or default).expanduser()
    if facts.tfds_name is None:
        folder = root / "tiny-imagenet-200"
        wanted = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
        if all((folder / item).exists() for item in wanted):
            return folder
        raise FileNotFoundError(
            f"config.dataset.name is {name!r} but {folder} does not hold it: unpack "
            f"http://cs231n.stanford.edu/tiny-imagenet-200.zip in {root}."
        )
    folder = root / facts.tfds_name
    versions = [path for path in folder.glob("*.*.*") if _is_prepared(path, facts)]
    if versions:
        return max(versions, key=lambda path: _version(path.name))
    raise FileNotFoundError(
        f"config.dataset.name is {name!r} but {folder} holds no version of it in array_record "
        f"format: prepare it with `pip install tensorflow && tfds build {facts.tfds_name} "
        f"--file_format=array_record --data_dir={root}`."
    )


def _version(folder: str) -> tuple[int, ...]:
    """(3, 0, 2) of "3.0.2"; () of anything else, like the folder of a preparation cut short."""
    parts = folder.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def _is_prepared(folder: Path, facts: DatasetSpec) -> bool:
    # Not asked of tensorflow-datasets, which reports a missing data set as a wrong format.
    try:
        info = json.loads((folder / "dataset_info.json").read_bytes())
        shards = {item["name"]: len(item["shardLengths"]) for item in info["splits"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(_version(folder.name)) and all(
        0 < shards.get(split, 0) == len(list(folder.glob(f"*-{split}.array_record*")))
        for split in (facts.train_split, facts.test_split)
    )


Example = tuple[bytes, int]  # an encoded image and its label


def _read_tfds(folder: Path, split: str) -> tuple[int, Iterator[Example]]:
    import tensorflow_datasets as tfds

    # From the directory, as `tfds.builder` wants the version that its own code would prepare.
    builder = tfds.builder_from_directory(os.fspath(folder))
    # Its own decoding is several times slower, and its result depends on whether OpenCV is there.
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split=split, decoders=decoders)

    def examples() -> Iterator[Example]:
        for start in range(0, len(source), 1024):
            indices = range(start, min(start + 1024, len(source)))
            for example in source.__getitems__(list(indices)):
                yield example["image"], int(example["label"])

    return len(source), examples()


def _read_tiny_imagenet(folder: Path, split: str) -> tuple[int, Iterator[Example]]:
    wnids = sorted((folder / "wnids.txt").read_text().split())
    index = {wnid: label for label, wnid in enumerate(wnids)}
    if split == "train":
        files = [
            (path, index[wnid])
            for wnid in wnids
            for path in sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
        ]
    else:
        lines = (folder / "val/val_annotations.txt").read_text().splitlines()
        rows = [line.split()[:2] for line in lines if line.strip()]
        files = [(folder / "val/images" / name, index[wnid]) for name, wnid in rows]
    return len(files), ((path.read_bytes(), label) for path, label in files)


def _decode(
    examples: Iterable[Example], size: int, row: np.dtype, name: str, num_classes: int
) -> np.ndarray:
    """Decode the images into `size` rows; ValueError for another shape or class, or for none."""
    from PIL import Image

    shape = row["image"].shape
    if not size:
        raise ValueError(f"{name} holds no images.")
    mode = "L" if shape[-1] == 1 else "RGB"  # a few images of Tiny-ImageNet are grey
    rows = np.empty(size, row)
    images, labels = rows["image"], rows["label"]
    for i, (encoded, label) in zip(range(size), examples, strict=True):
        image = Image.open(io.BytesIO(encoded))
        if image.size != (shape[1], shape[0]) or not 0 <= label < num_classes:
            width, height = image.size
            raise ValueError(
                f"image {i} of {name} is {height}×{width} of class {label}, where {shape[0]}×"
                f"{shape[1]} and a class below {num_classes} are expected."
            )
        images[i] = np.asarray(image if image.mode == mode else image.convert(mode)).reshape(shape)
        labels[i] = label
    return rows


def _cache_file(name: str, split: str, source: Path) -> Path:
    """The cache's place; sizes and times of the source's files are in its name, against staleness.

    Of Tiny-ImageNet's files only the folders count: there are 100,000.
    """
    tiny = SPECS[name].tfds_name is None
    files = [*source.glob("*.txt"), *source.glob("*/*"), *source.glob("train/*/images")]
    stats = [(path, path.stat()) for path in sorted(files if tiny else source.iterdir())]
    seen = [(path.relative_to(source).as_posix(), s.st_size, s.st_mtime_ns) for path, s in stats]
    digest = hashlib.sha256(repr(seen).encode()).hexdigest()[:8]
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "dfkd_jax" / f"{name}-{source.name}-{split}-{digest}.npy"


def _read_cache(file: Path, row: np.dtype) -> np.ndarray | None:
    try:
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if rows.ndim == 1 and rows.dtype == row else None


def _write_cache(file: Path, rows: np.ndarray) -> None:
    try:
        with replacing(file) as handle:
            np.save(handle, rows, allow_pickle=False)
    except OSError:
        pass  # a full or read-only disk costs the next run some seconds, not this one its life
