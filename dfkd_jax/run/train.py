"""A run: teacher, distillation epoch by epoch, evaluation, checkpoints and figures.

Everything is in the run's folder, and the same call on the same folder goes on where it was cut.
With several processes each runs this same code on the same folder, and process 0 writes.
"""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich.console import Console

from dfkd_jax.data import data_specs
from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.algorithm import Algorithm, create_algorithm
from dfkd_jax.distillation.state import DistillState
from dfkd_jax.replay import schemes
from dfkd_jax.run import checkpoint, teacher
from dfkd_jax.run import config as config_lib
from dfkd_jax.run.accuracy import Accuracy, create_accuracy, put_batches
from dfkd_jax.run.config import UserError
from dfkd_jax.run.outputs import Outputs
from dfkd_jax.run.progress import Progress, default_console, student_fields
from dfkd_jax.run.resume import claim, resume
from dfkd_jax.run.student import check_teacher, load_start
from dfkd_jax.runtime import devices as devices_lib
from dfkd_jax.runtime import processes, results
from dfkd_jax.runtime.devices import Devices
from dfkd_jax.runtime.finite import NonFinite
from dfkd_jax.runtime.folder_lock import only_user
from dfkd_jax.runtime.stop import Stopped, stop_requests

FIGURE_SECONDS = 120  # figures are drawn at the end, and at most so often before


class Distillation(NamedTuple):
    """What the epochs of a run are made and measured with; nothing of it changes meanwhile."""

    algorithm: Algorithm
    devices: Devices
    spec: DatasetSpec
    teacher_variables: teacher.Variables
    teacher_accuracy: float | None  # percent; None without test data
    student_accuracy: Accuracy


def run(
    config: ml_collections.ConfigDict, workdir: str | Path, console: Console | None = None
) -> dict[str, Any]:
    """Run `config` in `workdir`, or go on with what an earlier process left there.

    Args:
      config: of the run.
      workdir: its folder.
      console: where to report; standard output by default.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      UserError: the configuration cannot work, or the folder belongs to another one.
      NonFinite: training diverged, that of the student or of the teacher; nothing of it is saved,
        and the checkpoint before it is kept.
      DamagedCheckpoint, SaveFailed: see `dfkd_jax.run.checkpoint`.
      Stopped: SIGTERM or Ctrl-C came; the same call goes on after the last finished epoch.
    """
    config_lib.check(config)
    devices = devices_lib.choose(config.parallel, schemes.split_sizes(config))
    console = console or default_console()
    if not processes.is_main():
        console = Console(quiet=True)
    workdir = Path(workdir).absolute()
    precision = jax.default_matmul_precision(config.matmul_precision)
    with contextlib.ExitStack() as held, stop_requests() as own_request, precision:
        processes.on_main(lambda: held.enter_context(only_user(workdir)), UserError)
        processes.on_main(partial(claim, config, workdir), UserError)

        def stop_requested() -> str | None:
            request = own_request()
            return request or "A signal" if processes.any_of(request is not None) else None

        distillation = _prepare(config, workdir, devices, console, stop_requested)
        return _distil(config, workdir, distillation, console, stop_requested)


def _prepare(
    config: ml_collections.ConfigDict,
    workdir: Path,
    devices: Devices,
    console: Console,
    stop_requested: Callable[[], str | None],
) -> Distillation:
    """Put the run together, with its teacher, which is trained first where there is none."""
    spec = data_specs.spec(config)
    algorithm = create_algorithm(config, spec.image_shape, spec.num_classes, devices)
    load = data.loader(config, spec)
    test = put_batches(None if spec.name == "none" else load("test"), devices=devices)
    accuracy = create_accuracy(algorithm.parts.teacher, test, spec)
    variables = teacher.obtain_teacher(
        config,
        algorithm.parts.teacher,
        spec,
        load,
        accuracy,
        workdir,
        console=console,
        stop_requested=stop_requested,
        devices=devices,
    )
    processes.on_main(partial(check_teacher, workdir, variables), UserError)
    student_accuracy = create_accuracy(algorithm.parts.student, test, spec)
    return Distillation(algorithm, devices, spec, variables, accuracy(variables), student_accuracy)


def _starting(
    config: ml_collections.ConfigDict, distillation: Distillation
) -> Callable[[int], DistillState]:
    """`algorithm.init`, with the student of `config.student.checkpoint` if one is given."""
    algorithm, directory = distillation.algorithm, config.student.get("checkpoint")
    if directory is None:
        return algorithm.init
    variables = load_start(directory, algorithm.parts.student, distillation.spec.image_shape)

    def init(seed: int) -> DistillState:
        state = algorithm.init(seed)
        given = {"batch_stats": {}, **variables}
        given = jax.tree.map(
            lambda leaf, value: np.asarray(value, leaf.dtype), _student(state), given
        )
        # A copy, as an epoch consumes its state.
        found = jax.tree.map(jnp.copy, distillation.devices.put(given))
        return state.replace(student=state.student.replace(**found))

    return init


def _distil(
    config: ml_collections.ConfigDict,
    workdir: Path,
    distillation: Distillation,
    console: Console,
    stop_requested: Callable[[], str | None],
) -> dict[str, Any]:
    """The epochs that are left, each measured and recorded; the summary."""
    state, own = resume(config, workdir, _starting(config, distillation), console)
    saved, student_steps = len(own.history), config.iterations_per_epoch * config.student.steps
    teacher_accuracy, num_classes = distillation.teacher_accuracy, distillation.spec.num_classes
    fields = student_fields(teacher_accuracy is not None)
    outputs = Outputs(own, teacher_accuracy)
    said: set[str] = set()  # what was warned of, once each
    drawn = time.monotonic()
    with (
        contextlib.closing(outputs),  # also when the run is stopped or diverges
        Progress(config.epochs, saved, "student", fields, console) as progress,
    ):
        progress.log(_opening(config, distillation, saved))
        for epoch in range(saved + 1, config.epochs + 1):
            state, record, broken = _epoch(distillation, state, epoch)
            if broken:
                raise _diverged(broken, epoch, saved, own.manager.directory)
            own.history.append(record)
            last = epoch == config.epochs
            request = None if last else stop_requested()
            due = last or request or epoch % config.checkpoint_every == 0
            if due:
                checkpoint.save(own.manager, epoch, state, own.history)
                saved = epoch
            outputs.record(record)
            progress.update({**record, "steps_per_second": student_steps / record["seconds"]})
            for kind, sentence in outputs.warnings(num_classes).items():
                if kind not in said:
                    said.add(kind)
                    progress.log(f"Warning: {sentence}")
            if last:
                break
            # Saving takes a while, in which a signal may come as well.
            request = request or (stop_requested() if due else None)
            if request:
                raise Stopped(f"{request} came; epoch {epoch} is saved.")
            if processes.from_main(time.monotonic() - drawn > FIGURE_SECONDS):
                _draw_figures(outputs, distillation, state)
                drawn = time.monotonic()
        _draw_figures(outputs, distillation, state)
    own.manager.close()
    return outputs.summary(student_steps, num_classes, console)


def _opening(config: ml_collections.ConfigDict, distillation: Distillation, saved: int) -> str:
    """What a run says before its first epoch, `saved` epochs being done."""
    accuracy, count = distillation.teacher_accuracy, distillation.devices.count
    split = data.tested_split(config.dataset)
    known = "no test data" if accuracy is None else f"{split} accuracy {accuracy:.2f} %"
    return (
        f"Distilling {config.teacher.model} ({known}) into "
        f"{config.student.model} by {config.method}"
        + (f", on {count} devices" if count > 1 else "")
        + (f", after epoch {saved}." if saved else ".")
    )


def _epoch(
    distillation: Distillation, state: DistillState, epoch: int
) -> tuple[DistillState, dict[str, Any], str | None]:
    """One epoch, measured.

    Args:
      distillation: of the run.
      state: before it; consumed.
      epoch: its number.

    Returns:
      The state after it, its line of `metrics.jsonl`, and what became non-finite, None if nothing.
    """
    algorithm, variables = distillation.algorithm, distillation.teacher_variables
    accuracy = distillation.student_accuracy
    started = time.perf_counter()
    state, metrics = algorithm.epoch(state, variables)
    jax.block_until_ready(metrics)  # which reads nothing
    seconds = time.perf_counter() - started
    if epoch == 1:
        state = algorithm.keep_early(state, variables)
    measured = algorithm.agreement(state, variables), accuracy.correct(_student(state))
    # The epoch's one transfer.
    metrics, (agreement, correct) = jax.device_get((metrics, measured))
    broken = _non_finite(metrics)
    values = {name: float(value) for name, value in {**metrics, **agreement}.items()}
    return state, _record(epoch, values, accuracy.percent(correct), seconds), broken


def _student(state: DistillState) -> teacher.Variables:
    return {"params": state.student.params, "batch_stats": state.student.batch_stats}


def _draw_figures(outputs: Outputs, distillation: Distillation, state: DistillState) -> None:
    local = distillation.devices.local
    variables = local(distillation.teacher_variables)
    outputs.figures(distillation.algorithm, local(state), variables, distillation.spec)


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


def _diverged(broken: str, epoch: int, saved: int, directory: Any) -> NonFinite:
    """The error that ends the run.

    Args:
      broken: what became non-finite.
      epoch: when.
      saved: the newest epoch of which there is a checkpoint; 0 for none.
      directory: of the checkpoints.
    """
    kept = f"the last good checkpoint, of epoch {saved}, is in {directory}"
    return NonFinite(
        f"{broken} became non-finite in epoch {epoch}; "
        f"{kept if saved else 'no checkpoint was saved before'}."
    )


def _record(
    epoch: int, metrics: dict[str, float], accuracy: float | None, seconds: float
) -> dict[str, Any]:
    """One line of `metrics.jsonl`; what an epoch could not measure is None."""
    # What a method without replay does not measure is there as well, for whoever reads the lines.
    record = {"epoch": epoch, "retention_loss": None, "gradient_alignment": None}
    record |= {"student_accuracy": accuracy, **metrics, "seconds": seconds}
    return results.plain(record)
