"""What growth does to the cost: measured in sweeps, and drawn."""

import jax
import pytest

from dfkd_jax.cost import growth
from dfkd_jax.cost.measure import cost
from tests.helpers.tiny import NAMED, build, tiny_config


@pytest.mark.slow
def test_what_growth_does_to_the_cost():
    """The bank's capacity costs nothing in a step; a second inner step costs one more."""

    def lowered(sweep, value):
        config = tiny_config(**{**NAMED, "meta.variant": "exact_hvp"})
        growth.SWEEPS[sweep][2](config, value)
        steps, state, teacher = build(config)
        return jax.jit(steps.student_step, donate_argnums=0).lower(state, teacher)

    base, large, two = lowered("capacity", 2), lowered("capacity", 64), lowered("inner_steps", 2)
    flops = [each.cost_analysis()["flops"] for each in (base, large, two)]
    assert flops[1] <= 1.01 * flops[0]
    assert 1.2 * flops[0] < flops[2] < 3 * flops[0]
    assert cost(large.compile())[1] <= 1.05 * cost(base.compile())[1]


def test_growth_is_drawn(tmp_path):
    records = [
        {
            "sweep": sweep,
            "value": value,
            "seconds_per_student_step": 0.01 * value,
            "seconds_per_iteration": 0.1 * value,
            "compile_seconds": 1.0,
            "temp_bytes": 2**20 * value,
        }
        for sweep in growth.SWEEPS
        for value in (1, 2)
    ]
    growth.draw(records, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_sweep_is_measured(monkeypatch):
    fewer = {
        name: (label, lambda c, values_of=values_of: values_of(c)[1:2], change)
        for name, (label, values_of, change) in growth.SWEEPS.items()
    }
    monkeypatch.setattr(growth, "SWEEPS", fewer)  # compiling each takes seconds
    records = growth.growth(tiny_config(**{"meta.variant": "first_order"}), rounds=2)
    assert {r["sweep"] for r in records} == set(growth.SWEEPS)
    assert len(records) == len(growth.SWEEPS)
    assert all(r["seconds_per_iteration"] > 0 for r in records)
