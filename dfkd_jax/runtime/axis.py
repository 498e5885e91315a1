"""The axis over which a batch is split: what code for one device's share needs to know of it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from dfkd_jax.runtime.arrays import AnyArray


class Axis(NamedTuple):
    """A mapped axis over the devices; without a name there is one device, and nothing to average.

    Attributes:
      name: of the axis, for collectives; None on one device.
      size: how many shares a batch has.
    """

    name: str | None = None
    size: int = 1

    def mean(self, tree: Any) -> Any:
        """The mean of each leaf over the devices."""
        return tree if self.name is None else lax.pmean(tree, self.name)

    def batch_mean(self, x: Float[AnyArray, "B *rest"]) -> Float[Array, "*rest"]:
        """Mean over the first axis of an array, over all devices."""
        return self.mean(jnp.mean(x, axis=0))

    def gather(self, x: Float[AnyArray, "B *rest"]) -> Float[Array, "N *rest"]:
        """The shares of all devices, one after the other along the first axis."""
        return jnp.asarray(x) if self.name is None else lax.all_gather(x, self.name, tiled=True)

    def first(self, count: int) -> Integer[Array, ""] | int:
        """The global index of this device's first example, where each device has `count`."""
        return 0 if self.name is None else lax.axis_index(self.name) * count


ONE = Axis()
"""One device."""
