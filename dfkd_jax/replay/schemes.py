"""The replay schemes by name.

A new scheme is one new file and its line in `SCHEMES`. The file defines

    FIELDS                                   its fields of the configuration
    create(config, spec, axis) -> Replay
"""

from types import ModuleType
from typing import Any

import ml_collections

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.replay import generative_replay, memory_bank, momentum, pool
from dfkd_jax.replay.scheme import Replay, nothing
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Default, Field, at_least, one_of

SCHEMES: dict[str, ModuleType | None] = {
    "none": None,
    "memory_bank": memory_bank,
    "generative": generative_replay,
    "pool": pool,
    "momentum": momentum,
}
"""config.replay.kind ↦ the module of the scheme; None where nothing is replayed."""

FIELDS = {
    "replay.kind": Field("memory_bank", one_of(SCHEMES), "the replay scheme"),
    "replay.entry_size": Field(
        Default(lambda config: config.get_oneway_ref("batch_size") // 8),
        at_least(1),
        "images of a retention batch, and of an entry of the memory bank",
    ),
    **{name: f for module in SCHEMES.values() if module for name, f in module.FIELDS.items()},
}
"""The fields of all schemes, so that any of them can be chosen for any method."""


def create_replay(
    config: ml_collections.ConfigDict,
    spec: DatasetSpec,
    axis: Axis = ONE,
    generator: Any = None,
) -> Replay:
    """The scheme that `config.replay.kind` names.

    Args:
      config: of the run.
      spec: of the images and classes.
      axis: over which batches are split.
      generator: the synthesizer, if its state is a `Network` that goes on over its rounds: what
        `momentum` follows.

    Raises:
      UserError: fields that do not go together; one sentence.
    """
    module = SCHEMES[config.replay.kind]
    if module is None:
        return nothing(spec)
    if config.replay.entry_size > config.batch_size:
        raise UserError(
            f"config.replay.entry_size is {config.replay.entry_size}; "
            f"allowed is at most config.batch_size, {config.batch_size}."
        )
    if module is momentum:
        return momentum.create(config, spec, axis, generator)
    return module.create(config, spec, axis)
