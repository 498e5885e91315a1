"""Augmentation on the device: every image is cropped and mirrored on its own."""

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.data.splits import augmented

KEYS = jax.random.split(jax.random.key(0), 200)


def test_augmentation_shifts_and_mirrors_whole_images():
    images = jnp.arange(1, 65, dtype=jnp.uint8).reshape(1, 8, 8, 1).repeat(200, axis=0)
    moved = np.asarray(augmented(KEYS, images, flip=True, pad=2))
    original = np.asarray(images[0, :, :, 0])
    allowed = set()
    for top in range(5):
        for left in range(5):
            crop = np.pad(original, 2)[top : top + 8, left : left + 8]
            allowed |= {crop.tobytes(), np.ascontiguousarray(crop[:, ::-1]).tobytes()}
    seen = {np.ascontiguousarray(image[:, :, 0]).tobytes() for image in moved}
    assert seen <= allowed and len(seen) > 40  # of 50
    unmirrored = np.asarray(augmented(KEYS, images, flip=False, pad=0))
    np.testing.assert_array_equal(unmirrored, images)


def test_an_image_is_augmented_by_its_own_key_alone():
    """So that a share of a batch is augmented as in the whole one."""
    images = jnp.arange(5 * 64, dtype=jnp.float32).reshape(5, 8, 8, 1)
    whole = augmented(KEYS[:5], images, flip=True)
    np.testing.assert_array_equal(augmented(KEYS[2:4], images[2:4], flip=True), whole[2:4])
