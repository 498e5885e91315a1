"""Data sets prepared by tensorflow-datasets in array_record format; TensorFlow is not needed."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.data.decoded_cache import Example
from dfkd_jax.runtime.errors import DataMissing


def data_root(data_dir: str | os.PathLike | None) -> Path:
    """The folder given, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(data_dir or default).expanduser()


def find(spec: DatasetSpec, data_dir: str | os.PathLike | None) -> Path:
    """The folder of the newest version of which both splits are whole.

    Raises:
      DataMissing: there is none; says how to prepare it.
    """
    assert spec.tfds_name is not None
    root = data_root(data_dir)
    folder = root / spec.tfds_name
    versions = [path for path in folder.glob("*.*.*") if _is_prepared(path)]
    if versions:
        return max(versions, key=lambda path: _version(path.name))
    raise DataMissing(
        f"config.dataset.name is {spec.name!r} but {folder} holds no version of it in array_record "
        f"format: prepare it once with `python -m dfkd_jax.prepare --dataset={spec.name} "
        f"--data_dir={root}`."
    )


def files(folder: Path, split: str) -> Iterable[Path]:
    """What changes when the split does."""
    del split
    return folder.iterdir()


def read(folder: Path, split: str) -> tuple[int, Iterator[Example]]:
    """The number of examples of a split, and the examples."""
    import tensorflow_datasets as tfds  # here, as it costs a second

    # From the directory, as `tfds.builder` wants the version that its own code would prepare.
    builder = tfds.builder_from_directory(os.fspath(folder))
    # Its own decoding is several times slower, and its result depends on whether OpenCV is there.
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(
        split=split,  # pyright: ignore[reportCallIssue]  # its decorator hides the arguments
        decoders=decoders,
    )

    def examples() -> Iterator[Example]:
        for start in range(0, len(source), 1024):
            indices = range(start, min(start + 1024, len(source)))
            for i, example in zip(indices, source.__getitems__(list(indices)), strict=True):
                where = f"image {i} of {folder.parent.name}"
                yield Example(where, example["image"], int(example["label"]))

    return len(source), examples()


def _version(folder: str) -> tuple[int, ...]:
    """(3, 0, 2) of "3.0.2"; () of anything else, like the folder of a preparation cut short."""
    parts = folder.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def _is_prepared(folder: Path) -> bool:
    # Not asked of tensorflow-datasets, which reports a missing data set as a wrong format.
    try:
        info = json.loads((folder / "dataset_info.json").read_bytes())
        shards = {item["name"]: len(item["shardLengths"]) for item in info["splits"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(_version(folder.name)) and all(
        0 < shards.get(split, 0) == len(list(folder.glob(f"*-{split}.array_record*")))
        for split in ("train", "test")
    )
