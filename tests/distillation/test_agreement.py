"""Agreement of student and teacher: the numbers, what they are measured on, and what they leave."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation.agreement import create_agreement
from dfkd_jax.distillation.steps import begin_step, finish_step, generated, update_step, view
from dfkd_jax.replay import memory_bank
from dfkd_jax.run.setup import create_parts, parse
from dfkd_jax.runtime.draw import stream
from tests.helpers.tiny import build, tiny_config

KINDS = {"memory_bank": "lra-mb", "generative": "lra-gr", "none": "no-replay"}


def ready(kind):
    """(config, steps, state with something to replay, teacher, the jitted measure)."""
    config = tiny_config(KINDS[kind])
    steps, state, teacher = build(config)
    measure = jax.jit(create_agreement(steps.parts))
    return config, steps.parts, steps, state, teacher, measure


@pytest.fixture(scope="module")
def bank():
    config, models, steps, state, teacher, measure = ready("memory_bank")
    empty = {name: float(value) for name, value in measure(state, teacher).items()}
    for seed in range(2):
        images = jax.random.normal(jax.random.key(seed), state.replay.images.shape[1:])
        logits, _ = models.teacher.apply(teacher, images, train=False)
        state = state.replace(replay=memory_bank.push(state.replay, images, logits))
    return config, models, steps, state, teacher, measure, empty


def test_an_empty_memory_is_not_measured(bank):
    *_, empty = bank
    assert np.isnan(empty["memory_agreement"]) and np.isnan(empty["memory_distance"])
    assert 0 <= empty["generated_agreement"] <= 100 and empty["generated_distance"] > 0


def test_the_numbers_on_the_memory_are_those_of_its_images(bank):
    config, models, _, state, teacher, measure, _ = bank
    # Both entries the same, so that it does not matter which are drawn.
    images, logits = state.replay.images[:1], state.replay.logits[:1]
    both = state.replay.replace(images=images.repeat(2, 0), logits=logits.repeat(2, 0))
    measured = measure(state.replace(replay=both), teacher)
    variables = {"params": state.student.params, "batch_stats": state.student.batch_stats}
    student, _ = models.student.apply(variables, images[0], train=False)
    same = np.argmax(student, -1) == np.argmax(logits[0], -1)
    assert float(measured["memory_agreement"]) == pytest.approx(100 * np.mean(same))
    distance = np.mean(np.abs(student - logits[0]))
    np.testing.assert_allclose(measured["memory_distance"], distance, rtol=1e-5)


def test_a_student_that_is_the_teacher_agrees_everywhere(bank):
    """Evaluation mode in both: batch statistics in one of them would make a difference."""
    config, _, _, state, teacher, *_ = bank
    student = tiny_config(**{"student.model": config.teacher.model})
    parts = create_parts(parse(student))
    own = state.student.replace(
        params=teacher["params"],
        batch_stats=jax.tree.map(lambda x: x + 0.5, teacher["batch_stats"]),
    )
    moved = {**teacher, "batch_stats": own.batch_stats}
    logits, _ = parts.teacher.apply(moved, state.replay.images.reshape(-1, 8, 8, 1), train=False)
    kept = state.replay.replace(logits=logits.reshape(state.replay.logits.shape))
    measure = jax.jit(create_agreement(parts))
    measured = measure(state.replace(student=own, replay=kept), moved)
    for name in ("generated", "memory"):
        assert float(measured[f"{name}_agreement"]) == 100
        np.testing.assert_allclose(measured[f"{name}_distance"], 0, atol=1e-5)


def test_fresh_images_depend_on_the_run_and_the_step_and_on_nothing_else(bank):
    *_, state, teacher, measure, _ = bank
    first = measure(state, teacher)["generated_distance"]
    assert measure(state, teacher)["generated_distance"] == first
    others = (
        state.replace(key=jax.random.key(77)),
        state.replace(student_steps=state.student_steps + 1),
    )
    assert all(measure(other, teacher)["generated_distance"] != first for other in others)
    emptied = state.replace(replay=jax.tree.map(jnp.zeros_like, state.replay))
    assert measure(emptied, teacher)["generated_distance"] == first


@pytest.mark.parametrize("kind", [pytest.param("generative", marks=pytest.mark.slow), "none"])
def test_every_kind_of_replay_is_measured(kind):
    _, _, steps, state, teacher, measure = ready(kind)
    if kind == "generative":
        assert np.isnan(measure(state, teacher)["memory_distance"])  # it has observed nothing
        state = state.replace(replay=state.replay.replace(observations=jnp.ones((), jnp.int32)))
    measured = {name: float(value) for name, value in measure(state, teacher).items()}
    assert set(measured) == {
        "generated_agreement",
        "generated_distance",
        "memory_agreement",
        "memory_distance",
        "early_agreement",
        "generated_class_share",
        "generated_spread",
    }
    assert np.isnan(measured["memory_distance"]) == (kind == "none")
    assert np.isnan(measured["memory_agreement"]) == (kind == "none")


@pytest.mark.slow
def test_an_objective_of_replayed_images_alone_has_its_alignment_measured():
    """As two gradients by hand on the images that are measured; NaN while the pool is empty."""
    built, state, teacher = build(tiny_config("fast"))
    parts, replay = built.parts, built.parts.method.replay
    measure = jax.jit(create_agreement(parts))
    assert np.isnan(measure(state, teacher)["gradient_alignment"])
    pixels = jax.random.randint(jax.random.key(3), state.replay.images.shape, 0, 256)
    for step in (begin_step, update_step, finish_step):  # its first images are all alike
        state, _ = jax.jit(partial(step, parts))(state, teacher)
    size = jnp.full_like(state.replay.size, state.replay.images.shape[0])
    pool = state.replay.replace(images=pixels.astype(jnp.uint8), size=size)
    state = state.replace(replay=pool)

    def logits_of(images):
        return parts.teacher.apply(teacher, images, train=False)[0]

    keys = [stream(state.key, f"agreement_{name}", 0) for name in ("generated", "memory")]
    fresh = generated(parts, state, keys[0])
    seen = view(parts, state, teacher).teacher
    first = replay.recall(state.replay, jax.random.split(keys[1], 1)[0], seen).images

    def loss(params, images):
        variables = {"params": params, "batch_stats": state.student.batch_stats}
        (logits, _), _ = parts.student.apply(variables, images, train=True, mutable=["batch_stats"])
        return jnp.mean(parts.distance(logits, logits_of(images)))

    gradient = jax.jit(jax.grad(loss))
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)])
        for g in (gradient(state.student.params, x) for x in (fresh, first))
    )
    by_hand = a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
    found = float(measure(state, teacher)["gradient_alignment"])
    assert 0 < abs(by_hand) < 0.999
    np.testing.assert_allclose(found, by_hand, atol=1e-3)
    silent = build(tiny_config("fast", **{"meta.measure_alignment": False}))[0].parts
    assert "gradient_alignment" not in jax.eval_shape(create_agreement(silent), state, teacher)
