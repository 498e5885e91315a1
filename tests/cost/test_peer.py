"""The peer: what it is asked to do, what it refuses, and its gradient."""

import copy

import numpy as np
import pytest

from dfkd_jax.cost import peer
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import NAMED, tiny_config


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

    config = tiny_config(**{**NAMED, "meta.measure_alignment": False})
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


def test_a_method_without_a_generator_is_refused(own_method_example):
    config = tiny_config("pixels", **{"meta.measure_alignment": False})
    with pytest.raises(UserError, match=r"'pixels' has no field config\.generator\.final_learning"):
        peer.describe(config, "exact", 1)
