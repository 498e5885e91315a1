"""One epoch: iterations of generator steps, student steps and what the replay scheme observes.

`scan` is one compiled call, for GPU and TPU. `step` dispatches the same step functions one by one
from Python without ever reading a value back: on CPU, XLA runs convolutions inside compiled loops
and branches tens of times slower than outside of them. Both give the same numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax import lax

from dfkd_jax.devices import Mapped
from dfkd_jax.finite import all_finite
from dfkd_jax.state import DistillState, Totals
from dfkd_jax.steps import Step, Steps

LOOPS = ("auto", "scan", "step")
Epoch = Callable[[DistillState, Any], tuple[DistillState, dict[str, jax.Array]]]


def create_epoch(config: ml_collections.ConfigDict, steps: Steps, mapped: Mapped) -> Epoch:
    """(state, teacher variables) -> (state, metrics), with the state donated.

    Metrics are device scalars, the means over the epoch that `metrics_of` defines and what
    `finite_parts` says; nothing is read back.

    Args:
      config: of the run.
      steps: for one device's share of the batch.
      mapped: how they run on all devices.
    """
    loop = config.loop
    if loop == "auto":
        loop = "step" if jax.default_backend() == "cpu" else "scan"
    run = {"scan": _scanned, "step": _stepped}[loop](config, steps, mapped)
    finish = jax.jit(lambda state: metrics_of(state.totals) | finite_parts(state))

    def epoch(state: DistillState, teacher: Any) -> tuple[DistillState, dict[str, jax.Array]]:
        state = mapped.leave(run(mapped.enter(state), mapped.constants(teacher)))
        return state, finish(state)

    return epoch


def metrics_of(totals: Totals) -> dict[str, jax.Array]:
    """Means over the steps; NaN for the retention metrics of an epoch that replayed nothing.

    `finite` says whether every loss of the epoch was.
    """
    return {
        "acquisition_loss": totals.acquisition_loss / totals.student_steps,
        "retention_loss": totals.retention_loss / totals.replayed_steps,
        "generator_loss": totals.generator_loss / totals.generator_steps,
        "gradient_alignment": totals.gradient_alignment / totals.replayed_steps,
        "replayed_steps": totals.replayed_steps,
        "finite": jnp.isfinite(
            totals.acquisition_loss + totals.retention_loss + totals.generator_loss
        ),
    }


def finite_parts(state: DistillState) -> dict[str, jax.Array]:
    """Whether student, generator and replay are finite, as `finite_student` and so on.

    All that is floating in them counts: parameters, batch statistics, optimiser states and replayed
    images. The losses of an epoch do not show what its last update has made of the parameters.
    """
    parts = {name: getattr(state, name) for name in ("student", "generator", "replay")}
    return {f"finite_{name}": all_finite(part) for name, part in parts.items()}


def _start(state: DistillState) -> DistillState:
    return state.replace(totals=jax.tree.map(jnp.zeros_like, state.totals))


def _scanned(config: ml_collections.ConfigDict, steps: Steps, mapped: Mapped) -> Step:
    observes_after = jnp.asarray(steps.observes_after)

    def epoch(state: DistillState, teacher: Any) -> DistillState:
        def student(state: DistillState, observes: jax.Array) -> tuple[DistillState, None]:
            state = steps.student_step(state, teacher)
            replay = lax.cond(
                observes,
                lambda state: steps.observe_step(state, teacher).replay,
                lambda state: state.replay,
                state,
            )
            return state.replace(replay=replay), None

        def iteration(state: DistillState, _: None) -> tuple[DistillState, None]:
            state = lax.fori_loop(
                0,
                config.generator.steps,
                lambda _, state: steps.generator_step(state, teacher),
                state,
            )
            return lax.scan(student, state, observes_after)

        state, _ = lax.scan(iteration, _start(state), None, length=config.iterations_per_epoch)
        return state

    return mapped.step(epoch)


def _stepped(config: ml_collections.ConfigDict, steps: Steps, mapped: Mapped) -> Step:
    start = mapped.step(lambda state, teacher: _start(state))
    generator_step = mapped.step(steps.generator_step)
    student_step = mapped.step(steps.student_step)
    observe_step = mapped.step(steps.observe_step)

    def epoch(state: DistillState, teacher: Any) -> DistillState:
        state = start(state, teacher)
        for _ in range(config.iterations_per_epoch):
            for _ in range(config.generator.steps):
                state = mapped.settle(generator_step(state, teacher))
            for observes in steps.observes_after:
                state = mapped.settle(student_step(state, teacher))
                if observes:
                    state = mapped.settle(observe_step(state, teacher))
        return state

    return epoch
