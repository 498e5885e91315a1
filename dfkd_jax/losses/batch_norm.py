"""Batch norm seen from outside the network: masking examples, and reading input statistics.

Both work on any Flax network that is built of `flax.linen.BatchNorm`, by intercepting its calls.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dfkd_jax.losses.terms import LayerStatistics
from dfkd_jax.networks import convolution
from dfkd_jax.networks.given import AnyClassifier
from dfkd_jax.networks.layers import at_least_float32
from dfkd_jax.runtime.axis import ONE, Axis


def _is_batch_norm_call(context: nn.module.InterceptorContext) -> bool:
    return isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__"


@contextlib.contextmanager
def masked(example_mask: Bool[Array, "B"]) -> Iterator[None]:
    """Within this context batch statistics are of the examples whose mask is true."""
    chex.assert_type(example_mask, bool)

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
def recorded(axis: Axis = ONE) -> Iterator[list[LayerStatistics]]:
    """Within this context, collect what enters each batch-norm layer, beside what it remembers.

    The list grows as the network is applied; statistics are of the global batch, at least float32,
    and differentiable. The variance is the mean square of the centred values: in half precision,
    or far from 0, E[x²] − E[x]² would be rounding alone.
    """
    layers: list[LayerStatistics] = []

    def interceptor(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if _is_batch_norm_call(context) and context.module.has_variable("batch_stats", "mean"):
            x = at_least_float32(args[0])

            def mean_of(x: jax.Array) -> jax.Array:
                return axis.mean(jnp.mean(x, tuple(range(x.ndim - 1))))

            mean = mean_of(x)
            running = {k: context.module.get_variable("batch_stats", k) for k in ("mean", "var")}
            variance = mean_of((x - mean) ** 2)
            layers.append(
                LayerStatistics(mean, variance, running["mean"], running["var"], inputs=x)
            )
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield layers


def count(module: AnyClassifier, image_shape: tuple[int, int, int]) -> int:
    """How many layers of a classifier `recorded` finds; traced, not computed."""
    return len(_traced(module, image_shape))


def map_sizes(module: AnyClassifier, image_shape: tuple[int, int, int]) -> set[tuple[int, int]]:
    """The sizes of its attention maps, see `dfkd_jax.losses.attention`; traced, not computed."""
    return {
        shape[1:3] for shape in _traced(module, image_shape) if len(shape) == 4 and shape[1] > 1
    }


def _traced(module: AnyClassifier, image_shape: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """The shape of what enters each batch norm."""

    def look() -> jax.Array:
        images = jnp.zeros((2, *image_shape))
        with convolution.plain():  # which asks for no backend
            variables = module.init(jax.random.key(0), images, train=False)
            with recorded() as layers:
                module.apply(variables, images, train=False)
        found.extend(layer.inputs.shape for layer in layers if layer.inputs is not None)
        return images

    found: list[tuple[int, ...]] = []
    jax.eval_shape(look)
    return found
