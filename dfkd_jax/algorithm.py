"""The algorithm of one configuration on given devices: networks, replay, steps and epoch together.

An epoch's steps run per device on shares of the batch; everything else (start, figures, what is
measured between epochs) is the same steps on whole arrays.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import ml_collections

from dfkd_jax.agreement import Agreement, create_agreement
from dfkd_jax.axis import ONE, Axis
from dfkd_jax.compilation import rarely_run
from dfkd_jax.devices import WHOLE, Devices, mapped
from dfkd_jax.epoch import Epoch, create_epoch
from dfkd_jax.models import Models, create_models
from dfkd_jax.replay import ReplayScheme, create_replay
from dfkd_jax.state import DistillState, layout_of
from dfkd_jax.steps import Step, Steps, create_steps


class Algorithm(NamedTuple):
    """What a run calls."""

    models: Models  # on whole arrays
    replay: ReplayScheme | None  # likewise
    steps: Steps  # likewise
    init: Callable[[int], DistillState]  # from the seed
    epoch: Epoch
    keep_early: Step
    agreement: Agreement


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

    def build(axis: Axis) -> tuple[Models, ReplayScheme | None, Steps]:
        models = create_models(config, image_shape, num_classes, axis.name)
        replay = create_replay(config, image_shape, num_classes, axis=axis)
        return models, replay, create_steps(config, models, replay, image_shape, axis=axis)

    models, replay, steps = build(ONE)
    layout = layout_of(replay and replay.layout)
    shardings = devices.shardings(layout)
    per_device = build(devices.axis)[2] if devices.count > 1 else steps
    jit = partial(jax.jit, compiler_options=rarely_run())
    init = jit(lambda seed: steps.init(jax.random.key(seed)), out_shardings=shardings)
    return Algorithm(
        models,
        replay,
        steps,
        init,
        create_epoch(config, per_device, mapped(devices, layout)),
        jit(steps.keep_early, donate_argnums=0, out_shardings=shardings),
        jit(
            create_agreement(config, models, replay, steps),
            out_shardings=devices.shardings(WHOLE),
        ),
    )
