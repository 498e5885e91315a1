"""A run: get a teacher, distil a student epoch by epoch, leave the results in a folder."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console

from dfkd_jax import checkpoint, data, results, samples, teacher
from dfkd_jax import config as config_lib
from dfkd_jax.classifiers import create_classifier
from dfkd_jax.config import UserError
from dfkd_jax.epoch import create_epoch
from dfkd_jax.evaluate import create_accuracy
from dfkd_jax.figures import learning_curve
from dfkd_jax.generator import Generator
from dfkd_jax.progress import Progress, default_console, summary_table
from dfkd_jax.replay import create_replay
from dfkd_jax.steps import Models, Steps, create_steps, over_seeds
from dfkd_jax.stop import Stopped, stop_requests

FIGURE_SECONDS = 120  # figures are drawn at the end, and at most so often before


class NonFiniteLoss(UserError):
    """A loss became infinite or NaN."""


class Run(NamedTuple):
    """The folder of one seed, and what is open in it."""

    config: ml_collections.ConfigDict
    workdir: Path
    manager: ocp.CheckpointManager
    history: checkpoint.History


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
    (summary,) = run_seeds(config, [workdir], [config.seed], console)
    return summary


def run_seeds(
    config: ml_collections.ConfigDict,
    workdirs: Sequence[str | Path],
    seeds: Sequence[int],
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Run `config` with each seed in a folder of its own, all seeds at once.

    With several seeds every step is vectorised over them (`jax.vmap`); each folder ends up as if
    its seed had run alone, up to rounding, and may be resumed alone or together. `seconds` are the
    seed's share of the time.

    Args:
      config: of every run, but for the seed.
      workdirs: one folder per seed.
      seeds: config.seed of each run.
      console: where to report; standard output by default.

    Returns:
      The summaries, in the order of the seeds.

    Raises:
      What `run` raises; a failure of one seed ends all of them.
    """
    config_lib.check(config)
    console = console or default_console()
    paths = [Path(workdir).absolute() for workdir in workdirs]
    configs = []
    for seed, path in zip(seeds, paths, strict=True):
        own = ml_collections.ConfigDict(config.to_dict())
        own.seed = seed
        _claim(own, path)
        configs.append(own)
    with stop_requests() as stop_requested:
        spec = data.spec(config.dataset.name)
        models = create_models(config, spec)
        load = partial(data.load, config.dataset.name, data_dir=config.dataset.data_dir)
        test = load("test")
        try:
            variables = teacher.obtain_teacher(
                config, models.teacher, spec, load, test, paths[0], console, stop_requested
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        return _distil(configs, models, spec, test, variables, paths, console, stop_requested)


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


def _distil(
    configs: list[ml_collections.ConfigDict],
    models: Models,
    spec: data.DatasetSpec,
    test: data.Split,
    teacher_variables: teacher.Variables,
    workdirs: list[Path],
    console: Console,
    stop_requested: Callable[[], str | None],
) -> list[dict[str, Any]]:
    config, count = configs[0], len(configs)
    replay = create_replay(config, spec.image_shape, spec.num_classes)
    single = create_steps(config, models, replay, spec.image_shape)
    steps = single if count == 1 else over_seeds(single)
    epoch_of = create_epoch(config, steps)
    student_accuracy = create_accuracy(models.student, test, spec)
    teacher_accuracy = create_accuracy(models.teacher, test, spec)(teacher_variables)
    state, runs = _resume(configs, workdirs, single, console)
    done = len(runs[0].history)
    closing = contextlib.ExitStack()  # also when the run is stopped or diverges
    writers = [
        closing.enter_context(
            contextlib.closing(results.TensorBoard(r.workdir / "tensorboard", done + 1))
        )
        for r in runs
    ]
    keep_early = jax.jit(steps.keep_early, donate_argnums=0)
    agreement = jax.jit(single.early_agreement)

    def write_figures(states: list[Any]) -> None:
        for r, s in zip(runs, states, strict=True):
            learning_curve(r.history, teacher_accuracy, r.workdir / "learning_curve.png")
            panels = samples.panels(single, replay, models, s, teacher_variables, spec)
            samples.write(panels, r.workdir / "samples.png")

    drawn = time.monotonic()
    student_steps = config.iterations_per_epoch * config.student.steps
    with closing, Progress(config.epochs, done, "student", console=console) as progress:
        progress.log(
            f"Distilling {config.teacher.model} (test accuracy {teacher_accuracy:.2f} %) into "
            f"{config.student.model} by {config.method}"
            + (f", {count} seeds at once" if count > 1 else "")
            + (f", after epoch {done}." if done else ".")
        )
        for epoch in range(done + 1, config.epochs + 1):
            started = time.perf_counter()
            state, metrics = epoch_of(state, teacher_variables)
            metrics = jax.device_get(metrics)  # the one transfer of the epoch
            seconds = (time.perf_counter() - started) / count
            if not np.all(metrics.pop("finite")):
                raise NonFiniteLoss(
                    f"A loss became non-finite in epoch {epoch}; the last good checkpoint, of "
                    f"epoch {epoch - 1}, is in {runs[0].manager.directory}."
                )
            if epoch == 1:
                state = keep_early(state, teacher_variables)
            states = _unstack(state, count)
            for i, (r, s) in enumerate(zip(runs, states, strict=True)):
                own = {name: float(np.atleast_1d(value)[i]) for name, value in metrics.items()}
                own["early_agreement"] = float(agreement(s))
                variables = {"params": s.student.params, "batch_stats": s.student.batch_stats}
                record = _record(epoch, own, student_accuracy(variables), seconds)
                r.history.append(record)
                checkpoint.save(r.manager, epoch, s, r.history)
                results.append_metrics(r.workdir / "metrics.jsonl", record)
                writers[i].write(record)
            progress.update({**record, "steps_per_second": student_steps / seconds})
            if epoch == config.epochs:
                break
            if stop_requested():
                raise Stopped(f"{stop_requested()} came; epoch {epoch} is saved.")
            if time.monotonic() - drawn > FIGURE_SECONDS:
                write_figures(states)
                drawn = time.monotonic()
    write_figures(_unstack(state, count))
    summaries = []
    for r in runs:
        r.manager.close()
        summary = results.summarize(r.history, teacher_accuracy, method_names(r.config))
        times = [record["seconds"] for record in r.history]
        # The first epoch compiles.
        summary["seconds_per_student_step"] = statistics.median(times[1:] or times) / student_steps
        summary["peak_memory_bytes"] = _peak_memory()
        results.write_json(r.workdir / "summary.json", summary)
        summary_table(summary, r.workdir, console)
        summaries.append(summary)
    return summaries


def _resume(
    configs: list[ml_collections.ConfigDict], workdirs: list[Path], steps: Steps, console: Console
) -> tuple[Any, list[Run]]:
    """The state to go on from, stacked over the seeds, and the folders with their histories."""
    init = jax.jit(steps.init)
    fresh = [init(jax.random.key(config.seed)) for config in configs]
    managers = [checkpoint.open_checkpoints(workdir / "checkpoints") for workdir in workdirs]
    report = partial(console.print, soft_wrap=True)
    # A kill may have come after the checkpoints of some seeds only.
    common = min(manager.latest_step() or 0 for manager in managers)
    while True:
        found = [
            checkpoint.restore_latest(manager, state, report, newest=common)
            for manager, state in zip(managers, fresh, strict=True)
        ]
        epochs = [0 if one is None else len(one[1]) for one in found]
        if min(epochs) == max(epochs):
            break
        common = min(epochs)  # one of them was damaged
    restored = [(s, []) if one is None else one for s, one in zip(fresh, found, strict=True)]
    runs = [
        Run(config, workdir, manager, history)
        for config, workdir, manager, (_, history) in zip(
            configs, workdirs, managers, restored, strict=True
        )
    ]
    for r in runs:
        checkpoint.forget_after(r.manager, len(r.history))
        # A line may have been written for an epoch whose checkpoint was not, or was damaged.
        results.write_metrics(r.workdir / "metrics.jsonl", r.history)
    states = [state for state, _ in restored]
    if len(states) == 1:
        return states[0], runs
    return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *states), runs


def _unstack(state: Any, count: int) -> list[Any]:
    if count == 1:
        return [state]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(count)]


def _record(
    epoch: int, metrics: dict[str, float], accuracy: float, seconds: float
) -> dict[str, Any]:
    """One line of `metrics.jsonl`; what an epoch could not measure is None."""
    if not metrics.pop("replayed_steps"):
        metrics["retention_loss"] = metrics["gradient_alignment"] = None
    record = {"epoch": epoch, "student_accuracy": accuracy, **metrics, "seconds": seconds}
    return results.plain(record)


def _peak_memory() -> int:
    """Bytes: of the first device where it counts them, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
