"""Any folder of class folders, `DIR/{train,test}/CLASS/*.png`, `.jpg`, `.jpeg`, `.bmp`, `.webp`.

Classes are numbered in the sorted order of their folders' names. Hidden folders and files (of which
systems leave some) do not count. `decoded_cache.decode` says what it makes of other
depths and modes.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.data.decoded_cache import Example
from dfkd_jax.runtime.errors import DataMissing, UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # in capitals too


def class_names(data_dir: str | os.PathLike | None, split: str) -> list[str]:
    """The names of the class folders of "train" or "test", sorted.

    Raises:
      UserError: no folder is given.
      DataMissing: the folder has no such split.
    """
    folder = _root(data_dir) / split
    if not folder.is_dir():
        raise DataMissing(
            f"config.dataset.name is 'folder' but {folder} is no folder; it must hold a folder of "
            "images for each class"
            + (", unless config.teacher.checkpoint is given." if split == "train" else ".")
        )
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_visible(path))


def find(spec: DatasetSpec, data_dir: str | os.PathLike | None) -> Path:
    """The folder itself, checked: if there is a training split, it has the classes of the test's.

    Raises:
      UserError: the classes differ.
      DataMissing: there is no test split.
    """
    names = class_names(data_dir, "test")
    folder = _root(data_dir)
    if (folder / "train").exists():
        unmatched = set(class_names(data_dir, "train")).symmetric_difference(names)
        if unmatched:
            raise UserError(
                f"{folder}/train and {folder}/test must hold the same class folders; only one of "
                f"them holds {', '.join(sorted(unmatched))}."
            )
    return folder


def files(folder: Path, split: str) -> list[Path]:
    """The image files of a split, sorted by class and name."""
    return [
        path
        for name in class_names(folder, split)
        for path in sorted((folder / split / name).iterdir())
        if path.suffix.lower() in SUFFIXES and _is_visible(path)
    ]


def read(folder: Path, split: str) -> tuple[int, Iterator[Example]]:
    """The number of examples of a split, and the examples."""
    found = files(folder, split)
    label = {name: index for index, name in enumerate(class_names(folder, split))}
    examples = (Example(str(path), path.read_bytes(), label[path.parent.name]) for path in found)
    return len(found), examples


def _root(data_dir: str | os.PathLike | None) -> Path:
    if data_dir is None:
        raise UserError(
            "config.dataset.data_dir is None but config.dataset.name is 'folder'; give the folder "
            "that holds test/CLASS and train/CLASS."
        )
    return Path(data_dir).expanduser()


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")
