"""Layers shared by the networks: convolution, batch norm, pooling, upsampling, last dense layer.

Images are (B, H, W, C) throughout. Every function keeps the dtype of its input and can be
differentiated any number of times.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from dfkd_jax.networks.convolution import convolution, upsampled_convolution

# How weights start. Which network starts how is its source's choice, and stands in its docstring.

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, √(2/fan_out)): He initialisation of convolutions with batch norm."""

he_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""N(0, √(2/fan_in)): He initialisation of layers followed by a ReLU without batch norm."""

he_uniform = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")
"""U(−√(6/fan_in), √(6/fan_in)): the same standard deviation as `he_fan_in`."""

uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(−1/√fan_in, 1/√fan_in), PyTorch's default for kernels of convolutions and dense layers."""

small_normal = nn.initializers.normal(0.01)
"""N(0, 0.01), as torchvision starts the last layer of some networks."""


def uniform_bias(fan_in: int) -> Callable[..., jax.Array]:
    """U(−1/√fan_in, 1/√fan_in), PyTorch's default for biases; fan_in is that of the kernel."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return initialize


Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)
"""`flax.linen.Conv` with the convolution that is fast on this backend."""

UpsampleConv = functools.partial(Conv, conv_general_dilated=upsampled_convolution)
"""`upsample2`, then `Conv` with a 3×3 kernel and padding 1; the parameters are those of `Conv`."""


def padded_conv(
    width: int,
    size: int,
    stride: int,
    dtype: DTypeLike | None,
    name: str,
    *,
    groups: int = 1,
    kernel_init: Callable[..., jax.Array] = he_fan_out,
) -> nn.Module:
    """A convolution before batch norm: no bias, padded by ⌊size/2⌋ on each side.

    Not "SAME", which pads a stride-2 convolution on one side only; PyTorch pads on both.
    """
    return Conv(
        width,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        feature_group_count=groups,
        kernel_init=kernel_init,
        dtype=dtype,
        name=name,
    )


def batch_norm(
    axis_name: str | None, epsilon: float = 1e-5, **options: object
) -> Callable[..., nn.BatchNorm]:
    """Return `flax.linen.BatchNorm` with its options filled in; call it to make a layer.

    The running statistics keep 0.9 of their value at every step, which PyTorch calls a momentum of
    0.1 (PyTorch stores the unbiased variance, Flax the biased one). Over several devices the
    statistics are those of the global batch.

    Args:
      axis_name: name of the `pmap` axis to average statistics over; None on one device.
      epsilon: added to the variance.
      **options: further fields of `flax.linen.BatchNorm`.
    """
    return functools.partial(
        nn.BatchNorm, axis_name=axis_name, momentum=0.9, epsilon=epsilon, **options
    )


def max_pool2(x: jax.Array) -> jax.Array:
    """Maximum over 2×2 windows, (B, H, W, C) → (B, ⌊H/2⌋, ⌊W/2⌋, C).

    An odd last row or column is left out. Equal maxima of a window share the gradient.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    windows = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)
    # By pairs: on CPU several times faster than a reduction, in its derivatives too.
    upper, lower = (
        jnp.maximum(windows[:, :, row, :, 0], windows[:, :, row, :, 1]) for row in range(2)
    )
    return jnp.maximum(upper, lower)


def max_pool3(x: jax.Array, padding: int = 0) -> jax.Array:
    """Maximum over 3×3 windows at every second pixel. Equal maxima share the gradient equally.

    A window may reach over an edge by one, where nothing is.

    Args:
      x: (B, H, W, C).
      padding: 0: the first window begins at the first pixel, as in PyTorch's
        `MaxPool2d(3, 2, ceil_mode=True)`; 1: one before it, as in `MaxPool2d(3, 2, 1)`.

    Returns:
      (B, ⌊H/2⌋, ⌊W/2⌋, C); with padding (B, ⌈H/2⌉, ⌈W/2⌉, C).
    """
    for axis in (1, 2):
        size = (x.shape[axis] + padding) // 2
        edges = [(0, 0, 0)] * 4
        edges[axis] = (padding, 2 * size + 1 - padding - x.shape[axis], 0)
        padded = lax.pad(x, jnp.full((), -jnp.inf, x.dtype), edges)
        starts = [lax.slice_in_dim(padded, i, i + 2 * size - 1, 2, axis) for i in range(3)]
        x = jnp.stack(starts).max(axis=0)
    return x


def adaptive_pool(
    x: jax.Array, axis: int, count: int, function: Callable[..., jax.Array]
) -> jax.Array:
    """Pool an axis of length N into `count` bins, the i-th from ⌊iN/count⌋ to ⌈(i+1)N/count⌉.

    Bins overlap where N is no multiple of `count`, and repeat elements where it is smaller.

    Args:
      x: of any shape.
      axis: which to pool.
      count: length of the axis afterwards.
      function: `jnp.mean` or `jnp.max`.
    """
    length = x.shape[axis]
    if length == count:
        return x
    if length % count == 0:
        shape = (*x.shape[:axis], count, length // count, *x.shape[axis + 1 :])
        return function(x.reshape(shape), axis=axis + 1)
    bins = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
    parts = [lax.slice_in_dim(x, *ends, axis=axis) for ends in bins]
    return jnp.concatenate([function(part, axis=axis, keepdims=True) for part in parts], axis)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over all pixels, (B, H, W, C) → (B, C)."""
    return x.mean(axis=(1, 2))


def upsample2(x: jax.Array) -> jax.Array:
    """Repeat every pixel 2×2 times (nearest neighbour), (B, H, W, C) → (B, 2H, 2W, C)."""
    batch, height, width, channels = x.shape
    repeated = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return repeated.reshape(batch, 2 * height, 2 * width, channels)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Cast half precision to float32; leave float32 and float64 as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def classify(
    features: jax.Array,
    num_classes: int,
    dtype: DTypeLike | None,
    *,
    kernel_init: Callable[..., jax.Array] = uniform_fan_in,
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros,
) -> tuple[jax.Array, jax.Array]:
    """Apply the last dense layer, named `fc`, of the module whose `__call__` is running.

    Args:
      features: (B, D).
      num_classes: K.
      dtype: dtype of the computation.
      kernel_init: how its kernel starts. bias_init: how its bias starts.

    Returns:
      logits (B, K) and features (B, D), both at least float32.
    """
    logits = nn.Dense(
        num_classes, kernel_init=kernel_init, bias_init=bias_init, dtype=dtype, name="fc"
    )(features)
    return at_least_float32(logits), at_least_float32(features)
