"""The steps of the algorithm: pure functions of parts, state and the teacher's variables.

    update step      one optimisation step of the synthesizer: for an adversarial generator
                     min_G of its loss, through the frozen teacher and the student
    student step     min_θ L_acq(θ) + λ L_ret(θ − α ∇L_acq(θ)) on a fresh and a replayed batch, or
                     another of `objectives.OBJECTIVES`
    observe step     the replay scheme learns from the last fresh batch

Batch norm, decided once: the student runs in training mode (batch statistics), for the synthesizer
too unless `Synthesizer.student_mode` says otherwise. The running statistics it keeps come from
the outer pass over θ: from x̂, or from [x̂; x̂_m] for the concatenated objectives. The pass at θ' and
every other pass over the replayed batch, and the synthesizer's pass through the student, leave no
trace in them. The teacher is in evaluation mode throughout.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from dfkd_jax.distillation.objectives import StudentLosses
from dfkd_jax.distillation.roles import Method
from dfkd_jax.distillation.state import DistillState
from dfkd_jax.losses import batch_norm
from dfkd_jax.losses.attention import attention_loss, attention_maps
from dfkd_jax.networks import initialization
from dfkd_jax.networks.given import AnyClassifier
from dfkd_jax.networks.training import Network, descend
from dfkd_jax.replay.scheme import Batch, RetentionBatch
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.draw import stream
from dfkd_jax.runtime.metrics import Metrics
from dfkd_jax.synthesis.role import Seen, View

Variables = Any  # a dictionary of a Flax network; any pytree of a function in memory
Step = Callable[[DistillState, Variables], tuple[DistillState, Metrics]]


class Parts(NamedTuple):
    """What is static in a run's steps, for one device's share of the batch.

    Attributes:
      method: the roles.
      teacher: the network; (x, train) -> (logits, features).
      student: likewise; one with batch norm averages its statistics over `axis`.
      optimizer: of the student.
      distance: d(S, T), (B, K) × (B, K) -> (B,).
      batch_size: of one device.
      image_shape: (H, W, C).
      axis: over which batches are split. Gradients and what is measured are those of the global
        batch, and z is drawn per global example.
      initialization: how the student's weights start, of `initialization.INITIALIZATIONS`.
      iterations_per_epoch: of the run.
    """

    method: Method
    teacher: AnyClassifier
    student: AnyClassifier
    optimizer: optax.GradientTransformation
    distance: Callable[[jax.Array, jax.Array], jax.Array]
    batch_size: int
    image_shape: tuple[int, int, int]
    axis: Axis = ONE
    initialization: str = "source"
    iterations_per_epoch: int = 1


def init(parts: Parts, key: jax.Array) -> DistillState:
    """The state before the first step, on whole arrays."""
    images = jnp.zeros((2, *parts.image_shape))
    variables = parts.student.init(stream(key, "init_student"), images, train=True)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    if parts.initialization == "he":
        params = initialization.he(stream(key, "init_student"), params, bool(batch_stats))
    classes = jax.eval_shape(
        lambda: parts.student.init_with_output(key, images, train=True)[0][0]
    ).shape[-1]

    def empty(n: int) -> Batch:
        return Batch(jnp.zeros((n, *parts.image_shape)), jnp.zeros((n, classes)))

    replay = parts.method.replay
    return DistillState(
        key=key,
        student_steps=jnp.zeros((), jnp.int32),
        updates=jnp.zeros((), jnp.int32),
        student=Network(params, batch_stats, parts.optimizer.init(params)),
        synthesizer=parts.method.synthesizer.init(
            stream(key, "init_generator"), partial(shapes_seen, parts)
        ),
        replay=replay.init(stream(key, "init_replay")),
        recent=empty(replay.observed_images) if replay.observed_images else (),
        early=empty(parts.batch_size),
    )


def shapes_seen(parts: Parts) -> Seen:
    """What a teacher's `Seen` of a batch looks like: its shapes and dtypes; nothing is computed."""
    images = jnp.zeros((parts.batch_size, *parts.image_shape))

    def seen() -> Seen:
        variables = parts.teacher.init(jax.random.key(0), images, train=False)
        return _teacher_seen(parts, dict(variables), images)

    return jax.eval_shape(seen)


def view(parts: Parts, state: DistillState, teacher_variables: Variables) -> View:
    """Teacher and student as they are now."""

    return View(
        partial(_teacher_seen, parts, teacher_variables),
        lambda images: _student_seen(parts, state, images),
    )


def _teacher_seen(parts: Parts, variables: Variables, images: jax.Array) -> Seen:
    with batch_norm.recorded(parts.axis) as statistics:
        seen = parts.teacher.apply(variables, images, train=False)
    logits, features = cast(tuple[jax.Array, jax.Array], seen)
    return Seen(logits, features, statistics)


def _student_seen(parts: Parts, state: DistillState, images: jax.Array) -> jax.Array:
    """S(x̂) in the mode of `Synthesizer.student_mode`; leaves no statistics."""
    student, mode = state.student, parts.method.synthesizer.student_mode

    def training() -> jax.Array:
        return _student_logits(parts, student, student.params, images)[0]

    def evaluation() -> jax.Array:
        variables = {"params": student.params, "batch_stats": student.batch_stats}
        return parts.student.apply(variables, images, train=False)[0]

    if mode == "eval_after_test":
        iteration = iteration_of(parts, state.updates)
        tested = (iteration > 0) & (iteration % parts.iterations_per_epoch == 0)
        return lax.cond(tested, evaluation, training)
    return {"train": training, "eval": evaluation}[mode]()


def iteration_of(parts: Parts, updates: jax.Array) -> jax.Array:
    """The iteration, from 0, that begins after so many updates of the synthesizer."""
    plan = parts.method.plan
    rounds = updates // plan.updates
    warming = plan.warm_up * plan.warm_up_rounds
    during = (rounds < warming) * (rounds // plan.warm_up_rounds)
    return during + (rounds >= warming) * (plan.warm_up + (rounds - warming) // plan.rounds)


def _student_logits(
    parts: Parts, student: Network, params: Any, images: jax.Array
) -> tuple[jax.Array, Any]:
    """S_θ(x) in training mode, and the running statistics after it."""
    (logits, _), updated = parts.student.apply(
        {"params": params, "batch_stats": student.batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    return logits, updated.get("batch_stats", {})


def begin_step(
    parts: Parts, state: DistillState, teacher_variables: Variables
) -> tuple[DistillState, Metrics]:
    """What a round of updates starts from; as it is where the synthesizer has no `begin`."""
    del teacher_variables
    begin = parts.method.synthesizer.begin
    if begin is None:
        return state, {}
    key = stream(state.key, "begin", state.updates // parts.method.plan.updates)
    return state.replace(synthesizer=begin(state.synthesizer, key)), {}


def finish_step(
    parts: Parts, state: DistillState, teacher_variables: Variables
) -> tuple[DistillState, Metrics]:
    """What outlives a round of updates; all of it where the synthesizer has no `finish`."""
    del teacher_variables
    finish = parts.method.synthesizer.finish
    return (state if finish is None else state.replace(synthesizer=finish(state.synthesizer))), {}


def update_step(
    parts: Parts, state: DistillState, teacher_variables: Variables
) -> tuple[DistillState, Metrics]:
    """One optimisation step of the synthesizer."""
    synthesizer, metrics = parts.method.synthesizer.update(
        state.synthesizer,
        view(parts, state, teacher_variables),
        stream(state.key, "generate", state.updates),
    )
    return state.replace(synthesizer=synthesizer, updates=state.updates + 1), metrics


def student_losses(
    parts: Parts,
    teacher: Callable[[jax.Array], Seen],
    student: Network,
    batch: Batch | None,
    replayed: RetentionBatch,
) -> StudentLosses:
    """θ ↦ L_acq(θ), L_ret(θ) and the one-pass joint loss on these batches.

    Args:
      parts: of the run.
      teacher: of the view.
      student: its state; θ takes the place of its parameters.
      batch: the fresh one; None with an objective that does not acquire.
      replayed: the replayed one.
    """
    if batch is None:
        batch = Batch(replayed.images[:0], replayed.logits[:0])
    weight = parts.method.attention

    def of(batch: Batch | RetentionBatch) -> Callable[[Any], tuple[jax.Array, Any]]:
        """θ ↦ mean d(S, T) + β · attention, on this batch."""
        if not weight or not len(batch.images):

            def plain(params: Any) -> tuple[jax.Array, Any]:
                logits, batch_stats = _student_logits(parts, student, params, batch.images)
                return jnp.mean(parts.distance(logits, batch.logits)), batch_stats

            return plain
        maps = attention_maps(teacher(batch.images).statistics)

        def attending(params: Any) -> tuple[jax.Array, Any]:
            with batch_norm.recorded() as layers:
                logits, batch_stats = _student_logits(parts, student, params, batch.images)
            value = jnp.mean(parts.distance(logits, batch.logits))
            return value + weight * attention_loss(maps, attention_maps(layers)), batch_stats

        return attending

    acquisition, on_replayed = of(batch), of(replayed)

    def retention(params: Any) -> tuple[jax.Array, Any]:
        value, batch_stats = on_replayed(params)
        return replayed.weight * value, batch_stats

    def concatenated(params: Any) -> tuple[jax.Array, tuple]:
        """Mean of d over [x̂; x̂_m] in one pass; while nothing is replayed, over x̂ alone."""
        count = batch.images.shape[0]
        images = jnp.concatenate([batch.images, replayed.images])
        of_memory = jnp.broadcast_to(replayed.weight > 0, replayed.images.shape[:1])
        there = jnp.concatenate([jnp.ones(count, bool), of_memory])
        with batch_norm.masked(there):
            logits, batch_stats = _student_logits(parts, student, params, images)
        each = parts.distance(logits, jnp.concatenate([batch.logits, replayed.logits]))
        value = jnp.sum(each, where=there) / jnp.sum(there)
        acquired, retained = jnp.mean(each[:count]), jnp.mean(each[count:])
        return value, (acquired, replayed.weight * retained, batch_stats)

    return StudentLosses(acquisition, retention, concatenated, replayed.weight)


def student_step(
    parts: Parts, state: DistillState, teacher_variables: Variables
) -> tuple[DistillState, Metrics]:
    """One step of the student on a fresh batch, and a replayed one."""
    replay, student = parts.method.replay, state.student
    teacher = view(parts, state, teacher_variables).teacher
    acquire_key, recall_key = (
        stream(state.key, name, state.student_steps) for name in ("acquire", "recall")
    )
    batch = None
    if parts.method.objective.acquires:
        fresh = parts.method.synthesizer.sample(state.synthesizer, acquire_key).images
        chex.assert_shape(fresh, (parts.batch_size, *parts.image_shape))
        batch = Batch(fresh, teacher(fresh).logits)
    replayed = replay.recall(state.replay, recall_key, teacher)
    descent = parts.method.objective.descent(
        student_losses(parts, teacher, student, batch, replayed), student.params
    )
    recent = ()
    if replay.observed_images and batch is not None:
        # Spread over the batch: where it is split over devices, each keeps images of its own,
        # and together they are the same images on any number of devices.
        count = replay.observed_images
        spread = jnp.arange(count) * batch.images.shape[0] // count
        recent = jax.tree.map(lambda x: x[spread], batch)
    state = state.replace(
        student=descend(student, descent.gradient, descent.statistics, parts.optimizer),
        student_steps=state.student_steps + 1,
        recent=recent,
    )
    return state, descent.metrics


def observe_step(
    parts: Parts, state: DistillState, teacher_variables: Variables
) -> tuple[DistillState, Metrics]:
    """The replay scheme observes what the last student step kept for it."""
    last, plan = state.student_steps - 1, parts.method.plan
    observed, metrics = parts.method.replay.observe(
        state.replay,
        state.recent,
        stream(state.key, "learn", last),
        plan.warm_up + last // plan.student_steps,
        view(parts, state, teacher_variables).teacher,
    )
    return state.replace(replay=observed), metrics


def observe_round_step(
    parts: Parts, state: DistillState, teacher_variables: Variables
) -> tuple[DistillState, Metrics]:
    """The replay scheme observes a batch of the synthesizer's round, or follows its state."""
    replay = parts.method.replay
    if replay.follow is not None:
        return state.replace(replay=replay.follow(state.replay, state.synthesizer)), {}
    teacher = view(parts, state, teacher_variables).teacher
    images = generated(parts, state, stream(state.key, "round", state.updates))
    observed, metrics = parts.method.replay.observe(
        state.replay,
        Batch(images, teacher(images).logits),
        stream(state.key, "learn_round", state.updates),
        iteration_of(parts, state.updates - 1),
        teacher,
    )
    return state.replace(replay=observed), metrics


def generated(parts: Parts, state: DistillState, key: jax.Array) -> jax.Array:
    """A batch of images as the synthesizer makes them now, one device's share."""
    synthesizer = parts.method.synthesizer
    return (synthesizer.made or synthesizer.sample)(state.synthesizer, key).images


def keep_early(parts: Parts, state: DistillState, teacher_variables: Variables) -> DistillState:
    """Keep a batch that the synthesizer makes now, with the teacher's logits."""
    images = generated(parts, state, stream(state.key, "early"))
    logits = view(parts, state, teacher_variables).teacher(images).logits
    return state.replace(early=Batch(images, logits))


def early_agreement(parts: Parts, state: DistillState) -> jax.Array:
    """Percent of the early images that student (evaluation mode) and teacher call the same."""
    variables = {"params": state.student.params, "batch_stats": state.student.batch_stats}
    logits, _ = parts.student.apply(variables, state.early.images, train=False)
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(state.early.logits, axis=-1)
    return 100.0 * jnp.mean(same)
