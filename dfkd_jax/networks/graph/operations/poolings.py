"""Poolings: of windows, of a given number of pixels, of all."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfkd_jax.networks.graph.operations.convolutions import Sizes, each, windows
from dfkd_jax.networks.graph.tensors import Tensor, axis_of
from dfkd_jax.networks.layers import adaptive_pool


class _Window:
    """Windows along one axis of `length` pixels."""

    def __init__(
        self, length: int, size: int, stride: int, padding: int, dilation: int, ceil_mode: bool
    ) -> None:
        span = dilation * (size - 1) + 1
        room = length + 2 * padding - span
        count = (-(-room // stride) if ceil_mode else room // stride) + 1
        if ceil_mode and (count - 1) * stride >= length + padding:
            count -= 1  # a window must begin inside, or in the padding before
        self.length, self.size, self.stride, self.padding = length, size, stride, padding
        self.dilation, self.count = dilation, count
        self.after = max(0, (count - 1) * stride + span - length - padding)

    def taps(self, array: jax.Array, axis: int, empty: float) -> list[jax.Array]:
        edges = [(0, 0, 0)] * array.ndim
        edges[axis] = (self.padding, self.after, 0)
        padded = lax.pad(array, jnp.asarray(empty, array.dtype), edges)
        return windows(padded, axis, self.size, self.stride, self.dilation, self.count)

    def pixels(self, with_padding: bool) -> np.ndarray:
        """How many pixels each window counts."""
        first = np.arange(self.count) * self.stride - self.padding
        last = np.minimum(first + self.size, self.length + self.padding)
        if with_padding:
            return last - first
        return np.minimum(last, self.length) - np.maximum(first, 0)


def _windows_of(
    value: Tensor, size: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes, ceil: bool
) -> list[tuple[int, _Window]]:
    """(axis of the array, its windows) for the last axes."""
    space = value.ndim - 2
    sizes = each(size, space)
    strides = each(stride, space) if stride not in (None, [], ()) else sizes
    paddings, dilations = each(padding, space), each(dilation, space)
    return [
        (
            axis_of(value, i - space),
            _Window(value.shape[i - space], sizes[i], strides[i], paddings[i], dilations[i], ceil),
        )
        for i in range(space)
    ]


def max_pool(
    self: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The maximum over windows, axis by axis, so that derivatives of any order are there.

    Equal maxima share the gradient, where PyTorch gives it to the first.
    """
    array = self.array
    for axis, window in _windows_of(self, kernel_size, stride, padding, dilation, ceil_mode):
        array = jnp.stack(window.taps(array, axis, -math.inf)).max(axis=0)
    return Tensor(array, self.axes)


def max_pool_with_indices(self: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
    """`max_pool`, and no indices."""
    return max_pool(self, *args, **options), None


def average_pool(
    self: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean over windows; `count_include_pad` says whether padding counts."""
    array = self.array
    divisor: Any = 1.0
    for axis, window in _windows_of(self, kernel_size, stride, padding, 1, ceil_mode):
        array = functools.reduce(jnp.add, window.taps(array, axis, 0.0))
        shape = [1] * array.ndim
        shape[axis] = window.count
        divisor = divisor * window.pixels(count_include_pad).reshape(shape)
    divisor = divisor if divisor_override is None else divisor_override
    return Tensor(array / jnp.asarray(divisor, array.dtype), self.axes)


def adaptive_average_pool(self: Tensor, output_size: Sizes) -> Tensor:
    """Means over so many bins of about equal size; None keeps an axis."""
    return _adaptive(self, output_size, jnp.mean)


def adaptive_max_pool(self: Tensor, output_size: Sizes) -> tuple[Tensor, None]:
    """Maxima over so many bins of about equal size, and no indices."""
    return _adaptive(self, output_size, jnp.max), None


def _adaptive(value: Tensor, output_size: Any, function: Callable[..., jax.Array]) -> Tensor:
    space = value.ndim - 2
    array = value.array
    for i, count in enumerate(each(output_size, space)):
        axis, length = axis_of(value, i - space), value.shape[i - space]
        if count in (None, length):
            continue
        array = adaptive_pool(array, axis, count, function)
    return Tensor(array, value.axes)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "max_pool1d": max_pool,
    "max_pool2d": max_pool,
    "max_pool3d": max_pool,
    "max_pool2d_with_indices": max_pool_with_indices,
    "avg_pool1d": average_pool,
    "avg_pool2d": average_pool,
    "avg_pool3d": average_pool,
    "adaptive_avg_pool1d": adaptive_average_pool,
    "adaptive_avg_pool2d": adaptive_average_pool,
    "adaptive_avg_pool3d": adaptive_average_pool,
    "_adaptive_avg_pool2d": adaptive_average_pool,
    "adaptive_max_pool1d": adaptive_max_pool,
    "adaptive_max_pool2d": adaptive_max_pool,
}
