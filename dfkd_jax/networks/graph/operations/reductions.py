"""Sums, means, variances, extremes and norms over axes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dfkd_jax.networks.graph.operations.elementwise import cast
from dfkd_jax.networks.graph.tensors import Tensor, axis_of, reduced

Dims = Sequence[int] | int | None


def _over_axes(function: Callable[..., jax.Array]) -> Callable[..., Tensor]:
    def operation(
        self: Tensor, dim: Dims = None, keepdim: bool = False, dtype: int | None = None
    ) -> Tensor:
        return reduced(function, cast(self, dtype), dim, keepdim)

    return operation


def extreme(function: Callable[..., jax.Array], position: Callable[..., jax.Array]) -> Callable:
    """`max` or `min`: of all; or along one axis, with the positions."""

    def operation(self: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        value = reduced(function, self, dim, keepdim)
        if dim is None:
            return value
        return value, argument(position)(self, dim, keepdim)

    return operation


def argument(position: Callable[..., jax.Array]) -> Callable[..., Tensor]:
    """`argmax` or `argmin` along one axis."""

    def operation(self: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        def along(array: jax.Array, axis: Any, keepdims: bool) -> jax.Array:
            return position(array, axis=axis[0], keepdims=keepdims)

        if dim is None:
            raise NotImplementedError("the position of an extreme over all axes")
        return reduced(along, self, dim, keepdim)

    return operation


def variance(
    self: Tensor,
    dim: Dims = None,
    unbiased: bool = True,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    """The mean square of the centred values, n / (n − correction) times; unbiased with 1."""
    correction = (1 if unbiased else 0) if correction is None else correction
    dims = range(self.ndim) if dim in (None, []) else [dim] if isinstance(dim, int) else dim
    count = math.prod(self.array.shape[axis_of(self, d)] for d in dims)
    biased = reduced(jnp.var, self, dim, keepdim)
    return Tensor(biased.array * (count / (count - correction)), biased.axes)


def deviation(self: Tensor, *args: Any, **options: Any) -> Tensor:
    """The square root of `variance`."""
    value = variance(self, *args, **options)
    return Tensor(jnp.sqrt(value.array), value.axes)


def variance_and_mean(
    self: Tensor,
    dim: Dims = None,
    unbiased: bool = True,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both."""
    mean = reduced(jnp.mean, self, dim, keepdim)
    return variance(self, dim, unbiased, correction, keepdim), mean


def norm(
    self: Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    dtype: int | None = None,
) -> Tensor:
    """(Σ |x|^ord)^(1/ord); the derivative of a Euclidean norm at 0 is 0."""

    def value(array: jax.Array, axis: Any, keepdims: bool) -> jax.Array:
        if ord in (math.inf, -math.inf):
            return (jnp.max if ord > 0 else jnp.min)(jnp.abs(array), axis, keepdims=keepdims)
        if ord != 2:
            return jnp.sum(jnp.abs(array) ** ord, axis, keepdims=keepdims) ** (1 / ord)
        squares = jnp.sum(array**2, axis, keepdims=keepdims)
        empty = squares == 0
        return jnp.where(empty, 0, jnp.sqrt(jnp.where(empty, 1, squares)))

    return reduced(value, cast(self, dtype), dim, keepdim)


def old_norm(self: Tensor, p: float | None = 2, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """`norm` under its old name."""
    return norm(self, 2 if p is None else p, dim, keepdim)


def cumulated(self: Tensor, dim: int, dtype: int | None = None) -> Tensor:
    """Sums of all elements up to each."""
    value = cast(self, dtype)
    return Tensor(jnp.cumsum(value.array, axis_of(value, dim)), value.axes)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "mean": _over_axes(jnp.mean),
    "sum": _over_axes(jnp.sum),
    "prod": _over_axes(jnp.prod),
    "amax": _over_axes(jnp.max),
    "amin": _over_axes(jnp.min),
    "logsumexp": _over_axes(jax.nn.logsumexp),
    "any": _over_axes(jnp.any),
    "all": _over_axes(jnp.all),
    "max": extreme(jnp.max, jnp.argmax),
    "min": extreme(jnp.min, jnp.argmin),
    "argmax": argument(jnp.argmax),
    "argmin": argument(jnp.argmin),
    "var": variance,
    "std": deviation,
    "var_mean": variance_and_mean,
    "linalg_vector_norm": norm,
    "norm": old_norm,
    "cumsum": cumulated,
}
