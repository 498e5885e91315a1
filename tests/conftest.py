"""Small configurations and networks that the tests share."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do; in-process tests check numbers, not speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Many tests compile the same programs; the workers of one session inherit its cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="dfkd_jax-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jax.numpy as jnp
import pytest

from configs import digits
from dfkd_jax import data, host_memory
from dfkd_jax.replay import create_replay
from dfkd_jax.steps import create_steps
from dfkd_jax.train import create_models

host_memory.keep_freed_memory()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


TINY = {
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


def build(config):
    """(steps, state, teacher variables) of a configuration, with an untrained teacher."""
    spec = data.spec(config.dataset.name)
    models = create_models(config, spec)
    replay = create_replay(config, spec.image_shape, spec.num_classes)
    steps = create_steps(config, models, replay, spec.image_shape)
    state = jax.jit(steps.init)(jax.random.key(config.seed))
    images = jnp.zeros((2, *spec.image_shape))
    teacher = models.teacher.init(jax.random.key(99), images, train=False)
    return steps, state, teacher


def cast(tree, dtype):
    """Floating-point leaves in another precision."""

    def leaf(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)
