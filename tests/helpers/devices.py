"""Algorithms on several of the devices that one process emulates."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dfkd_jax.data.data_table import SPECS
from dfkd_jax.distillation.state import layout_of
from dfkd_jax.run.setup import create_algorithm, parse
from dfkd_jax.runtime.devices import AXIS, Devices
from tests.helpers.trees import cast

SPEC = SPECS["digits"]
FIELDS = {"batch_size": 16, "replay.entry_size": 8, "replay.mix": True}


def on(count, mapping="pmap"):
    return Devices(Mesh(np.array(jax.devices()[:count]), (AXIS,)), mapping)


_STARTS = {}


def start(config, some):
    """The algorithm on these devices, its first state and a teacher, in float64."""
    setup = parse(config)
    algorithm = create_algorithm(setup, some)
    if jax.process_count() > 1:
        state = cast(algorithm.init(1), jnp.float64)
    else:  # drawing it takes long to compile, and this way only once, not per number of devices
        key = config.copy_and_resolve_references()
        key.parallel.devices = key.loop = key.epochs = key.iterations_per_epoch = None
        key = key.to_json(sort_keys=True), jax.config.jax_enable_x64
        if key not in _STARTS:
            _STARTS[key] = create_algorithm(setup, on(1)).init(1)
        state = cast(jax.tree.map(jnp.copy, _STARTS[key]), jnp.float64)
        layout = layout_of(algorithm.parts.method)
        state = jax.device_put(state, some.shardings(layout))
    images = jnp.zeros((2, *SPEC.image_shape))
    init = jax.jit(lambda key: algorithm.parts.teacher.init(key, images, train=False))
    teacher = jax.tree.map(np.asarray, cast(init(jax.random.key(99)), jnp.float64))
    return algorithm, state, some.put(teacher)
