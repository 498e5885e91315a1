import itertools
import json
import math

import pytest

from dfkd_jax import benchmark
from dfkd_jax.benchmark import ITERATION, STEP, Ratio
from tests.helpers.tiny import tiny_config

KEYS = {
    "variant",
    "seconds_per_student_step",
    "seconds_per_iteration",
    "compile_seconds",
    "flops",
    "temp_bytes",
    "fraction_of_peak",
}


class Fake:
    """A candidate whose seconds are known."""

    def __init__(self, name, log):
        self.name, self.log, self.calls = name, log, 0

    def student_step(self):
        self.log.append(self.name)
        self.calls += 1
        return float(self.calls)

    def iteration(self):
        return 10 * self.student_step()


def test_candidates_take_turns():
    log = []
    a, b = Fake("a", log), Fake("b", log)
    rates = iter([4.0, 1.0, 2.0, 3.0])
    times, rate = benchmark.measure([a, b], 2, True, lambda: next(rates))
    assert log == ["a", "b"] * 3  # the first is to warm up
    assert times[a] == times[b] == {STEP: [2.0, 3.0], ITERATION: []}
    assert rate == 2.5


def test_a_ratio_is_taken_round_by_round():
    # Both sides are twice as slow in the second round: the ratio does not see it.
    assert Ratio.of([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == (2.0, 2.0, 2.0)
    assert Ratio.of([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == (2.0, 3.0, 4.0)


@pytest.mark.slow
def test_the_record_of_a_variant():
    config = tiny_config()
    records, comparisons = benchmark.benchmark(config, ["first_order", "exact"], rounds=9)
    assert comparisons == []
    assert [r["variant"] for r in records] == ["first_order", "exact"]
    for r in records:
        assert set(r) == KEYS
        assert all(
            math.isfinite(value) and value > 0 for key, value in r.items() if key != "variant"
        )
        # Two student steps, a generator step and an observation.
        assert r[ITERATION] > r[STEP]
    assert records[1]["flops"] > records[0]["flops"]
    assert config.meta.variant == "exact"
    json.dumps(records)


@pytest.mark.slow
def test_an_epoch_is_measured_against_its_iterations():
    """By a clock that ticks at each look: an epoch is looked at as often as one iteration."""
    ticks = itertools.count()
    config = tiny_config(iterations_per_epoch=3)
    record = benchmark.epoch_over_steps(config, 2, lambda: float(next(ticks)))
    assert json.loads(json.dumps(record)) == {
        "variant": "exact",
        "seconds_per_epoch": 1.0,
        "seconds_of_its_steps": 3.0,
        "epoch_over_its_steps": pytest.approx([1 / 3] * 3),
    }
