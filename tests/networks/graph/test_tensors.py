"""Axes as PyTorch has them, on arrays that lie otherwise; of NumPy here, which compiles nothing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkd_jax.networks.graph.tensors import (
    aligned,
    channels_last,
    permuted,
    plain,
    pointwise,
    reduced,
    reshaped,
    stored,
    tensor,
)

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)


def numbers(shape):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@st.composite
def lying(draw, shapes=SHAPES):
    """(an array in PyTorch's axes, the tensor of it in some order)."""
    array = numbers(draw(shapes))
    order = draw(st.permutations(range(array.ndim)))
    return array, tensor(array.transpose(order), order)


@st.composite
def another_shape(draw, size):
    """A shape of so many elements."""
    factors, rest = [], size
    while rest > 1:
        factor = draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0]))
        factors.append(factor)
        rest //= factor
    for _ in range(draw(st.integers(0, 2))):
        factors.insert(draw(st.integers(0, len(factors))), 1)
    return tuple(factors)


@given(lying())
@settings(deadline=None)
def test_a_tensor_is_its_array_in_any_order(pair):
    array, value = pair
    assert value.shape == array.shape and value.ndim == array.ndim
    np.testing.assert_array_equal(plain(value), array)
    np.testing.assert_array_equal(stored(value, value.order), value.array)


@given(lying(), st.data())
@settings(deadline=None, max_examples=200)
def test_reshaping_and_permuting_are_those_of_numpy(pair, data):
    array, value = pair
    shape = data.draw(another_shape(array.size))
    np.testing.assert_array_equal(plain(reshaped(value, shape)), array.reshape(shape))
    if shape:
        free = tuple(-1 if i == 0 else n for i, n in enumerate(shape))
        np.testing.assert_array_equal(plain(reshaped(value, free)), array.reshape(shape))
    dims = data.draw(st.permutations(range(array.ndim)))
    np.testing.assert_array_equal(plain(permuted(value, dims)), array.transpose(dims))


@given(lying(), st.data())
@settings(deadline=None)
def test_reductions_are_those_of_numpy(pair, data):
    array, value = pair
    dims = data.draw(
        st.lists(st.integers(-array.ndim, array.ndim - 1), unique_by=lambda d: d % array.ndim)
    )
    keep = data.draw(st.booleans())
    found = plain(reduced(np.sum, value, list(dims), keep))
    expected = array.sum(tuple(dims) if dims else None, keepdims=keep)
    np.testing.assert_allclose(found, expected)
    assert found.shape == expected.shape


@given(lying(), lying(), st.data())
@settings(deadline=None)
def test_broadcasting_is_that_of_numpy(first, second, data):
    """The second has the shape of the end of the first, with ones among it."""
    array, value = first
    tail = array.shape[data.draw(st.integers(0, array.ndim)) :]
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in tail)
    other = numbers(shape)
    order = data.draw(st.permutations(range(other.ndim)))
    result = pointwise(np.add, tensor(other.transpose(order), order), value)
    np.testing.assert_array_equal(plain(result), other + array)
    assert result.shape == array.shape


def test_images_are_not_moved():
    images = tensor(numbers((2, 5, 5, 3)), channels_last(4))
    assert images.shape == (2, 3, 5, 5)
    moved = permuted(images, (0, 2, 3, 1))
    assert moved.array is images.array and stored(moved, range(4)) is images.array
    words = permuted(reshaped(images, (2, 3, 25)), (0, 2, 1))  # pixels as words
    assert words.axes == (0, 1, 2) and words.shape == (2, 25, 3)
    bias = tensor(numbers((3, 1, 1)))
    (array, other), order = aligned(images, bias)
    assert array is images.array and order == channels_last(4) and other.shape == (1, 1, 1, 3)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_shuffle_of_channels_leaves_images_as_they_lie(groups):
    images = tensor(numbers((2, 4, 4, 6)), channels_last(4))
    split = reshaped(images, (2, groups, 6 // groups, 4, 4))
    shuffled = reshaped(permuted(split, (0, 2, 1, 3, 4)), (2, 6, 4, 4))
    assert shuffled.order == channels_last(4)
