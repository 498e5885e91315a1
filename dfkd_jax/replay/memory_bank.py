"""The memory bank: a ring buffer of replayed batches that lives on the device.

It holds what the generator once made together with the teacher's logits for it, so replaying an
entry costs no teacher pass. All functions are pure, keep every shape, and are safe under `jit`,
`scan`, `vmap` and `pmap`; an empty or partly filled bank is a matter of values, not of shapes.
"""

from typing import Any, no_type_check

import chex
import jax
import jax.numpy as jnp
import ml_collections
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.replay.scheme import Batch, Replay, RetentionBatch, Teacher
from dfkd_jax.runtime import draw
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.devices import WHOLE
from dfkd_jax.runtime.fields import Field, at_least, one_of
from dfkd_jax.runtime.metrics import Metrics

FIELDS = {
    "replay.capacity": Field(10, at_least(1), "entries of the memory bank"),
    "replay.push_period": Field(
        5, at_least(1), "a push at the end of the first unit, then of every so many-th"
    ),
    "replay.push_unit": Field("epoch", one_of(("epoch", "iteration")), "what the period counts"),
    "replay.mix": Field(
        False, None, "False: replay one stored entry; True: images of all entries, mixed"
    ),
}


@no_type_check  # a pytree: JAX puts other things than arrays into it as well
class MemoryBank(struct.PyTreeNode):
    """A ring of entries of m images each."""

    images: Float[Array, "entries m H W C"]
    logits: Float[Array, "entries m K"]  # the teacher's
    next: Int[Array, ""]  # the entry that the next push overwrites
    size: Int[Array, ""]  # how many entries are filled, ≤ entries


def init(
    capacity: int,
    entry_size: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
    dtype: jnp.dtype = jnp.float32,
) -> MemoryBank:
    """An empty bank of `capacity` entries of `entry_size` images (H, W, C) with their logits.

    Raises:
      ValueError: capacity or entry size below 1.
    """
    if capacity < 1 or entry_size < 1:
        raise ValueError(
            f"capacity is {capacity} and entry_size is {entry_size}; both must be 1 or more."
        )
    return MemoryBank(
        images=jnp.zeros((capacity, entry_size, *image_shape), dtype),
        logits=jnp.zeros((capacity, entry_size, num_classes), dtype),
        next=jnp.zeros((), jnp.int32),
        size=jnp.zeros((), jnp.int32),
    )


def push(
    bank: MemoryBank,
    images: Float[Array, "m H W C"],
    logits: Float[Array, "m K"],
    when: Bool[Array, ""] | bool = True,
) -> MemoryBank:
    """Store one entry over the oldest one, or leave the bank as it is where `when` is false.

    Only the entry at `next` is read and written, so a donated bank is updated in place.

    Args:
      bank: the bank.
      images: of the entry.
      logits: the teacher's for these images.
      when: may be traced.
    """
    chex.assert_shape(images, bank.images.shape[1:])
    chex.assert_shape(logits, bank.logits.shape[1:])
    capacity = bank.images.shape[0]
    when = jnp.asarray(when)

    def write(ring: jax.Array, entry: jax.Array) -> jax.Array:
        old = lax.dynamic_index_in_dim(ring, bank.next, keepdims=False)
        return lax.dynamic_update_index_in_dim(
            ring, jnp.where(when, entry.astype(ring.dtype), old), bank.next, 0
        )

    step = when.astype(jnp.int32)
    return MemoryBank(
        images=write(bank.images, images),
        logits=write(bank.logits, logits),
        next=(bank.next + step) % capacity,
        size=jnp.minimum(bank.size + step, capacity),
    )


def sample(
    bank: MemoryBank,
    key: Key[Array, ""],
    *,
    mix: bool = False,
    first_example: Integer[Array, ""] | int = 0,
) -> tuple[Float[Array, "m H W C"], Float[Array, "m K"], Float[Array, ""]]:
    """Draw a batch of m images.

    Args:
      bank: the bank.
      key: random key.
      mix: False draws one stored entry uniformly, as the paper does. True draws the i-th image
        from the i-th place of an entry of its own, uniform and independent for every i, so that
        every stored image is equally likely and a batch mixes all ages.
      first_example: global index of the bank's first place, where it is split over devices.

    Returns:
      images, logits, and weight: 1, or 0 while the bank is empty (the images are zeros then).
    """
    filled = jnp.maximum(bank.size, 1)
    weight = (bank.size > 0).astype(bank.images.dtype)
    if not mix:
        entry = jax.random.randint(key, (), 0, filled)
        images = lax.dynamic_index_in_dim(bank.images, entry, keepdims=False)
        logits = lax.dynamic_index_in_dim(bank.logits, entry, keepdims=False)
        return images, logits, weight
    places = jnp.arange(bank.images.shape[1])
    keys = draw.example_keys(key, first_example, places.shape[0])
    entries = jax.vmap(lambda k: jax.random.randint(k, (), 0, filled))(keys)
    return bank.images[entries, places], bank.logits[entries, places], weight


def newest(bank: MemoryBank, count: int) -> tuple[Float[Array, "n H W C"], Float[Array, "n K"]]:
    """At most `count` stored images and their logits, spread evenly over the entries.

    Newest entry first, the same number of each; for figures, not for compiled code.
    """
    capacity, entry_size = bank.images.shape[:2]
    size = int(bank.size)
    ages = range(min(size, count))
    entries = jnp.array([(int(bank.next) - 1 - age) % capacity for age in ages], jnp.int32)
    each = min(entry_size, count // max(len(ages), 1))
    images, logits = bank.images[entries, :each], bank.logits[entries, :each]
    return images.reshape(-1, *images.shape[2:]), logits.reshape(-1, logits.shape[-1])


def push_is_due(
    iteration: Integer[Array, ""] | int,
    period: Integer[Array, ""] | int,
    unit: Integer[Array, ""] | int = 1,
) -> Bool[Array, ""] | bool:
    """Whether this iteration's last batch is stored.

    At the end of the first unit, then of every `period`-th: of units 0, p, 2p, … counted from 0, as
    the authors' code has it. With p = 5 epochs replay begins in the second epoch.

    Args:
      iteration: from 0; may be traced.
      period: p, in units.
      unit: iterations of a unit, those of an epoch or 1.
    """
    return ((iteration + 1) % unit == 0) & (iteration // unit % period == 0)


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Replay:
    """The scheme of one configuration: pushes as `push_is_due`, a sample for every student step.

    Over several devices each keeps images of its own, its share of every entry.

    Args:
      config: of the run.
      spec: of the images and classes.
      axis: over which batches are split; its size divides `config.replay.entry_size`.
    """
    entry_size = config.replay.entry_size // axis.size
    unit = config.iterations_per_epoch if config.replay.push_unit == "epoch" else 1
    period = config.replay.push_period

    def empty(key: Key[Array, ""]) -> MemoryBank:
        del key
        return init(config.replay.capacity, entry_size, spec.image_shape, spec.num_classes)

    def observe(
        bank: MemoryBank,
        batch: Batch,
        key: Key[Array, ""],
        iteration: Integer[Array, ""],
        teacher: Teacher,
    ) -> tuple[MemoryBank, Metrics]:
        del key, teacher
        due = push_is_due(iteration, period, unit)
        return push(bank, batch.images, batch.logits, when=due), {}

    def recall(bank: MemoryBank, key: Key[Array, ""], teacher: Teacher) -> RetentionBatch:
        del teacher  # the bank keeps its logits
        first = axis.first(entry_size)
        return RetentionBatch(*sample(bank, key, mix=config.replay.mix, first_example=first))

    def exhibit(bank: MemoryBank, count: int, key: Key[Array, ""], teacher: Teacher) -> Batch:
        del key, teacher
        return Batch(*newest(bank, count))

    axes: dict[str, Any] = {"images": 1, "logits": 1, "next": WHOLE, "size": WHOLE}
    return Replay(
        empty,
        observe,
        recall,
        observes_after=(False,) * (config.student.steps - 1) + (True,),
        observed_images=entry_size,
        exhibit=exhibit,
        title="memory bank, newest first",
        layout=MemoryBank(**axes),
        split_sizes={"replay.entry_size": config.replay.entry_size},
        capacity="replay.capacity",
    )
