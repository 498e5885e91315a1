"""Normalisations other than batch norm, which is a layer of the network; and softmax."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dfkd_jax.networks.graph.operations.elementwise import cast
from dfkd_jax.networks.graph.tensors import (
    Tensor,
    axis_of,
    pointwise,
    reshaped,
)
from dfkd_jax.networks.layers import at_least_float32


def normalized(
    value: Tensor, dims: Sequence[int], eps: float, center: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(x − mean) / √(variance + eps) over these axes; with it mean and 1 / √(variance + eps).

    Statistics are at least single precision; the variance is the biased one.
    """
    axes = tuple(axis_of(value, dim) for dim in dims)
    x = at_least_float32(value.array)
    mean = jnp.mean(x, axes, keepdims=True) * (1.0 if center else 0.0)
    centred = x - mean
    scale = jax.lax.rsqrt(jnp.mean(centred**2, axes, keepdims=True) + eps)
    result = (centred * scale).astype(value.array.dtype)
    return Tensor(result, value.axes), Tensor(mean, value.axes), Tensor(scale, value.axes)


def _scaled(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        value = pointwise(jnp.multiply, value, weight)
    return value if bias is None else pointwise(jnp.add, value, bias)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Over the last axes, as many as `normalized_shape` has."""
    return native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm`, with mean and 1 / standard deviation."""
    result, mean, scale = normalized(input, range(-len(normalized_shape), 0), eps)
    return _scaled(result, weight, bias), mean, scale


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """x / √(mean of x² + eps) over the last axes; eps is the type's smallest step by default."""
    eps = float(jnp.finfo(input.array.dtype).eps) if eps is None else eps
    dims = range(-len(normalized_shape), 0)
    return _scaled(normalized(input, dims, eps, center=False)[0], weight, None)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Over the pixels and channels of each of so many groups; channels are axis 1."""
    batch, channels, *space = input.shape
    groups = reshaped(input, (batch, num_groups, channels // num_groups, *space))
    result = normalized(groups, range(2, groups.ndim), eps)[0]
    shape = (channels, *(1 for _ in space))
    weight, bias = (p if p is None else reshaped(p, shape) for p in (weight, bias))
    return _scaled(reshaped(result, input.shape), weight, bias)


def native_group_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> tuple[Tensor, None, None]:
    """`group_norm` of a decomposed program, without the statistics."""
    return group_norm(input, group, weight, bias, eps), None, None


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Over the pixels of each channel.

    Raises:
      NotImplementedError: it normalises by statistics that it remembers.
    """
    if not use_input_stats:
        raise NotImplementedError("instance norm by running statistics")
    return group_norm(input, input.shape[1], weight, bias, eps)


def batch_norm_of_weights(
    value: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm by the statistics of what it is given, as networks that standardise kernels do."""
    dims = [dim for dim in range(value.ndim) if dim != 1]
    shape = (value.shape[1], *(1 for _ in dims[1:]))
    weight, bias = (p if p is None else reshaped(p, shape) for p in (weight, bias))
    return _scaled(normalized(value, dims, eps)[0], weight, bias)


def _along(function: Callable[..., jax.Array]) -> Callable[..., Tensor]:
    def operation(
        self: Tensor, dim: int, dtype: int | None = None, half_to_float: bool = False
    ) -> Tensor:
        value = cast(self, dtype)
        x = function(at_least_float32(value.array), axis=axis_of(value, dim))
        return Tensor(x.astype(value.array.dtype), value.axes)

    return operation


OPERATIONS: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "native_layer_norm": native_layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "native_group_norm": native_group_norm,
    "instance_norm": instance_norm,
    "softmax": _along(jax.nn.softmax),
    "_softmax": _along(jax.nn.softmax),
    "log_softmax": _along(jax.nn.log_softmax),
    "_log_softmax": _along(jax.nn.log_softmax),
}
