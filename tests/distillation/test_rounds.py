"""Rounds of a synthesizer: begin, updates, finish, in both loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation.roles import Plan
from dfkd_jax.networks.training import student_optimizer
from tests.helpers.tiny import build, epoch_of, tiny_config
from tests.helpers.trees import same_bits


def counting(synthesizer):
    """The synthesizer on a state with counts of what was called, in the order of the calls."""

    def noted(state, place):
        inner, counts, last = state
        # A round is begin, its updates, finish, and nothing else.
        allowed = {"begin": (-1, 2), "update": (0, 1), "finish": (1,)}[place]
        number = ("begin", "update", "finish").index(place)
        fits = jnp.any(last == jnp.array(allowed))
        return inner, {**counts, place: counts[place] + fits}, jnp.int32(number)

    def init(key, shapes):
        counts = {place: jnp.zeros((), jnp.int32) for place in ("begin", "update", "finish")}
        return synthesizer.init(key, shapes), counts, jnp.int32(-1)

    def begin(state, key):
        inner, counts, last = noted(state, "begin")
        return synthesizer.init(key, lambda: None), counts, last

    def update(state, view, key):
        inner, counts, last = noted(state, "update")
        inner, metrics = synthesizer.update(inner, view, key)
        return (inner, counts, last), metrics

    return synthesizer._replace(
        init=init,
        begin=begin,
        update=update,
        finish=lambda state: noted(state, "finish"),
        sample=lambda state, key: synthesizer.sample(state[0], key),
    )


@pytest.mark.slow
@pytest.mark.parametrize("loop, rounds, updates", [("step", 1, 2), ("scan", 2, 1)])
def test_a_round_is_begin_updates_finish(loop, rounds, updates):
    config = tiny_config("no-replay", loop=loop, iterations_per_epoch=2)
    built, state, teacher = build(config)
    method = built.parts.method
    method = method._replace(
        synthesizer=counting(method.synthesizer),
        plan=Plan(updates=updates, student_steps=1, rounds=rounds),
    )
    parts = built.parts._replace(method=method)
    state = state.replace(synthesizer=method.synthesizer.init(state.key, lambda: None))
    state, metrics = epoch_of(config, built._replace(parts=parts))(state, teacher)
    counts = {place: int(count) for place, count in state.synthesizer[1].items()}
    assert counts == {"begin": 2 * rounds, "update": 2 * rounds * updates, "finish": 2 * rounds}
    assert int(state.updates) == 2 * rounds * updates and int(state.student_steps) == 2
    assert np.isfinite(metrics["generator_loss"])


def test_each_round_begins_from_a_key_of_its_own():
    config = tiny_config("no-replay", iterations_per_epoch=1)
    built, state, teacher = build(config)
    method = built.parts.method
    synthesizer = method.synthesizer._replace(
        init=lambda key, shapes: jax.random.key_data(key),
        begin=lambda state, key: jax.random.key_data(key),
        update=lambda state, view, key: (state, {}),
        sample=method.synthesizer.sample,
    )
    parts = built.parts._replace(
        method=method._replace(synthesizer=synthesizer, plan=Plan(updates=1, student_steps=1))
    )
    from dfkd_jax.distillation.steps import begin_step

    seen = set()
    for updates in range(3):
        own = state.replace(updates=jnp.int32(updates), synthesizer=())
        begun, _ = begin_step(parts, own, teacher)
        seen.add(tuple(np.asarray(begun.synthesizer).tolist()))
    assert len(seen) == 3


@pytest.mark.parametrize("loop", ["step", "scan"])
def test_in_warm_up_the_synthesizer_acts_alone(loop):
    """Three iterations in epochs of two: the student begins in the middle of the second epoch."""
    config = tiny_config("mb-dfkd", loop=loop, iterations_per_epoch=2)
    built, state, teacher = build(config)
    plan = built.parts.method.plan._replace(warm_up=3)
    parts = built.parts._replace(method=built.parts.method._replace(plan=plan))
    epoch = epoch_of(config, built._replace(parts=parts))
    start = jax.tree.map(np.array, state.student.params)
    state, first = epoch(state, teacher)
    assert (int(state.updates), int(state.student_steps), int(state.replay.size)) == (2, 0, 0)
    assert same_bits(start, jax.tree.map(np.array, state.student.params))
    assert np.isfinite(first["generator_loss"]) and np.isnan(first["acquisition_loss"])
    assert first["finite"]
    state, second = epoch(state, teacher)
    assert (int(state.updates), int(state.student_steps), int(state.replay.size)) == (4, 2, 1)
    assert np.isfinite(second["acquisition_loss"])
    state, _ = epoch(state, teacher)
    assert (int(state.updates), int(state.student_steps)) == (6, 6)


def test_the_students_rate_falls_over_the_epochs_after_the_warm_up():
    fields = {"student.momentum": 0.0, "student.weight_decay": 0.0, "student.learning_rate": 1.0}
    config = tiny_config("no-replay", epochs=4, iterations_per_epoch=2, **fields)
    params = {"w": jnp.ones(())}

    def rates(warm_up):
        """Of the first step of every epoch in which the student learns."""
        optimizer = student_optimizer(config, warm_up)
        state, found = optimizer.init(params), []
        for _ in range(4 - warm_up // 2):
            for step in range(2 * config.student.steps):
                update, state = optimizer.update(params, state, params)
                found += [-float(update["w"])] if step == 0 else []
        return found

    np.testing.assert_allclose(rates(0), [(1 + np.cos(np.pi * e / 4)) / 2 for e in range(4)])
    np.testing.assert_allclose(rates(4), [1.0, 0.5], rtol=1e-6)
