import copy
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax import benchmark
from dfkd_jax.benchmark import ITERATION, STEP, Ratio
from dfkd_jax.cost import operations, peer
from dfkd_jax.cost.measure import Program, cost
from dfkd_jax.runtime.errors import UserError
from tests.conftest import tiny_config

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


def test_cost_counts_products():
    n = 64
    product = jax.jit(jnp.matmul).lower(jnp.ones((n, n)), jnp.ones((n, n))).compile()
    flops, temp_bytes = cost(product)
    assert flops == 2 * n**3
    assert temp_bytes >= 0


def test_the_record_of_a_variant():
    config = tiny_config()
    records, comparisons = benchmark.benchmark(config, ["first_order", "exact"], rounds=2)
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


def test_the_time_of_a_step_by_kind_of_operation():
    text = """
%fused_computation.1 (param_0: f32[8,3]) -> f32[8,8] {
  %param_0 = f32[8,3]{1,0} parameter(0)
  ROOT %dot.2 = f32[8,8]{1,0} dot(%param_0, %param_0), lhs_contracting_dims={1}
}

ENTRY %main.3 (a.1: f32[8,3]) -> f32[8,8] {
  %a.1 = f32[8,3]{1,0} parameter(0)
  %ynn_fusion.7 = f32[8,8]{1,0} fusion(%a.1), kind=kCustom, calls=%fused_computation.1, metadata={}
  ROOT %copy.4 = f32[8,8]{0,1} copy(%ynn_fusion.7)
}
"""
    opcodes = operations.opcodes_of(text)
    assert [opcodes[name] for name in ("a.1", "ynn_fusion.7", "copy.4")] == [
        "parameter",
        "dot",
        "copy",
    ]
    assert operations.kind("ynn_fusion.7", "dot") == "matrix products"
    assert operations.kind("copy_bitcast_fusion.2", "fusion") == "copies"
    assert operations.kind("multiply_select_fusion", "fusion") == "elementwise and sums"
    assert operations.kind("while.3", "while") is None
    program = Program("exact", tiny_config())
    seconds = operations.seconds_by_kind(program)
    assert {"convolutions", "elementwise and sums"} <= set(seconds)
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    assert 0 < sum(seconds.values())


def test_a_peer_that_cannot_start_is_one_sentence(monkeypatch):
    monkeypatch.setitem(peer.PEERS, "torch", "benchmarks.missing")
    config = tiny_config(**{"meta.measure_alignment": False})
    with pytest.raises(UserError, match=r"needs torch and higher, and said: .*missing"):
        peer.Peer("torch", peer.describe(config, "exact", 1))


@pytest.mark.parametrize(
    "field, value",
    [
        ("replay.kind", "generative"),
        ("meta.measure_alignment", True),
        ("loss.adversarial_form", "kl"),
    ],
)
def test_work_that_the_peer_does_not_do_is_refused(field, value):
    config = tiny_config(**{"meta.measure_alignment": False, field: value})
    with pytest.raises(UserError, match=rf"config\.{field} is {value!r}; the peer"):
        peer.describe(config, "exact", 1)


def test_a_gradient_that_the_peer_does_not_have_is_refused():
    config = tiny_config(**{"meta.measure_alignment": False})
    with pytest.raises(UserError, match="--gradients has 'finite_difference'"):
        peer.describe(config, "finite_difference", 1)


@pytest.fixture
def torch_work():
    """The peer's work on the tiny configuration, in float64."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("higher")
    from dfkd_jax.cost.torch_peer import Work

    config = tiny_config(**{"meta.measure_alignment": False, "replay.kind": "memory_bank"})
    torch.set_default_dtype(torch.float64)
    yield lambda variant: Work(peer.describe(config, variant, 1))
    torch.set_default_dtype(torch.float32)


def torch_gradient(work, variant):
    import torch

    gradient = getattr(work, {"exact": "exact", "first_order": "first_order"}[variant])
    work.student.zero_grad()
    torch.manual_seed(1)
    images, replayed = torch.randn(2, 8, 1, 8, 8)
    logits, replayed_logits = work.teacher(images)[0], work.teacher(replayed)[0]
    gradient(images, logits, replayed, replayed_logits)

    def objective(student):
        from dfkd_jax.cost.torch_peer import distance

        parameters = dict(student.named_parameters())
        acquisition = distance(student(images)[0], logits)
        slopes = torch.autograd.grad(acquisition, list(parameters.values()))
        adapted = {
            name: p - work.work["inner_lr"] * g
            for (name, p), g in zip(parameters.items(), slopes, strict=True)
        }
        output = torch.func.functional_call(student, adapted, (replayed,))[0]
        return (acquisition + distance(output, replayed_logits)).item()

    return [p.grad for p in work.student.parameters()], objective


def test_the_peer_takes_the_exact_gradient(torch_work):
    import torch

    work = torch_work("exact")
    gradient, objective = torch_gradient(work, "exact")
    rng = np.random.default_rng(0)
    step = 1e-7
    values = []
    directions = [torch.tensor(rng.normal(size=p.shape)) for p in work.student.parameters()]
    for sign in (1, -1):
        moved = copy.deepcopy(work.student)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), directions, strict=True):
                p += sign * step * d
        values.append(objective(moved))
    difference = (values[0] - values[1]) / (2 * step)
    product = sum(float((g * d).sum()) for g, d in zip(gradient, directions, strict=True))
    assert product == pytest.approx(difference, rel=1e-4)
    first_order, _ = torch_gradient(torch_work("first_order"), "first_order")
    other = sum(float((g * d).sum()) for g, d in zip(first_order, directions, strict=True))
    assert abs(other - difference) > 1e-3 * abs(difference)
