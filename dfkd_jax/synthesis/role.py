"""The role of a synthesizer: where images come from, as pure functions over a state of its own."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from dfkd_jax.losses.terms import LayerStatistics
from dfkd_jax.runtime.devices import WHOLE, Layout
from dfkd_jax.runtime.metrics import Metrics

STUDENT_MODES = ("train", "eval", "eval_after_test")


class Drawn(NamedTuple):
    """Images to learn from, in the teacher's normalised input space."""

    images: Float[Array, "B H W C"]
    targets: Int[Array, "B"] | None = None  # the classes they were made for, if any


class Seen(NamedTuple):
    """What the teacher makes of images."""

    logits: Float[Array, "B K"]
    features: Float[Array, "B D"] | None  # the input of its last layer; None: it gives none
    statistics: list[LayerStatistics]  # of the input of each batch norm, over all devices


class View(NamedTuple):
    """Teacher and student with their variables closed over."""

    teacher: Callable[[jax.Array], Seen]  # in evaluation mode
    student: Callable[[jax.Array], jax.Array]  # images -> logits, as a synthesizer sees them


class Synthesizer(NamedTuple):
    """Where images come from.

    init(key, shapes) -> state             shapes() is what a teacher's `Seen` of a batch looks like
    begin(state, key) -> state             what a round of updates starts from; None: as it is
    update(state, view, key) -> (state, metrics)   one optimisation step
    sample(state, key) -> Drawn            a batch for the student, one device's share
    finish(state) -> state                 what outlives a round; None: all of it
    made(state, key) -> Drawn              a batch as it was made, for replay schemes, measures and
                                           figures; None: `sample`, which may crop and mirror it

    Attributes:
      needs: what an update needs of the teacher's `Seen` beside logits ("features", "statistics")
        ↦ the field of the configuration that asks for it. A teacher that cannot give it is refused.
      student_mode: how `View.student` shows the student: train, eval, or eval_after_test, which is
        eval in an epoch's first iteration only, where the authors' code has just tested the
        student.
      layout: how the state is split over devices, a layout of `dfkd_jax.runtime.devices`.
    """

    init: Callable[[jax.Array, Callable[[], Seen]], Any]
    update: Callable[[Any, View, jax.Array], tuple[Any, Metrics]]
    sample: Callable[[Any, jax.Array], Drawn]
    begin: Callable[[Any, jax.Array], Any] | None = None
    finish: Callable[[Any], Any] | None = None
    made: Callable[[Any, jax.Array], Drawn] | None = None
    needs: Mapping[str, str] = MappingProxyType({})
    student_mode: str = "train"
    layout: Layout = WHOLE
