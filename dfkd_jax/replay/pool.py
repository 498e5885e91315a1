"""The pool: all that was synthesised, as 8-bit images on the device, read with augmentation.

So CMI, Fast-Datafree and NAYER distil: what a round has made is added, and the student's batches
are drawn from all of it, cropped and mirrored anew each time as training images are. The pool keeps
no logits, as the teacher labels the augmented image. It loses nothing until it is full; then the
oldest images go first.

An image takes H·W·C bytes: 50,000 of 32×32×3 are 154 MB, shared by the devices. Drawing never
leaves the device.
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import ml_collections
from flax import struct
from jax import lax
from jaxtyping import Array, Integer, Key, UInt8

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.data.splits import augmented, denormalize, normalize
from dfkd_jax.replay.scheme import Batch, Replay, RetentionBatch, Teacher
from dfkd_jax.runtime import draw
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.devices import WHOLE
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Default, Field, at_least
from dfkd_jax.runtime.metrics import Metrics

FIELDS = {
    "pool.capacity": Field(51_200, at_least(1), "images of the pool, of 8 bits a value"),
    "pool.batch_size": Field(
        Default(lambda config: config.get_oneway_ref("batch_size")),
        at_least(2, ", for batch statistics"),
        "images that a student step draws from the pool",
    ),
    "pool.augment": Field(
        True, None, "read with random crops, padded by 4, and flips where the data set allows them"
    ),
}


@no_type_check  # a pytree: JAX puts other things than arrays into it as well
class Pool(struct.PyTreeNode):
    """A ring of S batches; a place of a batch stays with one device."""

    images: UInt8[Array, "S B H W C"]
    next: Integer[Array, ""]  # the batch that the next push overwrites
    size: Integer[Array, ""]  # how many batches are filled, ≤ S


def push(pool: Pool, images: UInt8[Array, "B H W C"]) -> Pool:
    """Add a batch; a full pool loses its oldest one."""
    capacity = pool.images.shape[0]
    return Pool(
        images=lax.dynamic_update_index_in_dim(pool.images, images, pool.next, 0),
        next=(pool.next + 1) % capacity,
        size=jnp.minimum(pool.size + 1, capacity),
    )


def sample(
    pool: Pool, key: Key[Array, ""], count: int, first_example: Integer[Array, ""] | int = 0
) -> UInt8[Array, "m H W C"]:
    """Draw images with replacement; zeros while the pool is empty.

    The i-th of m comes from a batch of its own, uniform over those that are there, and from the
    place ⌊(i + u) B / m⌋, u uniform in [0, 1). So every stored image is equally likely, and the
    share of a device draws from the share of the same device, which makes the draw the same on any
    number of devices.

    Args:
      pool: a device's share.
      key: random key.
      count: m, of this device.
      first_example: the global index of the first of them.
    """
    places = pool.images.shape[1]

    def one(key: Key[Array, ""], example: Integer[Array, ""]) -> UInt8[Array, "H W C"]:
        batch_key, place_key = jax.random.split(key)
        batch = jax.random.randint(batch_key, (), 0, jnp.maximum(pool.size, 1))
        within = (example + jax.random.uniform(place_key)) * places / count
        return pool.images[batch, jnp.minimum(within.astype(jnp.int32), places - 1)]

    keys = draw.example_keys(key, first_example, count)
    return jax.vmap(one)(keys, jnp.arange(count))


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Replay:
    """The scheme of one configuration: it observes every round, in warm-up too.

    Args:
      config: of the run.
      spec: of the images and classes.
      axis: over which batches are split; its size divides `config.batch_size` and
        `config.pool.batch_size`.

    Raises:
      UserError: fields that do not go together; one sentence.
    """
    capacity, made = config.pool.capacity, config.batch_size
    if capacity % made:
        raise UserError(
            f"config.pool.capacity is {capacity}; allowed are multiples of config.batch_size, "
            f"{made}, which are added together."
        )
    count = config.pool.batch_size // axis.size

    def init(key: Key[Array, ""]) -> Pool:
        del key
        shape = (capacity // made, made // axis.size, *spec.image_shape)
        zero = jnp.zeros((), jnp.int32)
        return Pool(jnp.zeros(shape, jnp.uint8), zero, zero)

    def observe(
        pool: Pool,
        batch: Batch,
        key: Key[Array, ""],
        iteration: Integer[Array, ""],
        teacher: Teacher,
    ) -> tuple[Pool, Metrics]:
        del key, iteration, teacher
        # Truncated, as 8-bit images on a disk are in the field's code.
        pixels = denormalize(batch.images, spec.mean, spec.std) * 255
        return push(pool, pixels.astype(jnp.uint8)), {}

    def recall(pool: Pool, key: Key[Array, ""], teacher: Teacher) -> RetentionBatch:
        draw_key, augment_key = (draw.stream(key, name) for name in ("draw", "augment"))
        first = axis.first(count)
        images = sample(pool, draw_key, count, first)
        if config.pool.augment:
            keys = draw.example_keys(augment_key, first, count)
            images = augmented(keys, images, spec.flip)
        # In float64 where JAX has 64 bits enabled.
        inputs = normalize(images, spec.mean, spec.std, jnp.zeros(()).dtype)
        weight = (pool.size > 0).astype(inputs.dtype)
        return RetentionBatch(inputs, lax.stop_gradient(teacher(inputs)[0]), weight)

    def exhibit(pool: Pool, count: int, key: Key[Array, ""], teacher: Teacher) -> Batch:
        shown = sample(pool, key, count if int(pool.size) else 0)
        inputs = normalize(shown, spec.mean, spec.std)
        logits = teacher(inputs)[0] if len(shown) else jnp.zeros((0, spec.num_classes))
        return Batch(inputs, logits)

    axes: dict[str, Any] = {"images": 1, "next": WHOLE, "size": WHOLE}
    return Replay(
        init,
        observe,
        recall,
        observes_after=(),
        observed_images=0,
        exhibit=exhibit,
        title="pool, at random",
        layout=Pool(**axes),
        split_sizes={"pool.batch_size": config.pool.batch_size},
        observes_rounds=True,
        capacity="pool.capacity",
    )
