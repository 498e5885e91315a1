"""Teacher and student of a run, made from its configuration."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from dfkd_jax.networks.classifiers import IMAGE_SIZES, LEAST_SIZES, classifier_in, create_classifier
from dfkd_jax.networks.given import AnyClassifier
from dfkd_jax.networks.own_module import check_axis, check_call, is_own
from dfkd_jax.runtime.axis import Axis
from dfkd_jax.runtime.errors import UserError

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
"""What layers compute in; None is the dtype of the parameters, which are float32."""


class Models(NamedTuple):
    """Two classifiers: (x, train) -> (logits, features)."""

    teacher: AnyClassifier
    student: AnyClassifier


def create_models(
    config: ml_collections.ConfigDict, image_shape: tuple[int, int, int], num_classes: int
) -> Models:
    """Teacher and student as the configuration names them; touches no accelerator.

    Args:
      config: of the run.
      image_shape: (H, W, C).
      num_classes: of both.

    Raises:
      UserError: one cannot be made, or cannot take such images; names the field.
    """
    return Models(
        *(named_classifier(role, config, image_shape, num_classes) for role in Models._fields)
    )


def named_classifier(
    role: str,
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> nn.Module:
    """The teacher or the student alone, see `create_models`."""
    name, dtype = config[role].model, COMPUTE_DTYPES[config.compute_dtype]
    try:
        if role == "teacher" and config.teacher.checkpoint is not None:
            module = classifier_in(config.teacher.checkpoint, name, num_classes, dtype=dtype)
        else:
            module = create_classifier(name, num_classes, dtype=dtype)
        if is_own(name):
            check_call(module, name, image_shape, num_classes)
        else:
            _check_size(name, image_shape)
    except UserError as error:
        raise UserError(f"config.{role}.model: {error}") from error
    return module


def on_axis(
    student: AnyClassifier, name: str, image_shape: tuple[int, int, int], axis: Axis
) -> AnyClassifier:
    """The student with batch statistics that are averaged over the axis.

    Args:
      student: as from `create_models`.
      name: of it, for messages.
      image_shape: (H, W, C).
      axis: over which batches are split; without a name the student is as it was.

    Raises:
      UserError: they cannot be averaged, see `check_axis`.
    """
    if axis.name is None:
        return student
    try:
        check_axis(student, name, image_shape)
    except UserError as error:
        raise UserError(f"config.student.model: {error}") from error
    return student.clone(axis_name=axis.name) if hasattr(student, "axis_name") else student


def _check_size(name: str, image_shape: tuple[int, int, int]) -> None:
    """By a table: tracing the network would start the accelerator."""
    sizes, least = IMAGE_SIZES.get(name), LEAST_SIZES.get(name, 1)
    allowed = (
        " or ".join(f"{size}×{size}" for size in sizes) if sizes else f"{least}×{least} or more"
    )
    if image_shape[0] < least or (sizes and image_shape[0] not in sizes):
        raise UserError(
            f"{name!r} cannot take {image_shape[0]}×{image_shape[1]}×{image_shape[2]} images; "
            f"allowed are {allowed}."
        )
