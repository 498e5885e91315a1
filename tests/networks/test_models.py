"""Compute in bfloat16: layers only; parameters, inner step and losses stay float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation.meta import cosine
from dfkd_jax.distillation.steps import student_step, update_step
from dfkd_jax.runtime.metrics import averages
from tests.helpers.tiny import NAMED, build, measured, tiny_config


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
def test_a_batch_norm_term_is_single_precision_too():
    """Its statistics are taken in float32 of what a bfloat16 teacher computes."""
    value = {}
    for dtype in ("float32", "bfloat16"):
        steps, state, teacher = build(tiny_config("dfq", compute_dtype=dtype, **NAMED))
        state, metrics = jax.jit(partial(update_step, steps.parts))(state, teacher)
        assert dtypes((state.synthesizer, metrics)) <= {
            jnp.dtype("float32"),
            jnp.dtype("int32"),
        }
        value[dtype] = float(averages(metrics)["generator_loss"])
    np.testing.assert_allclose(value["bfloat16"], value["float32"], rtol=0.02)


@pytest.mark.slow
def test_bfloat16_reaches_the_layers_and_nothing_else():
    params, losses = {}, {}
    for dtype in ("float32", "bfloat16"):
        steps, state, teacher = build(
            tiny_config("lra-gr", compute_dtype=dtype, **NAMED, **{"meta.variant": "first_order"})
        )
        student = jax.jit(steps.student_step)
        text = student.lower(state, teacher).as_text()
        assert ("bf16" in text) == (dtype == "bfloat16")
        before = state.student.params
        state = jax.jit(steps.observe_step)(student(state, teacher), teacher)
        state = student(state, teacher)
        losses[dtype] = measured(student_step, steps, state, teacher)["acquisition_loss"]
        assert dtypes((state.student, state.replay, state.recent)) <= {
            jnp.dtype("float32"),
            jnp.dtype("int32"),
        }
        params[dtype] = jax.tree.map(jnp.subtract, state.student.params, before)
    assert losses["bfloat16"] != losses["float32"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)
    assert cosine(params["bfloat16"], params["float32"]) > 0.98  # the same direction
