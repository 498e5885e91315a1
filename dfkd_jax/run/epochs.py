"""The epochs of a distillation: made ready, started, run and measured, one after the other.

Nothing here knows the folder of a run; `dfkd_jax.run.train` adds it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from dfkd_jax.data import splits as data
from dfkd_jax.distillation.state import DistillState
from dfkd_jax.run import teacher
from dfkd_jax.run.accuracy import Accuracy, Batches, create_accuracy, put_batches
from dfkd_jax.run.setup import Algorithm, Setup, create_algorithm
from dfkd_jax.run.student import load_start
from dfkd_jax.runtime import files
from dfkd_jax.runtime.devices import Devices


class Distillation(NamedTuple):
    """What the epochs of a run are made and measured with; nothing of it changes meanwhile."""

    setup: Setup
    algorithm: Algorithm
    devices: Devices
    teacher_variables: teacher.Variables
    teacher_accuracy: float | None  # percent; None without test data
    student_accuracy: Accuracy


def prepare(
    setup: Setup,
    devices: Devices,
    workdir: Path,
    console: Console,
    stop_requested: Callable[[], str | None],
) -> Distillation:
    """Put a run together, with its teacher, which is trained first where there is none.

    Args:
      setup: of the run.
      devices: that it uses.
      workdir: its folder, where a teacher of its own is kept.
      console: where to report.
      stop_requested: names the signal that came, if any.

    Raises:
      UserError, NonFinite, Stopped: see `teacher.obtain_teacher`.
    """
    algorithm = create_algorithm(setup, devices)
    test = testing_batches(setup, devices)
    accuracy = create_accuracy(setup.models.teacher, test, setup.spec)
    variables = obtain_teacher(setup, devices, accuracy, workdir, console, stop_requested)
    of_student = create_accuracy(algorithm.parts.student, test, setup.spec)
    return Distillation(setup, algorithm, devices, variables, accuracy(variables), of_student)


def testing_batches(setup: Setup, devices: Devices) -> Batches | None:
    """The images that teacher and student are tested on, on the devices; None without data."""
    none = setup.spec.name == "none"
    load = data.loader(setup.config, setup.spec)
    return put_batches(None if none else load("test"), devices=devices)


def obtain_teacher(
    setup: Setup,
    devices: Devices,
    accuracy: Accuracy,
    workdir: Path,
    console: Console,
    stop_requested: Callable[[], str | None],
) -> teacher.Variables:
    """The teacher's variables, trained in `workdir`/teacher where none is given; see `prepare`."""
    return teacher.obtain_teacher(
        setup.config,
        setup.models.teacher,
        setup.spec,
        data.loader(setup.config, setup.spec),
        accuracy,
        workdir,
        console=console,
        stop_requested=stop_requested,
        devices=devices,
    )


def starting(distillation: Distillation) -> Callable[[int], DistillState]:
    """Seed ↦ the state before the first epoch.

    Its student is that of `config.student.checkpoint` if one is given.
    """
    algorithm, setup = distillation.algorithm, distillation.setup
    directory = setup.config.student.get("checkpoint")
    if directory is None:
        return algorithm.init
    variables = load_start(directory, algorithm.parts.student, setup.spec.image_shape)
    return lambda seed: with_student(distillation, algorithm.init(seed), variables)


def with_student(
    distillation: Distillation, state: DistillState, variables: teacher.Variables
) -> DistillState:
    """The state with these variables of the student."""
    given = {"batch_stats": {}, **variables}
    given = jax.tree.map(
        lambda leaf, value: np.asarray(value, leaf.dtype), student_of(state), given
    )
    # A copy, as an epoch consumes its state.
    found = jax.tree.map(jnp.copy, distillation.devices.put(given))
    return state.replace(student=state.student.replace(**found))


def student_of(state: DistillState) -> teacher.Variables:
    """The student's variables."""
    return {"params": state.student.params, "batch_stats": state.student.batch_stats}


def epoch(
    distillation: Distillation, state: DistillState, number: int
) -> tuple[DistillState, dict[str, Any], str | None]:
    """One epoch, measured.

    Args:
      distillation: of the run.
      state: before it; consumed.
      number: of the epoch, from 1.

    Returns:
      The state after it, its line of `metrics.jsonl`, and what became non-finite, None if nothing.
    """
    algorithm, variables = distillation.algorithm, distillation.teacher_variables
    accuracy = distillation.student_accuracy
    started = time.perf_counter()
    state, metrics = algorithm.epoch(state, variables)
    jax.block_until_ready(metrics)  # which reads nothing
    seconds = time.perf_counter() - started
    if number == 1:
        state = algorithm.keep_early(state, variables)
    measured = algorithm.agreement(state, variables), accuracy.correct(student_of(state))
    # The epoch's one transfer.
    metrics, (agreement, correct) = jax.device_get((metrics, measured))
    broken = _non_finite(metrics)
    values = {name: float(value) for name, value in {**metrics, **agreement}.items()}
    record = _record(number, values, accuracy.percent(correct), seconds)
    return state, {**record, "seconds_of_synthesis": algorithm.clock.take()}, broken


def _non_finite(metrics: dict[str, Any]) -> str | None:
    """Take what says whether the epoch was finite out of its metrics; what was not, if anything."""
    words = {
        "finite": "A loss",
        "finite_student": "A parameter of the student",
        "finite_synthesizer": "A parameter of the generator",
        "finite_replay": "A value of the replay",
    }
    broken = [what for key, what in words.items() if not metrics.pop(key)]
    return broken[0] if broken else None


def _record(
    number: int, metrics: dict[str, float], accuracy: float | None, seconds: float
) -> dict[str, Any]:
    """One line of `metrics.jsonl`; what an epoch could not measure is None."""
    # What a method without replay does not measure is there as well, for whoever reads the lines.
    record = {"epoch": number, "retention_loss": None, "gradient_alignment": None}
    record |= {"student_accuracy": accuracy, **metrics, "seconds": seconds}
    record = files.plain(record)
    if all(record.get(loss) is None for loss in ("acquisition_loss", "retention_loss")):
        record["student_accuracy"] = None  # a warm-up, in which the student took no step
    return record
