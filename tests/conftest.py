"""Small configurations and networks that the tests share."""

import gc
import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do, and they check numbers, not speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Runs in this process use one of these, but where a test asks for more.
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
# Fusions by XLA's older emitters compile in a fifth of the time. XLA aborts at flags that it does
# not know, so a version that may have dropped this one does without.
if jaxlib.version.__version__.startswith("0.10.") and "emitters" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Many tests compile the same programs; the workers of one session inherit its cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="dfkd_jax-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from dfkd_jax.distillation import steps
from dfkd_jax.distillation.epoch import create_epoch
from dfkd_jax.distillation.steps import Parts
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import teacher
from dfkd_jax.run.setup import create_parts, parse
from dfkd_jax.runtime import host_memory
from dfkd_jax.runtime.devices import Devices, mapped
from dfkd_jax.runtime.metrics import averages

host_memory.keep_freed_memory()


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each keeps memory mapped, of which a process may have only so much: a session has thousands.

    The cache on disk has them for whoever needs them again.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


TINY = {
    "parallel.devices": 1,
    "epochs": 3,
    "batch_size": 8,
    "iterations_per_epoch": 3,
    "student.steps": 2,
    "teacher.model": "cnn_half",
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


def tiny_config(method="lra-mb", **fields):
    """Digits with networks and budgets so small that a step is a matter of milliseconds."""
    config = digits.get_config(method)
    config.update_from_flattened_dict({**TINY, **fields})
    return config


class Steps(NamedTuple):
    """The steps of one configuration, (state, teacher variables) -> state, and their parts."""

    generator_step: Callable
    student_step: Callable
    observe_step: Callable
    parts: Parts


def build(config):
    """(steps, state, teacher variables) of a configuration, with an untrained teacher."""
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
    found = jax.jit(partial(step, built.parts))(state, teacher)[1]
    return jax.tree.map(float, averages(found))


def untrained_teacher(directory, seed=0):
    """The folder of a teacher of `tiny_config` that nobody has trained."""
    model = create_classifier("cnn_half", 10)
    variables = model.init(jax.random.key(seed), jnp.zeros((2, 8, 8, 1)), train=False)
    card = {"model": "cnn_half", "num_classes": 10, "image_shape": [8, 8, 1]}
    teacher.save_teacher(directory, variables, card)
    return directory


def epoch_of(config, built):
    """The epoch function on one device."""
    parts = built.parts._replace(iterations_per_epoch=config.iterations_per_epoch)
    return create_epoch(config.loop, parts, parts, mapped(Devices.first(), None))


def cast(tree, dtype):
    """Floating-point leaves in another precision."""

    def leaf(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def same_bits(a, b):
    """Whether two trees have the same structure and the same bytes."""

    def data(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(map(data, jax.tree.leaves(a)), map(data, jax.tree.leaves(b)), strict=True)
    )
