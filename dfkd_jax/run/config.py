"""Checking a configuration before anything compiles, and comparing two of them."""

import json
from typing import Any

import ml_collections

from dfkd_jax.data import data_specs
from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation import meta, objectives
from dfkd_jax.distillation.epoch import LOOPS
from dfkd_jax.losses import batch_norm
from dfkd_jax.losses import terms as losses
from dfkd_jax.methods.presets import METHODS
from dfkd_jax.networks import initialization, models
from dfkd_jax.networks.classifiers import IMAGE_SIZES, create_classifier
from dfkd_jax.networks.generator import base_size
from dfkd_jax.networks.own_module import check_call, is_own
from dfkd_jax.replay import schemes
from dfkd_jax.run import student
from dfkd_jax.runtime import devices
from dfkd_jax.runtime.errors import UserError

MATMUL_PRECISIONS = ("default", "bfloat16", "tensorfloat32", "float32")
STUDENT_MODES = ("train", "eval", "eval_after_test")
INNER_VARIANTS = [variant for variant in meta.VARIANTS if variant != "none"]
# Fields of earlier versions, and what there is in their place.
RENAMED = {
    "meta.objective": "config.objective: for 'paper' lra or joint, for 'code' lra_concatenated or "
    "concatenated",
}

# A run may go on with other values of these: they do not change what it computes.
FREE_FIELDS = (
    "checkpoint_every",
    "loop",
    "dataset.data_dir",
    "parallel.devices",
    "parallel.mapping",
)


def check(config: ml_collections.ConfigDict, *, reads_data: bool = True) -> None:
    """Raise `UserError` for the first field that cannot work; touches no accelerator.

    Args:
      config: of a run.
      reads_data: whether the data set must be there.
    """
    _check_choices(config)
    _check_ranges(config)
    _check_teacher_given(config)
    spec = data_specs.spec(config)
    if reads_data:
        training = config.teacher.checkpoint is None or config.dataset.validation_size
        data.check_prepared(spec, config.dataset.data_dir, train=bool(training))
    _check_models(config, spec)
    _check_batch_norm_term(config, spec)
    _check_card(config, spec)
    student.check_start(config, spec)


def _check_choices(config: ml_collections.ConfigDict) -> None:
    choices = {
        "loop": LOOPS,
        "compute_dtype": models.COMPUTE_DTYPES,
        "matmul_precision": MATMUL_PRECISIONS,
        "method": METHODS,
        "objective": objectives.OBJECTIVES,
        "parallel.mapping": devices.MAPPINGS,
        "student.initialization": initialization.INITIALIZATIONS,
        "student.optimizer": ("sgd", "adam"),
        "loss.distance": losses.DISTANCES,
        "loss.adversarial_form": losses.ADVERSARIAL,
        "loss.entropy_logarithm": losses.LOGARITHMS,
        "generator.student_mode": STUDENT_MODES,
        "meta.variant": INNER_VARIANTS,
        "replay.kind": schemes.SCHEMES,
        "replay.push_unit": ("epoch", "iteration"),
    }
    for field, allowed in choices.items():
        value = get(config, field)
        if value not in allowed:
            raise UserError(f"config.{field} is {value!r}; allowed are {', '.join(allowed)}.")
    _check_objective(config)


def _check_objective(config: ml_collections.ConfigDict) -> None:
    """The objective, what it replays and how its gradient is taken must go together."""
    kind, objective = config.replay.kind, config.objective
    if (kind == "none") != (objective == "acquisition"):
        allowed = ["acquisition"] if kind == "none" else list(objectives.OBJECTIVES)[1:]
        raise UserError(
            f"config.objective is {objective!r} but config.replay.kind is {kind!r}, with which "
            f"allowed are {', '.join(allowed)}."
        )
    if objective in ("acquisition", "concatenated") and config.retention_weight != 1:
        raise UserError(
            f"config.retention_weight is {config.retention_weight} but config.objective is "
            f"{objective!r}, which has no such weight; allowed is 1.0."
        )
    if config.meta.variant == "finite_difference" and config.compute_dtype != "float32":
        raise UserError(
            f"config.meta.variant is 'finite_difference' but config.compute_dtype is "
            f"{config.compute_dtype!r}, whose differences are rounding alone; allowed is 'float32'."
        )
    if config.replay.accumulate_recall_gradient and config.replay.recall_steps != 1:
        raise UserError(
            "config.replay.accumulate_recall_gradient is True but config.replay.recall_steps is "
            f"{config.replay.recall_steps}; allowed is 1."
        )


def _check_ranges(config: ml_collections.ConfigDict) -> None:
    at_least_one = (
        "epochs",
        "checkpoint_every",
        "iterations_per_epoch",
        "teacher.epochs",
        "teacher.batch_size",
        "student.steps",
        "generator.latent_dim",
        "generator.steps",
        "meta.inner_steps",
        "replay.capacity",
        "replay.entry_size",
        "replay.push_period",
        "replay.observe_steps",
    )
    positive = (
        "teacher.learning_rate",
        "student.learning_rate",
        "generator.learning_rate",
        "loss.distance_temperature",
        "loss.adversarial_temperature",
        "replay.vae_learning_rate",
        "replay.recall_learning_rate",
    )
    not_negative = (
        "seed",
        "dataset.validation_size",
        "parallel.devices",
        "teacher.seed",
        "teacher.weight_decay",
        "student.momentum",
        "student.weight_decay",
        "meta.inner_lr",
        "meta.inner_weight_decay",
        "retention_weight",
        "replay.kl_weight",
        "replay.recall_steps",
        "replay.recall_information_entropy",
        "replay.recall_one_hot",
    )
    if config.batch_size < 2:
        raise UserError(
            f"config.batch_size is {config.batch_size}; allowed is 2 or more, for batch statistics."
        )
    for field in at_least_one:
        if get(config, field) < 1:
            raise UserError(f"config.{field} is {get(config, field)}; allowed is 1 or more.")
    for field in positive:
        if not get(config, field) > 0:
            raise UserError(f"config.{field} is {get(config, field)}; allowed is more than 0.")
    for field in ("seed", "teacher.seed"):
        if get(config, field) >= 2**31:
            raise UserError(f"config.{field} is {get(config, field)}; allowed is less than 2³¹.")
    for field in not_negative:
        if not get(config, field) >= 0:
            raise UserError(f"config.{field} is {get(config, field)}; allowed is 0 or more.")
    final = config.generator.final_learning_rate
    if final is not None and not final >= 0:
        raise UserError(
            f"config.generator.final_learning_rate is {final}; allowed is None or 0 or more."
        )
    if len(config.generator.channels) != 2 or min(config.generator.channels) < 1:
        raise UserError(
            f"config.generator.channels is {tuple(config.generator.channels)}; "
            "allowed are two numbers of 1 or more."
        )
    if config.replay.kind != "none" and config.replay.entry_size > config.batch_size:
        raise UserError(
            f"config.replay.entry_size is {config.replay.entry_size}; "
            f"allowed is at most config.batch_size, {config.batch_size}."
        )
    if config.replay.kind == "generative" and config.replay.entry_size < 2:
        raise UserError(
            f"config.replay.entry_size is {config.replay.entry_size}; generative replay needs 2 or "
            "more, for the variance over the recalled batch."
        )


def _check_models(config: ml_collections.ConfigDict, spec: DatasetSpec) -> None:
    for role in ("teacher", "student"):
        try:
            name, dtype = config[role].model, models.COMPUTE_DTYPES[config.compute_dtype]
            module = create_classifier(name, spec.num_classes, dtype=dtype)
            if is_own(name):
                check_call(module, name, spec.image_shape, spec.num_classes)
            else:
                _check_size(name, spec.image_shape)
        except UserError as error:
            raise UserError(f"config.{role}.model: {error}") from error
    try:
        base_size(spec.image_shape)
    except UserError as error:
        raise UserError(f"config.dataset.image_size is {spec.image_shape[0]}: {error}") from error


def _check_batch_norm_term(config: ml_collections.ConfigDict, spec: DatasetSpec) -> None:
    """The term compares with running statistics: a teacher that keeps none makes it 0."""
    if not config.loss.batch_norm:
        return
    module = create_classifier(config.teacher.model, spec.num_classes)
    if not batch_norm.count(module, spec.image_shape):
        raise UserError(
            f"config.loss.batch_norm is {config.loss.batch_norm} but config.teacher.model "
            f"{config.teacher.model!r} has no flax.linen.BatchNorm whose statistics to match; "
            "allowed is 0.0."
        )


def _check_size(name: str, image_shape: tuple[int, int, int]) -> None:
    """By a table: tracing the network would start the accelerator."""
    sizes = IMAGE_SIZES.get(name)
    if sizes and image_shape[0] not in sizes:
        allowed = " or ".join(f"{size}×{size}" for size in sizes)
        raise UserError(
            f"{name!r} cannot take {image_shape[0]}×{image_shape[1]}×{image_shape[2]} images; "
            f"allowed are {allowed}."
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


def _check_card(config: ml_collections.ConfigDict, spec: DatasetSpec) -> None:
    """The card of a given teacher must agree with the configuration."""
    card = data_specs.teacher_card(config)
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


def get(config: Any, field: str) -> Any:
    """The value of a dotted field name."""
    for part in field.split("."):
        config = config[part]
    return config


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The configuration as plain JSON values, references resolved."""
    return json.loads(config.to_json())


def differences(stored: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields that differ, as "field: stored → current", apart from `FREE_FIELDS`."""
    found = []
    for key in sorted(stored.keys() | current.keys()):
        field = prefix + key
        a, b = stored.get(key), current.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, field + ".")
        elif a != b and field not in FREE_FIELDS:
            found.append(f"{field}: {a!r} → {b!r}")
    return found
