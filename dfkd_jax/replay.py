"""Knowledge retention: where the retention batch comes from.

A replay scheme is three pure functions over a state of its own, and a new scheme is one new file
that builds a `ReplayScheme` and a line in `SCHEMES`. Over several devices each function sees the
device's share of the batch and of what the layout splits:

    init(key) -> replay state
    observe(replay, batch, key, clock, teacher) -> replay state     learn from generated images
    recall(replay, key, teacher) -> RetentionBatch                  what the student must retain
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from flax import struct
from jax import lax

from dfkd_jax import memory_bank
from dfkd_jax.devices import WHOLE, Layout

Teacher = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # images -> (logits, features)


@struct.dataclass
class Batch:
    """Generated images and what the teacher says of them."""

    images: jax.Array  # (B, H, W, C), in the teacher's normalised input space
    logits: jax.Array  # (B, classes), the teacher's


@struct.dataclass
class RetentionBatch:
    """A replayed batch; `weight` is 0 while there is nothing to replay, else 1."""

    images: jax.Array  # (m, H, W, C)
    logits: jax.Array  # (m, classes), the teacher's
    weight: jax.Array  # ()


class ReplayScheme(NamedTuple):
    """The pure functions of one kind of replay, and when it wants to observe."""

    init: Callable[[jax.Array], Any]
    observe: Callable[[Any, Batch, jax.Array, jax.Array, Teacher], Any]
    recall: Callable[[Any, jax.Array, Teacher], RetentionBatch]
    observes_after: tuple[bool, ...]  # for each student step of an iteration
    observed_images: int  # so many images, spread evenly over the batch, are kept for `observe`
    exhibit: Callable[[Any, int, jax.Array, Teacher], Batch]  # up to so many images, for figures
    title: str  # of that figure
    layout: Layout  # how the state is split over devices (`dfkd_jax.devices`)


def create_replay(
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    axis_name: str | None = None,
    devices: int = 1,
) -> ReplayScheme | None:
    """The scheme that `config.replay.kind` names; None where nothing is replayed.

    Args:
      config: of the run.
      image_shape: (H, W, C).
      num_classes: of the teacher.
      axis_name: the mapped axis over which batches are split; devices: its size.
    """
    build = SCHEMES[config.replay.kind]
    return build and build(config, image_shape, num_classes, axis_name, devices)


def _memory_bank(
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    num_classes: int,
    axis_name: str | None,
    devices: int,
) -> ReplayScheme:
    entry_size = config.replay.entry_size // devices
    period = config.replay.push_period * (
        config.iterations_per_epoch if config.replay.push_unit == "epoch" else 1
    )

    def init(key: jax.Array) -> memory_bank.MemoryBank:
        del key
        return memory_bank.init(config.replay.capacity, entry_size, image_shape, num_classes)

    def observe(
        bank: memory_bank.MemoryBank,
        batch: Batch,
        key: jax.Array,
        iteration: jax.Array,
        teacher: Teacher,
    ) -> memory_bank.MemoryBank:
        del key, teacher
        due = (iteration + 1) % period == 0
        return memory_bank.push(bank, batch.images, batch.logits, when=due)

    def recall(bank: memory_bank.MemoryBank, key: jax.Array, teacher: Teacher) -> RetentionBatch:
        del teacher  # the bank keeps its logits
        first = 0 if axis_name is None else lax.axis_index(axis_name) * entry_size
        return RetentionBatch(
            *memory_bank.sample(bank, key, mix=config.replay.mix, first_example=first)
        )

    def exhibit(
        bank: memory_bank.MemoryBank, count: int, key: jax.Array, teacher: Teacher
    ) -> Batch:
        del key, teacher
        return Batch(*memory_bank.newest(bank, count))

    return ReplayScheme(
        init,
        observe,
        recall,
        observes_after=(False,) * (config.student.steps - 1) + (True,),
        observed_images=entry_size,
        exhibit=exhibit,
        title="memory bank, newest first",
        layout=memory_bank.MemoryBank(images=1, logits=1, next=WHOLE, size=WHOLE),
    )


def _generative(config: ml_collections.ConfigDict, *arguments: Any) -> ReplayScheme:
    from dfkd_jax import generative_replay  # it imports this module

    return generative_replay.create_generative_replay(config, *arguments)


SCHEMES: dict[str, Callable[..., ReplayScheme] | None] = {
    "none": None,
    "memory_bank": _memory_bank,
    "generative": _generative,
}
