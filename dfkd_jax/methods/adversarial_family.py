"""What the adversarial methods have in common: one generator that learns as it goes.

An iteration is config.generator.steps updates of the generator, then config.student.steps steps of
the student, each on a fresh batch and, with replay, a recalled one. The methods differ in the terms
of the generator's loss, in the replay scheme and in the student's objective.
"""

import ml_collections

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.objectives import create_objective
from dfkd_jax.distillation.roles import Method, Plan
from dfkd_jax.replay.schemes import create_replay
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.synthesis import adversarial
from dfkd_jax.synthesis.role import Synthesizer

FIELDS = adversarial.FIELDS

NO_REPLAY = {"replay.kind": "none", "objective": "acquisition"}

ONLY_ADVERSARIAL = {
    "loss.one_hot": 0.0,
    "loss.information_entropy": 0.0,
    "loss.activation": 0.0,
    "loss.adversarial": 1.0,
}


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Method:
    """The method of a configuration, see `dfkd_jax.methods`."""
    return compose(config, spec, adversarial.create(config, spec, axis), axis)


def compose(
    config: ml_collections.ConfigDict,
    spec: DatasetSpec,
    synthesizer: Synthesizer,
    axis: Axis = ONE,
) -> Method:
    """The method of an adversarial synthesizer."""
    return Method(
        synthesizer=synthesizer,
        replay=create_replay(config, spec, axis, synthesizer),
        objective=create_objective(config, axis),
        plan=Plan(updates=config.generator.steps, student_steps=config.student.steps),
    )
