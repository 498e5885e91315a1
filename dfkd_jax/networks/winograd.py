"""Winograd's convolution F(2×2, 3×3): 2.25 times fewer products than the sum over nine taps.

Each 2×2 tile of the result needs a 4×4 tile d of the image. With kernel g,

    y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A,

where ⊙ is, over channels, one matrix product for each of the 16 places of a tile. Bᵀ and Aᵀ only
add and subtract. Every part is linear in the image and in the kernel, so derivatives of any order
are of the same kind and as cheap.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

_IMAGE = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # Bᵀ
_RESULT = ((1, 1, 1, 0), (0, 1, -1, -1))  # Aᵀ

# Tiles take four times the memory of the image. Where they are more than twice this many bytes, a
# few images at a time keep them in the processor's cache.
_BLOCK_BYTES = 10 * 2**20


def fits(
    image_shape: Sequence[int],
    kernel_shape: Sequence[int],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
) -> bool:
    """Whether `winograd_convolution` computes this convolution.

    3×3 kernel, stride 1, padding 1, images of even height and width.
    """
    return (
        tuple(kernel_shape[:2]) == (3, 3)
        and tuple(window_strides) == (1, 1)
        and (padding == "SAME" or tuple(map(tuple, padding)) == ((1, 1), (1, 1)))
        and image_shape[1] % 2 == image_shape[2] % 2 == 0
    )


def winograd_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """Convolve images (B, H, W, C_in) with a kernel (3, 3, C_in, C_out) to (B, H, W, C_out).

    Only for what `fits`. Its rounding errors are a few times those of the plain sum.

    Args:
      lhs: images.
      rhs: kernel.
      precision: as in `lax.dot`.
      preferred_element_type: accumulation dtype, as in `lax.dot`.
    """
    convolve = functools.partial(
        _convolve, precision=precision, preferred_element_type=preferred_element_type
    )
    blocks = _blocks(lhs.shape, rhs.shape[3], lhs.dtype.itemsize)
    if blocks == 1:
        return convolve(lhs, rhs)
    # Derivatives make a block's tiles again, which is cheaper than to store and to load them.
    convolve = jax.checkpoint(convolve)
    images = lhs.reshape(blocks, -1, *lhs.shape[1:])
    return lax.map(lambda block: convolve(block, rhs), images).reshape(*lhs.shape[:3], -1)


def _blocks(image_shape: Sequence[int], out_channels: int, itemsize: int) -> int:
    """Into how many blocks of equally many images a batch is split."""
    batch, height, width, in_channels = image_shape
    size = 4 * batch * height * width * max(in_channels, out_channels) * itemsize
    if size <= 2 * _BLOCK_BYTES:
        return 1
    divisors = (n for n in range(1, batch) if batch % n == 0)
    return next((n for n in divisors if size <= n * _BLOCK_BYTES), batch)


def _convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    precision: lax.PrecisionLike,
    preferred_element_type: DTypeLike | None,
) -> jax.Array:
    batch, height, width, in_channels = lhs.shape
    image = jnp.pad(lhs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _combine(_IMAGE, [image[:, row : row + height - 1 : 2] for row in range(4)])
    places = [
        place
        for row in rows
        for place in _combine(_IMAGE, [row[:, :, i : i + width - 1 : 2] for i in range(4)])
    ]
    by_column = zip(*(_kernel_tile(*taps) for taps in rhs), strict=True)
    kernel = zip(*(_kernel_tile(*taps) for taps in by_column), strict=True)
    # One product over all places: sixteen of them compile for twice as long, and are no faster.
    products = jnp.matmul(
        jnp.stack(places).reshape(16, -1, in_channels),
        jnp.stack([place for row in kernel for place in row]),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    by_row = [_combine(_RESULT, list(products[row : row + 4])) for row in range(0, 16, 4)]
    pixels = [_combine(_RESULT, column) for column in zip(*by_row, strict=True)]
    tiles = (batch, height // 2, width // 2)
    lines = [
        jnp.stack([column[row].reshape(*tiles, -1) for column in pixels], axis=3)
        for row in range(2)
    ]
    return jnp.stack(lines, axis=2).reshape(batch, height, width, -1)


def _kernel_tile(first: jax.Array, second: jax.Array, third: jax.Array) -> list[jax.Array]:
    """G · (first, second, third), three taps to four places."""
    outer = (first + third) / 2
    return [first, outer + second / 2, outer - second / 2, third]


def _combine(
    matrix: Sequence[Sequence[int | float]], parts: Sequence[jax.Array]
) -> list[jax.Array]:
    """matrix · parts for entries 0, 1 and −1, by additions."""
    combined = []
    for row in matrix:
        terms = [(sign, part) for sign, part in zip(row, parts, strict=True) if sign]
        first_sign, total = terms[0]
        total = total if first_sign > 0 else -total
        for sign, part in terms[1:]:
            total = total + part if sign > 0 else total - part
        combined.append(total)
    return combined
