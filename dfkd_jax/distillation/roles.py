"""The roles that a method composes: each a NamedTuple of pure functions over a state of its own.

    Synthesizer   where images x̂ come from
    Replay        what is kept of them, and comes back as x̂_m
    Objective     what the student descends on x̂ and x̂_m
    Plan          how often each acts

A method puts one of each together. The loop, checkpoints and figures know the roles only.
"""

from typing import NamedTuple

from dfkd_jax.distillation.objectives import Objective
from dfkd_jax.replay.scheme import Replay
from dfkd_jax.synthesis.role import Synthesizer


class Plan(NamedTuple):
    """How often each role acts in an iteration."""

    updates: int = 1  # of the synthesizer, in a round
    student_steps: int = 10
    rounds: int = 1  # of updates, each between the synthesizer's `begin` and `finish`
    # Iterations at the start of a run in which the student takes no step. The synthesizer acts, and
    # a replay scheme that observes its rounds does so.
    warm_up: int = 0
    warm_up_rounds: int = 1  # in each of these iterations, instead of `rounds`


class Method(NamedTuple):
    """A method of the field: one of each role."""

    synthesizer: Synthesizer
    replay: Replay
    objective: Objective
    plan: Plan
    attention: float = 0.0  # β of the student's attention loss, see `dfkd_jax.losses.attention`
