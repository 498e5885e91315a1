"""Attention transfer against NumPy."""

import jax.numpy as jnp
import numpy as np

from dfkd_jax.losses.attention import attention_loss, attention_maps
from dfkd_jax.losses.terms import LayerStatistics

RNG = np.random.default_rng(4)


def layer(*shape):
    return LayerStatistics(*[jnp.zeros(shape[-1])] * 4, inputs=jnp.asarray(RNG.normal(size=shape)))


def test_maps_are_of_the_last_layer_of_each_size():
    layers = [
        layer(2, 4, 4, 3),
        layer(2, 4, 4, 5),
        layer(2, 2, 2, 6),
        layer(2, 7),
        layer(2, 1, 1, 4),
    ]
    maps = attention_maps(layers)
    assert set(maps) == {(4, 4), (2, 2)}
    for size, index in (((4, 4), 1), ((2, 2), 2)):
        energy = (np.asarray(layers[index].inputs) ** 2).mean(-1).reshape(2, -1)
        expected = energy / np.linalg.norm(energy, axis=1, keepdims=True)
        np.testing.assert_allclose(maps[size], expected, rtol=1e-5)


def test_the_loss_is_over_the_sizes_that_both_have():
    teacher, student = ([layer(3, 4, 4, 2), layer(3, n, n, 2)] for n in (2, 3))
    one, other = attention_maps(teacher), attention_maps(student)
    expected = ((np.asarray(one[4, 4]) - np.asarray(other[4, 4])) ** 2).mean()
    np.testing.assert_allclose(attention_loss(one, other), expected, rtol=1e-5)
    assert attention_loss(one, one) == 0
