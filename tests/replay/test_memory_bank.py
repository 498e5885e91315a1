"""The ring buffer against a Python deque."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax.replay import memory_bank

SHAPE, CLASSES = (2, 2, 1), 3


def entry(value, size):
    """An entry whose i-th image is all 100·value + i, and its logits that plus 0.5."""
    number = 100.0 * value + jnp.arange(size)
    images = jnp.broadcast_to(number[:, None, None, None], (size, *SHAPE))
    return images, jnp.broadcast_to(number[:, None] + 0.5, (size, CLASSES))


push = jax.jit(memory_bank.push)
sample = jax.jit(memory_bank.sample, static_argnames="mix")


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.sampled_from([(1, 2), (3, 2), (4, 1)]),  # each is compiled
    whens=st.lists(st.booleans(), max_size=12),
    seed=st.integers(0, 2**31 - 1),
)
def test_behaves_like_a_deque(sizes, whens, seed):
    capacity, entry_size = sizes
    bank = memory_bank.init(capacity, entry_size, SHAPE, CLASSES)
    model = deque(maxlen=capacity)
    for number, when in enumerate(whens, start=1):
        bank = push(bank, *entry(number, entry_size), when)
        if when:
            model.append(number)

    assert int(bank.size) == len(model)
    stored = [(int(bank.next) - 1 - age) % capacity for age in range(len(model))]
    assert [int(bank.images[i, 0, 0, 0, 0]) // 100 for i in stored] == list(model)[::-1]

    for mix in (False, True):
        images, logits, weight = sample(bank, jax.random.key(seed), mix=mix)
        assert float(weight) == (1.0 if model else 0.0)
        numbers = np.asarray(images[:, 0, 0, 0])
        if not model:
            np.testing.assert_array_equal(numbers, 0)
            continue
        assert {int(n) // 100 for n in numbers} <= set(model)
        np.testing.assert_array_equal(numbers % 100, np.arange(entry_size))  # places are kept
        np.testing.assert_array_equal(logits[:, 0], numbers + 0.5)  # logits belong to images
        if not mix:
            assert len({int(n) // 100 for n in numbers}) == 1

    images, logits = memory_bank.newest(bank, 5)
    assert len(images) == len(logits) <= 5
    if model:
        assert int(images[0, 0, 0, 0]) // 100 == model[-1]


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 3),
    period=st.integers(1, 5),
    unit=st.integers(1, 4),
    iterations=st.integers(0, 40),
)
def test_pushes_come_after_the_first_unit_and_then_every_period(capacity, period, unit, iterations):
    """Against a deque that the authors' loop fills: `if epoch % period == 0`, epochs from 0."""
    model = deque(maxlen=capacity)
    for epoch in range(iterations // unit):
        if epoch % period == 0:
            model.append((epoch + 1) * unit - 1)  # the last iteration of the epoch
    found = deque(maxlen=capacity)
    for iteration in range(iterations):
        if memory_bank.push_is_due(iteration, period, unit):
            found.append(iteration)
    assert found == model
    assert bool(jax.jit(memory_bank.push_is_due)(unit - 1, period, unit))  # traced; the first


@pytest.mark.parametrize("mix", [False, True])
def test_sampling_is_uniform_over_what_is_stored(mix):
    bank = memory_bank.init(5, 2, SHAPE, CLASSES)
    for number in range(4):  # one entry stays empty
        bank = push(bank, *entry(number, 2))
    keys = jax.random.split(jax.random.key(0), 4000)
    images, _, _ = jax.vmap(lambda k: memory_bank.sample(bank, k, mix=mix))(keys)
    numbers = np.asarray(images[:, :, 0, 0, 0]).astype(int) // 100
    counts = np.stack([np.bincount(numbers[:, place], minlength=5) for place in range(2)])
    assert (counts[:, 4] == 0).all()
    np.testing.assert_allclose(counts[:, :4], 1000, atol=120)  # more than 4 standard deviations
    if mix:  # the places draw independently
        assert 0.2 < np.mean(numbers[:, 0] == numbers[:, 1]) < 0.3


def test_nothing_recompiles_as_the_bank_fills():
    compiled = jax.jit(lambda bank, key: memory_bank.sample(bank, key))
    bank = memory_bank.init(2, 3, SHAPE, CLASSES)
    for number in range(4):
        compiled(bank, jax.random.key(number))
        bank = push(bank, *entry(number, 3))
    assert compiled._cache_size() == 1


def test_a_mixed_draw_does_not_depend_on_how_the_places_are_split():
    bank = memory_bank.init(4, 6, SHAPE, CLASSES)
    for number in range(4):
        bank = push(bank, *entry(number, 6))
    key = jax.random.key(3)
    whole, _, _ = memory_bank.sample(bank, key, mix=True)
    parts = [
        memory_bank.sample(
            bank.replace(images=bank.images[:, i : i + 2], logits=bank.logits[:, i : i + 2]),
            key,
            mix=True,
            first_example=i,
        )[0]
        for i in (0, 2, 4)
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_a_wrong_shape_and_an_empty_capacity_are_refused():
    bank = memory_bank.init(2, 3, SHAPE, CLASSES)
    with pytest.raises(AssertionError):
        memory_bank.push(bank, *entry(1, 2))
    with pytest.raises(ValueError, match="capacity is 0"):
        memory_bank.init(0, 3, SHAPE, CLASSES)
