"""A run: get a teacher, distil a student epoch by epoch, leave the results in a folder."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
from rich.console import Console

from dfkd_jax import checkpoint, data, results, samples, teacher
from dfkd_jax import config as config_lib
from dfkd_jax.classifiers import create_classifier
from dfkd_jax.config import UserError
from dfkd_jax.epoch import create_epoch
from dfkd_jax.evaluate import create_accuracy
from dfkd_jax.figures import learning_curve
from dfkd_jax.generator import Generator
from dfkd_jax.progress import TEACHER_FIELDS, Progress, default_console, summary_table
from dfkd_jax.replay import create_replay
from dfkd_jax.steps import Models, create_steps
from dfkd_jax.stop import Stopped, stop_requests

FIGURE_SECONDS = 120  # figures are drawn at the end, and at most so often before


class NonFiniteLoss(UserError):
    """A loss became infinite or NaN."""


def run(
    config: ml_collections.ConfigDict, workdir: str | Path, console: Console | None = None
) -> dict[str, Any]:
    """Run `config` in `workdir`, or go on with what an earlier process left there.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      UserError: the configuration cannot work, or the folder belongs to another one.
      NonFiniteLoss: training diverged; the checkpoint of the epoch before it is kept.
      DamagedCheckpoint, SaveFailed: see `dfkd_jax.checkpoint`.
      Stopped: SIGTERM or Ctrl-C came; the same call goes on after the last finished epoch.
    """
    config_lib.check(config)
    workdir = Path(workdir).absolute()
    console = console or default_console()
    _claim(config, workdir)
    with stop_requests() as stop_requested:
        spec = data.spec(config.dataset.name)
        models = create_models(config, spec)
        load = partial(data.load, config.dataset.name, data_dir=config.dataset.data_dir)
        test = load("test")
        teacher_variables = obtain_teacher(
            config, models.teacher, spec, load, test, workdir, console, stop_requested
        )
        return _distil(
            config, models, spec, test, teacher_variables, workdir, console, stop_requested
        )


def create_models(config: ml_collections.ConfigDict, spec: data.DatasetSpec) -> Models:
    """Teacher, student and generator as the configuration names them."""
    return Models(
        teacher=create_classifier(config.teacher.model, spec.num_classes),
        student=create_classifier(config.student.model, spec.num_classes),
        generator=Generator(
            spec.image_shape, tuple(config.generator.channels), config.generator.spectral_norm
        ),
    )


def method_names(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What tells this run from others."""
    return {
        "method": config.method,
        "replay": config.replay.kind,
        "gradient": config.meta.variant,
        "objective": config.meta.objective,
        "dataset": config.dataset.name,
        "teacher": config.teacher.model,
        "student": config.student.model,
        "seed": config.seed,
    }


def _claim(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Write `config.json`, or compare with the one that is there."""
    path, current = workdir / "config.json", config_lib.to_dict(config)
    try:
        if path.exists():
            found = config_lib.differences(results.read_json(path), current)
            if found:
                raise UserError(
                    f"{workdir} holds a run of another configuration; "
                    f"the differing fields are {'; '.join(found)}."
                )
        else:
            results.write_json(path, current)
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir {workdir} cannot be used: {error}") from error


def obtain_teacher(
    config: ml_collections.ConfigDict,
    model: Any,
    spec: data.DatasetSpec,
    load: Callable[[str], data.Split],
    test: data.Split,
    workdir: Path,
    console: Console,
    stop_requested: Callable[[], str | None],
) -> teacher.Variables:
    """Load the teacher from its checkpoint, or train and save it in `workdir`/teacher."""
    directory = Path(config.teacher.checkpoint or workdir / "teacher")
    if not teacher.is_teacher(directory):
        fields = {"fields": TEACHER_FIELDS, "console": console}
        with Progress(config.teacher.epochs, description="teacher", **fields) as progress:
            progress.log(
                f"There is no teacher in {directory}: training {config.teacher.model} on the "
                f"training split of {config.dataset.name}. "
                "Nothing else in this run reads real training data."
            )
            trained = teacher.train_teacher(
                config.teacher,
                model,
                load("train"),
                spec,
                create_accuracy(model, test, spec),
                directory,
                report=progress.update,
                log=progress.log,
                stop_requested=stop_requested,
            )
        if trained is None:
            raise Stopped(f"{stop_requested()} came while training the teacher.")
        variables, record = trained
        card = {
            "model": config.teacher.model,
            "num_classes": spec.num_classes,
            "image_shape": spec.image_shape,
            "dataset": config.dataset.name,
            "mean": spec.mean,
            "std": spec.std,
            **record,
        }
        teacher.save_teacher(directory, variables, card)
    try:
        return teacher.load_teacher(directory, model, spec.image_shape)
    except ValueError as error:
        raise UserError(str(error)) from error


def _distil(
    config: ml_collections.ConfigDict,
    models: Models,
    spec: data.DatasetSpec,
    test: data.Split,
    teacher_variables: teacher.Variables,
    workdir: Path,
    console: Console,
    stop_requested: Callable[[], str | None],
) -> dict[str, Any]:
    replay = create_replay(config, spec.image_shape, spec.num_classes)
    steps = create_steps(config, models, replay, spec.image_shape)
    epoch_of = create_epoch(config, steps)
    student_accuracy = create_accuracy(models.student, test, spec)
    teacher_accuracy = create_accuracy(models.teacher, test, spec)(teacher_variables)

    manager = checkpoint.open_checkpoints(workdir / "checkpoints")
    state, history = jax.jit(steps.init)(jax.random.key(config.seed)), []
    restored = checkpoint.restore_latest(manager, state, partial(console.print, soft_wrap=True))
    if restored is not None:
        state, history = restored
    # A line may have been written for an epoch whose checkpoint was not, or was damaged.
    results.write_metrics(workdir / "metrics.jsonl", history)
    tensorboard = results.TensorBoard(workdir / "tensorboard", first_epoch=len(history) + 1)

    def write_figures() -> None:
        learning_curve(history, teacher_accuracy, workdir / "learning_curve.png")
        panels = samples.panels(steps, replay, models, state, teacher_variables, spec)
        samples.write(panels, workdir / "samples.png")

    drawn = time.monotonic()
    with Progress(config.epochs, len(history), "student", console=console) as progress:
        progress.log(
            f"Distilling {config.teacher.model} (test accuracy {teacher_accuracy:.2f} %) into "
            f"{config.student.model} by {config.method}"
            + (f", after epoch {len(history)}." if history else ".")
        )
        for epoch in range(len(history) + 1, config.epochs + 1):
            started = time.perf_counter()
            state, metrics = epoch_of(state, teacher_variables)
            metrics = jax.device_get(metrics)  # the one transfer of the epoch
            seconds = time.perf_counter() - started
            if not metrics.pop("finite"):
                raise NonFiniteLoss(
                    f"A loss became non-finite in epoch {epoch}; "
                    f"the last good checkpoint, of epoch {epoch - 1}, is in {manager.directory}."
                )
            record = _record(epoch, metrics, student_accuracy(_variables(state)), seconds)
            history.append(record)
            checkpoint.save(manager, epoch, state, history)
            results.append_metrics(workdir / "metrics.jsonl", record)
            tensorboard.write(record)
            student_steps = config.iterations_per_epoch * config.student.steps
            progress.update({**record, "steps_per_second": student_steps / seconds})
            if epoch == config.epochs:
                break
            if stop_requested():
                raise Stopped(f"{stop_requested()} came; epoch {epoch} is saved.")
            if time.monotonic() - drawn > FIGURE_SECONDS:
                write_figures()
                drawn = time.monotonic()
    manager.close()
    tensorboard.close()
    write_figures()
    summary = results.summarize(history, teacher_accuracy, method_names(config))
    results.write_json(workdir / "summary.json", summary)
    summary_table(summary, workdir, console)
    return summary


def _variables(state: Any) -> teacher.Variables:
    return {"params": state.student.params, "batch_stats": state.student.batch_stats}


def _record(epoch: int, metrics: dict[str, Any], accuracy: float, seconds: float) -> dict[str, Any]:
    """One line of `metrics.jsonl`; what an epoch could not measure is None."""
    metrics = {key: float(value) for key, value in metrics.items()}
    if not metrics.pop("replayed_steps"):
        metrics["retention_loss"] = metrics["gradient_alignment"] = None
    record = {"epoch": epoch, "student_accuracy": accuracy, **metrics, "seconds": seconds}
    return results.plain(record)
