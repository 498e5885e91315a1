"""Views of images that gradients pass through: what a network is shown while images are made."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dfkd_jax.data import splits
from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.runtime import draw
from dfkd_jax.runtime.axis import ONE, Axis

AUGMENTATIONS = ("crop", "jitter", "none")
JITTER = 2  # pixels, as DeepInversion has it for 32×32


def augmented(
    way: str,
    images: Float[Array, "B H W C"],
    key: Key[Array, ""],
    spec: DatasetSpec,
    axis: Axis = ONE,
) -> Float[Array, "B H W C"]:
    """The images, augmented.

    Args:
      way: crop: each image cropped at random out of a black border of 4 pixels and, where the data
        set allows it, flipped; jitter: all rolled alike by up to `JITTER` pixels each way, and all
        flipped or none; none: as they are.
      images: in the teacher's space, one device's share.
      key: random key.
      spec: of the images.
      axis: over which the batch is split.
    """
    if way == "none":
        return images
    if way == "jitter":
        roll_key, flip_key = jax.random.split(key)
        shift = jax.random.randint(roll_key, (2,), -JITTER, JITTER + 1)
        images = jnp.roll(images, shift, axis=(1, 2))
        mirror = jax.random.bernoulli(flip_key) if spec.flip else False
        return jnp.where(mirror, images[:, :, ::-1], images)
    count = images.shape[0]
    keys = draw.example_keys(key, axis.first(count), count)
    black = -jnp.asarray(spec.mean, images.dtype) / jnp.asarray(spec.std, images.dtype)
    return splits.augmented(keys, images - black, spec.flip) + black


def resized_crops(
    images: Float[Array, "B H W C"], key: Key[Array, ""], spec: DatasetSpec, axis: Axis = ONE
) -> Float[Array, "B H W C"]:
    """Crops of 25 to 100 % of each image's area, stretched to its size, flipped where allowed.

    The ratio of the crop's sides is log-uniform in [3/4, 4/3]; a side that would be longer than the
    image's is cut. Bilinear, without antialiasing, differentiable.

    Args:
      images: one device's share.
      key: random key.
      spec: of the images.
      axis: over which the batch is split.
    """
    count, height, width, _ = images.shape

    def one(key: Key[Array, ""], image: Float[Array, "H W C"]) -> Float[Array, "H W C"]:
        area_key, ratio_key, place_key, flip_key = jax.random.split(key, 4)
        area = jax.random.uniform(area_key, minval=0.25, maxval=1.0)
        bound = math.log(4 / 3)
        ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-bound, maxval=bound))
        sides = jnp.minimum(jnp.sqrt(area * jnp.stack([1 / ratio, ratio])), 1.0)
        size = jnp.array([height, width]) * sides
        corner = jax.random.uniform(place_key, (2,)) * (jnp.array([height, width]) - size)
        scale = 1 / sides
        image = jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -corner * scale, "linear", antialias=False
        )
        mirror = jax.random.bernoulli(flip_key) if spec.flip else False
        return jnp.where(mirror, image[:, ::-1], image)

    keys = draw.example_keys(key, axis.first(count), count)
    return jax.vmap(one)(keys, images)
