"""Networks in training: what changes in a step, and the optimizers of student and generator."""

from typing import Any

import ml_collections
import optax
from flax import struct
from jax import lax


class Network(struct.PyTreeNode):
    """A network in training: the student or the generator."""

    params: Any
    batch_stats: Any
    opt_state: Any


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


def student_optimizer(
    config: ml_collections.ConfigDict, warm_up: int = 0
) -> optax.GradientTransformation:
    """SGD with momentum, or Adam; weight decay; a cosine over the epochs to its final rate.

    Args:
      config: of the run.
      warm_up: iterations at its start in which the student does not learn; the cosine goes over the
        epochs after them.
    """
    epochs = config.epochs - warm_up // config.iterations_per_epoch
    rate = _cosine(config, "student", config.student.final_learning_rate, epochs)
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
    if final is None:
        return optax.adam(constant)
    return optax.adam(_cosine(config, "generator", final, config.epochs))


def _cosine(
    config: ml_collections.ConfigDict, name: str, final: float, epochs: int
) -> optax.Schedule:
    """A network's learning rate by its step: constant within an epoch, `final` after the last."""
    initial, steps = config[name].learning_rate, config.iterations_per_epoch * config[name].steps
    cosine = optax.cosine_decay_schedule(initial, epochs, alpha=final / initial)
    return lambda step: cosine(step // steps)
