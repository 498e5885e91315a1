"""Configurations and networks so small that a step is a matter of milliseconds."""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs import digits
from dfkd_jax.configs import default
from dfkd_jax.distillation import steps
from dfkd_jax.distillation.epoch import create_epoch
from dfkd_jax.distillation.steps import Parts
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import teacher
from dfkd_jax.run.setup import create_parts, parse
from dfkd_jax.runtime.devices import Devices, mapped
from dfkd_jax.runtime.metrics import averages

# Of the methods that have such fields.
TINY_PARTS = {
    "pool.capacity": 24,
    "pool.batch_size": 8,
    "synthesis.steps": 2,
    "synthesis.rounds": 1,
    "synthesis.warm_up": 1,
    "synthesis.warm_up_rounds": 2,
    "nayer.embedding_dim": 10,
    "nayer.width": 4,
    "nayer.generator_life": 1,
    "contrast.capacity": 16,
    "contrast.negatives": 4,
    "contrast.width": 4,
}
SMALL_NET = "tests.helpers.networks:SmallNet"  # compiles in a fraction of cnn_half's time
TINY = {
    "parallel.devices": 1,
    "epochs": 3,
    "batch_size": 8,
    "iterations_per_epoch": 3,
    "student.steps": 2,
    "teacher.model": SMALL_NET,
    "student.model": SMALL_NET,
    "teacher.epochs": 2,
    "generator.latent_dim": 4,
    "generator.channels": (8, 4),
    "replay.capacity": 2,
    "replay.entry_size": 4,
    "replay.push_period": 1,
    "replay.push_unit": "iteration",
    "replay.mix": False,
    "meta.inner_lr": 0.1,
}
NAMED = {"teacher.model": "cnn_half", "student.model": "cnn_half"}  # with all that the layers do


def tiny_config(method="lra-mb", **fields):
    """Digits with networks and budgets so small that a step is a matter of milliseconds."""
    config = digits.get_config(method)
    own = default.fields(method)
    parts = {name: value for name, value in TINY_PARTS.items() if name in own}
    if config.replay.kind != "pool":
        parts = {name: value for name, value in parts.items() if not name.startswith("pool.")}
    config.update_from_flattened_dict({**TINY, **parts, **fields})
    return config


class Steps(NamedTuple):
    """The steps of one configuration, (state, teacher variables) -> state, and their parts."""

    generator_step: Callable
    student_step: Callable
    observe_step: Callable
    parts: Parts


def build(config):
    """(steps, state, teacher variables) of a configuration, with an untrained teacher.

    One configuration has one set of functions, so that `jax.jit` of a step compiles it only once
    for the tests of a module. The arrays are the caller's own, as steps may take them over.
    """
    key = (config.to_json(sort_keys=True), jax.config.jax_enable_x64)
    if key not in _BUILT:
        _BUILT[key] = _build(config)
    built, *arrays = _BUILT[key]
    return built, *jax.tree.map(jnp.copy, arrays)


_BUILT = {}


def _build(config):
    parts = create_parts(parse(config, reads_data=False))
    state = jax.jit(partial(steps.init, parts))(jax.random.key(config.seed))
    images = jnp.zeros((2, *parts.image_shape))
    init = jax.jit(lambda key: parts.teacher.init(key, images, train=False))

    def state_after(step):
        return lambda state, teacher: step(parts, state, teacher)[0]

    every = (steps.update_step, steps.student_step, steps.observe_step)
    return Steps(*map(state_after, every), parts), state, init(jax.random.key(99))


def measured(step, built, state, teacher):
    """What a step of `dfkd_jax.distillation.steps` measures, by name; NaN where nothing was."""
    found = _measuring(step, _Parts(built.parts))(state, teacher)[1]
    return jax.tree.map(float, averages(found))


class _Parts:
    """Parts as a key: equal where they are the same object."""

    def __init__(self, parts):
        self.parts = parts

    def __hash__(self):
        return id(self.parts)

    def __eq__(self, other):
        return self.parts is other.parts


@functools.lru_cache(maxsize=32)
def _measuring(step, key):
    return jax.jit(partial(step, key.parts))


def untrained_teacher(directory, seed=0, name=SMALL_NET):
    """The folder of a teacher of `tiny_config` that nobody has trained."""
    model = create_classifier(name, 10)
    variables = model.init(jax.random.key(seed), jnp.zeros((2, 8, 8, 1)), train=False)
    card = {"model": name, "num_classes": 10, "image_shape": [8, 8, 1]}
    teacher.save_teacher(directory, variables, card)
    return directory


def epoch_of(config, built):
    """The epoch function on one device."""
    parts = built.parts._replace(iterations_per_epoch=config.iterations_per_epoch)
    return create_epoch(config.loop, parts, parts, mapped(Devices.first(), None))
