"""Replay schemes on the tiny configuration, and an untrained teacher for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.data.data_table import SPECS
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.replay.scheme import Batch
from dfkd_jax.replay.schemes import create_replay
from dfkd_jax.runtime.axis import ONE
from dfkd_jax.synthesis import adversarial
from tests.helpers.tiny import SMALL_NET, tiny_config

SHAPE, CLASSES = (8, 8, 1), 10
KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


MODEL = create_classifier(SMALL_NET, CLASSES)


@functools.cache
def teacher_variables():
    with jax.ensure_compile_time_eval():  # the first call may come from a function being traced
        return MODEL.init(KEY, jnp.zeros((2, *SHAPE)), train=False)


def teacher(images):
    """Logits and features of an untrained teacher."""
    return MODEL.apply(teacher_variables(), images, train=False)


@functools.cache
def scheme_of(kind, **fields):
    """(scheme, jitted observe, jitted recall) on the tiny configuration, made to learn fast."""
    fields = {"kind": kind, "vae_learning_rate": 0.005, **fields}
    fields = {f"replay.{name}": value for name, value in fields.items()}
    config = tiny_config(**fields, **{"pool.capacity": 16})
    synthesizer = adversarial.create(config, SPECS["digits"])
    scheme = create_replay(config, SPECS["digits"], ONE, synthesizer)
    if scheme.follow is None:
        observe = jax.jit(lambda *args: scheme.observe(*args, teacher)[0])
    else:
        follow, network = scheme.follow, synthesizer.init(KEY, lambda: None)
        observe = jax.jit(lambda state, *args: follow(state, network))
    recall = jax.jit(lambda *args: scheme.recall(*args, teacher))
    return scheme, observe, recall


def fresh(scheme, seed=0, count=0):
    """What the scheme observes; `count` images for one that observes whole batches."""
    images = jnp.asarray(normal(scheme.observed_images or count, *SHAPE, seed=seed))
    return Batch(images, teacher(images)[0])
