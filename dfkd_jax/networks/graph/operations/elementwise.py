"""Operations on each element: arithmetic, activations, comparisons, casts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.networks.graph.tensors import Tensor, plain, pointwise, tensor
from dfkd_jax.networks.layers import at_least_float32

Number = int | float | bool

# PyTorch's numbers of types, as a saved program has them.
_INTEGERS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64}
_FLOATS = (6, 7, 8, 13)  # half, float, double, bfloat16
_BOOL = 12


def cast(value: Tensor, dtype: int | None) -> Tensor:
    """To another type; floating-point numbers keep the precision of the computation.

    A program that was traced in single precision says so at many places, and runs here in any:
    what it calls float is at least single precision, and what it calls half stays as it is.
    """
    return value if dtype is None else pointwise(partial(_cast, dtype=dtype), value)


def _cast(array: jax.Array, dtype: int) -> jax.Array:
    if dtype == _BOOL:
        return array.astype(bool)
    if dtype in _INTEGERS:
        return array.astype(jax.dtypes.canonicalize_dtype(_INTEGERS[dtype]))
    if dtype not in _FLOATS:
        raise NotImplementedError(f"numbers of PyTorch's type {dtype}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(float)
    return at_least_float32(array) if dtype in (7, 8) else array


def numpy_type(dtype: int | None) -> Any:
    """What `full` and its like make of PyTorch's type: as `cast` does."""
    if dtype in _INTEGERS:
        return jax.dtypes.canonicalize_dtype(_INTEGERS[dtype])
    return bool if dtype == _BOOL else float


def _unary(function: Callable[[jax.Array], jax.Array]) -> Callable[..., Tensor]:
    return lambda self: pointwise(function, self)


def _binary(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    def operation(self: Any, other: Any) -> Any:
        return pointwise(function, self, other)

    return operation


def add(self: Any, other: Any, alpha: Number = 1) -> Tensor:
    """self + alpha · other."""
    return pointwise(lambda x, y: x + (y if alpha == 1 else alpha * y), self, other)


def sub(self: Any, other: Any, alpha: Number = 1) -> Tensor:
    """self − alpha · other."""
    return pointwise(lambda x, y: x - (y if alpha == 1 else alpha * y), self, other)


def rsub(self: Any, other: Any, alpha: Number = 1) -> Tensor:
    """other − alpha · self."""
    return sub(other, self, alpha)


def div(self: Any, other: Any, rounding_mode: str | None = None) -> Tensor:
    """self / other, rounded if asked for."""
    kinds = {None: jnp.true_divide, "floor": jnp.floor_divide, "trunc": _truncated_divide}
    return pointwise(kinds[rounding_mode], self, other)


def _truncated_divide(x: jax.Array, y: jax.Array) -> jax.Array:
    quotient = jnp.trunc(jnp.true_divide(x, y))
    return quotient.astype(jnp.result_type(x, y))


def addcmul(self: Tensor, tensor1: Tensor, tensor2: Tensor, value: Number = 1) -> Tensor:
    """self + value · tensor1 · tensor2."""
    return pointwise(lambda x, y, z: x + value * y * z, self, tensor1, tensor2)


def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, value: Number = 1) -> Tensor:
    """self + value · tensor1 / tensor2."""
    return pointwise(lambda x, y, z: x + value * y / z, self, tensor1, tensor2)


def lerp(self: Tensor, end: Tensor, weight: Any) -> Tensor:
    """self + weight · (end − self)."""
    return pointwise(lambda x, y, w: x + w * (y - x), self, end, weight)


def power(self: Any, exponent: Any) -> Tensor:
    """self ^ exponent; whole exponents as products, whose derivative at 0 is finite."""
    if isinstance(exponent, float) and exponent.is_integer():
        exponent = int(exponent)
    return pointwise(lambda x, y: x**y, self, exponent)


def clamp(self: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """Cut to [min, max]; the gradient passes inside, at the ends too."""

    def cut(x: jax.Array, *ends: Any) -> jax.Array:
        bounds = dict(zip(given, ends, strict=True))
        inside = True
        if "min" in bounds:
            inside = x >= bounds["min"]
        if "max" in bounds:
            inside = inside & (x <= bounds["max"])
        outside = jnp.clip(jax.lax.stop_gradient(x), bounds.get("min"), bounds.get("max"))
        return jnp.where(inside, x, outside)

    given = {name: end for name, end in (("min", min), ("max", max)) if end is not None}
    return pointwise(cut, self, *given.values())


def clamp_min(self: Tensor, min: Any) -> Tensor:
    """Cut to at least `min`."""
    return clamp(self, min=min)


def clamp_max(self: Tensor, max: Any) -> Tensor:
    """Cut to at most `max`."""
    return clamp(self, max=max)


def hardtanh(self: Tensor, min_val: Number = -1.0, max_val: Number = 1.0) -> Tensor:
    """Cut to (min_val, max_val), without gradient at the ends."""

    def cut(x: jax.Array) -> jax.Array:
        inside = (x > min_val) & (x < max_val)
        return jnp.where(inside, x, jnp.clip(jax.lax.stop_gradient(x), min_val, max_val))

    return pointwise(cut, self)


def relu6(self: Tensor) -> Tensor:
    """min(max(x, 0), 6)."""
    return hardtanh(self, 0.0, 6.0)


def hardsigmoid(self: Tensor) -> Tensor:
    """relu6(x + 3) / 6."""
    return pointwise(lambda x: x / 6, relu6(pointwise(lambda x: x + 3, self)))


def hardswish(self: Tensor) -> Tensor:
    """x · relu6(x + 3) / 6."""
    return pointwise(jnp.multiply, self, hardsigmoid(self))


def gelu(self: Tensor, approximate: str = "none") -> Tensor:
    """x Φ(x), or its approximation by tanh."""
    return pointwise(partial(jax.nn.gelu, approximate=approximate == "tanh"), self)


def elu(self: Tensor, alpha: Number = 1, scale: Number = 1, input_scale: Number = 1) -> Tensor:
    """scale · (x where it is above 0, else alpha · (exp(input_scale · x) − 1))."""

    def value(x: jax.Array) -> jax.Array:
        below = alpha * jnp.expm1(jnp.where(x > 0, 0, x) * input_scale)
        return scale * jnp.where(x > 0, x, below)

    return pointwise(value, self)


def leaky_relu(self: Tensor, negative_slope: Number = 0.01) -> Tensor:
    """x where it is above 0, else negative_slope · x."""
    return pointwise(lambda x: jnp.where(x > 0, x, negative_slope * x), self)


def prelu(self: Tensor, weight: Tensor) -> Tensor:
    """x where it is above 0, else its channel's weight · x; channels are axis 1."""
    shape = [1] * self.ndim
    if self.ndim > 1:
        shape[1] = weight.array.size
    slope = tensor(plain(weight).reshape(shape))
    return pointwise(lambda x, w: jnp.where(x > 0, x, w * x), self, slope)


def softplus(self: Tensor, beta: Number = 1, threshold: Number = 20) -> Tensor:
    """log(1 + exp(beta · x)) / beta; x itself where beta · x is above the threshold."""

    def value(x: jax.Array) -> jax.Array:
        linear = beta * x > threshold
        return jnp.where(linear, x, jax.nn.softplus(jnp.where(linear, 0, beta * x)) / beta)

    return pointwise(value, self)


def where(condition: Tensor, self: Any, other: Any) -> Tensor:
    """self where the condition holds, else other."""
    return pointwise(jnp.where, condition, self, other)


def masked_fill(self: Tensor, mask: Tensor, value: Any) -> Tensor:
    """`value` where the mask holds, else self."""
    return pointwise(lambda x, m, v: jnp.where(m, v, x), self, mask, value)


def nan_to_num(
    self: Tensor,
    nan: Number | None = None,
    posinf: Number | None = None,
    neginf: Number | None = None,
) -> Tensor:
    """Numbers for NaN and for the two infinities."""
    return pointwise(partial(jnp.nan_to_num, nan=nan or 0.0, posinf=posinf, neginf=neginf), self)


def to_copy(self: Tensor, dtype: int | None = None, **where_it_lies: Any) -> Tensor:
    """A copy of that type; layout, device and memory format are nothing here."""
    del where_it_lies
    return cast(self, dtype)


def to_dtype(self: Tensor, dtype: int | None = None, **how: Any) -> Tensor:
    """As `to_copy`."""
    return to_copy(self, dtype, **how)


def to_other(self: Tensor, other: Tensor, **how: Any) -> Tensor:
    """In the type of another tensor."""
    return pointwise(lambda x: x.astype(other.array.dtype), self)


def same(self: Tensor, **how: Any) -> Tensor:
    """The tensor as it is: copies, and what is for training alone."""
    return self


def dropout(p: float, train: bool, **given: Tensor) -> Tensor:
    """Nothing, in evaluation.

    Raises:
      NotImplementedError: it is active.
    """
    if train and p:
        raise NotImplementedError("dropout that is active, as in training: call .eval() first")
    (value,) = given.values()  # `input`, or `self` where it is done in place
    return value


UNARY = {
    "abs": jnp.abs,
    "neg": jnp.negative,
    "exp": jnp.exp,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "sqrt": jnp.sqrt,
    "rsqrt": jax.lax.rsqrt,
    "square": jnp.square,
    "reciprocal": jnp.reciprocal,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tanh": jnp.tanh,
    "erf": jax.lax.erf,
    "sigmoid": jax.nn.sigmoid,
    "log_sigmoid": jax.nn.log_sigmoid,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "selu": jax.nn.selu,
    "sign": jnp.sign,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "trunc": jnp.trunc,
    "logical_not": jnp.logical_not,
    "bitwise_not": jnp.bitwise_not,
    "isnan": jnp.isnan,
    "isinf": jnp.isinf,
}
BINARY = {
    "mul": jnp.multiply,
    "remainder": jnp.remainder,
    "fmod": jnp.fmod,
    "floor_divide": jnp.floor_divide,
    "atan2": jnp.atan2,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "max.other": jnp.maximum,
    "min.other": jnp.minimum,
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
}
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: _unary(function) for name, function in UNARY.items()},
    **{name: _binary(function) for name, function in BINARY.items()},
    "add": add,
    "sub": sub,
    "rsub": rsub,
    "div": div,
    "true_divide": div,
    "addcmul": addcmul,
    "addcdiv": addcdiv,
    "lerp": lerp,
    "pow": power,
    "clamp": clamp,
    "clip": clamp,
    "clamp_min": clamp_min,
    "clamp_max": clamp_max,
    "hardtanh": hardtanh,
    "relu6": relu6,
    "hardsigmoid": hardsigmoid,
    "hardswish": hardswish,
    "gelu": gelu,
    "elu": elu,
    "leaky_relu": leaky_relu,
    "prelu": prelu,
    "softplus": softplus,
    "where": where,
    "masked_fill": masked_fill,
    "nan_to_num": nan_to_num,
    "to.dtype": to_dtype,
    "to.device": to_dtype,
    "to.dtype_layout": to_dtype,
    "to.other": to_other,
    "type_as": to_other,
    "_to_copy": to_copy,
    "clone": same,
    "contiguous": same,
    "detach": same,
    "alias": same,
    "lift_fresh_copy": same,
    "positive": same,
    "dropout": dropout,
    "feature_dropout": dropout,
    "alpha_dropout": dropout,
    "feature_alpha_dropout": dropout,
}
