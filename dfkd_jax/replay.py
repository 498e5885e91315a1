"""Knowledge retention: where the retention batch comes from.

A replay scheme is three pure functions over a state of its own. Over several devices each sees the
device's share of the batch and of what the layout splits:

    init(key) -> replay state
    observe(replay, batch, key, iteration, teacher) -> replay state   learn from generated images
    recall(replay, key, teacher) -> RetentionBatch                    what the student must retain

A new scheme is one new file and its line in `SCHEMES`. The file defines

    create(config, image_shape, num_classes, axis) -> ReplayScheme
    split_sizes(config) -> dict[str, int]    sizes, by their fields, that the devices must divide
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import ml_collections
from flax import struct

from dfkd_jax.axis import ONE, Axis

# config.replay.kind ↦ the module of the scheme, imported when it is used, as it imports this one.
SCHEMES = {
    "none": None,
    "memory_bank": "dfkd_jax.memory_bank",
    "generative": "dfkd_jax.generative_replay",
}

Teacher = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # images -> (logits, features)


@struct.dataclass
class Batch:
    """Generated images and what the teacher says of them."""

    images: jax.Array  # (B, H, W, C), in the teacher's normalised input space
    logits: jax.Array  # (B, classes), the teacher's


@struct.dataclass
class RetentionBatch:
    """A replayed batch; `weight` is 0 while there is nothing to replay, else 1."""

    images: jax.Array  # (m, H, W, C)
    logits: jax.Array  # (m, classes), the teacher's
    weight: jax.Array  # ()


class ReplayScheme(NamedTuple):
    """The pure functions of one kind of replay, and when it wants to observe."""

    init: Callable[[jax.Array], Any]
    observe: Callable[[Any, Batch, jax.Array, jax.Array, Teacher], Any]
    recall: Callable[[Any, jax.Array, Teacher], RetentionBatch]
    observes_after: tuple[bool, ...]  # for each student step of an iteration
    observed_images: int  # so many images, spread evenly over the batch, are kept for `observe`
    exhibit: Callable[[Any, int, jax.Array, Teacher], Batch]  # up to so many images, for figures
    title: str  # of that figure
    layout: Any  # how the state is split over devices, a layout of `dfkd_jax.devices`


def create_replay(
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    axis: Axis = ONE,
) -> ReplayScheme | None:
    """The scheme that `config.replay.kind` names; None where nothing is replayed.

    Args:
      config: of the run.
      image_shape: (H, W, C).
      num_classes: of the teacher.
      axis: over which batches are split.
    """
    module = _scheme(config)
    return module and module.create(config, image_shape, num_classes, axis)


def split_sizes(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Sizes, by the fields of `config` that give them, that the scheme splits over the devices."""
    module = _scheme(config)
    return module.split_sizes(config) if module else {}


def _scheme(config: ml_collections.ConfigDict) -> ModuleType | None:
    name = SCHEMES[config.replay.kind]
    return name and importlib.import_module(name)
