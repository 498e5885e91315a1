"""Adversarial synthesis: a generator G learns, step by step, what teacher and student tell apart.

x̂ = G(z), z ~ N(0, I). One update descends the generator's loss, a weighted sum of terms, by Adam.
The generator always runs on batch statistics; its running statistics and the power iteration of its
spectral norm move in updates only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.losses import terms as losses
from dfkd_jax.networks import generator as generator_lib
from dfkd_jax.networks.conditional_generator import ConditionalGenerator
from dfkd_jax.networks.generator import Generator
from dfkd_jax.networks.models import COMPUTE_DTYPES
from dfkd_jax.networks.pixel_generator import NormalizedPixelGenerator, PixelGenerator
from dfkd_jax.networks.training import Network, descend, generator_optimizer
from dfkd_jax.runtime import draw
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Field, at_least, more_than, one_of, or_none
from dfkd_jax.runtime.metrics import Metrics, measured
from dfkd_jax.synthesis.role import STUDENT_MODES, Drawn, Seen, Synthesizer, View

FIELDS = {
    **generator_lib.FIELDS,
    "generator.output": Field(
        "normalized",
        one_of(("normalized", "pixels")),
        "normalized: LRA's, tanh and batch norm; pixels: a sigmoid, as of Fast-Datafree and NAYER, "
        "whose network has no spectral norm",
    ),
    "generator.spectral_norm": Field(True, None, "convolution kernels over their spectral norm"),
    "generator.learning_rate": Field(0.02, more_than(0), "of Adam"),
    "generator.final_learning_rate": Field(
        float, or_none(at_least(0)), "a cosine over the epochs to it; None: the rate is constant"
    ),
    "generator.steps": Field(1, at_least(1), "gen_iter: generator steps an iteration"),
    "generator.student_mode": Field(
        "train",
        one_of(STUDENT_MODES),
        "the student's when the generator looks at it, see `Synthesizer`",
    ),
    # Weights of the terms:
    "loss.one_hot": Field(1.0, None, "oh, CE(T(x̂), argmax T(x̂))"),
    "loss.information_entropy": Field(5.0, None, "ie, class balance Σ p̄ log p̄"),
    "loss.entropy_logarithm": Field(
        "log10", one_of(losses.LOGARITHMS), "of the class balance; or ln, as in DFQ"
    ),
    "loss.activation": Field(0.1, None, "a, −mean |f_T(x̂)|"),
    "loss.adversarial": Field(1.0, None, "where student and teacher differ"),
    "loss.adversarial_form": Field(
        "js", one_of(losses.ADVERSARIAL), "1 − JS, l1: −mean |T − S|, kl: −KL(T ‖ S)"
    ),
    "loss.adversarial_temperature": Field(3.0, more_than(0), "τ of the js and kl forms"),
    "loss.batch_norm": Field(0.0, None, "bn, distance to the teacher's running statistics"),
}


class Adversary(NamedTuple):
    """What is static in adversarial synthesis.

    Attributes:
      generator: G, or a `ConditionalGenerator`.
      optimizer: of it.
      weights: of the terms.
      options: of `losses.generator_loss`.
      batch_size: of one device.
      latent_dim: Z.
      classes: K where G is told its class, else 0.
      axis: over which the batch is split.
    """

    generator: Any
    optimizer: optax.GradientTransformation
    weights: losses.GeneratorLossWeights
    options: dict[str, Any]
    batch_size: int
    latent_dim: int
    classes: int
    axis: Axis


def create(
    config: ml_collections.ConfigDict,
    spec: DatasetSpec,
    axis: Axis = ONE,
    conditional: bool = False,
) -> Synthesizer:
    """The synthesizer of one configuration; its state is a `Network`.

    An update measures `generator_loss` and, by the name of each, the terms that have a weight.

    Args:
      config: of the run.
      spec: of the images.
      axis: over which the batch is split; its size divides it.
      conditional: whether the generator is told which class to make, x̂ = G(z + e_y) with learned
        embeddings e and y drawn at random, so that there can be a term of the targets.

    Raises:
      UserError: the generator cannot make such images; one sentence.
    """
    generator: Any = create_generator(config, spec, axis)
    if conditional:
        generator = ConditionalGenerator(generator, spec.num_classes)
    names = losses.GeneratorLossWeights._fields
    adversary = Adversary(
        generator,
        generator_optimizer(config),
        losses.GeneratorLossWeights(**{name: config.loss.get(name, 0.0) for name in names}),
        options={
            "adversarial_form": config.loss.adversarial_form,
            "adversarial_temperature": config.loss.adversarial_temperature,
            "entropy_logarithm": config.loss.entropy_logarithm,
            "axis": axis,
        },
        batch_size=config.batch_size // axis.size,
        latent_dim=config.generator.latent_dim,
        classes=spec.num_classes if conditional else 0,
        axis=axis,
    )
    needs = {need: f"loss.{name}" for name, need in losses.NEEDS.items() if config.loss[name]}
    return Synthesizer(
        partial(init, adversary),
        partial(update, adversary),
        partial(sample, adversary),
        needs=needs,
        student_mode=config.generator.student_mode,
    )


def init(adversary: Adversary, key: jax.Array, shapes: Callable[[], Seen]) -> Network:
    """The generator before its first update."""
    del shapes
    z, y = jnp.zeros((2, adversary.latent_dim)), jnp.zeros(2, jnp.int32)
    given = (z, y) if adversary.classes else (z,)
    variables = adversary.generator.init(key, *given, train=True)
    params = variables["params"]
    return Network(params, variables.get("batch_stats", {}), adversary.optimizer.init(params))


def generate(
    adversary: Adversary, network: Network, params: Any, key: jax.Array, update_stats: bool
) -> tuple[Drawn, Any]:
    """x̂ = G(z), (B, H, W, C), and the generator's statistics afterwards."""
    count, axis = adversary.batch_size, adversary.axis
    z = draw.normal(key, axis.first(count), count, adversary.latent_dim)
    targets = None
    if adversary.classes:
        keys = draw.example_keys(draw.stream(key, "targets"), axis.first(count), count)
        targets = jax.vmap(lambda k: jax.random.randint(k, (), 0, adversary.classes))(keys)
    images, updated = adversary.generator.apply(
        {"params": params, "batch_stats": network.batch_stats},
        *((z, targets) if adversary.classes else (z,)),
        train=True,
        update_stats=update_stats,
        mutable=["batch_stats"],
    )
    return Drawn(images, targets), updated["batch_stats"]


def update(
    adversary: Adversary, network: Network, view: View, key: jax.Array
) -> tuple[Network, Metrics]:
    """One step of Adam on the generator's loss."""
    weights = adversary.weights

    def loss(params: Any) -> tuple[jax.Array, Any]:
        drawn, batch_stats = generate(adversary, network, params, key, update_stats=True)
        seen = view.teacher(drawn.images)
        student = view.student(drawn.images) if weights.adversarial else seen.logits
        value, terms = losses.generator_loss(
            seen.logits,
            seen.features,
            student,
            seen.statistics,
            weights,
            targets=drawn.targets,
            **adversary.options,
        )
        return value, (terms, batch_stats)

    (value, (terms, batch_stats)), gradient = jax.value_and_grad(loss, has_aux=True)(network.params)
    metrics = {"generator_loss": value, **{f"generator_{k}": v for k, v in terms.items()}}
    gradient = adversary.axis.mean(gradient)
    network = descend(network, gradient, batch_stats, adversary.optimizer)
    return network, {name: measured(value) for name, value in metrics.items()}


def sample(adversary: Adversary, network: Network, key: jax.Array) -> Drawn:
    """A batch that the generator makes now."""
    return generate(adversary, network, network.params, key, update_stats=False)[0]


def create_generator(
    config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE
) -> Generator | NormalizedPixelGenerator:
    """G: z (B, Z) -> images (B, H, W, C); averages batch statistics over `axis`."""
    try:
        generator_lib.base_size(spec.image_shape)
    except UserError as error:
        raise UserError(f"config.dataset.image_size is {spec.image_shape[0]}: {error}") from error
    channels = tuple(config.generator.channels)
    options = {"axis_name": axis.name, "dtype": COMPUTE_DTYPES[config.compute_dtype]}
    if config.generator.output == "pixels":
        pixels = PixelGenerator(spec.image_shape, channels, **options)
        return NormalizedPixelGenerator(pixels, tuple(spec.mean), tuple(spec.std))
    return Generator(spec.image_shape, channels, config.generator.spectral_norm, **options)
