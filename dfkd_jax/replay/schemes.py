"""The replay schemes by name.

A new scheme is one new file and its line in `SCHEMES`. The file defines

    create(config, image_shape, num_classes, axis) -> Replay
    split_sizes(config) -> dict[str, int]    sizes, by their fields, that the devices must divide
"""

from types import ModuleType

import ml_collections

from dfkd_jax.replay import generative_replay, memory_bank
from dfkd_jax.replay.scheme import Replay, nothing
from dfkd_jax.runtime.axis import ONE, Axis

SCHEMES: dict[str, ModuleType | None] = {
    "none": None,
    "memory_bank": memory_bank,
    "generative": generative_replay,
}
"""config.replay.kind ↦ the module of the scheme; None where nothing is replayed."""


def create_replay(
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    axis: Axis = ONE,
) -> Replay:
    """The scheme that `config.replay.kind` names.

    Args:
      config: of the run.
      image_shape: (H, W, C).
      num_classes: of the teacher.
      axis: over which batches are split.
    """
    module = SCHEMES[config.replay.kind]
    if module is None:
        return nothing(image_shape, num_classes)
    return module.create(config, image_shape, num_classes, axis)


def split_sizes(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Sizes that a run splits over its devices, by the fields of `config` that give them."""
    sizes = {"batch_size": config.batch_size}
    if config.teacher.checkpoint is None:
        sizes["teacher.batch_size"] = config.teacher.batch_size
    module = SCHEMES[config.replay.kind]
    return sizes | (module.split_sizes(config) if module else {})
