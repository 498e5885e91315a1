"""A teacher's folder from Python: what `config.teacher.checkpoint` takes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dfkd_jax.data import data_specs
from dfkd_jax.networks.classifiers import classifier_in
from dfkd_jax.networks.given import AnyClassifier
from dfkd_jax.networks.own_module import check_call, is_own
from dfkd_jax.run import teacher
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError


class Teacher(NamedTuple):
    """A network, its variables, and what its card says: model, classes, images, normalisation."""

    network: AnyClassifier
    variables: dict[str, Any]
    card: dict[str, Any]


def save_teacher(
    folder: str | os.PathLike,
    model: str,
    variables: dict[str, Any],
    image_shape: Sequence[int],
    num_classes: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write the folder of a trained Flax network.

    Args:
      folder: new or empty.
      model: the name of a classifier, or "package.module:attribute" of one's own.
      variables: "params" and, with batch norm, "batch_stats", as `network.init` gives them.
      image_shape: (H, W, C).
      num_classes: K.
      mean: per channel, what is subtracted from images in [0, 1]; None: said by each run.
      std: per channel, what they are divided by then.

    Raises:
      UserError: the folder is not free, the network is not that of these variables or gives no
        logits (B, K), or some are no finite numbers; one sentence, and nothing is written.
    """
    path = Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"folder is {str(path)!r}, which exists; give a new or empty one.")
    if (mean is None) != (std is None):
        raise UserError("mean and std belong together; give both or none.")
    height, width, channels = image_shape
    network = classifier_in(path, model, num_classes)
    if is_own(model):
        check_call(network, model, (height, width, channels), num_classes)
    images = jnp.zeros((2, *image_shape))
    wanted = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
    teacher.check_names(variables, wanted)
    card = {
        "model": model,
        "num_classes": num_classes,
        "image_shape": list(image_shape),
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
    }
    with files.temporary_folder(path.absolute()) as new:
        teacher.save_teacher(new, variables, card)
        new.replace(path)


def load_teacher(folder: str | os.PathLike) -> Teacher:
    """The teacher of a folder, as a run, `save_teacher` or `convert` wrote it.

    Its network is called as `network.apply(variables, images, train=False)` with normalised images
    (B, H, W, C), and gives logits (B, K) and features (B, D). A network of one's own, which the
    card names, is imported.

    Raises:
      UserError: there is none, or a file of it is damaged; one sentence.
    """
    card = data_specs.card_in(folder)
    if not card:
        raise UserError(f"folder is {str(folder)!r}, which holds no {data_specs.CARD}.")
    network = classifier_in(folder, card["model"], card["num_classes"])
    variables = teacher.load_teacher(folder, network, tuple(card["image_shape"]))
    return Teacher(network, variables, card)
