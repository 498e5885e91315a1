"""One epoch: iterations of synthesis, student steps and what the replay scheme observes.

`scan` is one compiled call, for GPU and TPU. `step` dispatches the same step functions one by one
from Python without ever reading a value back: on CPU, XLA runs convolutions inside compiled loops
and branches tens of times slower than outside of them. Both give the same numbers.
"""

import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfkd_jax.distillation import steps
from dfkd_jax.distillation.state import DistillState
from dfkd_jax.distillation.steps import Parts
from dfkd_jax.runtime.devices import Mapped
from dfkd_jax.runtime.finite import all_finite
from dfkd_jax.runtime.metrics import Metrics, add, averages

LOOPS = ("auto", "scan", "step")
Epoch = Callable[[DistillState, Any], tuple[DistillState, dict[str, jax.Array]]]
Carry = tuple[DistillState, Metrics]  # a state, and what was measured since the epoch began
Step = Callable[[Carry, Any], Carry]


class Clock:
    """How long synthesis takes, where it can be told apart: on CPU, with the steps dispatched."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def add(self, seconds: float) -> None:
        """Of one iteration."""
        self._seconds = seconds + (self._seconds or 0.0)

    def take(self) -> float | None:
        """The seconds since the last call; None where they are not known."""
        seconds, self._seconds = self._seconds, None
        return seconds


def create_epoch(
    loop: str,
    whole: Parts,
    parts: Parts,
    mapped: Mapped,
    shardings: Any = None,
    clock: Clock | None = None,
) -> Epoch:
    """(state, teacher variables) -> (state, metrics), with the state donated.

    Metrics are device scalars: the means over the epoch of all that its steps measure, NaN where
    nothing was measured, and what `finite_parts` says. Nothing is read back.

    Args:
      loop: one of `LOOPS`; auto is step on CPU, else scan.
      whole: the parts on whole arrays.
      parts: for one device's share of the batch; on one device the same.
      mapped: how they run on all devices, for a layout of `Carry`.
      shardings: of what every device holds whole.
      clock: told how long synthesis takes, where that costs nothing.
    """
    on_cpu = jax.default_backend() == "cpu"
    if loop == "auto":
        loop = "step" if on_cpu else "scan"
    taken = steps_of(parts)
    if loop == "scan":
        run = _scanned(parts, taken, mapped)
    else:
        # Elsewhere waiting for the synthesis would leave the device idle.
        run = _stepped(parts, taken, mapped, clock if on_cpu else None)
    of_whole = taken if whole is parts else steps_of(whole)
    nothing = jax.jit(partial(nothing_measured, of_whole), out_shardings=shardings)
    finish = jax.jit(lambda state, sums: averages(sums) | finite_parts(state, sums))

    def epoch(state: DistillState, teacher: Any) -> tuple[DistillState, dict[str, jax.Array]]:
        carry = mapped.shard((state, nothing(state, teacher)))
        state, sums = mapped.gather(run(carry, mapped.replicate(teacher)))
        return state, finish(state, sums)

    return epoch


class Steps(NamedTuple):
    """The steps of an iteration, on a state or a `Carry`; None where a role has nothing to do."""

    begin: Callable | None
    update: Callable
    finish: Callable | None
    observe_round: Callable | None
    student: Callable
    observe: Callable | None


def steps_of(parts: Parts) -> Steps:
    """The steps of these parts, (state, teacher variables) -> (state, what it measures).

    Each is traced once, however many functions call it. Inlined, it leaves their programs as they
    would be without.
    """

    def one(step: Callable) -> Callable:
        @partial(jax.jit, inline=True)
        @wraps(step)  # by whose name profiles and caches show the compiled program
        def bound(state: DistillState, teacher: Any) -> tuple[DistillState, Metrics]:
            return step(parts, state, teacher)

        return bound

    synthesizer, replay = parts.method.synthesizer, parts.method.replay
    return Steps(
        begin=one(steps.begin_step) if synthesizer.begin else None,
        update=one(steps.update_step),
        finish=one(steps.finish_step) if synthesizer.finish else None,
        observe_round=one(steps.observe_round_step) if replay.observes_rounds else None,
        student=one(steps.student_step),
        observe=one(steps.observe_step) if any(replay.observes_after) else None,
    )


def nothing_measured(taken: Steps, state: DistillState, teacher: Any) -> Metrics:
    """Sums of 0 for all that the steps measure; nothing is computed."""
    every = (taken.update, taken.student, taken.observe, taken.observe_round)
    of_each = [jax.eval_shape(step, state, teacher)[1] for step in every if step]
    names = {name: mean for metrics in of_each for name, mean in metrics.items()}
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), names)


def finite_parts(state: DistillState, sums: Metrics | None = None) -> dict[str, jax.Array]:
    """Whether student, synthesizer and replay are finite, as `finite_student` and so on.

    All that is floating in them counts: parameters, batch statistics, optimiser states and replayed
    images. What an epoch measured, `finite`, does not show what its last update has made of them.
    """
    parts = {name: getattr(state, name) for name in ("student", "synthesizer", "replay")}
    found = {f"finite_{name}": all_finite(part) for name, part in parts.items()}
    return found if sums is None else {**found, "finite": all_finite(sums)}


def recorded(taken: Steps, map_step: Callable[[Step], Step] = lambda step: step) -> Steps:
    """The steps on a state and sums, to which what each measures is added.

    Args:
      taken: on a state alone.
      map_step: what becomes of each after that.
    """

    def one(step: Callable | None) -> Step | None:
        if step is None:
            return None

        def record(carry: Carry, teacher: Any) -> Carry:
            state, sums = carry
            state, metrics = step(state, teacher)
            return state, add(sums, metrics)

        record.__name__ = step.__name__
        return map_step(record)

    return Steps._make(map(one, taken))


def observes_after(parts: Parts) -> tuple[bool, ...]:
    """For each student step of an iteration, whether the replay scheme observes after it."""
    return parts.method.replay.observes_after or (False,) * parts.method.plan.student_steps


def _scanned(parts: Parts, taken: Steps, mapped: Mapped) -> Step:
    plan = parts.method.plan
    step = recorded(taken)
    observes = jnp.asarray(observes_after(parts))

    def epoch(carry: Carry, teacher: Any) -> Carry:
        def student(carry: Carry, due: jax.Array) -> tuple[Carry, None]:
            state, sums = step.student(carry, teacher)
            observe = step.observe
            if observe is None:
                return (state, sums), None

            def observed(carry: Carry) -> tuple[Any, Metrics]:
                state, sums = observe(carry, teacher)
                return state.replay, sums

            replay, sums = lax.cond(
                due, observed, lambda carry: (carry[0].replay, carry[1]), (state, sums)
            )
            return (state.replace(replay=replay), sums), None

        def a_round(_: jax.Array, carry: Carry) -> Carry:
            carry = step.begin(carry, teacher) if step.begin else carry
            carry = lax.fori_loop(
                0, plan.updates, lambda _, carry: step.update(carry, teacher), carry
            )
            carry = step.finish(carry, teacher) if step.finish else carry
            return step.observe_round(carry, teacher) if step.observe_round else carry

        def iteration(carry: Carry, _: None) -> tuple[Carry, None]:
            warm = steps.iteration_of(parts, carry[0].updates) >= plan.warm_up
            if plan.rounds == 1 and plan.warm_up_rounds == 1:  # a loop less to compile
                carry = a_round(jnp.zeros((), jnp.int32), carry)
            else:
                rounds = jnp.where(warm, plan.rounds, plan.warm_up_rounds)
                carry = lax.fori_loop(0, rounds, a_round, carry)
            if not plan.warm_up:
                return lax.scan(student, carry, observes)
            return lax.cond(
                warm,
                lambda carry: lax.scan(student, carry, observes)[0],
                lambda carry: carry,
                carry,
            ), None

        carry, _ = lax.scan(iteration, carry, None, length=parts.iterations_per_epoch)
        return carry

    return mapped.step(epoch)


def _stepped(parts: Parts, taken: Steps, mapped: Mapped, clock: Clock | None) -> Step:
    plan = parts.method.plan
    step = recorded(taken, mapped.step)

    def epoch(carry: Carry, teacher: Any) -> Carry:
        def take(one: Step | None) -> None:
            nonlocal carry
            if one is not None:
                carry = mapped.block_until_ready(one(carry, teacher))

        first = 0
        if plan.warm_up:  # an epoch's one read, of a value that is there when the epoch begins
            updates = np.ravel(jax.device_get(carry[0].updates))[0]  # each device has its own copy
            first = int(steps.iteration_of(parts, updates))
        for iteration in range(first, first + parts.iterations_per_epoch):
            warm = iteration >= plan.warm_up
            started = _waited_for(carry) if clock else 0.0
            for _ in range(plan.rounds if warm else plan.warm_up_rounds):
                take(step.begin)
                for _ in range(plan.updates):
                    take(step.update)
                take(step.finish)
                take(step.observe_round)
            if clock:
                clock.add(_waited_for(carry) - started)
            for due in observes_after(parts) if warm else ():
                take(step.student)
                take(step.observe if due else None)
        return carry

    return epoch


def _waited_for(carry: Carry) -> float:
    """The time when all that was dispatched is done; nothing is read."""
    jax.block_until_ready(carry)
    return time.perf_counter()
