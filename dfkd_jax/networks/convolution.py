"""Convolution, written in the way that is fast on the backend.

GPUs and TPUs get XLA's own. On a CPU its derivatives are slow, in loops above all; there the same
sum is written as a matrix product wherever it pays. All forms agree up to rounding.

Images are (B, H, W, C) and kernels (kh, kw, C_in, C_out) throughout. Every function keeps the dtype
of its input and can be differentiated any number of times.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dfkd_jax.networks import winograd

Padding = str | Sequence[tuple[int, int]]

_NHWC_HWIO = ("NHWC", "HWIO", "NHWC")

# From so many channels on the products saved outweigh the additions.
_WINOGRAD_CHANNELS = 64

_plain = ContextVar("plain convolutions", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside, every convolution is traced as XLA's, for programs that run on other machines."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


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
    kernel_height, kernel_width, _, out_channels = rhs.shape
    _check_channels(lhs, rhs)
    image = _padded(lhs, rhs, window_strides, padding)
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


def rows_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """Convolve with one matrix product per row of the result.

    kh rows of the image, (B, H', kh·W·C_in), times the banded matrix (kh·W·C_in, W'·C_out) that
    holds the kernel once for every column of the result. That is W / kw times the products of
    `patches_convolution`, but what is copied is kh whole rows, not kh·kw pixels one by one. The
    matrix is mostly zeros, so an image that is not finite spoils whole rows.

    Arguments, result and error as for `patches_convolution`.
    """
    kernel_height, kernel_width, in_channels, out_channels = rhs.shape
    _check_channels(lhs, rhs)
    image = _padded(lhs, rhs, window_strides, padding)
    row_stride, column_stride = window_strides
    batch, height, width, _ = image.shape
    row_span = height - kernel_height + 1
    columns = (width - kernel_width) // column_stride + 1
    rows = jnp.stack(
        [image[:, row : row + row_span : row_stride] for row in range(kernel_height)], axis=2
    )
    # place[v, w, u]: pixel w of the row meets tap v in column u of the result.
    tap, pixel, column = jnp.ogrid[:kernel_width, :width, :columns]
    place = (pixel == column * column_stride + tap).astype(rhs.dtype)
    band = jnp.einsum("vwu,rvio->rwiuo", place, rhs, precision="highest")
    result = jnp.matmul(
        rows.reshape(batch, rows.shape[1], -1),
        band.reshape(-1, columns * out_channels),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return result.reshape(batch, -1, columns, out_channels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _patches_in_derivatives(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: tuple[int, ...],
    padding: Padding,
    precision: lax.PrecisionLike,
    preferred_element_type: DTypeLike | None,
) -> jax.Array:
    """`patches_convolution` whose own value is XLA's, which copies no patches."""
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        dimension_numbers=_NHWC_HWIO,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


@_patches_in_derivatives.defjvp
def _patches_in_derivatives_jvp(
    window_strides: tuple[int, ...],
    padding: Padding,
    precision: lax.PrecisionLike,
    preferred_element_type: DTypeLike | None,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    options = (window_strides, padding, precision, preferred_element_type)
    by_patches = functools.partial(
        patches_convolution,
        window_strides=window_strides,
        padding=padding,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    _, tangent = jax.jvp(by_patches, primals, tangents)
    return _patches_in_derivatives(*primals, *options), tangent


def depthwise_convolution(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Padding
) -> jax.Array:
    """Convolve each channel with a kernel of its own: Σ over taps of shifted image × tap.

    Equal to `lax.conv_general_dilated` with as many groups as channels, which is slow on a CPU, and
    its derivatives are. Sums are of single precision at least.

    Args:
      lhs: images (B, H, W, C).
      rhs: kernel (kh, kw, 1, C).
      window_strides: (sh, sw).
      padding: "SAME", "VALID" or ((top, bottom), (left, right)).

    Returns:
      (B, H', W', C).
    """
    kernel_height, kernel_width = rhs.shape[:2]
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    image, kernel = _padded(lhs, rhs, window_strides, padding).astype(wide), rhs.astype(wide)
    row_stride, column_stride = window_strides
    row_span = image.shape[1] - kernel_height + 1
    column_span = image.shape[2] - kernel_width + 1
    taps = (
        image[:, row : row + row_span : row_stride, column : column + column_span : column_stride]
        * kernel[row, column, 0]
        for row in range(kernel_height)
        for column in range(kernel_width)
    )
    return functools.reduce(jnp.add, taps).astype(lhs.dtype)


def _padded(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Padding
) -> jax.Array:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    edges = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
    return lax.pad(lhs, jnp.zeros((), lhs.dtype), edges)


def _check_channels(lhs: jax.Array, rhs: jax.Array) -> None:
    if lhs.shape[3] != rhs.shape[2]:
        raise ValueError(f"The kernel takes {rhs.shape[2]} channels, the image has {lhs.shape[3]}.")


def _rows_pay(image_shape: Sequence[int], kernel_shape: Sequence[int]) -> bool:
    """Whether the product over rows is faster on a CPU than that over patches.

    It spends kh·(W − kw)·C_in·C_out more products on a pixel of the result and
    saves the copies of its kh·kw·C_in pixels. One scattered copy costs about what 40 products do.
    """
    _, _, width, _ = image_shape
    _, kernel_width, _, out_channels = kernel_shape
    return 0 < (width - kernel_width) * out_channels < 40 * kernel_width


def _patches_pay(image_shape: Sequence[int], kernel_shape: Sequence[int]) -> bool:
    """Whether derivatives of the product over patches are a good choice on a CPU.

    Those of XLA's convolution are slow for few channels and small kernels, and inside `lax.scan`
    and `lax.cond` fifty times and more slower still. But patches take kh·kw times the memory of
    the image. They pay where the image is small, where a patch is short (few channels),
    and where both channel counts are so large that the product dominates.
    """
    _, height, width, _ = image_shape
    kernel_height, kernel_width, in_channels, out_channels = kernel_shape
    taps, channels = kernel_height * kernel_width, min(in_channels, out_channels)
    small = 8 * 8 if taps >= 9 and channels >= 16 else 16 * 16
    return taps == 1 or height * width <= small or taps * in_channels <= 32 or channels >= 64


def on_cpu() -> bool:
    """Whether the default backend is the CPU, the only one with convolutions of its own."""
    return jax.default_backend() == "cpu"


def convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """`lax.conv_general_dilated`, written as a matrix product where that is faster.

    Nothing else asks `on_cpu`, and this once, while tracing: GPUs and TPUs always get XLA's
    convolution, and so does everybody inside of `plain`. A CPU gets `depthwise_convolution` for a
    kernel to each channel and `winograd_convolution` for many channels. For the shapes of
    `_patches_pay` it gets `rows_convolution` if they are those of `_rows_pay` too, else XLA's with
    the derivatives of `patches_convolution`. Dilation, other groups and layouts other than
    NHWC × HWIO always go to XLA.
    """
    ours = (
        on_cpu()
        and not _plain.get()
        and lhs.ndim == 4
        and batch_group_count == 1
        and all(dilation == 1 for dilation in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC_HWIO)
    )
    depthwise = ours and 1 < feature_group_count == lhs.shape[3] == rhs.shape[3]
    if depthwise and rhs.shape[2] == 1 and preferred_element_type is None:
        return depthwise_convolution(lhs, rhs, window_strides, padding)
    if ours and feature_group_count == 1:
        shapes = (lhs.shape, rhs.shape)
        if min(rhs.shape[2:]) >= _WINOGRAD_CHANNELS and winograd.fits(
            *shapes, window_strides, padding
        ):
            return winograd.winograd_convolution(lhs, rhs, precision, preferred_element_type)
        if _patches_pay(*shapes):
            options = (precision, preferred_element_type)
            if _rows_pay(*shapes):
                return rows_convolution(lhs, rhs, window_strides, padding, *options)
            if rhs.shape[:2] == (1, 1):
                return patches_convolution(lhs, rhs, window_strides, padding, *options)
            if not isinstance(padding, str):
                padding = tuple((low, high) for low, high in padding)
            return _patches_in_derivatives(lhs, rhs, tuple(window_strides), padding, *options)
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


# Which of three neighbouring taps see the same pixel of an image that was enlarged 2 times, for the
# two rows that a window of two pixels gives: [row given, pixel of the window, tap].
_SHARED_TAPS = (((1, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 1)))


def upsampled_convolution(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Padding, **options: Any
) -> jax.Array:
    """`convolution` of `upsample2(lhs)` with a 3×3 kernel, stride 1 and padding 1, made cheaper.

    In the enlarged image several taps of the kernel see the same pixel. Summed, they leave 2×2
    taps, so every window of 2×2 small pixels gives the 2×2 large ones around its centre by
    one convolution with 4·C_out outputs: 2.25 times fewer products, and the enlarged input is
    never made. Equal to the two in sequence up to rounding, at every order of derivatives.

    Args:
      lhs: images (B, H, W, C_in).
      rhs: kernel (3, 3, C_in, C_out).
      window_strides: (1, 1).
      padding: ((1, 1), (1, 1)).
      **options: of `convolution`; no dilation and no groups.

    Returns:
      (B, 2H, 2W, C_out).

    Raises:
      ValueError: another kernel size, stride or padding.
    """
    given = (rhs.shape[:2], tuple(window_strides), tuple(map(tuple, padding)))
    if given != ((3, 3), (1, 1), ((1, 1), (1, 1))):
        raise ValueError(
            "Upsampling with convolution has a 3×3 kernel, stride 1 and padding 1, "
            f"not {given[0]}, {given[1]} and {given[2]}."
        )
    batch, height, width, channels = lhs.shape
    taps = jnp.asarray(_SHARED_TAPS, rhs.dtype)
    # a, b: which of the large pixels; r, s: which of the small ones.
    kernel = jnp.einsum("aru,bsv,uvio->rsiabo", taps, taps, rhs, precision="highest")
    corners = convolution(lhs, kernel.reshape(2, 2, channels, -1), (1, 1), padding, **options)
    pixels = corners.reshape(batch, height + 1, width + 1, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    pixels = pixels.reshape(batch, 2 * height + 2, 2 * width + 2, -1)
    return pixels[:, 1:-1, 1:-1]
