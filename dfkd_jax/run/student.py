"""The student of a run's folder, finished or not, and what is known of it."""

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dfkd_jax.data import data_specs
from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.networks.given import AnyClassifier
from dfkd_jax.run import checkpoint, records, teacher
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.finite import check_variables

TEACHER_COPY = "given_teacher.json"


class Student(NamedTuple):
    """A trained classifier, its variables in evaluation mode, and its card."""

    module: nn.Module
    variables: dict[str, Any]
    card: dict[str, Any]


def load_student(folder: Path) -> Student:
    """The student of the newest whole checkpoint of a run.

    Its card holds `model`, `num_classes`, `image_shape` (H, W, C), `mean` and `std` of the images
    in [0, 1], `dataset`, `method`, `seed`, `epoch`, `accuracy`, `agreement` with the teacher and
    the `class_share` of its images after that epoch (percent, None if not measured), `teacher` (its
    model, accuracy and source) and the versions of `dfkd_jax`, `jax` and `flax`.

    Raises:
      UserError: it is no run's folder, it has no whole checkpoint, nothing tells its teacher, or
        its parameters are no finite numbers.
      DamagedCheckpoint: the checkpoint is not that of such a student.
      UserError: a file in it is damaged.
    """
    config = read_config(folder)
    teacher_card, _ = teacher_of(folder, config)
    facts = _facts(config, teacher_card)
    module = create_classifier(config.student.model, facts["num_classes"])
    variables, history = _newest(folder, module, facts["image_shape"])
    last = history[-1] if history else {}
    card = {
        **facts,
        "model": config.student.model,
        "dataset": data.tested_on(config),
        "method": config.method,
        "seed": config.seed,
        "epoch": len(history),
        "accuracy": last.get(records.ACCURACY),
        "agreement": last.get(records.AGREEMENT),
        "class_share": last.get(records.CLASS_SHARE),
        "teacher": {f: teacher_card.get(f) for f in ("model", "accuracy", "source")},
        **{name: importlib.metadata.version(name) for name in ("dfkd_jax", "jax", "flax")},
    }
    return Student(module, variables, files.plain(card))


def _facts(config: ml_collections.ConfigDict, teacher_card: dict[str, Any]) -> dict[str, Any]:
    """What images and classes a run of this configuration and teacher has."""
    # A converted teacher need not say how images are normalised; the run's configuration does.
    known = teacher_card.get("mean") is not None
    spec = None if known else data_specs.spec(config, teacher_card)
    return {
        field: teacher_card[field] if known else getattr(spec, field)
        for field in ("num_classes", "image_shape", "mean", "std")
    }


def _newest(
    folder: Path, module: AnyClassifier, image_shape: Sequence[int]
) -> tuple[dict[str, Any], checkpoint.History]:
    """The student's variables in the newest whole checkpoint of a run, and its history."""
    images = jnp.zeros((2, *image_shape))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))
    read = checkpoint.read_newest(folder / "checkpoints", {"student": dict(shapes)})
    if read is None:
        raise UserError(f"{folder} has no whole checkpoint; one epoch must be finished.")
    variables, history = read[0]["student"], read[1]
    check_variables(variables, f"The student in {folder}")
    return variables, history


def check_start(config: ml_collections.ConfigDict, spec: DatasetSpec) -> None:
    """Refuse a `config.student.checkpoint` that is not of such a student; reads no weights.

    Raises:
      UserError: it is neither the folder of a run nor of a teacher, or its network, its images or
        its classes are others; one sentence.
    """
    directory = config.student.get("checkpoint")
    if directory is None:
        return
    folder = Path(directory)
    try:
        if data_specs.is_teacher(folder):
            found = data_specs.card_in(folder)
        else:
            run = read_config(folder)
            found = _facts(run, teacher_of(folder, run)[0]) | {"model": run.student.model}
            if not any(p.name.isdigit() for p in (folder / "checkpoints").glob("*")):
                raise UserError(f"{folder} has no checkpoint; one epoch must be finished.")
    except UserError as error:
        raise UserError(f"config.student.checkpoint is {directory!r}: {error}") from error
    wanted = {
        "model": config.student.model,
        "num_classes": spec.num_classes,
        "image_shape": list(spec.image_shape),
    }
    for field, value in files.plain(wanted).items():
        if files.plain(found.get(field)) != value:
            raise UserError(
                f"config.student.checkpoint is {directory!r}, a student with {field} "
                f"{files.plain(found.get(field))!r}; this run needs {value!r}."
            )


def load_start(directory: str, module: AnyClassifier, image_shape: Sequence[int]) -> dict[str, Any]:
    """The variables that a run with this `config.student.checkpoint` starts from.

    Args:
      directory: of a run, whose newest whole checkpoint counts, or of a teacher.
      module: the student.
      image_shape: (H, W, C).

    Raises:
      UserError: its arrays are those of another network, or no finite numbers; one sentence.
    """
    folder = Path(directory)
    try:
        if data_specs.is_teacher(folder):
            return teacher.load_teacher(folder, module, tuple(image_shape))
        return _newest(folder, module, image_shape)[0]
    except (UserError, checkpoint.DamagedCheckpoint) as error:
        raise UserError(f"config.student.checkpoint is {directory!r}: {error}") from error


def logits_of(student: Student) -> Callable[[jax.Array], jax.Array]:
    """Images (B, H, W, C), float32 in [0, 1] ↦ logits (B, K): normalised, in evaluation mode."""
    mean, std = (np.asarray(student.card[f], np.float32) for f in ("mean", "std"))

    def logits(images: jax.Array) -> jax.Array:
        return student.module.apply(student.variables, (images - mean) / std, train=False)[0]

    return logits


def shape_of(card: dict[str, Any]) -> tuple[int, ...]:
    """(H, W, C, K) of a card."""
    return (*card["image_shape"], card["num_classes"])


def read_config(folder: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `folder`.

    Raises:
      UserError: it is no run's folder.
      UserError: the file is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json; allowed is the folder of a run.")
    return ml_collections.ConfigDict(files.read_json(path))


def keep_teacher_card(folder: Path, directory: str | None, card: dict[str, Any]) -> None:
    """Copy the card of the teacher given in `directory` to the run in `folder`, with where it lies.

    So the student stays readable when the teacher is moved, or when its relative path is read from
    another folder. A teacher that the run trains lies in the run's folder anyway.
    """
    copy = folder / TEACHER_COPY
    if card:
        kept = files.read_json(copy) if copy.is_file() else {}
        where = None if directory is None else Path(directory).absolute()
        files.write_json(copy, {**kept, "card": card, "folder": where})


def is_teacher_of(
    folder: Path, stored: str | None, given: str | None, card: dict[str, Any]
) -> bool:
    """Whether a run in `folder` that began with one teacher may go on with another path.

    A teacher is what its card, graph and weights say, wherever it lies. Graph and weights are not
    read here but known by their digests in the card; `check_teacher` looks at the weights when they
    are loaded.

    Args:
      folder: of the run.
      stored: `config.teacher.checkpoint` that the run began with; None for one of its own.
      given: the one to go on with.
      card: of that one; empty where there is none.
    """
    copy = folder / TEACHER_COPY
    if stored is None or not card or not copy.is_file():
        places = [Path(path or folder / "teacher").resolve() for path in (stored, given)]
        return places[0] == places[1]
    kept = files.read_json(copy)["card"]
    if kept.get("digest") and card.get("digest"):
        fields = ("digest", "graph", "model", "num_classes", "image_shape", "mean", "std")
        return all(kept.get(field) == card.get(field) for field in fields)
    # One of them was written by an earlier version.
    return {**kept, "digest": None} == {**card, "digest": None}


def check_teacher(folder: Path, variables: dict[str, Any]) -> None:
    """Keep the digest of the given teacher's weights, or compare with the one that is there.

    Raises:
      UserError: they are others than those the run in `folder` began with.
    """
    copy = folder / TEACHER_COPY
    if not copy.is_file():  # a teacher of the run's own
        return
    kept, found = files.read_json(copy), teacher.digest(variables)
    if kept.setdefault("digest", found) != found:
        raise UserError(
            f"{folder} holds a run with another teacher: the weights in {kept['folder']} are not "
            "those that it began with; allowed is the same teacher, wherever it lies."
        )
    files.write_json(copy, kept)


def teacher_of(
    folder: Path, config: ml_collections.ConfigDict
) -> tuple[dict[str, Any], Path | None]:
    """The card of the teacher of the run in `folder`, and the teacher's folder; None if it is gone.

    Raises:
      UserError: neither the teacher nor a copy of its card is there.
      UserError: a card is damaged.
    """
    directory, copy = Path(config.teacher.checkpoint or folder / "teacher"), folder / TEACHER_COPY
    if copy.is_file():
        kept = files.read_json(copy)
        # The same path may by now hold another teacher.
        places = [Path(place) for place in (kept["folder"], directory) if place]
        there = [place for place in places if data_specs.card_in(place) == kept["card"]]
        return kept["card"], next(iter(there), None)
    if not data_specs.is_teacher(directory):
        raise UserError(
            f"{directory}, the teacher of the run in {folder}, holds no {data_specs.CARD}; its "
            "card says what the images are."
        )
    return files.read_json(directory / data_specs.CARD), directory
