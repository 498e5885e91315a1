"""A run: teacher, distillation epoch by epoch, evaluation, checkpoints and figures.

Everything is in the run's folder, and the same call on the same folder goes on where it was cut.
With several processes each runs this same code on the same folder, and process 0 writes.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich.console import Console

from dfkd_jax import checkpoint, data, data_specs, processes, results, teacher
from dfkd_jax import config as config_lib
from dfkd_jax import devices as devices_lib
from dfkd_jax.algorithm import Algorithm, create_algorithm
from dfkd_jax.config import UserError
from dfkd_jax.data_table import DatasetSpec
from dfkd_jax.devices import Devices
from dfkd_jax.evaluate import Accuracy, create_accuracy, put_batches
from dfkd_jax.finite import NonFinite
from dfkd_jax.folder_lock import only_user
from dfkd_jax.outputs import Outputs
from dfkd_jax.progress import Progress, default_console, student_fields
from dfkd_jax.resume import claim, resume, stack, unstack
from dfkd_jax.state import DistillState
from dfkd_jax.stop import Stopped, stop_requests
from dfkd_jax.student import check_teacher, load_start

FIGURE_SECONDS = 120  # figures are drawn at the end, and at most so often before


def run(
    config: ml_collections.ConfigDict, workdir: str | Path, console: Console | None = None
) -> dict[str, Any]:
    """Run `config` in `workdir`, or go on with what an earlier process left there.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      UserError: the configuration cannot work, or the folder belongs to another one.
      NonFinite: training diverged, that of the student or of the teacher; nothing of it is saved,
        and the checkpoint before it is kept.
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

    With several seeds every step is vectorised over them (`jax.vmap`), on one device; each folder
    ends up as if its seed had run alone, up to rounding, and may be resumed alone or together.
    `seconds` are the seed's share of the time.

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
    devices = _devices(config, len(seeds))
    console = console or default_console()
    if not processes.is_main():
        console = Console(quiet=True)
    paths = [Path(workdir).absolute() for workdir in workdirs]
    configs = []
    for seed in seeds:
        own = ml_collections.ConfigDict(config.to_dict())
        own.seed = seed
        configs.append(own)
    precision = jax.default_matmul_precision(config.matmul_precision)
    with contextlib.ExitStack() as held, stop_requests() as own_request, precision:
        processes.on_main(partial(_hold, held, paths), UserError)
        for own, path in zip(configs, paths, strict=True):
            processes.on_main(partial(claim, own, path), UserError)

        def stop_requested() -> str | None:
            request = own_request()
            return request or "A signal" if processes.any_of(request is not None) else None

        spec = data_specs.spec(config)
        algorithm = create_algorithm(
            config, spec.image_shape, spec.num_classes, devices, len(seeds)
        )
        load = data.loader(config, spec)
        test = put_batches(None if spec.name == "none" else load("test"), devices=devices)
        teacher_accuracy = create_accuracy(algorithm.models.teacher, test, spec)
        variables = teacher.obtain_teacher(
            config,
            algorithm.models.teacher,
            spec,
            load,
            teacher_accuracy,
            paths[0],
            console,
            stop_requested,
            devices,
        )
        for path in paths:
            processes.on_main(partial(check_teacher, path, variables), UserError)
        return _distil(
            configs,
            algorithm,
            devices,
            spec,
            variables,
            teacher_accuracy(variables),
            create_accuracy(algorithm.models.student, test, spec),
            paths,
            console,
            stop_requested,
        )


def _hold(held: contextlib.ExitStack, folders: Sequence[Path]) -> None:
    """Keep other processes out of the folders for as long as `held` is open."""
    for folder in folders:
        held.enter_context(only_user(folder))


def _starting(
    config: ml_collections.ConfigDict, algorithm: Algorithm, devices: Devices, spec: DatasetSpec
) -> Callable[[int], DistillState]:
    """`algorithm.init`, with the student of `config.student.checkpoint` if one is given."""
    directory = config.student.get("checkpoint")
    if directory is None:
        return algorithm.init
    variables = load_start(directory, algorithm.models.student, spec.image_shape)

    def init(seed: int) -> DistillState:
        state = algorithm.init(seed)
        own = {"params": state.student.params, "batch_stats": state.student.batch_stats}
        given = {"batch_stats": {}, **variables}
        given = jax.tree.map(lambda leaf, value: np.asarray(value, leaf.dtype), own, given)
        # A copy for each seed, as an epoch consumes its state.
        found = jax.tree.map(jnp.copy, devices.put(given))
        return state.replace(student=state.student.replace(**found))

    return init


def _devices(config: ml_collections.ConfigDict, seeds: int) -> Devices:
    devices = devices_lib.choose(config)
    if seeds > 1 and devices.count > 1:
        raise UserError(
            f"config.parallel.devices gives {devices.count} devices; several seeds at once "
            "(--vectorize_seeds) run on 1."
        )
    return devices


def _distil(
    configs: list[ml_collections.ConfigDict],
    algorithm: Algorithm,
    devices: Devices,
    spec: DatasetSpec,
    teacher_variables: teacher.Variables,
    teacher_accuracy: float | None,
    student_accuracy: Accuracy,
    workdirs: list[Path],
    console: Console,
    stop_requested: Callable[[], str | None],
) -> list[dict[str, Any]]:
    config, count = configs[0], len(configs)
    states, runs = resume(configs, workdirs, _starting(config, algorithm, devices, spec), console)
    state, saved = stack(states), len(runs[0].history)
    closing = contextlib.ExitStack()  # also when the run is stopped or diverges
    outputs = [Outputs(r, teacher_accuracy) for r in runs]
    for out in outputs:
        closing.callback(out.close)

    def draw_figures(states: list[Any]) -> None:
        variables = devices.local(teacher_variables)
        for out, s in zip(outputs, states, strict=True):
            out.figures(algorithm, devices.local(s), variables, spec)

    said: set[tuple[str, int]] = set()  # of which run what was warned of, once each
    drawn = time.monotonic()
    student_steps = config.iterations_per_epoch * config.student.steps
    fields = student_fields(teacher_accuracy is not None)
    split = data.tested_split(config.dataset)
    known = (
        "no test data" if teacher_accuracy is None else f"{split} accuracy {teacher_accuracy:.2f} %"
    )
    with closing, Progress(config.epochs, saved, "student", fields, console) as progress:
        progress.log(
            f"Distilling {config.teacher.model} ({known}) into "
            f"{config.student.model} by {config.method}"
            + (f", {count} seeds at once" if count > 1 else "")
            + (f", on {devices.count} devices" if devices.count > 1 else "")
            + (f", after epoch {saved}." if saved else ".")
        )
        for epoch in range(saved + 1, config.epochs + 1):
            started = time.perf_counter()
            state, metrics = algorithm.epoch(state, teacher_variables)
            jax.block_until_ready(metrics)  # which reads nothing
            seconds = (time.perf_counter() - started) / count
            if epoch == 1:
                state = algorithm.keep_early(state, teacher_variables)
            states = unstack(state, count)
            measured = [
                (algorithm.agreement(s, teacher_variables), student_accuracy.correct(_student(s)))
                for s in states
            ]
            metrics, measured = jax.device_get((metrics, measured))  # the epoch's one transfer
            _check_finite(metrics, epoch, saved, runs[0].manager.directory)
            last = epoch == config.epochs
            request = None if last else stop_requested()
            due = last or request or epoch % config.checkpoint_every == 0
            for i, (r, out, s) in enumerate(zip(runs, outputs, states, strict=True)):
                agreement, correct = measured[i]
                own = {name: float(np.atleast_1d(value)[i]) for name, value in metrics.items()}
                own |= {name: float(value) for name, value in agreement.items()}
                record = _record(epoch, own, student_accuracy.percent(correct), seconds)
                r.history.append(record)
                if due:
                    checkpoint.save(r.manager, epoch, s, r.history)
                out.record(record)
            saved = epoch if due else saved
            progress.update({**record, "steps_per_second": student_steps / seconds})
            for i, (r, out) in enumerate(zip(runs, outputs, strict=True)):
                for kind, sentence in out.warnings(spec.num_classes).items():
                    if (kind, i) not in said:
                        said.add((kind, i))
                        whose = f" (seed {r.config.seed})" if count > 1 else ""
                        progress.log(f"Warning{whose}: {sentence}")
            if last:
                break
            # Saving takes a while, in which a signal may come as well.
            request = request or (stop_requested() if due else None)
            if request:
                raise Stopped(f"{request} came; epoch {epoch} is saved.")
            if processes.from_main(time.monotonic() - drawn > FIGURE_SECONDS):
                draw_figures(states)
                drawn = time.monotonic()
        draw_figures(unstack(state, count))
    for r in runs:
        r.manager.close()
    return [out.summary(student_steps, spec.num_classes, console) for out in outputs]


def _student(state: DistillState) -> teacher.Variables:
    return {"params": state.student.params, "batch_stats": state.student.batch_stats}


def _check_finite(metrics: dict[str, Any], epoch: int, saved: int, directory: Any) -> None:
    """Take what says whether the epoch was finite out of its metrics, and end the run if not.

    Args:
      metrics: of `algorithm.epoch`; of several seeds, arrays.
      epoch: their number.
      saved: the newest epoch of which there is a checkpoint; 0 for none.
      directory: of the checkpoints.
    """
    words = {
        "finite": "A loss",
        "finite_student": "A parameter of the student",
        "finite_generator": "A parameter of the generator",
        "finite_replay": "A value of the replay",
    }
    broken = [what for key, what in words.items() if not np.all(metrics.pop(key))]
    if broken:
        kept = f"the last good checkpoint, of epoch {saved}, is in {directory}"
        raise NonFinite(
            f"{broken[0]} became non-finite in epoch {epoch}; "
            f"{kept if saved else 'no checkpoint was saved before'}."
        )


def _record(
    epoch: int, metrics: dict[str, float], accuracy: float | None, seconds: float
) -> dict[str, Any]:
    """One line of `metrics.jsonl`; what an epoch could not measure is None."""
    if not metrics.pop("replayed_steps"):
        metrics["retention_loss"] = metrics["gradient_alignment"] = None
    record = {"epoch": epoch, "student_accuracy": accuracy, **metrics, "seconds": seconds}
    return results.plain(record)
