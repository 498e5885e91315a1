"""Distillation from Python, of networks in memory: `dfkd_jax.distill`."""

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from dfkd_jax.configs import default
from dfkd_jax.data.data_table import SPECS, DatasetSpec
from dfkd_jax.data.splits import Split
from dfkd_jax.distillation.state import DistillState
from dfkd_jax.networks import given
from dfkd_jax.networks.models import Models, named_classifier
from dfkd_jax.run import epochs, samples, train
from dfkd_jax.run.accuracy import create_accuracy, put_batches
from dfkd_jax.run.checkpoint import History
from dfkd_jax.run.epochs import Distillation
from dfkd_jax.run.setup import Setup, assemble, create_algorithm
from dfkd_jax.run.teacher import digest
from dfkd_jax.runtime import devices as devices_lib
from dfkd_jax.runtime import fields as fields_lib
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.finite import NonFinite, check_variables

Callback = Callable[[dict[str, Any], Any], None]


class Distilled(NamedTuple):
    """What `distill` gives back.

    Attributes:
      variables: of the student after the last epoch, in the form it was given in: "params" and
        "batch_stats" of a linen module, or a `nnx.State` for `flax.nnx.update`.
      history: one record an epoch, as a line of `metrics.jsonl`.
      samples: images that the generator makes at the end, in [0, 1], with the teacher's class and
        confidence.
    """

    variables: Any
    history: History
    samples: samples.Panel


def distill(
    teacher: Any,
    student: Any,
    *,
    method: str = "lra-mb",
    config: str | ml_collections.ConfigDict = "default",
    fields: Mapping[str, Any] | None = None,
    image_shape: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    callback: Callback | None = None,
    folder: str | Path | None = None,
) -> Distilled:
    """Distil a student from a teacher without data, both in memory.

        result = dfkd_jax.distill(
            teacher=(model, variables), student="cnn_half", config="digits", method="lra-mb"
        )

    The same numbers as `python -m dfkd_jax.main` with that configuration and teacher. Nothing is
    written unless a folder is given.

    Args:
      teacher: (module, variables) of a flax.linen module, (apply, variables) of a function
        apply(variables, x), or a flax.nnx module; from x (B, H, W, C), normalised, to logits (B, K)
        or (logits, features (B, D)), in evaluation mode.
      student: the name of a classifier, a flax.linen module, (module, variables) of one to start
        from, or a flax.nnx module.
      method: a key of `dfkd_jax.methods.table.METHODS`, or "package.module" of one's own.
      config: the name of a configuration, as of --config, or one that was made already; then its
        method counts.
      fields: set after it, by dotted name: {"epochs": 20, "replay.capacity": 50}.
      image_shape: (H, W, C) of the images to invent; None: those of the configuration's data set,
        of which "default" has none.
      mean: per channel, of images in [0, 1]; x = (images − mean) / std.
      std: per channel. Mean and std are those of the configuration's data set where image_shape is,
        else 0 and 1.
      test: images, uint8 (N, H, W, C), and labels (N,), to measure accuracies on; for nothing else.
      callback: called after every epoch with its record and the student's variables.
      folder: where to keep checkpoints, metrics and figures, as a run does. The same call goes on
        with what is there.

    Raises:
      UserError: something that cannot work; one sentence, before anything is compiled.
      NonFinite: training diverged.
    """
    setup, taught, learner = _setup(
        teacher,
        student,
        _configuration(config, method, fields or {}),
        _Data(image_shape, mean, std),
    )
    check_variables(taught.variables, "The teacher")
    with jax.default_matmul_precision(setup.config.matmul_precision):
        distillation = _distillation(setup, taught, test)
        start = epochs.starting(distillation)
        if learner.variables is not None:
            start = _from(distillation, learner.variables)

        def tell(record: dict[str, Any], state: DistillState) -> None:
            if callback is not None:
                callback(record, learner.restore(given.as_numpy(epochs.student_of(state))))

        if folder is None:
            state, history = _epochs(distillation, start, tell)
        else:
            workdir = Path(folder).absolute()
            state, history = train.in_folder(distillation, workdir, start, tell)
        local = distillation.devices.local
        parts, variables = distillation.algorithm.parts, distillation.teacher_variables
        shown = samples.panels(parts, local(state), local(variables), setup.spec)[0]
    return Distilled(learner.restore(given.as_numpy(epochs.student_of(state))), history, shown)


def _from(distillation: Distillation, variables: Any) -> Callable[[int], DistillState]:
    """Seed ↦ the state before the first epoch, with these variables of the student."""
    init = distillation.algorithm.init
    return lambda seed: epochs.with_student(distillation, init(seed), variables)


class _Data(NamedTuple):
    """What was said of the images; None is what the configuration's data set says."""

    image_shape: Sequence[int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None


def _configuration(
    config: str | ml_collections.ConfigDict, method: str, fields: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """A configuration of its own, with these fields set."""
    if not isinstance(config, str):
        made = copy.deepcopy(config)
    else:
        allowed = sorted(path.stem for path in Path(default.__file__).parent.glob("[!_]*.py"))
        if config not in allowed:
            raise UserError(f"config is {config!r}; allowed are {', '.join(allowed)}.")
        made = importlib.import_module(f"dfkd_jax.configs.{config}").get_config(method)
        if config == "default":  # which says nothing of the images of somebody's teacher
            made.dataset.name = "none"
    known = default.fields(made.method)
    for name in fields:
        if name not in known:
            raise UserError(f"fields has {name!r}; the method {made.method!r} has no such field.")
    try:
        # Before references are resolved: what follows from a field follows from what is set here.
        made.update_from_flattened_dict(dict(fields))
    except (TypeError, ValueError) as error:
        raise UserError(f"fields: {str(error).strip().splitlines()[0]}") from error
    return made.copy_and_resolve_references()


def _setup(
    teacher: Any, student: Any, config: ml_collections.ConfigDict, said: _Data
) -> tuple[Setup, given.Given, given.Given]:
    """The setup of networks in memory, and these."""
    if config.teacher.checkpoint is not None:
        raise UserError("config.teacher.checkpoint is set; here the teacher is an argument.")
    taught = given.teacher(teacher)
    spec = _spec(config, said)
    classes = given.check(taught.network, "teacher", spec.image_shape, None)
    spec = spec._replace(num_classes=classes)
    height, _, channels = spec.image_shape
    facts = {"image_size": height, "channels": channels, "num_classes": classes}
    config.dataset.update({"name": "none", **facts, "mean": spec.mean, "std": spec.std})
    config.teacher.model = taught.network.name
    if isinstance(student, str):
        config.student.model = student
        network = named_classifier("student", config, spec.image_shape, classes)
        learner = given.Given(network, None, lambda variables: variables)
    else:
        learner = given.student(student)
        config.student.model = learner.network.name
    given.check(learner.network, "student", spec.image_shape, classes)
    fields_lib.check(config, default.fields(config.method))
    if "concatenated" in config.objective and not given.can_mask(learner.network):
        raise UserError(
            f"config.objective is {config.objective!r}, which leaves images out of batch norm "
            "while nothing is replayed; with batch norm of flax.nnx allowed are lra and joint."
        )
    card = {
        "model": taught.network.name,
        "num_classes": classes,
        "image_shape": spec.image_shape,
        "mean": spec.mean,
        "std": spec.std,
        "digest": digest(taught.variables),
    }
    models = Models(taught.network, learner.network)
    return assemble(config, spec, files.plain(card), models), taught, learner


def _spec(config: ml_collections.ConfigDict, said: _Data) -> DatasetSpec:
    """The facts of the images; the number of classes is the teacher's to say."""
    known = SPECS.get(config.dataset.name)
    if said.image_shape is None:
        if known is None:
            raise UserError("image_shape is None; allowed is (H, W, C) of the teacher's images.")
        mean = known.mean if said.mean is None else said.mean
        std = known.std if said.std is None else said.std
        return DatasetSpec("none", known.image_shape, 0, tuple(mean), tuple(std))
    shape = tuple(said.image_shape)
    if len(shape) != 3 or shape[0] != shape[1] or shape[2] not in (1, 3):
        raise UserError(
            f"image_shape is {shape}; allowed is (H, W, C) with H = W and C of 1 or 3 channels."
        )
    mean = (0.0,) * shape[2] if said.mean is None else tuple(said.mean)
    std = (1.0,) * shape[2] if said.std is None else tuple(said.std)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != shape[2]:
            raise UserError(f"{name} is {values}; allowed is a number for each of the channels.")
    return DatasetSpec("none", shape, 0, tuple(mean), tuple(std))


def _distillation(
    setup: Setup, taught: given.Given, test: tuple[np.ndarray, np.ndarray] | None
) -> Distillation:
    devices = devices_lib.choose(setup.config.parallel, setup.split_sizes)
    algorithm = create_algorithm(setup, devices)
    variables = devices.put(given.as_numpy(taught.variables))
    images = None
    if test is not None:
        split = Split(np.asarray(test[0]), np.asarray(test[1], np.int32))
        if split.images.dtype != np.uint8 or split.images.shape[1:] != setup.spec.image_shape:
            raise UserError(
                f"test has images {split.images.dtype} {split.images.shape}; allowed is uint8 "
                f"(N, {', '.join(map(str, setup.spec.image_shape))})."
            )
        if split.labels.shape != split.images.shape[:1]:
            raise UserError(
                f"test has labels {split.labels.shape} of {len(split.images)} images; allowed is "
                "one label for each."
            )
        images = put_batches(split, devices=devices)
    of_teacher = create_accuracy(setup.models.teacher, images, setup.spec)
    of_student = create_accuracy(algorithm.parts.student, images, setup.spec)
    return Distillation(setup, algorithm, devices, variables, of_teacher(variables), of_student)


def _epochs(
    distillation: Distillation,
    start: Callable[[int], DistillState],
    tell: Callable[[dict[str, Any], DistillState], None],
) -> tuple[DistillState, History]:
    """All epochs, with nothing written."""
    config, history = distillation.setup.config, []
    state = start(config.seed)
    for number in range(1, config.epochs + 1):
        state, record, broken = epochs.epoch(distillation, state, number)
        if broken:
            raise NonFinite(f"{broken} became non-finite in epoch {number}.")
        history.append(record)
        tell(record, state)
    return state, history
