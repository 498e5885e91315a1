"""Augmentations that gradients pass through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.data.data_table import SPECS
from dfkd_jax.synthesis import views

SPEC = SPECS["cifar10"]
KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (16, 32, 32, 3))


def test_crops_stand_on_a_black_border():
    """What comes from outside of the image is a black pixel, not a grey one."""
    black = -np.asarray(SPEC.mean) / np.asarray(SPEC.std)
    bright = jnp.full((64, 32, 32, 3), 9.0)
    seen = np.asarray(views.augmented("crop", bright, KEY, SPEC))
    outside = seen != 9.0
    assert outside.any() and not outside[:, 8:24, 8:24].any()
    np.testing.assert_allclose(
        seen[outside.all(-1)], np.broadcast_to(black, seen.shape)[outside.all(-1)], rtol=1e-5
    )


def test_jitter_moves_all_images_alike():
    moves = set()
    for seed in range(40):
        seen = np.asarray(views.augmented("jitter", IMAGES, jax.random.key(seed), SPEC))
        found = [
            (dy, dx, flip)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            for flip in (False, True)
            if np.array_equal(seen, np.roll(IMAGES, (dy, dx), (1, 2))[:, :, :: -1 if flip else 1])
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert len({m[:2] for m in moves}) > 10 and {m[2] for m in moves} == {False, True}
    digits = SPECS["digits"]
    some = jax.random.normal(KEY, (4, 8, 8, 1))
    seen = np.asarray(views.augmented("jitter", some, KEY, digits))
    assert any(
        np.array_equal(seen, np.roll(some, (dy, dx), (1, 2)))
        for dy in range(-2, 3)
        for dx in range(-2, 3)
    )  # a mirrored digit is no digit


def test_none_leaves_images_alone():
    assert views.augmented("none", IMAGES, KEY, SPEC) is IMAGES


def test_a_resized_crop_is_a_stretched_part():
    """Of an image that is linear in its coordinates the crop is linear too, over part of it."""
    y, x = jnp.meshgrid(jnp.arange(32.0), jnp.arange(32.0), indexing="ij")
    images = jnp.broadcast_to(jnp.stack([y, x, y + x], -1), (8, 32, 32, 3))
    seen = np.asarray(views.resized_crops(images, KEY, SPEC))
    inner = seen[:, 4:-4, 4:-4]
    np.testing.assert_allclose(inner[..., 2], inner[..., 0] + inner[..., 1], atol=1e-3)
    slope = np.diff(inner[..., 0], axis=1)
    np.testing.assert_allclose(slope, np.broadcast_to(slope[:, :1, :1], slope.shape), atol=1e-3)
    assert np.all(slope > 0.43) and np.all(slope < 1.001)  # sides from √(¼ · ¾) to 1
    assert len(np.unique(np.round(slope[:, 0, 0], 4))) > 4  # each image its own


@pytest.mark.parametrize("way", ["crop", "jitter", "resized"])
def test_gradients_pass(way):
    def seen(images):
        if way == "resized":
            return jnp.sum(views.resized_crops(images, KEY, SPEC) ** 2)
        return jnp.sum(views.augmented(way, images, KEY, SPEC) ** 2)

    gradient = jax.grad(seen)(IMAGES)
    assert np.all(np.isfinite(gradient)) and np.any(gradient)
