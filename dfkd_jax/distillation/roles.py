"""The roles that a method composes: each a NamedTuple of pure functions over a state of its own.

    Synthesizer   where images x̂ come from
    Replay        what is kept of them, and comes back as x̂_m
    Objective     what the student descends on x̂ and x̂_m
    Plan          how often each acts

A method puts one of each together. The loop, checkpoints and figures know the roles only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dfkd_jax.distillation.metrics import Metrics
from dfkd_jax.distillation.objectives import Objective
from dfkd_jax.losses.terms import LayerStatistics
from dfkd_jax.replay.scheme import Replay


class Drawn(NamedTuple):
    """Images to learn from, in the teacher's normalised input space."""

    images: jax.Array  # (B, H, W, C)
    targets: jax.Array | None = None  # (B,) int32, the classes they were made for, if any


class Seen(NamedTuple):
    """What the teacher makes of images."""

    logits: jax.Array  # (B, K)
    features: jax.Array  # (B, D), the input of its last layer
    statistics: list[LayerStatistics]  # of the input of each batch norm, over all devices


class View(NamedTuple):
    """Teacher and student with their variables closed over."""

    teacher: Callable[[jax.Array], Seen]  # in evaluation mode
    student: Callable[[jax.Array], jax.Array]  # images -> logits, as a synthesizer sees them


class Synthesizer(NamedTuple):
    """Where images come from.

    init(key) -> state
    begin(state, key) -> state             what a round of updates starts from; None: as it is
    update(state, view, key) -> (state, metrics)   one optimisation step
    sample(state, key) -> Drawn            a batch for the student, one device's share
    finish(state) -> state                 what outlives a round; None: all of it
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[Any, View, jax.Array], tuple[Any, Metrics]]
    sample: Callable[[Any, jax.Array], Drawn]
    begin: Callable[[Any, jax.Array], Any] | None = None
    finish: Callable[[Any], Any] | None = None


class Plan(NamedTuple):
    """How often each role acts in an iteration."""

    updates: int = 1  # of the synthesizer, in a round
    student_steps: int = 10
    rounds: int = 1  # of updates, each between `begin` and `finish`
    warm_up: int = 0  # so many iterations without student steps, at the start of a run


class Method(NamedTuple):
    """A method of the field: one of each role."""

    synthesizer: Synthesizer
    replay: Replay
    objective: Objective
    plan: Plan
