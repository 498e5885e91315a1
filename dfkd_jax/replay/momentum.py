"""A momentum generator: an exponential moving average of the synthesizer's, as what is retained.

After every round ψ ← d ψ + (1 − d) φ, with φ the parameters and statistics of the generator. A
retention batch is drawn from ψ as the fresh one is from φ. It changes slowly, so it still makes
what the generator has left. Source: MAD (Do et al., NeurIPS 2022).
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import ml_collections
from flax import struct
from jax import lax
from jaxtyping import Array, Integer, Key

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.networks.training import Network
from dfkd_jax.replay.scheme import Batch, Replay, RetentionBatch, Teacher
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.devices import WHOLE
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Field, below

FIELDS = {
    "momentum.decay": Field(0.95, below(1, "1"), "d, of the generator's average, a round"),
}


@no_type_check  # a pytree: JAX puts other things than arrays into it as well
class Momentum(struct.PyTreeNode):
    """The average, and how many rounds it has followed."""

    params: Any
    batch_stats: Any
    rounds: Integer[Array, ""]


def create(
    config: ml_collections.ConfigDict,
    spec: DatasetSpec,
    axis: Axis = ONE,
    generator: Any = None,
) -> Replay:
    """The scheme of one configuration.

    Args:
      config: of the run.
      spec: of the images and classes.
      axis: over which batches are split.
      generator: the synthesizer to follow, whose state is a `Network`.

    Raises:
      UserError: the method has no such synthesizer; one sentence.
    """
    del axis
    if generator is None:
        raise UserError(
            f"config.replay.kind is 'momentum' but the method {config.method!r} has no generator "
            "that goes on over its rounds; allowed are the other schemes."
        )
    decay = config.momentum.decay

    def init(key: Key[Array, ""]) -> Momentum:
        started = generator.init(key, lambda: None)
        return Momentum(started.params, started.batch_stats, jnp.zeros((), jnp.int32))

    def follow(momentum: Momentum, network: Network) -> Momentum:
        kept = jnp.where(momentum.rounds > 0, decay, 0.0)  # the first round sets it

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            return (kept * old + (1 - kept) * new).astype(new.dtype)

        return Momentum(
            jax.tree.map(average, momentum.params, network.params),
            jax.tree.map(average, momentum.batch_stats, network.batch_stats),
            momentum.rounds + 1,
        )

    def images_of(momentum: Momentum, key: Key[Array, ""]) -> jax.Array:
        return generator.sample(Network(momentum.params, momentum.batch_stats, ()), key).images

    def recall(momentum: Momentum, key: Key[Array, ""], teacher: Teacher) -> RetentionBatch:
        images = images_of(momentum, key)
        weight = (momentum.rounds > 0).astype(images.dtype)
        return RetentionBatch(images, lax.stop_gradient(teacher(images)[0]), weight)

    def exhibit(momentum: Momentum, count: int, key: Key[Array, ""], teacher: Teacher) -> Batch:
        images = images_of(momentum, key)[: count if int(momentum.rounds) else 0]
        logits = teacher(images)[0] if len(images) else jnp.zeros((0, spec.num_classes))
        return Batch(images, logits)

    return Replay(
        init,
        observe=lambda state, batch, key, iteration, teacher: (state, {}),
        recall=recall,
        observes_after=(),
        observed_images=0,
        exhibit=exhibit,
        title="momentum generator, now",
        layout=WHOLE,
        observes_rounds=True,
        follow=follow,
    )
