"""The three networks of a run, made from its configuration."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from dfkd_jax.classifiers import create_classifier
from dfkd_jax.generator import Generator
from dfkd_jax.own_module import check_axis

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
      ValueError: a classifier is unknown, or the student's batch statistics cannot be averaged
        over that axis.
    """
    dtype = COMPUTE_DTYPES[config.compute_dtype]
    common = {"axis_name": axis_name, "dtype": dtype}
    student = create_classifier(config.student.model, num_classes, **common)
    if axis_name is not None:
        check_axis(student, config.student.model, image_shape)
    return Models(
        # In evaluation mode, so it averages no statistics over devices.
        teacher=create_classifier(config.teacher.model, num_classes, dtype=dtype),
        student=student,
        generator=Generator(
            image_shape, tuple(config.generator.channels), config.generator.spectral_norm, **common
        ),
    )
