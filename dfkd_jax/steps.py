"""The steps of the algorithm, pure functions (state, teacher variables) -> state.

    generator step   min_G of the generator's loss, through the frozen teacher and the student
    student step     min_θ L_acq(θ) + λ L_ret(θ − α ∇L_acq(θ)) on a fresh and a replayed batch, or
                     another of `objectives.OBJECTIVES`
    observe step     the replay scheme learns from the last fresh batch

Batch norm, decided once: the student runs in training mode (batch statistics), for the generator
too unless config.generator.student_mode says otherwise. The running statistics it keeps come from
the outer pass over θ: from x̂, or from [x̂; x̂_m] for the concatenated objectives. The pass at θ' and
every other pass over the replayed batch, and the generator's pass through the student, leave no
trace in them. The generator
always runs on batch statistics; its own (and the power iteration of its spectral norm) move in
generator steps only. The teacher is in evaluation mode throughout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax import lax

from dfkd_jax import batch_norm, draw, initialization, losses
from dfkd_jax.axis import ONE, Axis
from dfkd_jax.draw import stream
from dfkd_jax.models import Models
from dfkd_jax.objectives import StudentLosses, objective_gradient
from dfkd_jax.replay import Batch, ReplayScheme, RetentionBatch, Teacher
from dfkd_jax.state import (
    DistillState,
    Network,
    Totals,
    generator_optimizer,
    student_optimizer,
)

Variables = dict[str, Any]
Step = Callable[[DistillState, Variables], DistillState]


class Steps(NamedTuple):
    """The algorithm for one configuration."""

    init: Callable[[jax.Array], DistillState]
    generator_step: Step
    student_step: Step
    observe_step: Step
    observes_after: tuple[bool, ...]  # for each student step of an iteration
    images: Callable[[DistillState, jax.Array], jax.Array]  # what the generator makes now
    keep_early: Step  # keep a batch that the generator makes now, with the teacher's logits
    early_agreement: Callable[[DistillState], jax.Array]  # on that batch, percent


def create_steps(
    config: ml_collections.ConfigDict,
    models: Models,
    replay: ReplayScheme | None,
    image_shape: tuple[int, int, int],
    *,
    axis: Axis = ONE,
) -> Steps:
    """Close the step functions over what is static: configuration, networks and replay scheme.

    Args:
      config: of the run.
      models: the networks; those with batch norm average over `axis` too.
      replay: the scheme, made for the same axis; None without replay.
      image_shape: (H, W, C).
      axis: over which batches are split; its size divides the batch. Gradients and what is recorded
        are those of the global batch, and z is drawn per global example.
    """
    batch_size = config.batch_size // axis.size  # of one device
    optimizers = {"student": student_optimizer(config), "generator": generator_optimizer(config)}
    weights = losses.GeneratorLossWeights(
        **{name: config.loss[name] for name in losses.GeneratorLossWeights._fields}
    )

    def distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return losses.DISTANCES[config.loss.distance](
            student, teacher, config.loss.distance_temperature
        )

    def init(key: jax.Array) -> DistillState:
        def network(name: str, module: nn.Module, sample: jax.Array) -> Network:
            variables = module.init(stream(key, f"init_{name}"), sample, train=True)
            params = variables["params"]
            if name == "student" and config.student.initialization == "he":
                params = initialization.he(
                    stream(key, "init_student"), params, "batch_stats" in variables
                )
            return Network(params, variables.get("batch_stats", {}), optimizers[name].init(params))

        images = jnp.zeros((2, *image_shape))
        classes = jax.eval_shape(
            lambda: models.student.init_with_output(key, images, train=True)[0][0]
        ).shape[-1]

        def empty(n: int) -> Batch:
            return Batch(jnp.zeros((n, *image_shape)), jnp.zeros((n, classes)))

        return DistillState(
            key=key,
            student_steps=jnp.zeros((), jnp.int32),
            generator_steps=jnp.zeros((), jnp.int32),
            student=network("student", models.student, images),
            generator=network(
                "generator", models.generator, jnp.zeros((2, config.generator.latent_dim))
            ),
            replay=() if replay is None else replay.init(stream(key, "init_replay")),
            recent=() if replay is None else empty(replay.observed_images),
            early=empty(batch_size),
            totals=Totals.zeros(),
        )

    def generate(
        generator: Network, params: Any, key: jax.Array, update_stats: bool
    ) -> tuple[jax.Array, Any]:
        """x̂ = G(z), z ~ N(0, I), (B, H, W, C)."""
        z = draw.normal(key, axis.first(batch_size), batch_size, config.generator.latent_dim)
        images, updated = models.generator.apply(
            {"params": params, "batch_stats": generator.batch_stats},
            z,
            train=True,
            update_stats=update_stats,
            mutable=["batch_stats"],
        )
        return images, updated["batch_stats"]

    def generated(state: DistillState, key: jax.Array) -> jax.Array:
        return generate(state.generator, state.generator.params, key, update_stats=False)[0]

    def student_logits(params: Any, batch_stats: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        """In training mode."""
        (logits, _), updated = models.student.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return logits, updated.get("batch_stats", {})

    def student_seen_by_generator(state: DistillState, images: jax.Array) -> jax.Array:
        """S(x̂) in the mode that config.generator.student_mode asks for; leaves no statistics."""
        student = state.student

        def training() -> jax.Array:
            return student_logits(student.params, student.batch_stats, images)[0]

        def evaluation() -> jax.Array:
            variables = {"params": student.params, "batch_stats": student.batch_stats}
            return models.student.apply(variables, images, train=False)[0]

        mode = config.generator.student_mode
        if mode == "eval_after_test":
            iteration = state.generator_steps // config.generator.steps
            tested = (iteration > 0) & (iteration % config.iterations_per_epoch == 0)
            return lax.cond(tested, evaluation, training)
        return {"train": training, "eval": evaluation}[mode]()

    def teacher_of(variables: Variables) -> Teacher:
        return lambda images: models.teacher.apply(variables, images, train=False)

    def generator_step(state: DistillState, teacher_variables: Variables) -> DistillState:
        generator = state.generator
        key = stream(state.key, "generate", state.generator_steps)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            images, batch_stats = generate(generator, params, key, update_stats=True)
            with batch_norm.recorded(axis) as layers:
                logits, features = teacher_of(teacher_variables)(images)
            student_out = student_seen_by_generator(state, images)
            value = losses.generator_loss(
                logits,
                features,
                student_out,
                layers,
                weights,
                adversarial_form=config.loss.adversarial_form,
                adversarial_temperature=config.loss.adversarial_temperature,
                entropy_logarithm=config.loss.entropy_logarithm,
                axis=axis,
            )
            return value, batch_stats

        (value, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(generator.params)
        gradient = axis.mean(gradient)
        totals = state.totals
        return state.replace(
            generator=_descend(generator, gradient, batch_stats, optimizers["generator"]),
            generator_steps=state.generator_steps + 1,
            totals=totals.replace(
                generator_loss=totals.generator_loss + value,
                generator_steps=totals.generator_steps + 1,
            ),
        )

    def student_losses(
        student: Network, batch: Batch, replayed: RetentionBatch | None
    ) -> StudentLosses:
        """θ ↦ L_acq(θ), L_ret(θ) and the one-pass joint loss on these batches."""

        def acquisition(params: Any) -> tuple[jax.Array, Any]:
            logits, batch_stats = student_logits(params, student.batch_stats, batch.images)
            return jnp.mean(distance(logits, batch.logits)), batch_stats

        def retention(params: Any) -> tuple[jax.Array, Any]:
            logits, batch_stats = student_logits(params, student.batch_stats, replayed.images)
            return replayed.weight * jnp.mean(distance(logits, replayed.logits)), batch_stats

        def concatenated(params: Any) -> tuple[jax.Array, tuple]:
            """Mean of d over [x̂; x̂_m] in one pass; while nothing is replayed, over x̂ alone."""
            count = batch.images.shape[0]
            images = jnp.concatenate([batch.images, replayed.images])
            there = jnp.concatenate(
                [
                    jnp.ones(count, bool),
                    jnp.broadcast_to(replayed.weight > 0, replayed.images.shape[:1]),
                ]
            )
            with batch_norm.masked(there):
                student_out, batch_stats = student_logits(params, student.batch_stats, images)
            each = distance(student_out, jnp.concatenate([batch.logits, replayed.logits]))
            value = jnp.sum(each, where=there) / jnp.sum(there)
            acquired, retained = jnp.mean(each[:count]), jnp.mean(each[count:])
            return value, (acquired, replayed.weight * retained, batch_stats)

        return StudentLosses(acquisition, retention, concatenated)

    def student_step(state: DistillState, teacher_variables: Variables) -> DistillState:
        student, totals = state.student, state.totals
        teacher = teacher_of(teacher_variables)
        key = stream(state.key, "acquire", state.student_steps)
        fresh = generated(state, key)
        chex.assert_shape(fresh, (batch_size, *image_shape))
        batch = Batch(fresh, teacher(fresh)[0])
        replayed = None
        if replay is not None:
            key = stream(state.key, "recall", state.student_steps)
            replayed = replay.recall(state.replay, key, teacher)
        gradient, metrics = objective_gradient(
            config, student_losses(student, batch, replayed), student.params, axis
        )
        recent = ()
        if replayed is not None:
            # Spread over the batch: where it is split over devices, each keeps images of its own,
            # and together they are the same images on any number of devices.
            count = replay.observed_images
            spread = jnp.arange(count) * batch.images.shape[0] // count
            recent = jax.tree.map(lambda x: x[spread], batch)
            totals = totals.replace(
                retention_loss=totals.retention_loss + metrics["retention_loss"],
                gradient_alignment=totals.gradient_alignment
                + replayed.weight * metrics.get("gradient_alignment", jnp.nan),  # not measured
                replayed_steps=totals.replayed_steps + replayed.weight,
            )
        batch_stats = metrics["acquisition_aux"]
        return state.replace(
            student=_descend(student, gradient, batch_stats, optimizers["student"]),
            student_steps=state.student_steps + 1,
            recent=recent,
            totals=totals.replace(
                acquisition_loss=totals.acquisition_loss + metrics["acquisition_loss"],
                student_steps=totals.student_steps + 1,
            ),
        )

    def observe_step(state: DistillState, teacher_variables: Variables) -> DistillState:
        if replay is None:
            return state
        last = state.student_steps - 1
        observed = replay.observe(
            state.replay,
            state.recent,
            stream(state.key, "learn", last),
            last // config.student.steps,
            teacher_of(teacher_variables),
        )
        return state.replace(replay=observed)

    def keep_early(state: DistillState, teacher_variables: Variables) -> DistillState:
        images = generated(state, stream(state.key, "early"))
        return state.replace(early=Batch(images, teacher_of(teacher_variables)(images)[0]))

    def early_agreement(state: DistillState) -> jax.Array:
        """Percent of the early images that student (evaluation mode) and teacher call the same."""
        variables = {"params": state.student.params, "batch_stats": state.student.batch_stats}
        logits, _ = models.student.apply(variables, state.early.images, train=False)
        same = jnp.argmax(logits, axis=-1) == jnp.argmax(state.early.logits, axis=-1)
        return 100.0 * jnp.mean(same)

    observes_after = (False,) * config.student.steps if replay is None else replay.observes_after
    return Steps(
        init,
        generator_step,
        student_step,
        observe_step,
        observes_after,
        generated,
        keep_early,
        early_agreement,
    )


def _descend(
    network: Network, gradient: Any, batch_stats: Any, optimizer: optax.GradientTransformation
) -> Network:
    updates, opt_state = optimizer.update(gradient, network.opt_state, network.params)
    return Network(
        params=optax.apply_updates(network.params, updates),
        batch_stats=lax.stop_gradient(batch_stats),
        opt_state=opt_state,
    )
