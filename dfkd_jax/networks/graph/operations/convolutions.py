"""Convolutions, with images (B, H, W, C) and kernels (H, W, I, O) inside."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from dfkd_jax.networks.convolution import convolution
from dfkd_jax.networks.graph.tensors import Tensor, channels_last, plain, stored, tensor

Sizes = Sequence[int] | int


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """PyTorch's `conv1d`, `conv2d` and `conv3d`: the project's convolution, grouped and dilated.

    Args:
      input: (B, C, ...); without batch it is one image.
      weight: (O, C / groups, ...).
      bias: (O,).
      stride: of the window, one number or one an axis.
      padding: on both sides, or "same" or "valid".
      dilation: pixels from tap to tap.
      groups: into which channels are divided.
    """
    space = weight.ndim - 2
    sizes = weight.shape[2:]
    strides, dilations = each(stride, space), each(dilation, space)
    if padding == "same":
        total = [dilations[i] * (sizes[i] - 1) for i in range(space)]
        edges = [(n // 2, n - n // 2) for n in total]
    else:
        edges = [(n, n) for n in each(0 if isinstance(padding, str) else padding, space)]
    letters = "DHW"[3 - space :]
    images, kernel = f"N{letters}C", f"{letters}IO"
    numbers = (images, kernel, images)
    array = convolution(
        stored(input, channels_last(input.ndim)),
        stored(weight, (*range(2, weight.ndim), 1, 0)),
        strides,
        edges,
        rhs_dilation=dilations,
        feature_group_count=groups,
        dimension_numbers=numbers,
    )
    if bias is not None:
        array = array + plain(bias)
    return tensor(array, channels_last(input.ndim))


def general_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
) -> Tensor:
    """`convolution`, which a decomposed program has instead of `conv2d`.

    Raises:
      NotImplementedError: it is transposed.
    """
    del output_padding
    if transposed:
        raise NotImplementedError("a transposed convolution")
    return conv(
        input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
    )


def each(sizes: Sizes, count: int) -> tuple[int, ...]:
    """One number an axis."""
    if isinstance(sizes, int):
        return (sizes,) * count
    return tuple(sizes) * count if len(sizes) == 1 else tuple(sizes)


def windows(array: Any, axis: int, size: int, stride: int, dilation: int, count: int) -> list[Any]:
    """What each tap of a window sees along an axis: `size` strided slices of `count` elements."""
    return [
        lax.slice_in_dim(
            array, tap * dilation, tap * dilation + (count - 1) * stride + 1, stride, axis
        )
        for tap in range(size)
    ]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "conv1d": conv,
    "conv2d": conv,
    "conv3d": conv,
    "convolution": general_conv,
}
