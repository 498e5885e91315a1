"""The facts of the data set that a configuration describes: from the table, or its own."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from dfkd_jax.data import folder_data
from dfkd_jax.data.data_table import SPECS, DatasetSpec
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError

# What has no line in the table: any folder of class folders, and no data at all.
OWN = ("folder", "none")
CARD = "teacher.json"  # in the folder of a teacher: what it says of itself
FIELDS = ("image_size", "channels", "num_classes", "mean", "std")  # of config.dataset


def spec(config: ml_collections.ConfigDict, card: Mapping[str, Any] | None = None) -> DatasetSpec:
    """The facts of the data set that `config.dataset` describes.

    Images are normalised as the teacher's card says, if it does: what they look like to a network
    is the teacher's affair, not that of the table. Of `folder` and `none`, a field that is None is
    taken from the card too, as images must be what the teacher takes; the classes of `folder` are
    counted in any case.

    Args:
      config: of a run.
      card: of the teacher; that of `config.teacher.checkpoint` by default.

    Raises:
      UserError: no data set has that name, or a field is missing, impossible, or contradicts what
        is known of the data set.
      DataMissing: `folder` is not there.
    """
    dataset = config.dataset
    card = teacher_card(config) if card is None else card
    if dataset.name in OWN:
        return _own(dataset, card)
    if dataset.name not in SPECS:
        allowed = ", ".join((*SPECS, *OWN))
        raise UserError(f"config.dataset.name is {dataset.name!r} but must be one of {allowed}.")
    known = SPECS[dataset.name]
    if card.get("mean") is not None and card.get("std") is not None:
        known = known._replace(mean=tuple(card["mean"]), std=tuple(card["std"]))
    size, _, channels = known.image_shape
    values = (size, channels, known.num_classes, known.mean, known.std, known.flip)
    for field, value in zip((*FIELDS, "flip"), values, strict=True):
        given = dataset[field]
        if isinstance(given, list):  # a tuple that was written to config.json
            given = tuple(given)
        if given not in (None, value):
            raise UserError(
                f"config.dataset.{field} is {dataset[field]!r} but {value!r} for the data set "
                f"{dataset.name!r}; allowed is to leave it out."
            )
    return known


def is_teacher(directory: str | os.PathLike) -> bool:
    """Whether a finished teacher lies in `directory`; its card is written last."""
    return (Path(directory) / CARD).is_file()


def teacher_card(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What the teacher in `config.teacher.checkpoint` says of itself; empty if none is there.

    Raises:
      UserError: its file is damaged.
    """
    directory = config.teacher.checkpoint
    return {} if directory is None else card_in(directory)


def card_in(directory: str | os.PathLike) -> dict[str, Any]:
    """The card of the teacher in a folder; see `teacher_card`."""
    if not is_teacher(directory):
        return {}
    return files.read_json(Path(directory) / CARD)


def _own(dataset: ml_collections.ConfigDict, card: Mapping[str, Any]) -> DatasetSpec:
    size, _, channels = card.get("image_shape", (None, None, None))
    known = {**card, "image_size": size, "channels": channels}
    if dataset.name == "folder":
        known["num_classes"] = len(folder_data.class_names(dataset.data_dir, "test"))
        if dataset.num_classes not in (None, known["num_classes"]):
            raise UserError(
                f"config.dataset.num_classes is {dataset.num_classes} but "
                f"{dataset.data_dir}/test holds {known['num_classes']} class folders."
            )
    values: dict[str, Any] = {f: known.get(f) if dataset[f] is None else dataset[f] for f in FIELDS}
    missing = [f"config.dataset.{field}" for field in FIELDS if values[field] is None]
    if missing:
        raise UserError(
            f"config.dataset.name is {dataset.name!r}, which needs {', '.join(missing)}, or a "
            "config.teacher.checkpoint whose card says so."
        )
    size, channels, classes, mean, std = values.values()
    each = f"one for each of {channels} channels"
    allowed = {
        "image_size": (_is_integer(size, 1), "1 or more"),
        "channels": (channels in (1, 3), "1 or 3"),
        "num_classes": (_is_integer(classes, 2), "2 or more"),
        "mean": (_are_numbers(mean, channels), f"a tuple of numbers, {each}"),
        "std": (
            _are_numbers(std, channels) and min(std) > 0,
            f"a tuple of numbers above 0, {each}",
        ),
    }
    for field, (holds, words) in allowed.items():
        if not holds:
            raise UserError(f"config.dataset.{field} is {values[field]!r}; allowed is {words}.")
    facts = (dataset.name, (size, size, channels), classes, tuple(mean), tuple(std))
    return DatasetSpec(*facts, flip=bool(dataset.flip))


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )
