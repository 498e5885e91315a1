"""The three networks of a run, made from its configuration."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.networks.generator import Generator
from dfkd_jax.networks.own_module import check_axis
from dfkd_jax.runtime.errors import UserError

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
"""What layers compute in; None is the dtype of the parameters, which are float32."""


class Models(NamedTuple):
    """The three networks. Classifiers: (x, train) -> (logits, features); generator: z -> x̂."""

    teacher: nn.Module
    student: nn.Module
    generator: nn.Module


def create_models(
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    axis_name: str | None = None,
) -> Models:
    """Teacher, student and generator as the configuration names them.

    Args:
      config: of the run.
      image_shape: (H, W, C).
      num_classes: of teacher and student.
      axis_name: the mapped axis over which batch statistics are averaged.

    Raises:
      UserError: a classifier cannot be made, or the student's batch statistics cannot be averaged
        over that axis; names the field.
    """
    dtype = COMPUTE_DTYPES[config.compute_dtype]

    def classifier(role: str, axis_name: str | None) -> nn.Module:
        name = config[role].model
        try:
            module = create_classifier(name, num_classes, axis_name=axis_name, dtype=dtype)
            if axis_name is not None:
                check_axis(module, name, image_shape)
        except UserError as error:
            raise UserError(f"config.{role}.model: {error}") from error
        return module

    return Models(
        # In evaluation mode, so it averages no statistics over devices.
        teacher=classifier("teacher", None),
        student=classifier("student", axis_name),
        generator=Generator(
            image_shape,
            tuple(config.generator.channels),
            config.generator.spectral_norm,
            axis_name=axis_name,
            dtype=dtype,
        ),
    )
