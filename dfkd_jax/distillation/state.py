"""The state of a distillation: one pytree that holds all a run needs to go on."""

from typing import Any

import jax
import ml_collections
import optax
from flax import struct
from jax import lax

from dfkd_jax.replay.scheme import Batch
from dfkd_jax.runtime.devices import WHOLE, Layout


@struct.dataclass
class Network:
    """A network in training: the student or the generator."""

    params: Any
    batch_stats: Any
    opt_state: Any


@struct.dataclass
class DistillState:
    """Everything that changes while distilling; the frozen teacher is not in it."""

    key: jax.Array  # the run's random key, constant
    student_steps: jax.Array  # () int32, taken so far
    updates: jax.Array  # () int32, of the synthesizer so far
    student: Network
    synthesizer: Any  # its state; of an adversarial one a `Network`
    replay: Any  # of the replay scheme; () without replay
    recent: Batch | tuple  # what the replay scheme observes next; () without replay
    early: Batch  # generated after the first epoch, to measure what is forgotten since


def layout_of(replay: Layout) -> DistillState:
    """How the state is split over devices, given the layout of the replay state."""
    split = {name: WHOLE for name in DistillState.__dataclass_fields__}
    return DistillState(**{**split, "replay": replay, "recent": 0, "early": 0})


def descend(
    network: Network, gradient: Any, batch_stats: Any, optimizer: optax.GradientTransformation
) -> Network:
    """The network after one step of its optimizer, with these batch statistics."""
    updates, opt_state = optimizer.update(gradient, network.opt_state, network.params)
    return Network(
        params=optax.apply_updates(network.params, updates),
        batch_stats=lax.stop_gradient(batch_stats),
        opt_state=opt_state,
    )


def student_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """SGD with momentum, or Adam; weight decay; cosine over the epochs to 0."""
    rate = _cosine(config, "student", 0.0)
    if config.student.optimizer == "adam":  # the decay decoupled, as of AdamW
        return optax.adamw(rate, weight_decay=config.student.weight_decay)
    return optax.chain(
        optax.add_decayed_weights(config.student.weight_decay),
        optax.sgd(rate, config.student.momentum),
    )


def generator_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam, its rate constant or a cosine over the epochs to generator.final_learning_rate."""
    final = config.generator.final_learning_rate
    constant = config.generator.learning_rate
    return optax.adam(constant if final is None else _cosine(config, "generator", final))


def _cosine(config: ml_collections.ConfigDict, name: str, final: float) -> optax.Schedule:
    """A network's learning rate by its step: constant within an epoch, `final` after the last."""
    initial, steps = config[name].learning_rate, config.iterations_per_epoch * config[name].steps
    cosine = optax.cosine_decay_schedule(initial, config.epochs, alpha=final / initial)
    return lambda step: cosine(step // steps)
