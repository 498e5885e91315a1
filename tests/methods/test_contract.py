"""What every method of the table must keep, as one contract."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation import steps
from dfkd_jax.distillation.state import layout_of
from dfkd_jax.methods.table import METHODS
from dfkd_jax.run import checkpoint
from dfkd_jax.run.setup import create_algorithm, parse
from dfkd_jax.runtime import devices
from tests.helpers.tiny import tiny_config
from tests.helpers.trees import cast, same_bits

pytestmark = pytest.mark.slow

FIELDS = {
    "generator.channels": (4, 4),
    "iterations_per_epoch": 2,
    "epochs": 2,
}


def methods():
    """The first method of every file, and the example of the documentation.

    The others of a file differ in objective and replay scheme, which go with every method and have
    tests of their own.
    """
    return [*{module: name for name, module in reversed(METHODS.items())}.values(), "pixels"]


@pytest.fixture(scope="module", params=methods())
def method(request, own_method_example):
    return request.param


def algorithm_of(method, loop, count):
    config = tiny_config(method, loop=loop, **FIELDS)
    config.parallel.devices = count
    setup = parse(config, reads_data=False)
    some = devices.choose(config.parallel, setup.split_sizes)
    return create_algorithm(setup, some), some


def start(algorithm):
    """The first state and a teacher."""
    teacher = algorithm.parts.teacher
    images = jnp.zeros((2, *algorithm.parts.image_shape))
    variables = jax.jit(lambda key: teacher.init(key, images, train=False))(jax.random.key(99))
    return algorithm.init(1), variables


@pytest.fixture(scope="module")
def single(method):
    """On one device: (algorithm, devices, first state and teacher)."""
    with jax.enable_x64(True):
        algorithm, some = algorithm_of(method, "step", 1)
        return algorithm, some, start(algorithm)


def placed(started, algorithm, some):
    """A copy in float64 on these devices."""
    state, variables = jax.tree.map(jnp.copy, cast(started, jnp.float64))
    state = jax.device_put(state, some.shardings(layout_of(algorithm.parts.method)))
    return state, some.put(jax.tree.map(np.asarray, variables))


def test_both_loops_and_two_devices_give_the_same_numbers(method, single, x64, tmp_path):
    """An epoch reads nothing back, leaves the teacher alone, and what is saved is the state."""
    found, (*one, started) = [], single
    for algorithm, some in (one, algorithm_of(method, "scan", 2)):
        state, variables = placed(started, algorithm, some)
        before = jax.tree.map(np.array, variables)
        # Compiles, which may move constants.
        algorithm.epoch(*placed(started, algorithm, some))
        with jax.transfer_guard_device_to_host("disallow"):
            state, metrics = algorithm.epoch(state, variables)
        assert same_bits(before, jax.tree.map(np.array, variables))
        found.append((some.local(state), jax.device_get(metrics)))
    (first, measured), *others = found
    learning = 2 - algorithm.parts.method.plan.warm_up
    assert int(first.student_steps) == 2 * learning and measured["finite"]
    for state, metrics in others:
        assert metrics.keys() == measured.keys()
        for name, value in measured.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
        for path, leaf in jax.tree_util.tree_flatten_with_path(first.student.params)[0]:
            other = state.student.params
            for key in path:
                other = other[key.key]
            np.testing.assert_allclose(other, leaf, rtol=1e-6, atol=1e-9)

    manager = checkpoint.open_checkpoints(tmp_path / "checkpoints")
    checkpoint.save(manager, 1, first, [{"epoch": 1}])
    restored, history = checkpoint.restore_latest(manager, first, pytest.fail)
    manager.close()
    assert same_bits(restored, first) and history == [{"epoch": 1}]


def test_each_step_changes_what_is_its_own(single, x64):
    algorithm, some, started = single
    parts, (state, teacher) = algorithm.parts, placed(started, algorithm, some)
    own = {
        steps.begin_step: {"synthesizer"},
        steps.update_step: {"synthesizer", "updates"},
        steps.finish_step: {"synthesizer"},
        steps.observe_round_step: {"replay"},
        steps.student_step: {"student", "student_steps", "recent"},
        steps.observe_step: {"replay"},
    }
    replay = parts.method.replay
    if not replay.observes_rounds:
        del own[steps.observe_round_step]
    if not any(replay.observes_after):
        del own[steps.observe_step]
    for step, allowed in own.items():
        after, _ = jax.jit(partial(step, parts))(state, teacher)
        names = type(state).__dataclass_fields__
        changed = {n for n in names if not same_bits(getattr(state, n), getattr(after, n))}
        assert changed <= allowed, step.__name__
        if step is steps.update_step:
            assert changed == allowed
        if step is steps.student_step:
            assert allowed - changed <= {"recent"}  # of which there is none without replay
            moved = jax.tree.map(
                lambda a, b: bool(np.any(a != b)), *(s.student.params for s in (state, after))
            )
            assert all(jax.tree.leaves(moved)), moved
        state = after
