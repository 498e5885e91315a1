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
import ml_collections
from rich.console import Console

from dfkd_jax.data import splits as data
from dfkd_jax.distillation import costs
from dfkd_jax.distillation.state import DistillState
from dfkd_jax.run import checkpoint, epochs
from dfkd_jax.run.accuracy import create_accuracy
from dfkd_jax.run.checkpoint import History
from dfkd_jax.run.epochs import Distillation
from dfkd_jax.run.outputs import Outputs
from dfkd_jax.run.progress import Progress, default_console, student_fields
from dfkd_jax.run.resume import check_or_write_config, resume
from dfkd_jax.run.setup import parse
from dfkd_jax.run.student import check_teacher
from dfkd_jax.runtime import devices as devices_lib
from dfkd_jax.runtime import processes
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.finite import NonFinite
from dfkd_jax.runtime.folder_lock import only_user
from dfkd_jax.runtime.stop import Stopped, stop_requests

FIGURE_SECONDS = 120  # figures are drawn at the end, and at most so often before


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
    setup = parse(config)
    devices = devices_lib.choose(config.parallel, setup.split_sizes)
    console = console or default_console()
    if not processes.is_main():
        console = Console(quiet=True)
    workdir = Path(workdir).absolute()
    precision = jax.default_matmul_precision(config.matmul_precision)
    with contextlib.ExitStack() as held, stop_requests() as own_request, precision:
        processes.on_main(lambda: held.enter_context(only_user(workdir)), UserError)
        processes.on_main(partial(check_or_write_config, config, setup.card, workdir), UserError)

        def stop_requested() -> str | None:
            request = own_request()
            return request or "A signal" if processes.any_of(request is not None) else None

        distillation = epochs.prepare(setup, devices, workdir, console, stop_requested)
        check = partial(check_teacher, workdir, distillation.teacher_variables)
        processes.on_main(check, UserError)
        start = epochs.starting(distillation)
        return _distil(distillation, workdir, start, console, stop_requested).summary


def in_folder(
    distillation: Distillation,
    workdir: Path,
    start: Callable[[int], DistillState],
    tell: Callable[[dict[str, Any], DistillState], None],
) -> tuple[DistillState, History]:
    """A distillation that is ready, in a folder as of `run`; says and draws nothing elsewhere.

    Args:
      distillation: to run, or to go on with.
      workdir: its folder.
      start: seed ↦ the state before the first epoch.
      tell: called after every epoch with its record and the state.

    Returns:
      The state and the history after the last epoch.

    Raises:
      As `run`, but for Stopped: a signal acts as without this function.
    """
    console = Console(quiet=True)
    with contextlib.ExitStack() as held:
        processes.on_main(lambda: held.enter_context(only_user(workdir)), UserError)
        setup = distillation.setup
        check_config = partial(check_or_write_config, setup.config, setup.card, workdir)
        processes.on_main(check_config, UserError)
        check = partial(check_teacher, workdir, distillation.teacher_variables)
        processes.on_main(check, UserError)
        done = _distil(distillation, workdir, start, console, lambda: None, tell=tell)
        return done.state, done.history


def train_teacher(config: ml_collections.ConfigDict, workdir: str | Path) -> None:
    """Train the teacher of `config` in `workdir`/teacher, or go on with it.

    Raises:
      UserError, NonFinite, Stopped: as of `run`.
    """
    setup = parse(config)
    devices = devices_lib.choose(config.parallel, setup.split_sizes)
    with stop_requests() as stop_requested:
        test = epochs.testing_batches(setup, devices)
        accuracy = create_accuracy(setup.models.teacher, test, setup.spec)
        arguments = (setup, devices, accuracy, Path(workdir), default_console(), stop_requested)
        epochs.obtain_teacher(*arguments)


class _Finished(NamedTuple):
    state: DistillState
    history: History
    summary: dict[str, Any]


def _distil(
    distillation: Distillation,
    workdir: Path,
    start: Callable[[int], DistillState],
    console: Console,
    stop_requested: Callable[[], str | None],
    *,
    tell: Callable[[dict[str, Any], DistillState], None] = lambda record, state: None,
) -> _Finished:
    """The epochs that are left, each measured and recorded."""
    setup, teacher_accuracy = distillation.setup, distillation.teacher_accuracy
    config, num_classes = setup.config, setup.spec.num_classes
    state, own = resume(config, workdir, start, console)
    saved, student_steps = len(own.history), config.iterations_per_epoch * config.student.steps
    fields = student_fields(teacher_accuracy is not None)
    outputs = Outputs(own, teacher_accuracy)
    said: set[str] = set()  # what was warned of, once each
    drawn = time.monotonic()
    with (
        own.manager,  # closed also when the run is stopped or diverges
        contextlib.closing(outputs),
        Progress(config.epochs, saved, "student", fields, console) as progress,
    ):
        progress.log(_opening(distillation, saved))
        for epoch in range(saved + 1, config.epochs + 1):
            state, record, broken = epochs.epoch(distillation, state, epoch)
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
            tell(record, state)
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
    iterations = config.epochs * config.iterations_per_epoch
    spent = costs.of_run(distillation.algorithm.parts, iterations)
    summary = outputs.summary(student_steps, num_classes, spent, console)
    return _Finished(state, own.history, summary)


def _opening(distillation: Distillation, saved: int) -> str:
    """What a run says before its first epoch, `saved` epochs being done."""
    config, count = distillation.setup.config, distillation.devices.count
    accuracy, split = distillation.teacher_accuracy, data.tested_split(config.dataset)
    known = "no test data" if accuracy is None else f"{split} accuracy {accuracy:.2f} %"
    return (
        f"Distilling {config.teacher.model} ({known}) into "
        f"{config.student.model} by {config.method}"
        + (f", on {count} devices" if count > 1 else "")
        + (f", after epoch {saved}." if saved else ".")
    )


def _draw_figures(outputs: Outputs, distillation: Distillation, state: DistillState) -> None:
    local = distillation.devices.local
    variables = local(distillation.teacher_variables)
    outputs.figures(distillation.algorithm, local(state), variables, distillation.setup.spec)


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
