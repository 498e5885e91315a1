"""Knowledge retention: where the retention batch comes from.

A replay scheme is three pure functions over a state of its own. Over several devices each sees the
device's share of the batch and of what the layout splits:

    init(key) -> replay state
    observe(replay, batch, key, iteration, teacher) -> (replay state, metrics)   learn from images
    recall(replay, key, teacher) -> RetentionBatch                    what the student must retain

The schemes are listed in `dfkd_jax.replay.schemes`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.runtime.metrics import Metrics

Teacher = Callable[[jax.Array], tuple[Any, ...]]  # images -> (logits, ...)


@no_type_check  # a pytree: JAX puts other things than arrays into it as well
class Batch(struct.PyTreeNode):
    """Generated images and what the teacher says of them."""

    images: Float[Array, "B H W C"]  # in the teacher's normalised input space
    logits: Float[Array, "B K"]  # the teacher's


@no_type_check
class RetentionBatch(struct.PyTreeNode):
    """A replayed batch; `weight` is 0 while there is nothing to replay, else 1."""

    images: Float[Array, "m H W C"]
    logits: Float[Array, "m K"]  # the teacher's
    weight: Float[Array, ""]


class Replay(NamedTuple):
    """The pure functions of one kind of replay, and when it wants to observe."""

    init: Callable[[jax.Array], Any]
    observe: Callable[[Any, Batch, jax.Array, jax.Array, Teacher], tuple[Any, Metrics]]
    recall: Callable[[Any, jax.Array, Teacher], RetentionBatch]
    observes_after: tuple[bool, ...]  # for each student step of an iteration
    # So many images, spread evenly over the batch, are kept for `observe`; 0: nothing is replayed.
    observed_images: int
    exhibit: Callable[[Any, int, jax.Array, Teacher], Batch]  # up to so many images, for figures
    title: str  # of that figure
    layout: Any  # how the state is split over devices, a layout of `dfkd_jax.runtime.devices`
    # Sizes that the devices must divide, by the fields of the configuration that give them.
    split_sizes: Mapping[str, int] = MappingProxyType({})
    # It observes a whole batch of the synthesizer's after each of its rounds, in warm-up too.
    observes_rounds: bool = False
    # (replay state, the synthesizer's) -> replay state, instead of `observe` after a round.
    follow: Callable[[Any, Any], Any] | None = None
    capacity: str = ""  # the field of the configuration that says how many images are kept

    @property
    def replays(self) -> bool:
        """Whether anything is ever recalled."""
        return self.observed_images > 0 or self.observes_rounds


def nothing(spec: DatasetSpec) -> Replay:
    """No replay: a scheme that observes nothing and recalls no images."""

    def none() -> Batch:
        return Batch(jnp.zeros((0, *spec.image_shape)), jnp.zeros((0, spec.num_classes)))

    return Replay(
        init=lambda key: (),
        observe=lambda state, batch, key, iteration, teacher: (state, {}),
        recall=lambda state, key, teacher: RetentionBatch(
            none().images, none().logits, jnp.zeros(())
        ),
        observes_after=(),
        observed_images=0,
        exhibit=lambda state, count, key, teacher: none(),
        title="",
        layout=(),
    )
