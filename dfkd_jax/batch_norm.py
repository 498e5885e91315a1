"""Batch norm seen from outside the network: masking examples, and reading input statistics.

Both work on any Flax network that is built of `flax.linen.BatchNorm`, by intercepting its calls.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dfkd_jax.losses import LayerStatistics


def _is_batch_norm_call(context: nn.module.InterceptorContext) -> bool:
    return isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__"


@contextlib.contextmanager
def masked(example_mask: jax.Array) -> Iterator[None]:
    """Within this context batch statistics are of the examples with mask 1 only; mask is (B,)."""

    def interceptor(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if _is_batch_norm_call(context):
            shape = (-1,) + (1,) * (args[0].ndim - 1)
            kwargs = {**kwargs, "mask": example_mask.reshape(shape)}
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield


@contextlib.contextmanager
def recorded(axis_name: str | None = None) -> Iterator[list[LayerStatistics]]:
    """Within this context, collect what enters each batch-norm layer, beside what it remembers.

    The list grows as the network is applied; statistics are of the global batch and differentiable.
    """
    layers: list[LayerStatistics] = []

    def interceptor(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if _is_batch_norm_call(context) and context.module.has_variable("batch_stats", "mean"):
            x = args[0]
            axes = tuple(range(x.ndim - 1))
            mean, square = jnp.mean(x, axes), jnp.mean(x**2, axes)
            if axis_name is not None:
                mean, square = lax.pmean((mean, square), axis_name)
            running = {k: context.module.get_variable("batch_stats", k) for k in ("mean", "var")}
            layers.append(LayerStatistics(mean, square - mean**2, running["mean"], running["var"]))
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield layers
