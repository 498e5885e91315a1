"""The spread of images and the share of their commonest class."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation.agreement import class_share, spread


@pytest.mark.slow
def test_the_spread_is_the_mean_distance_over_pairs():
    images = np.random.default_rng(0).normal(3, 0.5, (7, 4, 4, 3)).astype(np.float32)
    distances = [np.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(images, 2)]
    assert float(spread(images)) == pytest.approx(np.mean(distances), rel=1e-5)
    assert float(spread(images[:2])) == pytest.approx(distances[0], rel=1e-5)
    # Two independent standard normals are √2 apart.
    wide = jax.random.normal(jax.random.key(0), (64, 16, 16, 3))
    assert float(spread(wide)) == pytest.approx(np.sqrt(2), rel=0.02)


def test_the_spread_of_equal_images_is_zero_however_large_they_are():
    image = jax.random.normal(jax.random.key(1), (1, 8, 8, 1))
    for scale in (1.0, 1e3):
        assert float(spread(jnp.repeat(scale * image, 32, axis=0))) <= 1e-5 * scale
    near = 1e3 + 1e-2 * jax.random.normal(jax.random.key(2), (32, 8, 8, 1))
    assert float(spread(near)) == pytest.approx(np.sqrt(2) * 1e-2, rel=0.05)
    assert np.isnan(spread(jnp.full((4, 8, 8, 1), jnp.nan)))
    assert spread(jnp.ones((4, 8, 8, 1), jnp.bfloat16)).dtype == jnp.float32


def test_the_class_share_counts_the_commonest_class():
    logits = jax.nn.one_hot(jnp.array([3, 1, 3, 3, 0, 2, 1, 3]), 5)
    assert float(class_share(logits)) == 50.0
    assert float(class_share(jax.nn.one_hot(jnp.arange(4), 4))) == 25.0  # 100 / K
    assert float(class_share(jnp.ones((8, 3)))) == 100.0


def test_over_devices_they_are_those_of_the_whole_batch():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    images = jax.random.normal(jax.random.key(3), (8, 4, 4, 1))
    logits = jax.random.normal(jax.random.key(4), (8, 3))
    np.testing.assert_allclose(
        jax.jit(spread)(jax.device_put(images, split)), spread(images), rtol=1e-6
    )
    assert jax.jit(class_share)(jax.device_put(logits, split)) == class_share(logits)
