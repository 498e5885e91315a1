"""Generative replay: a variational autoencoder remembers what the generator made (PRE-DFKD).

An encoder and a memory generator learn the generator's past output; recalling is decoding latent
vectors that the teacher finds easy. No image is stored (Binici et al., AAAI 2022).

Two habits of the authors' code are off by default, with a switch for each (docs/differences.md):
`config.replay.accumulate_recall_gradient` adds the gradient that the recall objective leaves in the
memory generator's parameters to that of the autoencoder's loss; with
`config.replay.recall_running_statistics` the student's recall runs on the memory generator's
running statistics, not on those of its batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast, no_type_check

import chex
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Integer, Key

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.losses import batch_norm
from dfkd_jax.losses import terms as losses
from dfkd_jax.networks import generator as generator_lib
from dfkd_jax.networks.encoder import Encoder
from dfkd_jax.networks.generator import Generator
from dfkd_jax.networks.models import COMPUTE_DTYPES
from dfkd_jax.replay.scheme import Batch, Replay, RetentionBatch, Teacher
from dfkd_jax.runtime import draw
from dfkd_jax.runtime.arrays import AnyArray
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.devices import WHOLE
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Field, at_least, more_than
from dfkd_jax.runtime.metrics import Metrics, measured

FIELDS = {
    **generator_lib.FIELDS,
    "replay.observe_steps": Field(
        4, at_least(1), "it learns after the first so many student steps of an iteration"
    ),
    "replay.vae_learning_rate": Field(
        0.02 / 40, more_than(0), "of Adam, encoder and memory generator"
    ),
    "replay.kl_weight": Field(1e-5, at_least(0), "of the divergence of the latents from N(0, I)"),
    "replay.recall_steps": Field(1, at_least(0), "Adam steps on the latents of a retention batch"),
    "replay.recall_learning_rate": Field(0.02, more_than(0), "of these steps"),
    "replay.recall_information_entropy": Field(5.0, at_least(0), "ie of the recall, Σ p̄ log10 p̄"),
    "replay.recall_one_hot": Field(1.0, at_least(0), "oh of the recall, CE(T(x̂_m), argmax T(x̂_m))"),
    # Habits of the authors' code, see docs/differences.md:
    "replay.recall_running_statistics": Field(
        False, None, "the student's recall uses running statistics"
    ),
    "replay.accumulate_recall_gradient": Field(
        False, None, "the recall's gradient is added to the memory's next"
    ),
}
"""It learns from config.batch_size // 2 images at a time."""


@no_type_check  # a pytree: JAX puts other things than arrays into it as well
class GenerativeMemory(struct.PyTreeNode):
    """Encoder and memory generator in training; each field has one entry for either."""

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any  # of one Adam over both
    observations: Int[Array, ""]  # so far


def kl_to_normal(
    mean: Float[AnyArray, "B Z"], log_variance: Float[AnyArray, "B Z"]
) -> Float[Array, "B"]:
    """KL(N(μ, σ²) ‖ N(0, I)) = −½ Σ (1 + log σ² − μ² − σ²), the sum over the Z dimensions."""
    chex.assert_equal_shape([mean, log_variance])
    return -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), axis=-1)


def vae_loss(
    original: Batch,
    reconstruction: Batch,
    mean: Float[AnyArray, "B Z"],
    log_variance: Float[AnyArray, "B Z"],
    *,
    kl_weight: float = 1e-5,
    example_weights: Float[Array, "B"] | None = None,
    axis: Axis = ONE,
) -> Float[Array, ""]:
    """d(x, x̃) + d(T(x), T(x̃)) + kl_weight · KL, with d(a, b) = mean |a − b|.

    Args:
      original: x and T(x).
      reconstruction: x̃ and T(x̃), the same shapes.
      mean: μ. log_variance: log σ².
      kl_weight: of the divergence from N(0, I), its mean over the batch.
      example_weights: how much each example counts in the means; None: all the same.
      axis: over which the batch is split.
    """
    chex.assert_trees_all_equal_shapes(original, reconstruction)
    pixels = jnp.mean(losses.absolute(original.images - reconstruction.images), axis=(1, 2, 3))
    logits = losses.l1_distance(reconstruction.logits, original.logits)
    per_example = pixels + logits + kl_weight * kl_to_normal(mean, log_variance)
    if example_weights is None:
        return axis.batch_mean(per_example)
    total = axis.batch_mean(example_weights * per_example)
    return total / axis.batch_mean(example_weights)


def recall_objective(
    latents: Float[AnyArray, "m Z"],
    logits: Float[AnyArray, "m K"],
    *,
    information_entropy: float = 5.0,
    one_hot: float = 1.0,
    axis: Axis = ONE,
) -> Float[Array, ""]:
    """ie · Σ_c p̄_c log10 p̄_c + oh · CE(T, argmax T) + MSE(var z, 1) + MSE(mean z, 0).

    Low where the teacher is sure of every image, all classes come equally often, and the latent
    vectors still look drawn from N(0, I). Mean and (unbiased) variance of z are over the batch, for
    each of the Z dimensions.

    Args:
      latents: z, m ≥ 2 over all devices.
      logits: T of what the memory generator makes of z.
      information_entropy: ie. one_hot: oh.
      axis: over which the batch is split.
    """
    count = latents.shape[0] * axis.size
    mean = axis.batch_mean(latents)
    variance = axis.batch_mean((latents - mean) ** 2) * count / (count - 1)
    return (
        information_entropy * losses.information_entropy_loss(logits, axis)
        + one_hot * losses.one_hot_loss(logits, axis)
        + jnp.mean((variance - 1) ** 2)
        + jnp.mean(mean**2)
    )


def recall_latent(
    latents: Float[Array, "m Z"],
    logits_of: Callable[[jax.Array], jax.Array],
    *,
    steps: int = 1,
    learning_rate: float = 0.02,
    information_entropy: float = 5.0,
    one_hot: float = 1.0,
    axis: Axis = ONE,
) -> Float[Array, "m Z"]:
    """Take `steps` Adam steps on latent vectors down the recall objective.

    Args:
      latents: where to start.
      logits_of: z (m, Z) ↦ T(memory generator(z)) (m, K), differentiable.
      steps: how many. learning_rate: of Adam.
      information_entropy: ie. one_hot: oh, of `recall_objective`.
      axis: over which the batch is split.
    """
    optimizer = optax.adam(learning_rate)

    def objective(latents: Float[Array, "m Z"]) -> Float[Array, ""]:
        return recall_objective(
            latents,
            logits_of(latents),
            information_entropy=information_entropy,
            one_hot=one_hot,
            axis=axis,
        )

    state = optimizer.init(latents)
    for _ in range(steps):  # unrolled: on CPU, XLA's convolutions are slow in compiled loops
        # A mapped gradient is that of the sum over devices, each of which has the same mean.
        gradient = jax.grad(objective)(latents) / axis.size
        updates, state = optimizer.update(gradient, state)
        latents = cast(jax.Array, optax.apply_updates(latents, updates))
    return latents


class Scheme(NamedTuple):
    """What stays the same during a run: the networks, their optimizer and the settings.

    Attributes:
      encoder: images ↦ (μ, log σ²) of the latent vector.
      generator: the memory generator, latent vectors ↦ images.
      optimizer: of both networks together.
      latent_dim: Z.
      num_classes: K, of the teacher.
      recalled_images: m, how many one recall gives on one device.
      kl_weight: of `vae_loss`.
      recall_steps: Adam steps on the latent vectors of one recall.
      recall_learning_rate: of that Adam.
      information_entropy: ie of `recall_objective`.
      one_hot: oh of `recall_objective`.
      running_statistics: whether the student's recall runs on the running statistics.
      accumulates: whether the recall's gradient is added to that of the autoencoder's loss.
      axis: over which batches are split.
    """

    encoder: Encoder
    generator: Generator
    optimizer: optax.GradientTransformation
    latent_dim: int
    num_classes: int
    recalled_images: int
    kl_weight: float
    recall_steps: int
    recall_learning_rate: float
    information_entropy: float
    one_hot: float
    running_statistics: bool
    accumulates: bool
    axis: Axis


class Observed(NamedTuple):
    """What one observation learns from: n current images and m recalled ones, in this order."""

    original: Batch
    weights: Float[Array, "n+m"]  # 1, and for recalled ones 0 while the memory knows nothing
    noise: Float[Array, "n+m Z"]  # ε of the latent vectors μ + σ ε


def create_scheme(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Scheme:
    """The networks and settings of one configuration; for the arguments see `create`."""
    settings = config.replay
    latent_dim, channels = config.generator.latent_dim, tuple(config.generator.channels)
    common = {"axis_name": axis.name, "dtype": COMPUTE_DTYPES[config.compute_dtype]}
    return Scheme(
        encoder=Encoder(latent_dim, channels[::-1], **common),
        generator=Generator(spec.image_shape, channels, spectral_norm=False, **common),
        optimizer=optax.adam(settings.vae_learning_rate),
        latent_dim=latent_dim,
        num_classes=spec.num_classes,
        recalled_images=settings.entry_size // axis.size,
        kl_weight=settings.kl_weight,
        recall_steps=settings.recall_steps,
        recall_learning_rate=settings.recall_learning_rate,
        information_entropy=settings.recall_information_entropy,
        one_hot=settings.recall_one_hot,
        running_statistics=settings.recall_running_statistics,
        accumulates=settings.accumulate_recall_gradient,
        axis=axis,
    )


def init(scheme: Scheme, key: Key[Array, ""]) -> GenerativeMemory:
    """A memory that has observed nothing."""
    keys = {name: draw.stream(key, name) for name in ("encoder", "generator")}
    images = jnp.zeros((2, *scheme.generator.image_shape))
    variables = {
        "encoder": scheme.encoder.init(keys["encoder"], images),
        "generator": scheme.generator.init(keys["generator"], jnp.zeros((2, scheme.latent_dim))),
    }
    params = {name: value["params"] for name, value in variables.items()}
    return GenerativeMemory(
        params=params,
        batch_stats={name: value["batch_stats"] for name, value in variables.items()},
        opt_state=scheme.optimizer.init(params),
        observations=jnp.zeros((), jnp.int32),
    )


def standard_normal(
    scheme: Scheme, key: Key[Array, ""], count: int
) -> Float[Array, "{count} {scheme.latent_dim}"]:
    """`count` of N(0, I), for this device's examples."""
    return draw.normal(key, scheme.axis.first(count), count, scheme.latent_dim)


def decoded(
    scheme: Scheme,
    memory: GenerativeMemory,
    params: Any,
    latents: Float[Array, "m Z"],
    *,
    train: bool,
) -> Float[Array, "m H W C"]:
    """What the memory generator makes of z.

    Args:
      scheme: of the scheme.
      memory: whose running statistics count without `train`; they stay as they are.
      params: of both networks, in place of those of `memory`.
      latents: z.
      train: whether batch norm takes the statistics of this batch.
    """
    variables = {"params": params["generator"], "batch_stats": memory.batch_stats["generator"]}
    images = scheme.generator.apply(variables, latents, train=train, update_stats=False)
    return cast(jax.Array, images)


def recalled(
    scheme: Scheme, memory: GenerativeMemory, key: Key[Array, ""], teacher: Teacher, *, train: bool
) -> RetentionBatch:
    """Images of latent vectors that the teacher finds easy, without a gradient.

    Args:
      scheme: of the scheme.
      memory: whose generator decodes; weight 0 before its first observation.
      key: of the latent vectors that `recall_latent` starts from.
      teacher: who judges.
      train: whether batch norm takes the statistics of this batch, or running ones.
    """

    def images_of(latents: jax.Array) -> jax.Array:
        return decoded(scheme, memory, memory.params, latents, train=train)

    latents = recall_latent(
        standard_normal(scheme, key, scheme.recalled_images),
        lambda latents: teacher(images_of(latents))[0],
        steps=scheme.recall_steps,
        learning_rate=scheme.recall_learning_rate,
        information_entropy=scheme.information_entropy,
        one_hot=scheme.one_hot,
        axis=scheme.axis,
    )
    images = lax.stop_gradient(images_of(latents))
    logits = lax.stop_gradient(teacher(images)[0])
    weight = (memory.observations > 0).astype(images.dtype)
    return RetentionBatch(images, logits, weight)


def recall(
    scheme: Scheme, memory: GenerativeMemory, key: Key[Array, ""], teacher: Teacher
) -> RetentionBatch:
    """The retention batch of the student."""
    return recalled(scheme, memory, key, teacher, train=not scheme.running_statistics)


def recall_gradient(
    scheme: Scheme, memory: GenerativeMemory, key: Key[Array, ""], teacher: Teacher
) -> Any:
    """∇ of the recall objective, where its one step starts, by the memory's parameters."""
    latents = standard_normal(scheme, key, scheme.recalled_images)

    def objective(params: dict[str, Any]) -> jax.Array:
        images = decoded(scheme, memory, params, latents, train=True)
        return recall_objective(
            latents,
            teacher(images)[0],
            information_entropy=scheme.information_entropy,
            one_hot=scheme.one_hot,
            axis=scheme.axis,
        )

    return jax.grad(objective)(memory.params)


def observed(
    scheme: Scheme,
    batch: Batch,
    own: RetentionBatch,
    knows: Float[Array, ""],
    key: Key[Array, ""],
) -> Observed:
    """Put current and recalled images together, and draw the noise of their latent vectors.

    Args:
      scheme: of the scheme.
      batch: n current images.
      own: m images that the memory has recalled.
      knows: the weight of those.
      key: of the observation.
    """
    parts = (batch, Batch(own.images, own.logits))
    counts = [part.images.shape[0] for part in parts]
    keys = [draw.stream(key, name) for name in ("noise_of_current", "noise_of_recalled")]
    return Observed(
        original=jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts),
        weights=jnp.concatenate(
            [jnp.ones(counts[0], knows.dtype), jnp.broadcast_to(knows, counts[1:])]
        ),
        noise=jnp.concatenate(
            [standard_normal(scheme, k, n) for k, n in zip(keys, counts, strict=True)]
        ),
    )


def loss(
    scheme: Scheme, params: Any, batch_stats: Any, examples: Observed, teacher: Teacher
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """`vae_loss` of what the networks make of the examples, and their moved running statistics.

    An example of weight 0 counts neither in the loss nor in the statistics of the batch.
    """
    original, weights, noise = examples
    variables = {
        name: {"params": params[name], "batch_stats": batch_stats[name]}
        for name in ("encoder", "generator")
    }
    with batch_norm.masked(weights > 0):
        (mean, log_variance), encoder_updates = scheme.encoder.apply(
            variables["encoder"], original.images, mutable=["batch_stats"]
        )
        images, generator_updates = scheme.generator.apply(
            variables["generator"],
            mean + jnp.exp(log_variance / 2) * noise,
            mutable=["batch_stats"],
        )
    value = vae_loss(
        original,
        Batch(images, teacher(images)[0]),
        mean,
        log_variance,
        kl_weight=scheme.kl_weight,
        example_weights=weights,
        axis=scheme.axis,
    )
    return value, {
        "encoder": encoder_updates["batch_stats"],
        "generator": generator_updates["batch_stats"],
    }


def observe(
    scheme: Scheme,
    memory: GenerativeMemory,
    batch: Batch,
    key: Key[Array, ""],
    iteration: Integer[Array, ""],
    teacher: Teacher,
) -> tuple[GenerativeMemory, Metrics]:
    """One Adam step of both networks on current and recalled images."""
    recall_key = draw.stream(key, "recall")
    own = recalled(scheme, memory, recall_key, teacher, train=True)
    knows = jnp.where(iteration > 0, own.weight, 0)
    examples = observed(scheme, batch, own, knows, key)
    (value, batch_stats), gradient = jax.value_and_grad(loss, argnums=1, has_aux=True)(
        scheme, memory.params, memory.batch_stats, examples, teacher
    )
    if scheme.accumulates:
        left = recall_gradient(scheme, memory, recall_key, teacher)
        gradient = jax.tree.map(lambda g, more: g + knows * more, gradient, left)
    gradient = scheme.axis.mean(gradient)
    updates, opt_state = scheme.optimizer.update(gradient, memory.opt_state)
    learned = GenerativeMemory(
        params=cast(dict, optax.apply_updates(memory.params, updates)),
        batch_stats=batch_stats,
        opt_state=opt_state,
        observations=memory.observations + 1,
    )
    return learned, {"memory_loss": measured(value)}


def exhibit(
    scheme: Scheme, memory: GenerativeMemory, count: int, key: Key[Array, ""], teacher: Teacher
) -> Batch:
    """Recall `count` images, none before the first observation; for figures."""
    rounds = -(-count // scheme.recalled_images) if memory.observations > 0 else 0
    compiled = jax.jit(lambda memory, key: recall(scheme, memory, key, teacher))
    recalls = [compiled(memory, draw.stream(key, "exhibit", i)) for i in range(rounds)]
    if not recalls:
        images = jnp.zeros((0, *scheme.generator.image_shape))
        return Batch(images, jnp.zeros((0, scheme.num_classes)))
    return Batch(
        jnp.concatenate([one.images for one in recalls])[:count],
        jnp.concatenate([one.logits for one in recalls])[:count],
    )


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Replay:
    """The scheme for one configuration.

    An observation is one Adam step of both networks on `vae_loss`, for the current images together
    with images that the memory recalls itself, so that it does not forget. In iteration 0 of a run
    (all its observations, as in the authors' code), and in any later iteration if nothing was
    observed before it, the memory knows nothing yet: the recalled images then have weight 0 in the
    loss and in the batch statistics, and the step is that of the current images alone.

    The running statistics of both networks move in observations only, in the reconstructing pass.

    Args:
      config: the run's.
      spec: of the images and classes.
      axis: over which batches are split; its size divides `config.replay.entry_size` and
        `config.batch_size // 2`.

    Raises:
      UserError: fields that do not go together; one sentence.
    """
    settings = config.replay
    if settings.accumulate_recall_gradient and settings.recall_steps != 1:
        raise UserError(
            "config.replay.accumulate_recall_gradient is True but config.replay.recall_steps is "
            f"{settings.recall_steps}; allowed is 1."
        )
    if settings.entry_size < 2:
        raise UserError(
            f"config.replay.entry_size is {settings.entry_size}; generative replay needs 2 or "
            "more, for the variance over the recalled batch."
        )
    scheme = create_scheme(config, spec, axis)
    observing = min(settings.observe_steps, config.student.steps)
    return Replay(
        partial(init, scheme),
        partial(observe, scheme),
        partial(recall, scheme),
        observes_after=(True,) * observing + (False,) * (config.student.steps - observing),
        observed_images=config.batch_size // 2 // axis.size,
        exhibit=partial(exhibit, scheme),
        title="memory generator, recalled",
        layout=WHOLE,
        # A device recalls its share of a retention batch and observes its share of half a batch.
        split_sizes={
            "replay.entry_size": settings.entry_size,
            "batch_size // 2": config.batch_size // 2,
        },
    )
