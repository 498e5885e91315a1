"""Images of another size: nearest pixels, and linear and cubic interpolation.

Each is a product with one small matrix an axis, which is made while tracing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dfkd_jax.networks.graph.tensors import Tensor, axis_of
from dfkd_jax.networks.layers import at_least_float32


def _source(length: int, count: int, align_corners: bool, scale: float | None) -> np.ndarray:
    """Where the pixels of the result lie in the image."""
    pixels = np.arange(count)
    if align_corners:
        return pixels * ((length - 1) / (count - 1) if count > 1 else 0.0)
    step = 1 / scale if scale else length / count
    return (pixels + 0.5) * step - 0.5


def _linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(x))


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _matrix(
    kernel: Callable[[np.ndarray], np.ndarray],
    reach: int,
    length: int,
    place: np.ndarray,
    support: float = 1.0,
) -> np.ndarray:
    """(pixels of the result, pixels of the image): the weight of each."""
    matrix = np.zeros((place.size, length))
    first = np.floor(place).astype(int) - reach + 1
    for tap in range(2 * reach):
        weight = kernel((place - (first + tap)) / support)
        np.add.at(matrix, (np.arange(place.size), np.clip(first + tap, 0, length - 1)), weight)
    return matrix


def _antialiased(
    kernel: Callable[[np.ndarray], np.ndarray],
    reach: int,
    length: int,
    place: np.ndarray,
    step: float,
) -> np.ndarray:
    """As `_matrix`, the kernel as wide as the result's pixels, and nothing beyond the edges."""
    distance = (np.arange(length) - place[:, None]) / max(step, 1.0)
    weights = np.where(np.abs(distance) < reach, kernel(distance), 0)
    return weights / weights.sum(1, keepdims=True)


def _resized(value: Tensor, sizes: Sequence[int], matrix: Callable[..., np.ndarray]) -> Tensor:
    array = value.array
    for i, count in enumerate(sizes):
        axis, length = axis_of(value, i - len(sizes)), value.shape[i - len(sizes)]
        weights = jnp.asarray(matrix(i, length, count), at_least_float32(array).dtype)
        moved = jnp.moveaxis(array, axis, -1)
        array = jnp.moveaxis((moved @ weights.T).astype(array.dtype), -1, axis)
    return Tensor(array, value.axes)


def _interpolation(
    kernel: Callable[[np.ndarray], np.ndarray], reach: int, antialias: bool = False
) -> Callable[..., Tensor]:
    def operation(
        output_size: Sequence[int] | None,
        align_corners: bool,
        scale_factors: Sequence[float] | None = None,
        scales_h: float | None = None,
        scales_w: float | None = None,
        **given: Any,
    ) -> Tensor:
        value = _image(given)
        sizes, scales = _sizes(value, output_size, scale_factors, (scales_h, scales_w))

        def matrix(i: int, length: int, count: int) -> np.ndarray:
            place = _source(length, count, align_corners, scales[i])
            if reach == 1 and not align_corners:
                place = np.maximum(place, 0) if not antialias else place
            if antialias:
                return _antialiased(kernel, reach, length, place, length / count)
            return _matrix(kernel, reach, length, place)

        return _resized(value, sizes, matrix)

    return operation


def _nearest(exact: bool) -> Callable[..., Tensor]:
    def operation(
        output_size: Sequence[int] | None,
        scale_factors: Sequence[float] | None = None,
        scales_h: float | None = None,
        scales_w: float | None = None,
        **given: Any,
    ) -> Tensor:
        value = _image(given)
        sizes, scales = _sizes(value, output_size, scale_factors, (scales_h, scales_w))
        array = value.array
        for i, count in enumerate(sizes):
            axis, length = axis_of(value, i - len(sizes)), value.shape[i - len(sizes)]
            scale = scales[i]
            step = 1 / scale if scale else length / count
            place = np.floor((np.arange(count) + (0.5 if exact else 0.0)) * step)
            array = jnp.take(array, np.clip(place, 0, length - 1).astype(int), axis)
        return Tensor(array, value.axes)

    return operation


def _image(given: dict[str, Any]) -> Tensor:
    """What an overload calls `input` and another `self`."""
    return given["input"] if "input" in given else given["self"]


def _sizes(
    value: Tensor,
    output_size: Sequence[int] | None,
    scale_factors: Sequence[float] | None,
    one_by_one: Sequence[float | None],
) -> tuple[Sequence[int], Sequence[float | None]]:
    """Pixels of the result, and the scales, if they were given instead of a size."""
    space = value.ndim - 2
    if output_size is not None:
        given = tuple(one_by_one) if space == 2 else (None,) * space
        return output_size, given
    assert scale_factors is not None
    lengths = value.shape[2:]
    return [math.floor(n * s) for n, s in zip(lengths, scale_factors, strict=True)], scale_factors


_BILINEAR, _BICUBIC = _interpolation(_linear, 1), _interpolation(_cubic, 2)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "upsample_linear1d": _BILINEAR,
    "upsample_bilinear2d": _BILINEAR,
    "upsample_bicubic2d": _BICUBIC,
    "_upsample_bilinear2d_aa": _interpolation(_linear, 1, antialias=True),
    "_upsample_bicubic2d_aa": _interpolation(lambda x: _cubic(x, -0.5), 2, antialias=True),
    "upsample_nearest1d": _nearest(exact=False),
    "upsample_nearest2d": _nearest(exact=False),
    "_upsample_nearest_exact2d": _nearest(exact=True),
}
