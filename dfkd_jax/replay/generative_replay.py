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
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct
from jax import lax

from dfkd_jax.losses import batch_norm
from dfkd_jax.losses import terms as losses
from dfkd_jax.networks import generator as generator_lib
from dfkd_jax.networks.encoder import Encoder
from dfkd_jax.networks.generator import Generator
from dfkd_jax.networks.models import COMPUTE_DTYPES
from dfkd_jax.replay.scheme import Batch, Replay, RetentionBatch, Teacher
from dfkd_jax.runtime import draw
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


@struct.dataclass
class GenerativeMemory:
    """Encoder and memory generator in training; each field has one entry for either."""

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any  # of one Adam over both
    observations: jax.Array  # () int32, so far


def kl_to_normal(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(N(μ, σ²) ‖ N(0, I)) = −½ Σ (1 + log σ² − μ² − σ²), (B, Z) × (B, Z) → (B,)."""
    chex.assert_equal_shape([mean, log_variance])
    return -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), axis=-1)


def vae_loss(
    original: Batch,
    reconstruction: Batch,
    mean: jax.Array,
    log_variance: jax.Array,
    *,
    kl_weight: float = 1e-5,
    example_weights: jax.Array | None = None,
    axis: Axis = ONE,
) -> jax.Array:
    """d(x, x̃) + d(T(x), T(x̃)) + kl_weight · KL, with d(a, b) = mean |a − b|.

    Args:
      original: x (B, H, W, C) and T(x) (B, K).
      reconstruction: x̃ and T(x̃), the same shapes.
      mean: μ, (B, Z). log_variance: log σ², (B, Z).
      kl_weight: of the divergence from N(0, I), its mean over the batch.
      example_weights: (B,), how much each example counts in the means; None: all the same.
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
    latents: jax.Array,
    logits: jax.Array,
    *,
    information_entropy: float = 5.0,
    one_hot: float = 1.0,
    axis: Axis = ONE,
) -> jax.Array:
    """ie · Σ_c p̄_c log10 p̄_c + oh · CE(T, argmax T) + MSE(var z, 1) + MSE(mean z, 0).

    Low where the teacher is sure of every image, all classes come equally often, and the latent
    vectors still look drawn from N(0, I). Mean and (unbiased) variance of z are over the batch, for
    each of the Z dimensions.

    Args:
      latents: z, (m, Z), m ≥ 2 over all devices.
      logits: T of what the memory generator makes of z, (m, K).
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
    latents: jax.Array,
    logits_of: Callable[[jax.Array], jax.Array],
    *,
    steps: int = 1,
    learning_rate: float = 0.02,
    information_entropy: float = 5.0,
    one_hot: float = 1.0,
    axis: Axis = ONE,
) -> jax.Array:
    """Take `steps` Adam steps on latent vectors (m, Z) down the recall objective.

    Args:
      latents: where to start.
      logits_of: z (m, Z) ↦ T(memory generator(z)) (m, K), differentiable.
      steps: how many. learning_rate: of Adam.
      information_entropy: ie. one_hot: oh, of `recall_objective`.
      axis: over which the batch is split.
    """
    optimizer = optax.adam(learning_rate)

    def objective(latents: jax.Array) -> jax.Array:
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
        latents = optax.apply_updates(latents, updates)
    return latents


def create(
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    axis: Axis = ONE,
) -> Replay:
    """The scheme for one configuration.

    An observation is one Adam step of both networks on `vae_loss`, for the current images together
    with images that the memory recalls itself, so that it does not forget. In iteration 0 of a run
    (all its observations, as in the authors' code), and in any later iteration if nothing was
    observed before it, the memory knows nothing yet: the recalled images then have weight 0 in the
    loss and in the batch statistics, and the step is that of the current images alone.

    The running statistics of both networks move in observations only, in the reconstructing pass.

    Args:
      config: the run's.
      image_shape: (H, W, C).
      num_classes: of the teacher.
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
    latent_dim, channels = config.generator.latent_dim, tuple(config.generator.channels)
    common = {"axis_name": axis.name, "dtype": COMPUTE_DTYPES[config.compute_dtype]}
    encoder = Encoder(latent_dim, channels[::-1], **common)
    generator = Generator(image_shape, channels, spectral_norm=False, **common)
    optimizer = optax.adam(settings.vae_learning_rate)
    recalled_images = settings.entry_size // axis.size

    def normal(key: jax.Array, count: int) -> jax.Array:
        return draw.normal(key, axis.first(count), count, latent_dim)

    def init(key: jax.Array) -> GenerativeMemory:
        keys = {name: draw.stream(key, name) for name in ("encoder", "generator")}
        variables = {
            "encoder": encoder.init(keys["encoder"], jnp.zeros((2, *image_shape))),
            "generator": generator.init(keys["generator"], jnp.zeros((2, latent_dim))),
        }
        params = {name: value["params"] for name, value in variables.items()}
        return GenerativeMemory(
            params=params,
            batch_stats={name: value["batch_stats"] for name, value in variables.items()},
            opt_state=optimizer.init(params),
            observations=jnp.zeros((), jnp.int32),
        )

    def variables_of(memory: GenerativeMemory, params: dict, name: str) -> dict[str, Any]:
        return {"params": params[name], "batch_stats": memory.batch_stats[name]}

    objective = {
        "information_entropy": settings.recall_information_entropy,
        "one_hot": settings.recall_one_hot,
        "axis": axis,
    }

    def decoded(
        memory: GenerativeMemory, params: dict, latents: jax.Array, train: bool
    ) -> jax.Array:
        """What the memory generator makes of z, on statistics of this batch or running ones."""
        variables = variables_of(memory, params, "generator")
        return generator.apply(variables, latents, train=train, update_stats=False)

    def recall(memory: GenerativeMemory, key: jax.Array, teacher: Teacher) -> RetentionBatch:
        """The student's."""
        return recalled(memory, key, teacher, train=not settings.recall_running_statistics)

    def recalled(
        memory: GenerativeMemory, key: jax.Array, teacher: Teacher, train: bool
    ) -> RetentionBatch:
        def images_of(latents: jax.Array) -> jax.Array:
            return decoded(memory, memory.params, latents, train)

        latents = recall_latent(
            normal(key, recalled_images),
            lambda latents: teacher(images_of(latents))[0],
            steps=settings.recall_steps,
            learning_rate=settings.recall_learning_rate,
            **objective,
        )
        images = lax.stop_gradient(images_of(latents))
        logits = lax.stop_gradient(teacher(images)[0])
        weight = (memory.observations > 0).astype(images.dtype)
        return RetentionBatch(images, logits, weight)

    def recall_gradient(memory: GenerativeMemory, key: jax.Array, teacher: Teacher) -> Any:
        """∇ of the recall objective, where its one step starts, by the memory's parameters."""
        latents = normal(key, recalled_images)

        def loss(params: dict[str, Any]) -> jax.Array:
            images = decoded(memory, params, latents, train=True)
            return recall_objective(latents, teacher(images)[0], **objective)

        return jax.grad(loss)(memory.params)

    def observe(
        memory: GenerativeMemory,
        batch: Batch,
        key: jax.Array,
        iteration: jax.Array,
        teacher: Teacher,
    ) -> tuple[GenerativeMemory, Metrics]:
        recall_key = draw.stream(key, "recall")
        own = recalled(memory, recall_key, teacher, train=True)
        parts = (batch, Batch(own.images, own.logits))
        original = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        counts = [part.images.shape[0] for part in parts]
        knows = jnp.where(iteration > 0, own.weight, 0)
        weights = jnp.concatenate(
            [jnp.ones(counts[0], knows.dtype), jnp.broadcast_to(knows, counts[1:])]
        )
        keys = [draw.stream(key, name) for name in ("noise_of_current", "noise_of_recalled")]
        noise = jnp.concatenate([normal(k, n) for k, n in zip(keys, counts, strict=True)])

        def loss(params: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
            with batch_norm.masked(weights > 0):
                (mean, log_variance), encoder_updates = encoder.apply(
                    variables_of(memory, params, "encoder"),
                    original.images,
                    mutable=["batch_stats"],
                )
                images, generator_updates = generator.apply(
                    variables_of(memory, params, "generator"),
                    mean + jnp.exp(log_variance / 2) * noise,
                    mutable=["batch_stats"],
                )
            value = vae_loss(
                original,
                Batch(images, teacher(images)[0]),
                mean,
                log_variance,
                kl_weight=settings.kl_weight,
                example_weights=weights,
                axis=axis,
            )
            return value, {
                "encoder": encoder_updates["batch_stats"],
                "generator": generator_updates["batch_stats"],
            }

        (value, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(memory.params)
        if settings.accumulate_recall_gradient:
            left = recall_gradient(memory, recall_key, teacher)
            gradient = jax.tree.map(lambda g, more: g + knows * more, gradient, left)
        gradient = axis.mean(gradient)
        updates, opt_state = optimizer.update(gradient, memory.opt_state)
        learned = GenerativeMemory(
            params=optax.apply_updates(memory.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            observations=memory.observations + 1,
        )
        return learned, {"memory_loss": measured(value)}

    def exhibit(memory: GenerativeMemory, count: int, key: jax.Array, teacher: Teacher) -> Batch:
        rounds = -(-count // recalled_images) if memory.observations > 0 else 0
        compiled = jax.jit(lambda memory, key: recall(memory, key, teacher))
        recalls = [compiled(memory, draw.stream(key, "exhibit", i)) for i in range(rounds)]
        if not recalls:
            return Batch(jnp.zeros((0, *image_shape)), jnp.zeros((0, num_classes)))
        return Batch(
            jnp.concatenate([one.images for one in recalls])[:count],
            jnp.concatenate([one.logits for one in recalls])[:count],
        )

    observing = min(settings.observe_steps, config.student.steps)
    return Replay(
        init,
        observe,
        recall,
        observes_after=(True,) * observing + (False,) * (config.student.steps - observing),
        observed_images=config.batch_size // 2 // axis.size,
        exhibit=exhibit,
        title="memory generator, recalled",
        layout=WHOLE,
        # A device recalls its share of a retention batch and observes its share of half a batch.
        split_sizes={
            "replay.entry_size": settings.entry_size,
            "batch_size // 2": config.batch_size // 2,
        },
    )
