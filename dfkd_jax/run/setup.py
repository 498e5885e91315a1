"""A configuration, parsed once: everything that follows from it, and the algorithm it stands for.

`parse` checks a configuration and gives a `Setup`; it compiles nothing and touches no accelerator.
`create_algorithm` puts that on devices. A run, the children of a comparison and the benchmark all
begin here, and nothing after them reads the configuration's files again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections

from dfkd_jax.configs import default
from dfkd_jax.data import data_specs
from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation import objectives, steps
from dfkd_jax.distillation.agreement import Agreement, create_agreement
from dfkd_jax.distillation.epoch import Clock, Epoch, create_epoch
from dfkd_jax.distillation.roles import Method
from dfkd_jax.distillation.state import DistillState, layout_of
from dfkd_jax.distillation.steps import Parts
from dfkd_jax.losses import batch_norm
from dfkd_jax.losses import terms as losses
from dfkd_jax.methods import table
from dfkd_jax.networks.given import Classifier, has_features
from dfkd_jax.networks.models import Models, create_models, on_axis
from dfkd_jax.networks.training import student_optimizer
from dfkd_jax.run import student
from dfkd_jax.runtime import fields
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.compilation import rarely_run
from dfkd_jax.runtime.devices import WHOLE, Devices, mapped, memory_bytes
from dfkd_jax.runtime.errors import UserError


class Setup(NamedTuple):
    """What follows from a configuration.

    Attributes:
      config: the configuration.
      spec: the data set's facts: image_shape (H, W, C), num_classes, mean, std.
      card: of the given teacher; empty where the run trains one.
      models: teacher and student.
      create_method: (config, spec, axis) -> Method.
      method: that of whole batches.
    """

    config: ml_collections.ConfigDict
    spec: DatasetSpec
    card: dict[str, Any]
    models: Models
    create_method: Callable[..., Method]
    method: Method

    @property
    def split_sizes(self) -> dict[str, int]:
        """Sizes that are split over devices, by the fields of the configuration that give them."""
        sizes = {"batch_size": self.config.batch_size}
        if self.config.teacher.checkpoint is None and self.spec.name != "none":
            sizes["teacher.batch_size"] = self.config.teacher.batch_size
        return {**sizes, **self.method.replay.split_sizes}


class Algorithm(NamedTuple):
    """What a run calls."""

    parts: Parts  # on whole arrays
    init: Callable[[int], DistillState]  # from the seed
    epoch: Epoch
    clock: Clock  # of the epoch's synthesis
    keep_early: Callable[[DistillState, Any], DistillState]
    agreement: Agreement


def parse(config: ml_collections.ConfigDict, *, reads_data: bool = True) -> Setup:
    """Check a configuration and make what follows from it; touches no accelerator.

    Args:
      config: of a run.
      reads_data: whether the data set must be there.

    Raises:
      UserError: the first field that cannot work; one sentence.
    """
    fields.check(config, default.fields(config.method))
    _check_teacher_given(config)
    card = data_specs.teacher_card(config)
    spec = data_specs.spec(config, card)
    if reads_data:
        training = config.teacher.checkpoint is None or config.dataset.validation_size
        data.check_prepared(spec, config.dataset.data_dir, train=bool(training))
    models = create_models(config, spec.image_shape, spec.num_classes)
    setup = assemble(config, spec, card, models)
    _check_card(setup)
    student.check_start(config, spec)
    return setup


def assemble(
    config: ml_collections.ConfigDict, spec: DatasetSpec, card: dict[str, Any], models: Models
) -> Setup:
    """The setup of a checked configuration and what is known of its data, teacher and networks.

    Raises:
      UserError: method, objective, replay and teacher do not go together; one sentence.
    """
    create_method = table.find(config.method).create
    method = create_method(config, spec, ONE)
    setup = Setup(config, spec, card, models, create_method, method)
    _check_method(setup)
    return setup


def create_parts(setup: Setup, axis: Axis = ONE) -> Parts:
    """What is static in the run's steps, for one device's share of the batch.

    Args:
      setup: of the run.
      axis: over which batches are split.

    Raises:
      UserError: see `on_axis`.
    """
    config, spec, method = setup.config, setup.spec, setup.method
    if axis != ONE:
        method = setup.create_method(config, spec, axis)
    return Parts(
        method=method,
        teacher=setup.models.teacher,  # in evaluation mode, so it averages no statistics
        student=on_axis(setup.models.student, config.student.model, spec.image_shape, axis),
        optimizer=student_optimizer(config, method.plan.warm_up),
        distance=partial(
            losses.DISTANCES[config.loss.distance], temperature=config.loss.distance_temperature
        ),
        batch_size=config.batch_size // axis.size,
        image_shape=spec.image_shape,
        axis=axis,
        initialization=config.student.initialization,
        iterations_per_epoch=config.iterations_per_epoch,
    )


def create_algorithm(setup: Setup, devices: Devices) -> Algorithm:
    """The algorithm on these devices.

    An epoch's steps run per device on shares of the batch; everything else (start, figures, what is
    measured between epochs) is the same steps on whole arrays.

    Args:
      setup: of the run.
      devices: what an epoch runs on.

    Raises:
      UserError: see `on_axis`; or what is to be replayed does not fit the devices' memory.
    """
    _check_memory(setup, devices)
    whole = per_device = create_parts(setup)
    if devices.count > 1:
        per_device = create_parts(setup, devices.axis)
    layout = layout_of(whole.method)
    shardings, replicated = devices.shardings(layout), devices.shardings(WHOLE)
    jit = partial(jax.jit, compiler_options=rarely_run())
    on_devices, clock = mapped(devices, (layout, WHOLE)), Clock()
    return Algorithm(
        whole,
        jit(lambda seed: steps.init(whole, jax.random.key(seed)), out_shardings=shardings),
        create_epoch(setup.config.loop, whole, per_device, on_devices, replicated, clock),
        clock,
        jit(partial(steps.keep_early, whole), donate_argnums=0, out_shardings=shardings),
        jit(create_agreement(whole), out_shardings=replicated),
    )


def _check_memory(setup: Setup, devices: Devices) -> None:
    """What is replayed must fit a device, before anything is compiled."""
    replay = setup.method.replay
    state = jax.eval_shape(replay.init, jax.random.key(0))
    split = 1 if replay.layout == WHOLE else devices.count
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) // split
    if replay.capacity and needed > memory_bytes():
        raise UserError(
            f"config.{replay.capacity} is {fields.get(setup.config, replay.capacity)}, which takes "
            f"{needed:,} bytes of a device that has {memory_bytes():,}; allowed is less."
        )


def _check_method(setup: Setup) -> None:
    """The objective, what is replayed, the plan and the teacher must go together."""
    config, method = setup.config, setup.method
    replays = method.replay.replays
    if replays == (config.objective == "acquisition"):
        allowed = list(objectives.OBJECTIVES)[1:] if replays else ["acquisition"]
        raise UserError(
            f"config.objective is {config.objective!r} but config.replay.kind is "
            f"{config.replay.kind!r}, with which allowed are {', '.join(allowed)}."
        )
    if config.objective == "retention" and not method.replay.observes_rounds:
        # It may be empty when the student takes its first steps, which would be on no image.
        raise UserError(
            f"config.objective is 'retention' but config.replay.kind is {config.replay.kind!r}, "
            "which may have nothing to recall; allowed is pool."
        )
    if method.plan.student_steps != config.student.steps:
        raise UserError(
            f"The method {config.method!r} plans {method.plan.student_steps} student steps an "
            f"iteration but config.student.steps, by which its replay and the learning rate go, is "
            f"{config.student.steps}; allowed is the same number."
        )
    _check_attention(setup)
    iterations = config.epochs * config.iterations_per_epoch
    if method.plan.warm_up >= iterations:
        raise UserError(
            f"config.epochs × config.iterations_per_epoch is {iterations}; the method "
            f"{config.method!r} needs more than the {method.plan.warm_up} iterations that it "
            "warms up in."
        )
    _check_needs(setup)


def _check_needs(setup: Setup) -> None:
    """The teacher must give what the synthesizer needs; what is not there would be a term of 0."""
    config, needs = setup.config, setup.method.synthesizer.needs
    teacher, image_shape = setup.models.teacher, setup.spec.image_shape
    lacking = {
        "statistics": lambda: not batch_norm.count(teacher, image_shape),
        # A classifier by name has features, which a trace would start the accelerator to see.
        "features": lambda: (
            isinstance(teacher, Classifier) and not has_features(teacher, image_shape)
        ),
    }
    words = {
        "statistics": "no flax.linen.BatchNorm whose statistics to match",
        "features": "logits alone, no features",
    }
    for need, field in needs.items():
        if lacking[need]():
            raise UserError(
                f"config.{field} is {fields.get(config, field)} but config.teacher.model "
                f"{config.teacher.model!r} has {words[need]}; allowed is 0.0."
            )


def _check_attention(setup: Setup) -> None:
    """An attention term needs maps of one size in both networks, and a loss of each batch."""
    config, weight = setup.config, setup.method.attention
    if not weight:
        return
    if config.objective in ("concatenated", "lra_concatenated"):
        raise UserError(
            f"config.loss.attention is {weight} but config.objective is {config.objective!r}, "
            "whose one pass has no such term; allowed is 0.0."
        )
    sizes = [
        batch_norm.map_sizes(network, setup.spec.image_shape)
        for network in (setup.models.teacher, setup.models.student)
    ]
    if not sizes[0] & sizes[1]:
        raise UserError(
            f"config.loss.attention is {weight} but {config.teacher.model!r} and "
            f"{config.student.model!r} have no batch norm on images of one size; allowed is 0.0."
        )


def _check_teacher_given(config: ml_collections.ConfigDict) -> None:
    """A given teacher must be there, and without data one must be given."""
    directory = config.teacher.checkpoint
    if directory is None and config.dataset.name == "none":
        raise UserError(
            "config.teacher.checkpoint is None but config.dataset.name is 'none'; without data no "
            "teacher can be trained, and only the folder of a trained one is allowed."
        )
    if directory is not None and not data_specs.is_teacher(directory):
        raise UserError(
            f"config.teacher.checkpoint is {directory!r}, which holds no {data_specs.CARD}; "
            "allowed is the folder of a trained teacher (such as WORKDIR/teacher of an earlier "
            "run), or None to train one."
        )


def _check_card(setup: Setup) -> None:
    """The card of a given teacher must agree with the configuration."""
    config, spec, card = setup.config, setup.spec, setup.card
    if not card:
        return
    wanted = {
        "model": config.teacher.model,
        "num_classes": spec.num_classes,
        "image_shape": list(spec.image_shape),
    }
    # A card from elsewhere may not say how inputs are normalised.
    wanted |= {f: list(getattr(spec, f)) for f in ("mean", "std") if card.get(f) is not None}
    for field, value in wanted.items():
        if card.get(field) != value:
            raise UserError(
                f"config.teacher.checkpoint is {config.teacher.checkpoint!r}, a teacher with "
                f"{field} {card.get(field)!r}; the configuration and config.dataset.name "
                f"{config.dataset.name!r} need {value!r}."
            )
