"""The pool: a ring of 8-bit batches, drawn from evenly, the same on any number of devices."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.data.data_table import SPECS
from dfkd_jax.data.splits import normalize
from dfkd_jax.distillation.steps import observe_round_step
from dfkd_jax.replay import pool as pool_lib
from dfkd_jax.replay.pool import Pool
from dfkd_jax.replay.scheme import Batch
from dfkd_jax.run.setup import create_algorithm, parse
from dfkd_jax.runtime.errors import UserError
from tests.helpers.devices import on, start
from tests.helpers.schemes import KEY, teacher
from tests.helpers.tiny import build, epoch_of, tiny_config

SPEC = SPECS["digits"]
POOL = {"replay.kind": "pool", "objective": "retention", "pool.capacity": 24}


def filled(pushes, batches=3, places=4):
    """A pool after pushes of batches whose pixels are all 10 · push + place."""
    zero = jnp.zeros((), jnp.int32)
    pool = Pool(jnp.zeros((batches, places, 2, 2, 1), jnp.uint8), zero, zero)
    for push in range(pushes):
        values = (10 * push + jnp.arange(places)).astype(jnp.uint8)
        pool = pool_lib.push(pool, jnp.broadcast_to(values[:, None, None, None], (places, 2, 2, 1)))
    return pool


@pytest.mark.parametrize("pushes", range(8))
def test_the_newest_batches_are_kept(pushes):
    kept = deque(range(pushes), maxlen=3)
    pool = filled(pushes)
    assert int(pool.size) == len(kept)
    held = np.asarray(pool.images[: len(kept), :, 0, 0, 0])
    assert {tuple(row) for row in held} == {tuple(10 * p + np.arange(4)) for p in kept}


@pytest.mark.parametrize("count", [2, 4, 6, 8])
def test_a_draw_is_even_over_all_that_is_there(count):
    """Two of three batches are filled; fewer, as many or more images than a batch has places."""
    pool = filled(2)
    draws = jax.vmap(lambda key: pool_lib.sample(pool, key, count))(jax.random.split(KEY, 3000))
    values, times = np.unique(np.asarray(draws)[..., 0, 0, 0], return_counts=True)
    assert values.tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    expected = 3000 * count / 8
    assert np.all(np.abs(times - expected) < 5 * np.sqrt(expected))


@pytest.mark.parametrize("count", [4, 8])
def test_shares_of_two_devices_draw_what_one_draws(count):
    pool = filled(3)
    whole = pool_lib.sample(pool, KEY, count)
    shares = [
        pool_lib.sample(
            pool.replace(images=pool.images[:, 2 * d : 2 * d + 2]), KEY, count // 2, d * count // 2
        )
        for d in range(2)
    ]
    np.testing.assert_array_equal(jnp.concatenate(shares), whole)


def test_what_is_recalled_is_what_was_observed_up_to_8_bits():
    config = tiny_config("lra-mb", **POOL, **{"pool.augment": False})
    scheme = pool_lib.create(config, SPEC)
    assert scheme.recall(scheme.init(KEY), KEY, teacher).weight == 0
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    images = normalize(jnp.asarray(pixels), SPEC.mean, SPEC.std) + 1e-4  # not below after rounding
    batch = Batch(images, teacher(images)[0])
    state, _ = scheme.observe(scheme.init(KEY), batch, KEY, jnp.int32(0), teacher)
    assert state.images.dtype == jnp.uint8
    recalled = scheme.recall(state, KEY, teacher)
    assert recalled.weight == 1 and recalled.images.shape == (8, 8, 8, 1)
    distances = np.abs(np.asarray(recalled.images)[:, None] - np.asarray(images)[None])
    assert np.all(distances.max((2, 3, 4)).min(1) < 1 / 255 / SPEC.std[0])
    np.testing.assert_allclose(recalled.logits, teacher(recalled.images)[0], rtol=1e-4, atol=1e-5)


def test_a_scheme_that_may_be_empty_is_not_learned_from_alone():
    config = tiny_config("lra-mb", objective="retention")
    with pytest.raises(UserError, match=r"'retention' but .* 'memory_bank', .* allowed is pool"):
        parse(config)


def test_the_capacity_is_of_whole_batches():
    with pytest.raises(UserError, match=r"pool\.capacity is 20; allowed are multiples of .*, 8,"):
        parse(tiny_config("lra-mb", **{**POOL, "pool.capacity": 20}))


@pytest.mark.parametrize("kind", ["pool", "memory_bank"])
def test_more_than_a_device_holds_is_refused_with_the_bytes(kind):
    fields = {"replay.kind": kind, "pool.capacity": 8 * 10**13, "replay.capacity": 10**13}
    setup = parse(tiny_config("mb-dfkd", **fields))
    field = {"pool": "pool", "memory_bank": "replay"}[kind]
    with pytest.raises(UserError, match=rf"config\.{field}\.capacity is .* [\d,]+ bytes of"):
        create_algorithm(setup, on(1))


@pytest.mark.slow
def test_the_student_learns_from_the_pool_which_warm_up_fills():
    config = tiny_config("lra-mb", **POOL, loop="step", iterations_per_epoch=2)
    built, state, variables = build(config)
    plan = built.parts.method.plan._replace(warm_up=2)
    parts = built.parts._replace(method=built.parts.method._replace(plan=plan))
    epoch = epoch_of(config, built._replace(parts=parts))
    state, _ = epoch(state, variables)
    assert (int(state.replay.size), int(state.student_steps)) == (2, 0)
    state, metrics = epoch(state, variables)
    assert (int(state.replay.size), int(state.student_steps)) == (3, 4)
    assert np.isfinite(metrics["retention_loss"]) and metrics["replayed_share"] == 1
    assert "acquisition_loss" not in metrics


def test_the_gradient_is_that_of_the_recalled_batch_alone():
    config = tiny_config("lra-mb", **POOL)
    built, state, variables = build(config)
    state = observe_round_step(built.parts, state, variables)[0]
    step = jax.jit(built.student_step)
    other = state.replace(synthesizer=jax.tree.map(lambda x: x + 1, state.synthesizer))
    for a, b in zip(
        jax.tree.leaves(step(state, variables).student.params),
        jax.tree.leaves(step(other, variables).student.params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["retention", "lra"])
def test_loops_and_devices_give_the_same_numbers(objective, x64):
    found = []
    for loop, count in (("step", 1), ("scan", 1), ("step", 2)):
        fields = {**POOL, "objective": objective, "pool.capacity": 32, "batch_size": 16}
        config = tiny_config("lra-mb", loop=loop, **fields)
        algorithm, state, variables = start(config, on(count))
        state, metrics = algorithm.epoch(state, variables)
        found.append((on(count).local(state), jax.device_get(metrics)))
    (first, measured), *others = found
    assert measured["finite"] and int(first.replay.size) == 2
    for state, metrics in others:
        np.testing.assert_array_equal(state.replay.images, first.replay.images)
        for name, value in measured.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-8, atol=1e-8, err_msg=name)
