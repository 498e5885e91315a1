"""Products of matrices: dense layers, attention."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dfkd_jax.networks.graph.tensors import Tensor, plain, stored, tensor
from dfkd_jax.networks.layers import at_least_float32


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b over the last axis.

    Args:
      input: (..., I).
      weight: (O, I).
      bias: (O,).
    """
    order = input.order
    if order and order[-1] != input.ndim - 1:
        order = tuple(range(input.ndim))
    array = stored(input, order) @ stored(weight, (1, 0))
    return tensor(array if bias is None else array + plain(bias), order)


def matmul(self: Tensor, other: Tensor) -> Tensor:
    """The product of the last two axes, the ones before broadcast."""
    return tensor(jnp.matmul(plain(self), plain(other)))


def matrix_product(self: Tensor, mat2: Tensor) -> Tensor:
    """The product of two matrices, or of each pair in two batches."""
    return matmul(self, mat2)


def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta · self + alpha · mat1 mat2."""
    return tensor(beta * plain(self) + alpha * (plain(mat1) @ plain(mat2)))


def baddbmm(
    self: Tensor, batch1: Tensor, batch2: Tensor, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`addmm` of each pair in two batches."""
    return addmm(self, batch1, batch2, beta, alpha)


def einsum(equation: str, tensors: Sequence[Tensor], path: Any = None) -> Tensor:
    """Einstein's sum, in PyTorch's notation, which NumPy's is too."""
    return tensor(jnp.einsum(equation, *map(plain, tensors)))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(s Q Kᵀ + mask) V, with s = 1 / √E by default.

    Args:
      query: (..., L, E).
      key: (..., S, E).
      value: (..., S, V).
      attn_mask: (..., L, S), added, or where it is true attended to.
      dropout_p: must be 0.
      is_causal: whether no query attends to later keys.
      scale: s.
      enable_gqa: whether heads of keys serve several heads of queries each.

    Raises:
      NotImplementedError: its dropout is active.
    """
    if dropout_p:
        raise NotImplementedError("dropout that is active, as in training: call .eval() first")
    q, k, v = plain(query), plain(key), plain(value)
    if enable_gqa:
        repeats = q.shape[-3] // k.shape[-3]
        k, v = jnp.repeat(k, repeats, axis=-3), jnp.repeat(v, repeats, axis=-3)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = at_least_float32((q * scale) @ jnp.swapaxes(k, -1, -2))
    if is_causal:
        seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(seen, logits, -jnp.inf)
    if attn_mask is not None:
        mask = plain(attn_mask)
        logits = jnp.where(mask, logits, -jnp.inf) if mask.dtype == bool else logits + mask
    return tensor(jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "matmul": matmul,
    "mm": matrix_product,
    "bmm": matrix_product,
    "mv": lambda self, vec: matmul(self, vec),
    "dot": lambda self, tensor: matmul(self, tensor),
    "addmm": addmm,
    "baddbmm": baddbmm,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
}
