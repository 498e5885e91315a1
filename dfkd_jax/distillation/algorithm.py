"""The algorithm of one configuration on given devices: networks, method, steps and epoch together.

An epoch's steps run per device on shares of the batch; everything else (start, figures, what is
measured between epochs) is the same steps on whole arrays.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections

from dfkd_jax.distillation import steps
from dfkd_jax.distillation.agreement import Agreement, create_agreement
from dfkd_jax.distillation.epoch import Epoch, create_epoch
from dfkd_jax.distillation.objectives import create_objective
from dfkd_jax.distillation.roles import Method, Plan
from dfkd_jax.distillation.state import DistillState, layout_of
from dfkd_jax.distillation.steps import Parts
from dfkd_jax.losses import terms as losses
from dfkd_jax.networks.models import create_models
from dfkd_jax.networks.training import student_optimizer
from dfkd_jax.replay.schemes import create_replay
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.compilation import rarely_run
from dfkd_jax.runtime.devices import WHOLE, Devices, mapped
from dfkd_jax.synthesis import adversarial


class Algorithm(NamedTuple):
    """What a run calls."""

    parts: Parts  # on whole arrays
    init: Callable[[int], DistillState]  # from the seed
    epoch: Epoch
    keep_early: Callable[[DistillState, Any], DistillState]
    agreement: Agreement


def create_parts(
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    axis: Axis = ONE,
) -> Parts:
    """The parts of a configuration, for one device's share of the batch.

    Args:
      config: of the run.
      image_shape: (H, W, C).
      num_classes: of teacher and student.
      axis: over which batches are split.

    Raises:
      UserError: see `create_models`.
    """
    models = create_models(config, image_shape, num_classes, axis.name)
    method = Method(
        synthesizer=adversarial.create(config, models.generator, axis),
        replay=create_replay(config, image_shape, num_classes, axis=axis),
        objective=create_objective(config, axis),
        plan=Plan(updates=config.generator.steps, student_steps=config.student.steps),
    )
    return Parts(
        method=method,
        teacher=models.teacher,
        student=models.student,
        optimizer=student_optimizer(config),
        distance=partial(
            losses.DISTANCES[config.loss.distance], temperature=config.loss.distance_temperature
        ),
        batch_size=config.batch_size // axis.size,
        image_shape=image_shape,
        axis=axis,
        initialization=config.student.initialization,
        student_mode=config.generator.student_mode,
        iterations_per_epoch=config.iterations_per_epoch,
    )


def create_algorithm(
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    devices: Devices,
) -> Algorithm:
    """Build it.

    Args:
      config: of the run.
      image_shape: (H, W, C).
      num_classes: of teacher and student.
      devices: what an epoch runs on.

    Raises:
      UserError: see `create_models`.
    """
    whole = per_device = create_parts(config, image_shape, num_classes)
    if devices.count > 1:
        per_device = create_parts(config, image_shape, num_classes, devices.axis)
    layout = layout_of(whole.method.replay.layout)
    shardings, replicated = devices.shardings(layout), devices.shardings(WHOLE)
    jit = partial(jax.jit, compiler_options=rarely_run())
    return Algorithm(
        whole,
        jit(lambda seed: steps.init(whole, jax.random.key(seed)), out_shardings=shardings),
        create_epoch(config, whole, per_device, mapped(devices, (layout, WHOLE)), replicated),
        jit(partial(steps.keep_early, whole), donate_argnums=0, out_shardings=shardings),
        jit(create_agreement(config, whole), out_shardings=replicated),
    )
