"""This project's objectives on top of methods that distil from a pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation import steps
from dfkd_jax.runtime.draw import stream
from tests.helpers.tiny import build, measured, tiny_config

pytestmark = pytest.mark.slow

ON_TOP = [
    {"objective": "joint"},
    {"objective": "concatenated"},
    {"objective": "lra_concatenated"},
    *({"objective": "lra", "meta.variant": name} for name in ("exact", "exact_hvp", "first_order")),
]


@pytest.fixture(scope="module", params=["fast", "nayer"])
def filled(request):
    """(method, state after a round of synthesis, its pool not empty, teacher)."""
    built, state, teacher = build(tiny_config(request.param))
    taken = [steps.begin_step, steps.update_step, steps.finish_step, steps.observe_round_step]
    for step in taken:
        state, _ = jax.jit(lambda state, teacher, step=step: step(built.parts, state, teacher))(
            state, teacher
        )
    assert int(state.replay.size) == 1  # batch
    return request.param, state, teacher


@pytest.mark.parametrize("fields", ON_TOP, ids=lambda fields: "-".join(fields.values()))
def test_the_newest_images_are_acquired_and_the_pools_retained(filled, fields):
    method, state, teacher = filled
    built, _, _ = build(tiny_config(method, **fields))
    parts = built.parts
    found = measured(steps.student_step, built, state, teacher)
    key = stream(state.key, "acquire", state.student_steps)
    newest = parts.method.synthesizer.sample(state.synthesizer, key).images
    assert found["replayed_share"] == 1 and found["retention_loss"] > 0
    assert -1 <= found["gradient_alignment"] <= 1 and found["gradient_alignment"] != 0
    if fields["objective"] in ("joint", "lra"):  # one pass has the batch statistics of both
        variables = {"params": state.student.params, "batch_stats": state.student.batch_stats}
        (logits, _), _ = parts.student.apply(variables, newest, train=True, mutable=["batch_stats"])
        wanted, _ = parts.teacher.apply(teacher, newest, train=False)
        by_hand = jnp.mean(parts.distance(logits, wanted))
        np.testing.assert_allclose(found["acquisition_loss"], by_hand, rtol=1e-4)
    after = jax.jit(built.student_step)(state, teacher)
    assert all(
        jax.tree.leaves(
            jax.tree.map(
                lambda a, b: bool(np.any(a != b)), state.student.params, after.student.params
            )
        )
    )


def test_the_variants_agree_on_what_they_should(filled):
    """Both exact variants give one update, the first-order one another."""
    method, state, teacher = filled
    found = {}
    for variant in ("exact", "exact_hvp", "first_order"):
        config = tiny_config(method, **{"objective": "lra", "meta.variant": variant})
        built, _, _ = build(config)
        after = jax.jit(built.student_step)(state, teacher)
        leaves = jax.tree.leaves(after.student.params)
        found[variant] = np.concatenate([np.ravel(leaf) for leaf in leaves])
    np.testing.assert_allclose(found["exact"], found["exact_hvp"], rtol=1e-3, atol=1e-6)
    assert np.max(np.abs(found["exact"] - found["first_order"])) > 1e-6
