"""The contract of every replay scheme: init, observe, recall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.replay import schemes
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime import devices
from tests.helpers import last_batch
from tests.helpers.schemes import CLASSES, KEY, SHAPE, fresh, scheme_of, teacher
from tests.helpers.tiny import build, tiny_config

KINDS = [kind for kind in schemes.SCHEMES if kind != "none"]


@pytest.fixture(autouse=True)
def new_scheme(monkeypatch):
    """All that a new scheme needs beside its file."""
    monkeypatch.setitem(schemes.SCHEMES, "last_batch", last_batch)


@pytest.mark.parametrize("kind", [*KINDS, "last_batch"])
def test_contract(kind):
    scheme, observe, recall = scheme_of(kind)
    config = tiny_config()
    empty = jax.jit(scheme.init)(KEY)
    assert scheme.replays
    if not scheme.observes_rounds:
        assert len(scheme.observes_after) == config.student.steps and any(scheme.observes_after)
    nothing = scheme.exhibit(empty, 6, KEY, teacher)
    assert nothing.images.shape[1:] == SHAPE and nothing.logits.shape[1:] == (CLASSES,)

    first = recall(empty, KEY)
    assert float(first.weight) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(first))
    state = empty
    for i in range(2):
        batch = fresh(scheme, seed=i, count=config.batch_size)
        state = observe(state, batch, jax.random.fold_in(KEY, i), jnp.int32(i))
        again = recall(state, KEY)
        assert float(again.weight) == 1
    assert jax.tree.structure(state) == jax.tree.structure(empty)
    for a, b in zip(jax.tree.leaves(empty), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)

    for batch in (first, again):
        sizes = {"pool": config.pool.batch_size, "momentum": config.batch_size}
        size = sizes.get(kind, config.replay.entry_size)
        assert batch.images.shape == (size, *SHAPE)
        assert batch.logits.shape == (size, CLASSES)
        assert batch.weight.shape == ()
    np.testing.assert_allclose(again.logits, teacher(again.images)[0], rtol=1e-4, atol=1e-5)
    same = recall(state, KEY)
    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (same, again)), strict=True)
    )
    # Empty or filled is a matter of values: neither function was compiled twice.
    assert observe._cache_size() == recall._cache_size() == 1

    shown = scheme.exhibit(state, 6, KEY, teacher)
    assert 0 < shown.images.shape[0] <= 6
    np.testing.assert_allclose(shown.logits, teacher(shown.images)[0], rtol=1e-4, atol=1e-5)
    assert scheme.title


def test_a_new_scheme_is_named_in_one_place():
    config = tiny_config("lra-mb", **{"replay.kind": "last_batch", "meta.variant": "first_order"})
    parse(config)
    steps, state, variables = build(config)
    first = jax.jit(steps.student_step)(state, variables)
    observed = jax.jit(steps.observe_step)(first, variables)
    second = jax.jit(steps.student_step)(observed, variables)
    assert (float(first.replay.weight), float(second.replay.weight)) == (0, 1)
    np.testing.assert_array_equal(observed.replay.images, first.recent.images)
    config.parallel.devices = 8
    with pytest.raises(ValueError, match=r"config\.replay\.entry_size is 4, which 8 devices"):
        devices.choose(config.parallel, parse(config).split_sizes)
