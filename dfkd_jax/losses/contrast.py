"""Contrast of generated images against earlier ones: model inversion that repeats itself less.

Every image has two views, a local and a global one. The embedding of the local view should be that
of its own global view rather than of any other image's, of the batch or of a bank of earlier ones.

Source: CMI (Fang et al., IJCAI 2021, equations 4 and 5).
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Integer, Key

from dfkd_jax.losses.terms import LayerStatistics


class Head(nn.Module):
    """The projection d → d → `width`, with a ReLU, to unit length."""

    width: int = 256

    @nn.compact
    def __call__(self, x: Float[Array, "N d"]) -> Float[Array, "N width"]:
        """Project embeddings."""
        x = nn.relu(nn.Dense(x.shape[-1])(x))
        x = nn.Dense(self.width)(x)
        return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def embedding(layers: list[LayerStatistics]) -> Float[Array, "B d"]:
    """The spatial means of the inputs of all batch-norm layers, one after the other."""
    inputs = [layer.inputs for layer in layers if layer.inputs is not None]
    means = [jnp.mean(x, axis=tuple(range(1, x.ndim - 1))) for x in inputs]
    return jnp.concatenate(means, axis=-1)


def contrast_loss(
    local: Float[Array, "B w"],
    whole: Float[Array, "B w"],
    bank_local: Float[Array, "M w"],
    bank_whole: Float[Array, "M w"],
    filled: Float[Array, ""],
    temperature: float,
) -> Float[Array, ""]:
    """Mean over the batch of InfoNCE against batch and bank, plus its mean over the bank.

    InfoNCE of image i is −log softmax_j(local_i · whole_j / τ) at j = i. The keys, `whole`, carry
    no gradient.

    Args:
      local: projected local views of the whole batch. whole: of its global views.
      bank_local: of images of earlier rounds. bank_whole: likewise.
      filled: 0 while the bank is empty: then the batch is contrasted with itself alone; else 1.
      temperature: τ.
    """
    count = local.shape[0]
    queries = jnp.concatenate([local, bank_local])
    keys = jnp.concatenate([whole, bank_whole])
    similarity = jnp.matmul(queries, lax.stop_gradient(keys).T) / temperature
    there = jnp.concatenate([jnp.ones(count), jnp.full(len(bank_local), filled)]) > 0
    similarity = jnp.where(there[None], similarity, -jnp.inf)
    # A query of the bank that is not there has its own key left out: it is not counted below.
    own = jnp.where(there, jnp.diagonal(similarity), 0.0)
    each = jnp.where(there, jax.nn.logsumexp(similarity, axis=-1) - own, 0.0)
    return jnp.mean(each[:count]) + filled * jnp.mean(each[count:])


@no_type_check  # a pytree: JAX puts other things than arrays into it as well
class Bank(struct.PyTreeNode):
    """A ring of S embedding pairs, the same on every device."""

    local: Float[Array, "S d"]
    whole: Float[Array, "S d"]
    next: Integer[Array, ""]  # the pair that the next push overwrites
    size: Integer[Array, ""]  # how many are filled, ≤ S


def empty_bank(capacity: int, dim: int) -> Bank:
    """A bank of `capacity` pairs of `dim` numbers, none of them filled."""
    zero = jnp.zeros((), jnp.int32)
    return Bank(jnp.zeros((capacity, dim)), jnp.zeros((capacity, dim)), zero, zero)


def push(bank: Bank, local: Float[Array, "B d"], whole: Float[Array, "B d"]) -> Bank:
    """Add the pairs of a batch; a full bank loses its oldest ones. B divides the capacity."""
    capacity, count = bank.local.shape[0], local.shape[0]
    return Bank(
        local=lax.dynamic_update_slice_in_dim(bank.local, local, bank.next, 0),
        whole=lax.dynamic_update_slice_in_dim(bank.whole, whole, bank.next, 0),
        next=(bank.next + count) % capacity,
        size=jnp.minimum(bank.size + count, capacity),
    )


def sample(bank: Bank, key: Key[Array, ""], count: int) -> tuple[Array, Array]:
    """Draw pairs with replacement; zeros while the bank is empty."""
    index = jax.random.randint(key, (count,), 0, jnp.maximum(bank.size, 1))
    return bank.local[index], bank.whole[index]
