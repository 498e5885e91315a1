"""Inversion: each round optimises a new start until the teacher takes its images for real ones.

A round begins with what a `Source` starts from, pixels or a generator with its latent vectors. It
takes `Plan.updates` steps of Adam on the weighted sum of

    batch_norm        the teacher's batch statistics, mixed with those of earlier rounds
    target            CE(T(x̂), y) to classes y that the source chose
    adversarial       where teacher and student differ; nothing in warm-up
    total_variation   smooth images
    image_norm        ‖x̂‖₂
    contrast          embeddings unlike those of other images

and keeps the images of the step with the least sum. DeepInversion, CMI, Fast-Datafree and NAYER
differ in source and weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.losses import contrast as contrast_lib
from dfkd_jax.losses import terms as losses
from dfkd_jax.networks.training import Network, descend
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.devices import WHOLE, Layout
from dfkd_jax.runtime.draw import stream
from dfkd_jax.runtime.fields import Field, at_least, below, more_than, one_of
from dfkd_jax.runtime.metrics import Metrics, measured
from dfkd_jax.synthesis import views
from dfkd_jax.synthesis.role import Drawn, Seen, Synthesizer, View

FIELDS = {
    "synthesis.steps": Field(1, at_least(1), "optimisation steps of a round"),
    "synthesis.rounds": Field(1, at_least(1), "batches synthesised in an iteration"),
    "synthesis.warm_up": Field(
        0, at_least(0), "iterations at the start of a run, in which the student does not learn"
    ),
    "synthesis.warm_up_rounds": Field(1, at_least(1), "batches synthesised in each of them"),
    "synthesis.augment": Field(
        "crop",
        one_of(views.AUGMENTATIONS),
        "of what teacher and student see of the images: crop: random crops and flips, each image "
        "its own; jitter: all images rolled by up to 2 pixels, and flipped; none",
    ),
    # Weights of the terms:
    "loss.batch_norm": Field(1.0, at_least(0), "bn, distance to the teacher's running statistics"),
    "loss.batch_norm_momentum": Field(
        0.0, below(1, "1"), "share of earlier rounds in the batch statistics"
    ),
    "loss.target": Field(1.0, at_least(0), "CE(T(x̂), y)"),
    "loss.adversarial": Field(0.0, at_least(0), "where student and teacher differ, after warm-up"),
    "loss.adversarial_form": Field("decision", one_of(losses.ADVERSARIAL), "see `losses.terms`"),
    "loss.adversarial_temperature": Field(1.0, more_than(0), "τ of it"),
    "loss.total_variation": Field(0.0, at_least(0), "tv"),
    "loss.image_norm": Field(0.0, at_least(0), "‖x̂‖₂ over the batch"),
}
WEIGHTED = ("batch_norm", "target", "adversarial", "total_variation", "image_norm")

NO_LOSS = float(jnp.finfo(jnp.float32).max)
"""Before the first step of a round; finite, as a run stops at what is not."""


class Start(NamedTuple):
    """What a round begins from, one device's share."""

    generator: Any  # parameters, the same on every device; {} without a generator
    inputs: Any  # arrays of one row an image that are optimised too: pixels, z; {} if none
    targets: Int[Array, "B"]


class Source(NamedTuple):
    """What a round optimises, as pure functions.

    Attributes:
      init: key -> what the source keeps over rounds; `()` if nothing.
      start: (kept, key, round from 0) -> Start.
      render: (generator, inputs, targets) -> images (B, H, W, C) in the teacher's space.
      input_shapes: name ↦ shape of one image's row of the inputs.
      generator_optimizer: of the generator's parameters, new in each round.
      input_optimizer: of the inputs, likewise.
      learn: (kept, the gradient of the generator's parameters) -> kept, after each step.
      finish: (kept, the generator's parameters) -> kept, after the last.
    """

    init: Callable[[jax.Array], Any]
    start: Callable[[Any, jax.Array, jax.Array], Start]
    render: Callable[[Any, Any, jax.Array], jax.Array]
    input_shapes: dict[str, tuple[int, ...]]
    generator_optimizer: optax.GradientTransformation
    input_optimizer: optax.GradientTransformation
    learn: Callable[[Any, Any], Any] | None = None
    finish: Callable[[Any, Any], Any] | None = None


class Contrast(NamedTuple):
    """The contrast of CMI, see `dfkd_jax.losses.contrast`.

    Attributes:
      weight: of the term.
      temperature: τ.
      capacity: pairs of embeddings in the bank.
      negatives: how many of them a step sees.
      head: the projection.
      optimizer: of the head.
    """

    weight: float
    temperature: float
    capacity: int
    negatives: int
    head: contrast_lib.Head
    optimizer: optax.GradientTransformation


class Best(struct.PyTreeNode):
    """What is kept of the step with the least loss, one device's share."""

    images: Float[Array, "B H W C"]
    embeddings: Any = ()  # (local, whole), each (B, d), with contrast


class Inversion(struct.PyTreeNode):
    """The state of an inversion."""

    kept: Any  # of the source
    generator: Network
    inputs: Network
    targets: Int[Array, "B"]
    best: Best
    least: Float[Array, ""]  # the loss of that step
    rounds: Int[Array, ""]  # begun so far
    memory: losses.Moments  # batch statistics up to the last round; [] without momentum
    latest: losses.Moments  # and with the last step
    head: Any = ()  # a `Network`, of the contrast
    bank: Any = ()


class Inverter(NamedTuple):
    """What is static in an inversion.

    Attributes:
      source: what a round optimises.
      spec: of the images.
      batch_size: B, of all devices.
      axis: over which the batch is split.
      weights: of the terms of `WEIGHTED` that have one.
      momentum: share of earlier rounds in the batch statistics.
      form: of the adversarial term, see `losses.ADVERSARIAL`; temperature: its τ.
      warming: rounds of the warm-up, in which the adversarial term is 0.
      augmentation: see `views.AUGMENTATIONS`.
      crops: whether the student's own batches are cropped and mirrored.
      contrast: of the embeddings; None: there is none.
    """

    source: Source
    spec: DatasetSpec
    batch_size: int
    axis: Axis
    weights: dict[str, float]
    momentum: float
    form: Callable[..., jax.Array]
    temperature: float
    warming: int
    augmentation: str
    crops: bool
    contrast: Contrast | None


def create(
    config: ml_collections.ConfigDict,
    spec: DatasetSpec,
    source: Source,
    axis: Axis = ONE,
    contrast: Contrast | None = None,
) -> Synthesizer:
    """The synthesizer of a source; its state is an `Inversion`.

    An update measures `generator_loss`, the weighted sum, and the terms that have a weight.

    Args:
      config: of the run.
      spec: of the images.
      source: what a round optimises.
      axis: over which the batch is split; its size divides it.
      contrast: of the embeddings; None: there is none.
    """
    weights = {name: config.loss[name] for name in WEIGHTED if config.loss[name]}
    inverter = Inverter(
        source,
        spec,
        config.batch_size,
        axis,
        weights,
        momentum=config.loss.batch_norm_momentum if "batch_norm" in weights else 0.0,
        form=losses.ADVERSARIAL[config.loss.adversarial_form],
        temperature=config.loss.adversarial_temperature,
        warming=config.synthesis.warm_up * config.synthesis.warm_up_rounds,
        augmentation=config.synthesis.augment,
        crops=config.pool.augment,
        contrast=contrast,
    )
    needs = {"statistics": "loss.batch_norm"} if "batch_norm" in weights else {}
    if contrast is not None:
        needs.setdefault("statistics", "loss.contrast")
    return Synthesizer(
        partial(init, inverter),
        partial(update, inverter),
        partial(sample, inverter),
        begin=partial(begin, inverter),
        finish=partial(finish, inverter),
        made=made,
        needs=needs,
        student_mode="eval",
        layout=_layout(source),
    )


def _networks(source: Source, start: Start) -> tuple[Network, Network]:
    """Generator and inputs of a round, each with a new optimizer."""
    return (
        Network(start.generator, {}, source.generator_optimizer.init(start.generator)),
        Network(start.inputs, {}, source.input_optimizer.init(start.inputs)),
    )


def init(inverter: Inverter, key: jax.Array, shapes: Callable[[], Seen]) -> Inversion:
    """The state before the first round, on whole arrays."""
    kept = inverter.source.init(stream(key, "source"))
    start = inverter.source.start(kept, stream(key, "start"), jnp.zeros((), jnp.int32))
    memory: losses.Moments = []
    if inverter.momentum:
        memory = losses.moments(_zeros(shapes().statistics))
    generator, inputs = _networks(inverter.source, start)
    state = Inversion(
        kept=kept,
        generator=generator,
        inputs=inputs,
        targets=start.targets,
        best=Best(jnp.zeros((inverter.batch_size, *inverter.spec.image_shape))),
        least=jnp.asarray(NO_LOSS),
        rounds=jnp.zeros((), jnp.int32),
        memory=memory,
        latest=memory,
    )
    contrast = inverter.contrast
    if contrast is None:
        return state
    dim = contrast_lib.embedding(_zeros(shapes().statistics)).shape[-1]
    none = jnp.zeros((inverter.batch_size, dim))
    head = contrast.head.init(stream(key, "head"), none)["params"]
    return state.replace(
        best=state.best.replace(embeddings=(none, none)),
        head=Network(head, {}, contrast.optimizer.init(head)),
        bank=contrast_lib.empty_bank(contrast.capacity, dim),
    )


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def begin(inverter: Inverter, state: Inversion, key: jax.Array) -> Inversion:
    """A new start; what the round before has made stays until the first step."""
    start = inverter.source.start(state.kept, key, state.rounds)
    old = (state.generator, state.inputs)
    # A new generator is float32; its state may be of another precision.
    generator, inputs = jax.tree.map(
        lambda new, old: new.astype(old.dtype), _networks(inverter.source, start), old
    )
    return state.replace(
        generator=generator,
        inputs=inputs,
        targets=start.targets,
        least=jnp.full_like(state.least, NO_LOSS),
        rounds=state.rounds + 1,
    )


class _Found(NamedTuple):
    terms: dict[str, jax.Array]
    best: Best
    latest: losses.Moments


def update(
    inverter: Inverter, state: Inversion, view: View, key: jax.Array
) -> tuple[Inversion, Metrics]:
    """One step of Adam on the generator, its inputs and the contrast's head."""
    source, axis, contrast = inverter.source, inverter.axis, inverter.contrast

    def loss(optimised: tuple) -> tuple[jax.Array, _Found]:
        generator, inputs, head = optimised
        images = source.render(generator, inputs, state.targets)
        return _loss(inverter, state, view, images, head, key)

    head = () if contrast is None else state.head.params
    optimised = (state.generator.params, state.inputs.params, head)
    (value, found), gradients = jax.value_and_grad(loss, has_aux=True)(optimised)
    of_generator, of_inputs, of_head = gradients
    of_generator, of_head = axis.mean((of_generator, of_head))
    # Each device's gradient is that of the sum of all devices' losses, which are one and the same.
    of_inputs = jax.tree.map(lambda g: g / axis.size, of_inputs)
    better = value < state.least
    metrics = {"generator_loss": value, **{f"generator_{k}": v for k, v in found.terms.items()}}
    state = state.replace(
        generator=descend(state.generator, of_generator, {}, source.generator_optimizer),
        inputs=descend(state.inputs, of_inputs, {}, source.input_optimizer),
        best=jax.tree.map(lambda a, b: jnp.where(better, a, b), found.best, state.best),
        least=jnp.minimum(value, state.least),
        latest=found.latest,
    )
    if source.learn is not None:
        state = state.replace(kept=source.learn(state.kept, of_generator))
    if contrast is not None:
        state = state.replace(head=descend(state.head, of_head, {}, contrast.optimizer))
    return state, {name: measured(value) for name, value in metrics.items()}


def _loss(
    inverter: Inverter, state: Inversion, view: View, images: jax.Array, head: Any, key: jax.Array
) -> tuple[jax.Array, _Found]:
    """The weighted sum of the terms on these images, and what is to be kept of the step."""
    axis, weights, contrast = inverter.axis, inverter.weights, inverter.contrast
    shown = views.augmented(
        inverter.augmentation, images, stream(key, "augment"), inverter.spec, axis
    )
    seen = view.teacher(shown)
    layers = seen.statistics
    if inverter.momentum:  # there is nothing to mix with in the first round
        layers = losses.mixed(layers, state.memory, inverter.momentum * (state.rounds > 1))

    def adversarial() -> jax.Array:
        value = inverter.form(seen.logits, view.student(shown), inverter.temperature, axis)
        return jnp.where(state.rounds > inverter.warming, value, 0.0)

    every = {
        "batch_norm": lambda: losses.batch_norm_loss(layers),
        "target": lambda: losses.target_loss(seen.logits, state.targets, axis),
        "adversarial": adversarial,
        "total_variation": lambda: losses.total_variation(images, axis),
        "image_norm": lambda: losses.image_norm(images, axis),
    }
    terms = {name: every[name]() for name in weights}
    total = sum((weights[n] * v for n, v in terms.items()), jnp.zeros((), images.dtype))
    best = Best(images)
    if contrast is not None:
        embeddings = _embeddings(inverter, view, images, seen, stream(key, "local"))
        terms["contrast"] = _contrast(contrast, state.bank, head, embeddings, axis, key)
        total = total + contrast.weight * terms["contrast"]
        best = Best(images, embeddings)
    latest = losses.moments(layers) if inverter.momentum else []
    return total, _Found(terms, best, latest)


def _embeddings(
    inverter: Inverter, view: View, images: jax.Array, seen: Seen, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(local, whole), each (B, d), one device's share; the whole view is what the losses saw."""
    local = views.resized_crops(images, key, inverter.spec, inverter.axis)
    layers = view.teacher(local).statistics
    return contrast_lib.embedding(layers), contrast_lib.embedding(seen.statistics)


def _contrast(
    contrast: Contrast,
    bank: contrast_lib.Bank,
    head: Any,
    embeddings: tuple[jax.Array, jax.Array],
    axis: Axis,
    key: jax.Array,
) -> jax.Array:
    """The contrastive loss of the whole batch, the same on every device."""
    earlier = contrast_lib.sample(bank, stream(key, "negatives"), contrast.negatives)
    sets = [axis.gather(x) for x in embeddings] + list(earlier)
    local, whole, bank_local, bank_whole = (
        cast(jax.Array, contrast.head.apply({"params": head}, x)) for x in sets
    )
    filled = (bank.size > 0).astype(local.dtype)
    return contrast_lib.contrast_loss(
        local, whole, bank_local, bank_whole, filled, contrast.temperature
    )


def finish(inverter: Inverter, state: Inversion) -> Inversion:
    """Keep what outlives the round: statistics, embeddings, and what the source keeps."""
    source = inverter.source
    state = state.replace(memory=state.latest)
    if source.finish is not None:
        state = state.replace(kept=source.finish(state.kept, state.generator.params))
    if inverter.contrast is not None:
        pairs = (inverter.axis.gather(x) for x in state.best.embeddings)
        state = state.replace(bank=contrast_lib.push(state.bank, *pairs))
    return state


def made(state: Inversion, key: jax.Array) -> Drawn:
    """The images of the last round."""
    del key
    return Drawn(state.best.images, state.targets)


def sample(inverter: Inverter, state: Inversion, key: jax.Array) -> Drawn:
    """The images of the last round, cropped and mirrored as the pool's are."""
    way = "crop" if inverter.crops else "none"
    images = views.augmented(way, state.best.images, key, inverter.spec, inverter.axis)
    return Drawn(images, state.targets)


def _layout(source: Source) -> Layout:
    """Pixels, latent vectors and what is kept of the images are split over the devices."""
    rows = {name: jnp.zeros((1, *shape)) for name, shape in source.input_shapes.items()}
    optimizer = jax.eval_shape(source.input_optimizer.init, rows)
    optimizer = jax.tree.map(lambda leaf: 0 if leaf.ndim else WHOLE, optimizer)
    layout: dict[str, Any] = {name: WHOLE for name in Inversion.__dataclass_fields__}
    inputs = Network(0, WHOLE, optimizer) if rows else WHOLE
    return Inversion(**{**layout, "inputs": inputs, "targets": 0, "best": 0})
