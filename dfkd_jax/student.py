"""The student of a run's folder, finished or not, and what is known of it."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dfkd_jax import checkpoint, data, data_specs, results, teacher
from dfkd_jax.classifiers import create_classifier
from dfkd_jax.config import UserError


class Student(NamedTuple):
    """A trained classifier, its variables in evaluation mode, and its card."""

    module: nn.Module
    variables: dict[str, Any]
    card: dict[str, Any]


def load_student(folder: Path) -> Student:
    """The student of the newest whole checkpoint of a run.

    Its card holds `model`, `num_classes`, `image_shape` (H, W, C), `mean` and `std` of the images
    in [0, 1], `dataset`, `method`, `seed`, `epoch`, `accuracy` and `agreement` with the teacher
    after that epoch (percent, None if not measured), `teacher` (its model, accuracy and source) and
    `dfkd_jax`, the version.

    Raises:
      UserError: it is no run's folder, it has no whole checkpoint, or its teacher is gone.
      DamagedCheckpoint: the checkpoint is not that of such a student.
      ValueError: a file in it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json; allowed is the folder of a run.")
    config = ml_collections.ConfigDict(results.read_json(path))
    directory = teacher_folder(folder, config)
    if not teacher.is_teacher(directory):
        raise UserError(
            f"{directory}, the teacher of the run in {folder}, holds no {teacher.CARD}; its card "
            "says what the images are."
        )
    teacher_card = results.read_json(directory / teacher.CARD)
    if teacher_card.get("mean") is not None:
        facts = {f: teacher_card[f] for f in ("num_classes", "image_shape", "mean", "std")}
    else:  # a converted one need not say it; the run's configuration does
        spec = data_specs.spec(config)
        facts = {f: getattr(spec, f) for f in ("num_classes", "image_shape", "mean", "std")}
    module = create_classifier(config.student.model, facts["num_classes"])
    images = jnp.zeros((2, *facts["image_shape"]))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))
    read = checkpoint.read_newest(folder / "checkpoints", {"student": dict(shapes)})
    if read is None:
        raise UserError(f"{folder} has no whole checkpoint; one epoch must be finished.")
    variables, history = read[0]["student"], read[1]
    last = history[-1] if history else {}
    card = {
        **facts,
        "model": config.student.model,
        "dataset": data.tested_on(config),
        "method": config.method,
        "seed": config.seed,
        "epoch": len(history),
        "accuracy": last.get(results.ACCURACY),
        "agreement": last.get(results.AGREEMENT),
        "teacher": {f: teacher_card.get(f) for f in ("model", "accuracy", "source")},
        "dfkd_jax": importlib.metadata.version("dfkd_jax"),
    }
    return Student(module, variables, results.plain(card))


def logits_of(student: Student) -> Callable[[jax.Array], jax.Array]:
    """Images (B, H, W, C), float32 in [0, 1] ↦ logits (B, K): normalised, in evaluation mode."""
    mean, std = (np.asarray(student.card[f], np.float32) for f in ("mean", "std"))

    def logits(images: jax.Array) -> jax.Array:
        return student.module.apply(student.variables, (images - mean) / std, train=False)[0]

    return logits


def shape_of(card: dict[str, Any]) -> tuple[int, ...]:
    """(H, W, C, K) of a card."""
    return (*card["image_shape"], card["num_classes"])


def teacher_folder(folder: Path, config: ml_collections.ConfigDict) -> Path:
    """Where the teacher of the run in `folder` lies."""
    return Path(config.teacher.checkpoint or folder / "teacher")
