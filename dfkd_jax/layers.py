"""Layers shared by the networks: convolution, batch norm, pooling, upsampling, last dense layer.

Images are (B, H, W, C) and kernels (kh, kw, C_in, C_out) throughout. Every function keeps the dtype
of its input and can be differentiated any number of times.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

Padding = str | Sequence[tuple[int, int]]

_NHWC_HWIO = ("NHWC", "HWIO", "NHWC")

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He initialisation of convolutions followed by batch norm (ResNet, WideResNet)."""

he_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""He initialisation of layers followed by a ReLU without batch norm."""

uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(−1/√fan_in, 1/√fan_in), PyTorch's default for dense layers."""


def patches_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """Convolve with one matrix product: (B, H', W', kh·kw·C_in) patches × (kh·kw·C_in, C_out).

    Equal to `lax.conv_general_dilated` without dilation and groups. The patches are strided slices
    of the padded image, so derivatives of any order are slices, pads and matrix products again.

    Args:
      lhs: images (B, H, W, C_in).
      rhs: kernel (kh, kw, C_in, C_out).
      window_strides: (sh, sw).
      padding: "SAME", "VALID" or ((top, bottom), (left, right)).
      precision: as in `lax.dot`.
      preferred_element_type: accumulation dtype, as in `lax.dot`.

    Returns:
      (B, H', W', C_out).

    Raises:
      ValueError: the two channel counts differ.
    """
    kernel_height, kernel_width, in_channels, out_channels = rhs.shape
    if lhs.shape[3] != in_channels:
        raise ValueError(f"The kernel takes {in_channels} channels, the image has {lhs.shape[3]}.")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    edges = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
    image = lax.pad(lhs, jnp.zeros((), lhs.dtype), edges)
    multiply = functools.partial(
        jnp.matmul, precision=precision, preferred_element_type=preferred_element_type
    )
    matrix = rhs.reshape(-1, out_channels)
    if image.shape[1:3] == rhs.shape[:2]:
        # One window covers the whole image: it is its own patch.
        return multiply(image.reshape(image.shape[0], 1, 1, -1), matrix)
    row_stride, column_stride = window_strides
    row_span = image.shape[1] - kernel_height + 1
    column_span = image.shape[2] - kernel_width + 1
    taps = [
        image[:, row : row + row_span : row_stride, column : column + column_span : column_stride]
        for row in range(kernel_height)
        for column in range(kernel_width)
    ]
    patches = taps[0] if len(taps) == 1 else jnp.concatenate(taps, axis=-1)
    return multiply(patches, matrix)


def _patches_pay(image_shape: Sequence[int], kernel_shape: Sequence[int]) -> bool:
    """Whether the product over patches is a good choice on a CPU for these shapes.

    XLA's CPU convolution is ten times and more slower inside `lax.scan` and `lax.cond` and slow in
    second derivatives, but patches take kh·kw times the memory of the image. They pay where the
    image is small, where a patch is short (few channels), and where both channel counts are so
    large that the product dominates.
    """
    _, height, width, _ = image_shape
    kernel_height, kernel_width, in_channels, out_channels = kernel_shape
    taps = kernel_height * kernel_width
    return (
        taps == 1
        or height * width <= 16 * 16
        or taps * in_channels <= 32
        or min(in_channels, out_channels) >= 64
    )


def convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """`lax.conv_general_dilated`, written as patches × matrix where that is faster.

    This is the only place that looks at the backend, once, while tracing: GPUs and TPUs always get
    XLA's convolution, a CPU gets `patches_convolution` for the shapes of `_patches_pay`. Dilation,
    groups and layouts other than NHWC × HWIO always go to XLA. The two agree up to rounding.
    """
    plain = (
        lhs.ndim == 4
        and feature_group_count == batch_group_count == 1
        and all(dilation == 1 for dilation in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC_HWIO)
    )
    if plain and jax.default_backend() == "cpu" and _patches_pay(lhs.shape, rhs.shape):
        return patches_convolution(
            lhs, rhs, window_strides, padding, precision, preferred_element_type
        )
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)
"""`flax.linen.Conv` with `convolution` of this module."""


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

    An odd last row or column is left out. Equal maxima of a window share the gradient equally.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    windows = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)
    return windows.max(axis=(2, 4))


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
    features: jax.Array, num_classes: int, dtype: DTypeLike | None
) -> tuple[jax.Array, jax.Array]:
    """Apply the last dense layer, named `fc`, of the module whose `__call__` is running.

    Returns:
      logits (B, K) and features (B, D), both at least float32.
    """
    logits = nn.Dense(num_classes, kernel_init=uniform_fan_in, dtype=dtype, name="fc")(features)
    return at_least_float32(logits), at_least_float32(features)
