"""The state of a distillation: one pytree that holds all a run needs to go on."""

from typing import Any

import jax
from flax import struct

from dfkd_jax.distillation.roles import Method
from dfkd_jax.networks.training import Network
from dfkd_jax.replay.scheme import Batch
from dfkd_jax.runtime.devices import WHOLE


class DistillState(struct.PyTreeNode):
    """Everything that changes while distilling; the frozen teacher is not in it."""

    key: jax.Array  # the run's random key, constant
    student_steps: jax.Array  # () int32, taken so far
    updates: jax.Array  # () int32, of the synthesizer so far
    student: Network
    synthesizer: Any  # its state; of an adversarial one a `Network`
    replay: Any  # of the replay scheme; () without replay
    recent: Any  # a `Batch`, what the replay scheme observes next; () without replay
    early: Batch  # generated after the first epoch, to measure what is forgotten since


def layout_of(method: Method) -> DistillState:
    """How the state of a method is split over devices."""
    split = {name: WHOLE for name in DistillState.__dataclass_fields__}
    of_parts = {"synthesizer": method.synthesizer.layout, "replay": method.replay.layout}
    return DistillState(**{**split, **of_parts, "recent": 0, "early": 0})
