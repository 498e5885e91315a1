"""Data-free knowledge distillation in JAX/Flax.

`distill` for networks in memory, `meta_gradient` for losses of one's own, the roles that a method
puts together (`docs/own_method.md`), and `load_student` for what a run has trained.
"""

from dfkd_jax.distillation.meta import meta_gradient
from dfkd_jax.distillation.objectives import Objective, create_objective
from dfkd_jax.distillation.roles import Method, Plan
from dfkd_jax.replay.scheme import Replay
from dfkd_jax.replay.schemes import create_replay
from dfkd_jax.run.distill import Distilled, distill
from dfkd_jax.run.setup import Setup
from dfkd_jax.run.student import Student, load_student
from dfkd_jax.synthesis.role import Drawn, Seen, Synthesizer, View

__all__ = [
    "Distilled",
    "Drawn",
    "Method",
    "Objective",
    "Plan",
    "Replay",
    "Seen",
    "Setup",
    "Student",
    "Synthesizer",
    "View",
    "create_objective",
    "create_replay",
    "distill",
    "load_student",
    "meta_gradient",
]
