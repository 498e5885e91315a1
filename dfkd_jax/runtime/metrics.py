"""What an epoch measures: a dictionary of weighted means, filled by whatever takes part.

A step returns the metrics of that step; an epoch adds them up and divides once. Nobody lists the
names: what a part measures is recorded because it is measured.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Mean(NamedTuple):
    """Σ wᵢ xᵢ and Σ wᵢ; a weight of 0 stands for "nothing was measured"."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


Metrics = dict[str, Mean]


def measured(value: Float[Array, ""], weight: Float[Array, ""] | float = 1.0) -> Mean:
    """One value with its weight."""
    weight = jnp.asarray(weight, value.dtype)
    return Mean(weight * value, weight)


def add(sums: Metrics, new: Metrics) -> Metrics:
    """The sums with those of one more step; a step need not measure all of them.

    Raises:
      KeyError: the step measured what the sums have no place for.
    """
    added = {name: jax.tree.map(jnp.add, sums[name], mean) for name, mean in new.items()}
    return {**sums, **added}


def averages(sums: Metrics) -> dict[str, Float[Array, ""]]:
    """Σ wᵢ xᵢ / Σ wᵢ by name; NaN where nothing was measured."""
    return {name: mean.total / mean.weight for name, mean in sums.items()}
