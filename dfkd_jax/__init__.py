"""Data-free knowledge distillation in JAX/Flax.

`distill` for networks in memory, `meta_gradient` for losses of one's own, the roles that a method
puts together (`docs/own_method.md`), `load_student` for what a run has trained, and
`save_teacher` and `load_teacher` for a teacher's folder (`docs/teachers.md`).
"""

from dfkd_jax.distillation.meta import meta_gradient
from dfkd_jax.distillation.objectives import Objective, create_objective
from dfkd_jax.distillation.roles import Method, Plan
from dfkd_jax.replay.scheme import Replay
from dfkd_jax.replay.schemes import create_replay
from dfkd_jax.run.distill import Distilled, distill
from dfkd_jax.run.setup import Setup
from dfkd_jax.run.student import Student, load_student
from dfkd_jax.run.teacher_folder import load_teacher, save_teacher
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
    "load_teacher",
    "meta_gradient",
    "save_teacher",
]
