"""The momentum generator: an average that follows the synthesizer, and what is drawn from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation import steps
from dfkd_jax.networks.training import Network
from tests.helpers.tiny import build, tiny_config
from tests.helpers.trees import same_bits

DECAY = 0.7


@pytest.mark.slow
def test_it_follows_the_generator():
    built, state, teacher = build(tiny_config("mad", **{"momentum.decay": DECAY}))
    update, observe = (
        jax.jit(lambda s, t, step=step: step(built.parts, s, t)[0])
        for step in (steps.update_step, steps.observe_round_step)
    )
    expected = None
    for _ in range(3):
        state = observe(update(state, teacher), teacher)
        now = jax.tree.map(np.asarray, state.synthesizer.params)
        expected = (
            now
            if expected is None
            else jax.tree.map(lambda a, b: DECAY * a + (1 - DECAY) * b, expected, now)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            state.replay.params,
            expected,
        )
    assert int(state.replay.rounds) == 3


@pytest.mark.slow
def test_what_is_recalled_is_of_the_average():
    built, state, teacher = build(tiny_config("mad"))
    replay, synthesizer = built.parts.method.replay, built.parts.method.synthesizer
    see = steps.view(built.parts, state, teacher).teacher
    key = jax.random.key(5)
    assert float(replay.recall(state.replay, key, see).weight) == 0  # before the first round
    state, _ = steps.observe_round_step(built.parts, state, teacher)
    recalled = replay.recall(state.replay, key, see)
    assert float(recalled.weight) == 1 and recalled.images.shape == (8, 8, 8, 1)
    average = Network(state.replay.params, state.replay.batch_stats, ())
    np.testing.assert_array_equal(recalled.images, synthesizer.sample(average, key).images)
    np.testing.assert_allclose(recalled.logits, see(recalled.images).logits, rtol=1e-5, atol=1e-5)
    later = state.replace(
        synthesizer=state.synthesizer.replace(params=jax.tree.map(jnp.zeros_like, average.params))
    )
    again = replay.recall(later.replay, key, see)  # the generator's own state has no part in it
    assert same_bits(again, recalled)


@pytest.mark.slow
def test_any_adversarial_method_can_be_followed():
    config = tiny_config("dfad", **{"replay.kind": "momentum", "objective": "lra"})
    built, state, teacher = build(config)
    state, _ = steps.observe_round_step(built.parts, state, teacher)
    state, metrics = jax.jit(lambda s, t: steps.student_step(built.parts, s, t))(state, teacher)
    assert float(metrics["retention_loss"].total) > 0
