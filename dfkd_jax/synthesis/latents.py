"""A source of images that starts from z ~ N(0, I) and classes drawn at random.

What CMI and Fast-Datafree have in common; they differ in where the generator starts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.networks.pixel_generator import PixelGenerator
from dfkd_jax.runtime import draw
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.synthesis.inversion import Source, Start


def create(
    generator: PixelGenerator,
    spec: DatasetSpec,
    batch_size: int,
    latent_dim: int,
    *,
    parameters: Callable[[Any, jax.Array], Any],
    generator_optimizer: optax.GradientTransformation,
    latent_optimizer: optax.GradientTransformation,
    axis: Axis = ONE,
) -> Source:
    """The source; its `init` keeps nothing.

    Args:
      generator: G, pixels in [0, 1].
      spec: of the images.
      batch_size: B, of all devices.
      latent_dim: Z.
      parameters: (kept, key) -> those that a round starts from.
      generator_optimizer: of G.
      latent_optimizer: of z.
      axis: over which the batch is split.
    """
    count = batch_size // axis.size

    def start(kept: Any, key: jax.Array, rounds: jax.Array) -> Start:
        del rounds
        first = axis.first(count)
        latents = draw.normal(draw.stream(key, "latents"), first, count, latent_dim)
        keys = draw.example_keys(draw.stream(key, "targets"), first, count)
        targets = jax.vmap(lambda k: jax.random.randint(k, (), 0, spec.num_classes))(keys)
        return Start(parameters(kept, draw.stream(key, "generator")), {"latents": latents}, targets)

    def render(params: Any, inputs: dict[str, jax.Array], targets: jax.Array) -> jax.Array:
        del targets
        return pixels(generator, params, inputs["latents"], spec)

    return Source(
        init=lambda key: (),
        start=start,
        render=render,
        input_shapes={"latents": (latent_dim,)},
        generator_optimizer=generator_optimizer,
        input_optimizer=latent_optimizer,
    )


def initial(generator: PixelGenerator, features: int, key: jax.Array) -> Any:
    """Parameters that G starts from, for inputs of so many features."""
    return generator.init(key, jnp.zeros((2, features)))["params"]


def pixels(
    generator: PixelGenerator, params: Any, features: jax.Array, spec: DatasetSpec
) -> jax.Array:
    """G of features (B, D), in the teacher's space; on batch statistics, of which none are kept."""
    made, _ = generator.apply({"params": params}, features, mutable=["batch_stats"])
    mean, std = (jnp.asarray(x, made.dtype) for x in (spec.mean, spec.std))
    return (made - mean) / std
