"""Checking a configuration before anything compiles, and comparing two of them."""

import json
from typing import Any

import ml_collections

from dfkd_jax import data, losses, meta, replay, results, teacher
from dfkd_jax.classifiers import create_classifier
from dfkd_jax.epoch import LOOPS
from dfkd_jax.generator import Generator

# A run may go on with other values of these: they do not change what it computes.
FREE_FIELDS = ("loop", "dataset.data_dir")


class UserError(Exception):
    """One sentence for the user: what is wrong, and what is allowed."""


def check(config: ml_collections.ConfigDict) -> None:
    """Raise `UserError` for the first field that cannot work; touches no accelerator."""
    try:
        _check_choices(config)
        _check_ranges(config)
        spec = data.spec(config.dataset.name)
        data.check_prepared(config.dataset.name, config.dataset.data_dir)
        _check_models(config, spec)
        _check_teacher(config, spec)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def _check_choices(config: ml_collections.ConfigDict) -> None:
    choices = {
        "loop": LOOPS,
        "loss.distance": losses.DISTANCES,
        "loss.adversarial_form": losses.ADVERSARIAL,
        "meta.variant": meta.VARIANTS,
        "meta.objective": ("paper", "code"),
        "replay.kind": replay.SCHEMES,
        "replay.push_unit": ("epoch", "iteration"),
    }
    for field, allowed in choices.items():
        value = get(config, field)
        if value not in allowed:
            raise ValueError(f"config.{field} is {value!r}; allowed are {', '.join(allowed)}.")
    if config.replay.kind == "none" and (
        config.meta.variant != "none" or config.meta.objective != "paper"
    ):
        raise ValueError(
            f"config.meta.variant is {config.meta.variant!r} and config.meta.objective is "
            f"{config.meta.objective!r} but config.replay.kind is 'none'; without replay there is "
            "nothing to retain, and only variant 'none' with objective 'paper' is allowed."
        )


def _check_ranges(config: ml_collections.ConfigDict) -> None:
    at_least_one = (
        "epochs",
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
        "teacher.seed",
        "teacher.weight_decay",
        "student.momentum",
        "student.weight_decay",
        "meta.inner_lr",
        "meta.inner_weight_decay",
        "replay.kl_weight",
        "replay.recall_steps",
        "replay.recall_information_entropy",
        "replay.recall_one_hot",
    )
    if config.batch_size < 2:
        raise ValueError(
            f"config.batch_size is {config.batch_size}; allowed is 2 or more, for batch statistics."
        )
    for field in at_least_one:
        if get(config, field) < 1:
            raise ValueError(f"config.{field} is {get(config, field)}; allowed is 1 or more.")
    for field in positive:
        if not get(config, field) > 0:
            raise ValueError(f"config.{field} is {get(config, field)}; allowed is more than 0.")
    for field in not_negative:
        if not get(config, field) >= 0:
            raise ValueError(f"config.{field} is {get(config, field)}; allowed is 0 or more.")
    if len(config.generator.channels) != 2 or min(config.generator.channels) < 1:
        raise ValueError(
            f"config.generator.channels is {tuple(config.generator.channels)}; "
            "allowed are two numbers of 1 or more."
        )
    if config.replay.kind != "none" and config.replay.entry_size > config.batch_size:
        raise ValueError(
            f"config.replay.entry_size is {config.replay.entry_size}; "
            f"allowed is at most config.batch_size, {config.batch_size}."
        )
    if config.replay.kind == "generative" and config.replay.entry_size < 2:
        raise ValueError(
            f"config.replay.entry_size is {config.replay.entry_size}; generative replay needs 2 or "
            "more, for the variance over the recalled batch."
        )


def _check_models(config: ml_collections.ConfigDict, spec: data.DatasetSpec) -> None:
    for role in ("teacher", "student"):
        try:
            create_classifier(config[role].model, spec.num_classes)
        except ValueError as error:
            raise ValueError(f"config.{role}.model: {error}") from error
    Generator(spec.image_shape, tuple(config.generator.channels))


def _check_teacher(config: ml_collections.ConfigDict, spec: data.DatasetSpec) -> None:
    """The card of a given teacher must agree with the configuration."""
    directory = config.teacher.checkpoint
    if directory is None:
        return
    if not teacher.is_teacher(directory):
        raise ValueError(
            f"config.teacher.checkpoint is {directory!r}, which holds no {teacher.CARD}; allowed "
            "is the folder of a trained teacher (such as WORKDIR/teacher of an earlier run), or "
            "None to train one."
        )
    card = results.read_json(f"{directory}/{teacher.CARD}")
    wanted = {
        "model": config.teacher.model,
        "num_classes": spec.num_classes,
        "image_shape": list(spec.image_shape),
    }
    for field, value in wanted.items():
        if card.get(field) != value:
            raise ValueError(
                f"config.teacher.checkpoint is {directory!r}, a teacher with {field} "
                f"{card.get(field)!r}; the configuration and config.dataset.name "
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
