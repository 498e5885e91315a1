"""Tensors of a graph: PyTorch's axes, and where they lie in an array.

PyTorch's images are (B, C, H, W) and its kernels (O, I, H, W); what is fast here is (B, H, W, C)
and (H, W, I, O). A `Tensor` has the axes that the graph speaks of and keeps its array as it lies,
so a permutation moves nothing, and a network of convolutions transposes nowhere inside.

An *order* lists PyTorch's axes as they lie in the array: images in (B, H, W, C) have (0, 2, 3, 1).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Tensor(NamedTuple):
    """An array, and for each of PyTorch's axes the axis of the array that it is."""

    array: jax.Array
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As PyTorch says it."""
        return tuple(self.array.shape[axis] for axis in self.axes)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.axes)

    @property
    def order(self) -> tuple[int, ...]:
        """PyTorch's axes as they lie in the array."""
        return tuple(int(axis) for axis in np.argsort(self.axes))


def tensor(array: Any, order: Sequence[int] | np.ndarray | None = None) -> Tensor:
    """An array whose axes are PyTorch's in this order; in PyTorch's own by default."""
    axes = range(array.ndim) if order is None else np.argsort(order)
    return Tensor(array, tuple(map(int, axes)))


def stored(value: Tensor, order: Sequence[int]) -> jax.Array:
    """The array with its axes in this order; what lies so already is not moved."""
    axes = tuple(value.axes[axis] for axis in order)
    return value.array if axes == tuple(range(len(axes))) else value.array.transpose(axes)


def plain(value: Tensor) -> jax.Array:
    """The array with PyTorch's order of axes."""
    return stored(value, range(value.ndim))


def channels_last(ndim: int) -> tuple[int, ...]:
    """The order in which channels, PyTorch's axis 1, come last."""
    return (0, *range(2, ndim), 1)


def axis_of(value: Tensor, dim: int) -> int:
    """Where PyTorch's axis lies in the array; negative ones count from the end."""
    return value.axes[dim % max(value.ndim, 1)]


def aligned(*values: Any) -> tuple[list[Any], tuple[int, ...]]:
    """Arrays that broadcast as PyTorch's tensors do, and the order of what comes of them.

    Args:
      *values: tensors, at least one, and numbers, which stay what they are. The largest tensor
        stays as it lies.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    ndim = max(value.ndim for value in tensors)
    order = max((t for t in tensors if t.ndim == ndim), key=lambda t: t.array.size).order

    def array(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.ndim < ndim:
            ones = (1,) * (ndim - value.ndim)
            value = tensor(plain(value).reshape((*ones, *value.shape)))
        return stored(value, order)

    return [array(value) for value in values], order


def pointwise(function: Callable[..., jax.Array], *values: Any) -> Tensor:
    """A function of numbers, of each element."""
    arrays, order = aligned(*values)
    return tensor(function(*arrays), order)


def permuted(value: Tensor, dims: Sequence[int]) -> Tensor:
    """PyTorch's `permute`: nothing is moved."""
    return Tensor(value.array, tuple(axis_of(value, dim) for dim in dims))


def reshaped(value: Tensor, shape: Sequence[int]) -> Tensor:
    """PyTorch's `reshape`, one size of which may be -1.

    Axes that are split or merged move together, and all others stay where they lie.
    """
    shape = tuple(shape)
    if -1 in shape:
        rest = -math.prod(shape)
        size = value.array.size // rest if rest else 0
        shape = tuple(size if n == -1 else n for n in shape)
    blocks = _blocks(value.shape, shape)
    if not blocks:
        return tensor(plain(value).reshape(shape))
    blocks.sort(key=lambda block: min(value.axes[axis] for axis in block[0]))
    before = [axis for old, _ in blocks for axis in old]
    after = [axis for _, new in blocks for axis in new]
    return tensor(stored(value, before).reshape([shape[axis] for axis in after]), after)


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of old and new axes that hold the same elements; none if there are none."""
    blocks, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        first, second = [i], [j]
        sizes = [old[i], new[j]]
        i, j = i + 1, j + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1] and i < len(old):
                sizes[0] *= old[i]
                first.append(i)
                i += 1
            elif j < len(new):
                sizes[1] *= new[j]
                second.append(j)
                j += 1
            else:
                return []
        blocks.append((first, second))
    if blocks:  # what is left has size 1
        blocks[-1][0].extend(range(i, len(old)))
        blocks[-1][1].extend(range(j, len(new)))
    return blocks


def reduced(
    function: Callable[..., jax.Array], value: Tensor, dim: Any, keepdim: bool = False
) -> Tensor:
    """A reduction such as `jnp.mean` over PyTorch's axes; over all of them without any."""
    dims = range(value.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    gone = {d % max(value.ndim, 1) for d in dims} if value.ndim else set()
    array = function(value.array, axis=tuple(value.axes[d] for d in sorted(gone)), keepdims=keepdim)
    if keepdim:
        return Tensor(array, value.axes)
    kept = [axis for axis in value.order if axis not in gone]
    return tensor(array, np.argsort(np.argsort(kept)))
