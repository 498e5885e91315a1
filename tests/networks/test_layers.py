import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dfkd_jax.networks import layers

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default


def normal(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), float)


@pytest.mark.parametrize("options", [{}, dict(strides=2), dict(padding=1, strides=2)])
def test_conv_layer_equals_flax(options):
    x = normal((2, 9, 9, 3))
    ours, theirs = (cls(5, (3, 3), **options) for cls in (layers.Conv, nn.Conv))
    variables = theirs.init(KEY, x)
    np.testing.assert_allclose(
        ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-5
    )


def test_batch_norm_follows_pytorch_momentum():
    x = 3 + 2 * normal((64, 2, 2, 3))
    module = layers.batch_norm(None, use_running_average=False)()
    variables = module.init(KEY, x)
    y, updates = module.apply(variables, x, mutable=["batch_stats"])
    mean, var = np.mean(x, (0, 1, 2)), np.var(x, (0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-4)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-4)


def test_batch_norm_statistics_are_global_over_the_axis():
    x = normal((8, 2, 2, 3))
    single = layers.batch_norm(None, use_running_average=False)()
    sharded = layers.batch_norm("devices", use_running_average=False)()
    variables = single.init(KEY, x)
    whole, stats = single.apply(variables, x, mutable=["batch_stats"])
    parts, part_stats = jax.vmap(
        lambda part: sharded.apply(variables, part, mutable=["batch_stats"]), axis_name="devices"
    )(x.reshape(2, 4, 2, 2, 3))
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, atol=1e-5)
    for part, full in zip(jax.tree.leaves(part_stats), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(part, np.stack([full, full]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pool, size, shapes",
    [
        (layers.max_pool2, 2, [(4, 6), (5, 7), (2, 3)]),
        (layers.max_pool3, 3, [(7, 6), (3, 2), (4, 5)]),
    ],
)
def test_max_pooling_against_numpy(pool, size, shapes):
    for height, width in shapes:
        x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32) - 9
        expected = np.empty((2, height // 2, width // 2, 3), np.float32)
        for row in range(height // 2):
            for column in range(width // 2):
                window = x[:, 2 * row : 2 * row + size, 2 * column : 2 * column + size]
                expected[:, row, column] = window.max((1, 2))
        np.testing.assert_array_equal(pool(jnp.asarray(x)), expected)


@pytest.mark.parametrize("height, width", [(4, 5), (1, 2)])
def test_padded_max_pooling_against_numpy(height, width):
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32) - 9
    expected = np.empty((2, -(-height // 2), -(-width // 2), 3), np.float32)
    for row, column in np.ndindex(expected.shape[1:3]):
        rows = slice(max(2 * row - 1, 0), 2 * row + 2)
        columns = slice(max(2 * column - 1, 0), 2 * column + 2)
        expected[:, row, column] = x[:, rows, columns].max((1, 2))
    np.testing.assert_array_equal(layers.max_pool3(jnp.asarray(x), padding=1), expected)


def test_max_pool2_derivatives():
    with jax.enable_x64(True):
        x = normal((1, 5, 4, 2))

        def pooled_cube(x):
            return jnp.sum(layers.max_pool2(x) ** 3)

        maxima = jax.image.resize(layers.max_pool2(x), (1, 4, 4, 2), "nearest") == x[:, :4]
        is_maximum = jnp.pad(maxima, ((0, 0), (0, 1), (0, 0), (0, 0)))
        np.testing.assert_allclose(jax.grad(pooled_cube)(x), 3 * x**2 * is_maximum)
        second = jax.grad(lambda x: jnp.sum(jax.grad(pooled_cube)(x)))(x)
        np.testing.assert_allclose(second, 6 * x * is_maximum)


def test_max_pool3_derivatives():
    with jax.enable_x64(True):
        x = normal((1, 6, 5, 2))

        def pooled_cube(x):
            return jnp.sum(layers.max_pool3(x) ** 3)

        # How many of the overlapping windows each pixel is the maximum of.
        pooled = layers.max_pool3(x)
        times = jnp.sum(x[..., None, None] == pooled.transpose(0, 3, 1, 2)[:, None, None], (4, 5))
        np.testing.assert_allclose(jax.grad(pooled_cube)(x), 3 * x**2 * times)
        second = jax.grad(lambda x: jnp.sum(jax.grad(pooled_cube)(x)))(x)
        np.testing.assert_allclose(second, 6 * x * times)


def test_upsample2_repeats_pixels():
    x = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    np.testing.assert_array_equal(
        layers.upsample2(jnp.asarray(x)), x.repeat(2, axis=1).repeat(2, axis=2)
    )


def test_global_average_pool():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(
        layers.global_average_pool(jnp.asarray(x)), x.mean((1, 2)), atol=1e-6
    )


def test_at_least_float32():
    assert layers.at_least_float32(jnp.ones(1, jnp.bfloat16)).dtype == jnp.float32
    assert layers.at_least_float32(jnp.ones(1, jnp.float32)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert layers.at_least_float32(jnp.ones(1, jnp.float64)).dtype == jnp.float64
