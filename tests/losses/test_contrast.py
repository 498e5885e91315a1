"""The contrast of CMI against independent NumPy computations."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.losses import contrast
from dfkd_jax.losses.terms import LayerStatistics

RNG = np.random.default_rng(3)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


LOCAL, WHOLE = map(jnp.asarray, unit(RNG.normal(size=(2, 5, 3))))
BANK_LOCAL, BANK_WHOLE = map(jnp.asarray, unit(RNG.normal(size=(2, 4, 3))))


def info_nce(queries, keys, temperature):
    """−log of the positive's share, row by row."""
    each = []
    for i, query in enumerate(queries):
        scores = np.exp(keys @ query / temperature)
        each.append(-np.log(scores[i] / scores.sum()))
    return np.array(each)


@pytest.mark.parametrize("filled", [0.0, 1.0])
def test_the_contrast_is_infonce_over_batch_and_bank(filled):
    value = contrast.contrast_loss(LOCAL, WHOLE, BANK_LOCAL, BANK_WHOLE, jnp.asarray(filled), 0.2)
    if filled:
        both = info_nce(
            np.concatenate([LOCAL, BANK_LOCAL]), np.concatenate([WHOLE, BANK_WHOLE]), 0.2
        )
        expected = both[:5].mean() + both[5:].mean()
    else:
        expected = info_nce(LOCAL, WHOLE, 0.2).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_keys_send_no_gradient():
    def loss(local, whole):
        return contrast.contrast_loss(local, whole, BANK_LOCAL, BANK_WHOLE, jnp.ones(()), 0.2)

    of_local, of_whole = jax.grad(loss, (0, 1))(jnp.asarray(LOCAL), jnp.asarray(WHOLE))
    assert np.any(of_local) and not np.any(of_whole) and np.all(np.isfinite(of_local))


def test_an_empty_bank_gives_finite_gradients():
    def loss(local):
        zeros = jnp.zeros((4, 3))
        return contrast.contrast_loss(local, jnp.asarray(WHOLE), zeros, zeros, jnp.zeros(()), 0.2)

    assert np.all(np.isfinite(jax.grad(loss)(jnp.asarray(LOCAL))))


def test_an_embedding_is_the_spatial_means_of_all_layers():
    convolved, dense = RNG.normal(size=(2, 4, 4, 3)), RNG.normal(size=(2, 5))
    layers = [
        LayerStatistics(*[jnp.zeros(3)] * 4, inputs=jnp.asarray(x)) for x in (convolved, dense)
    ]
    expected = np.concatenate([convolved.mean((1, 2)), dense], axis=1)
    np.testing.assert_allclose(contrast.embedding(layers), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pushes", range(6))
def test_the_bank_keeps_the_newest_pairs(pushes):
    """Also when it is exactly full, where the next place is 0 as in an empty one."""
    bank, kept = contrast.empty_bank(6, 1), deque(maxlen=3)
    for push in range(pushes):
        pair = jnp.full((2, 1), push, float)
        bank = contrast.push(bank, pair, -pair)
        kept.append(push)
    assert int(bank.size) == 2 * len(kept)
    held = np.asarray(bank.local[: int(bank.size), 0])
    assert sorted(held.tolist()) == sorted([p for p in kept for _ in range(2)])
    np.testing.assert_array_equal(bank.whole, -bank.local)
    if pushes:
        local, whole = contrast.sample(bank, jax.random.key(0), 200)
        assert set(np.asarray(local)[:, 0].tolist()) == set(kept)
        np.testing.assert_array_equal(local, -whole)  # pairs stay together


def test_the_head_gives_unit_vectors():
    head = contrast.Head(7)
    x = jnp.asarray(RNG.normal(size=(3, 32)), jnp.float32)
    out = head.apply(head.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1, rtol=1e-5)
