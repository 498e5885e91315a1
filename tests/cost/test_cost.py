"""A guard against regressions of cost, by counts that do not depend on the machine's speed."""

import logging

import jax
import jax.numpy as jnp
import pytest

from dfkd_jax.cost.measure import cost
from dfkd_jax.run.setup import create_algorithm, parse
from dfkd_jax.run.teacher import load_teacher, save_teacher
from dfkd_jax.runtime.devices import Devices
from tests.helpers.tiny import NAMED, build, epoch_of, tiny_config


@pytest.fixture
def compile_as_users_do():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# Measured when this was written.
ITERATION_FLOPS, ITERATION_BYTES = 56.5e6, 1.08e6


@pytest.mark.slow
def test_cost_of_a_compiled_iteration(compile_as_users_do):
    """A generator and a student step of a small digits run in one program.

    Counts differ a little between versions of the compiler; a factor is a regression.
    """
    config = tiny_config(**NAMED)
    steps, state, teacher = build(config)

    def iteration(state, teacher):
        return steps.student_step(steps.generator_step(state, teacher), teacher)

    flops, temp_bytes = cost(jax.jit(iteration).lower(state, teacher).compile())
    assert flops < 1.15 * ITERATION_FLOPS
    assert temp_bytes < 1.3 * ITERATION_BYTES


@pytest.mark.slow
def test_an_epoch_compiles_once_and_transfers_nothing(caplog):
    config = tiny_config(loop="step")
    steps, state, teacher = build(config)
    epoch = epoch_of(config, steps)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, _ = epoch(state, teacher)
        first = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
        caplog.clear()
        with jax.transfer_guard("disallow"):
            for _ in range(2):
                state, _ = epoch(state, teacher)
        later = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    # The start of an epoch, generator, student and observe step, and the metrics.
    assert len(first) == 5, first
    assert later == []


@pytest.mark.slow
def test_a_run_compiles_each_of_its_steps_once(tmp_path, caplog):
    """The state of the first step is fresh and the teacher read from a file, as in a run."""
    config = tiny_config(loop="step")
    devices, setup = Devices.first(), parse(config)
    algorithm, spec = create_algorithm(setup, devices), setup.spec
    network = algorithm.parts.teacher
    images = jnp.zeros((2, *spec.image_shape))
    save_teacher(tmp_path, network.init(jax.random.key(0), images, train=False), {})
    variables = load_teacher(tmp_path, network, spec.image_shape, devices)
    state = algorithm.init(config.seed)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        algorithm.epoch(state, variables)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    for step in ("update_step", "student_step", "observe_step"):
        assert sum(step in message for message in compiled) == 1, compiled
