"""Adversarial synthesis: a generator G learns, step by step, what teacher and student tell apart.

x̂ = G(z), z ~ N(0, I). One update descends the generator's loss, a weighted sum of terms, by Adam.
The generator always runs on batch statistics; its running statistics and the power iteration of its
spectral norm move in updates only.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from dfkd_jax.losses import terms as losses
from dfkd_jax.networks.training import Network, descend, generator_optimizer
from dfkd_jax.runtime import draw
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.metrics import Metrics, measured
from dfkd_jax.synthesis.role import Drawn, Synthesizer, View


def create(
    config: ml_collections.ConfigDict, generator: nn.Module, axis: Axis = ONE
) -> Synthesizer:
    """The synthesizer of one configuration; its state is a `Network`.

    An update measures `generator_loss` and, by the name of each, the terms that have a weight.

    Args:
      config: of the run.
      generator: z (B, Z) -> images (B, H, W, C); averages batch statistics over `axis`.
      axis: over which the batch is split; its size divides it.
    """
    batch_size, latent_dim = config.batch_size // axis.size, config.generator.latent_dim
    optimizer = generator_optimizer(config)
    weights = losses.GeneratorLossWeights(
        **{name: config.loss[name] for name in losses.GeneratorLossWeights._fields}
    )
    options = {
        "adversarial_form": config.loss.adversarial_form,
        "adversarial_temperature": config.loss.adversarial_temperature,
        "entropy_logarithm": config.loss.entropy_logarithm,
        "axis": axis,
    }

    def init(key: jax.Array) -> Network:
        variables = generator.init(key, jnp.zeros((2, latent_dim)), train=True)
        params = variables["params"]
        return Network(params, variables.get("batch_stats", {}), optimizer.init(params))

    def generate(
        network: Network, params: Any, key: jax.Array, update_stats: bool
    ) -> tuple[jax.Array, Any]:
        """x̂ = G(z), (B, H, W, C), and the generator's statistics afterwards."""
        z = draw.normal(key, axis.first(batch_size), batch_size, latent_dim)
        images, updated = generator.apply(
            {"params": params, "batch_stats": network.batch_stats},
            z,
            train=True,
            update_stats=update_stats,
            mutable=["batch_stats"],
        )
        return images, updated["batch_stats"]

    def update(network: Network, view: View, key: jax.Array) -> tuple[Network, Metrics]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            images, batch_stats = generate(network, params, key, update_stats=True)
            seen, student = view.teacher(images), view.student(images)
            value, terms = losses.generator_loss(
                seen.logits, seen.features, student, seen.statistics, weights, **options
            )
            return value, (terms, batch_stats)

        (value, (terms, batch_stats)), gradient = jax.value_and_grad(loss, has_aux=True)(
            network.params
        )
        metrics = {"generator_loss": value, **{f"generator_{k}": v for k, v in terms.items()}}
        network = descend(network, axis.mean(gradient), batch_stats, optimizer)
        return network, {name: measured(value) for name, value in metrics.items()}

    def sample(network: Network, key: jax.Array) -> Drawn:
        return Drawn(generate(network, network.params, key, update_stats=False)[0])

    return Synthesizer(init, update, sample)
