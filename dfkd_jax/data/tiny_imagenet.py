"""Tiny-ImageNet, as the folder that its official archive unpacks to."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.data.decoded_cache import Example
from dfkd_jax.data.tfds_data import data_root
from dfkd_jax.runtime.errors import DataMissing

ARCHIVE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
FOLDER = "tiny-imagenet-200"
PARTS = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")


def find(spec: DatasetSpec, data_dir: str | os.PathLike | None) -> Path:
    """The folder `tiny-imagenet-200`.

    Raises:
      DataMissing: it is not there, or not whole; says what to unpack where.
    """
    root = data_root(data_dir)
    folder = root / FOLDER
    if all((folder / part).exists() for part in PARTS):
        return folder
    raise DataMissing(
        f"config.dataset.name is {spec.name!r} but {folder} does not hold it: "
        f"unpack {ARCHIVE} in {root}."
    )


def files(folder: Path, split: str) -> Iterable[Path]:
    """What changes when the split does: the folders of images, as there are 100,000 files."""
    del split
    return [*folder.glob("*.txt"), *folder.glob("*/*"), *folder.glob("train/*/images")]


def read(folder: Path, split: str) -> tuple[int, Iterator[Example]]:
    """The number of examples of a split, and the examples.

    The test split is the archive's "val": the labels of its own "test" were never published.
    """
    wnids = sorted((folder / "wnids.txt").read_text().split())
    index = {wnid: label for label, wnid in enumerate(wnids)}
    if split == "train":
        found = [
            (path, index[wnid])
            for wnid in wnids
            for path in sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
        ]
    else:
        lines = (folder / "val/val_annotations.txt").read_text().splitlines()
        rows = [line.split()[:2] for line in lines if line.strip()]
        found = [(folder / "val/images" / name, index[wnid]) for name, wnid in rows]
    return len(found), (Example(str(path), path.read_bytes(), label) for path, label in found)
