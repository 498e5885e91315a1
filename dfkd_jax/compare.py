"""Command line: several methods, several seeds, one teacher, and a report.

`python -m dfkd_jax.compare --config=configs/digits.py --methods=mb-dfkd,lra-mb --seeds=5
--workdir=DIR` runs every combination in DIR/runs/LABEL/seedN and writes the report to DIR. The same
command goes on where it was stopped. `--vary=meta.inner_lr=0.01,0.1` runs each combination with
each value of a field.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from dfkd_jax import report
from dfkd_jax.comparison import run_folders
from dfkd_jax.comparison.child_process import in_child
from dfkd_jax.comparison.overall_progress import OverallProgress
from dfkd_jax.data.data_specs import is_teacher
from dfkd_jax.distillation.objectives import INNER_VARIANTS, WITH_INNER_STEP
from dfkd_jax.methods import table
from dfkd_jax.methods.table import METHODS
from dfkd_jax.run import command_line, train
from dfkd_jax.run.command_line import CONFIG, FLAG_ERRORS, WORKDIR, fail
from dfkd_jax.run.gradients_flag import chosen_gradients
from dfkd_jax.run.outputs import method_names
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime import fields as fields_lib
from dfkd_jax.runtime import files, folder_lock
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.stop import STOPPED, Stopped, stop_requests

METHODS_FLAG = flags.DEFINE_list("methods", [], f"Methods: {', '.join(METHODS)}.")
SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds, from config.seed on.")
BASELINE = flags.DEFINE_string("baseline", None, "Label to compare with; mb-dfkd by default.")
VARY = flags.DEFINE_multi_string(
    "vary", [], "FIELD=VALUE,VALUE: every combination with each value; given again, with all pairs."
)
flags.adopt_module_key_flags(command_line)  # --help shows them

# Fields that a comparison sets itself, and the flag that sets them.
RESERVED = {"method": "--methods", "meta.variant": "--gradients"}


class Combination(NamedTuple):
    """A method with a gradient, to run with every seed."""

    label: str
    config: ml_collections.ConfigDict  # with the first seed
    card: dict[str, Any]  # of the teacher, once there is one


class Job(NamedTuple):
    """What one child process does: a combination with one of the seeds."""

    label: str
    config: ml_collections.ConfigDict  # with the seed
    workdir: Path

    @property
    def name(self) -> str:
        """For messages: `lra-mb_exact, seed 3`."""
        return f"{self.label}, seed {self.config.seed}"

    @property
    def log(self) -> Path:
        """The file for what the child prints."""
        return self.workdir / "log.txt"


def combinations(
    load: Callable[..., ml_collections.ConfigDict],
    methods: Sequence[str],
    gradients: Sequence[str],
    workdir: Path,
    varied: Sequence[dict[str, str]] = ({},),
) -> list[Combination]:
    """The configurations to run.

    A method that is joint or without replay has one gradient, its own; others get each of
    `gradients`. Without config.teacher.checkpoint their teacher is the one in `workdir`/teacher.

    Args:
      load: method and fields ↦ a fresh configuration.
      methods: as after the colon of --config.
      gradients: of `objectives.INNER_VARIANTS`.
      workdir: of the comparison.
      varied: see `settings`; the fields are named in the label.

    Raises:
      UserError: an unknown or no method or gradient, or a field that cannot work.
    """
    _check_methods(methods)
    _check_names("--gradients", gradients, INNER_VARIANTS)
    found: dict[str, Combination] = {}

    def loaded(method: str, fields: dict[str, str]) -> ml_collections.ConfigDict:
        try:
            return load(method, **fields)
        except UserError:
            raise
        except FLAG_ERRORS as error:
            raise UserError(command_line.sentence(error)) from error

    for method in dict.fromkeys(methods):
        for fields, gradient in _with_gradients(loaded, method, varied, gradients):
            config = loaded(method, fields)
            if gradient is not None:
                config.meta.variant = gradient
            if config.teacher.checkpoint is None:
                _check_teacher_is_shared(fields)
            setup = parse(config)
            if config.teacher.checkpoint is None:
                config.teacher.checkpoint = str(workdir / "teacher")
                if is_teacher(config.teacher.checkpoint):
                    setup = parse(config)
            label = run_folders.method_label(method_names(config))
            label = " ".join([label, *(f"{f}={fields_lib.get(config, f)}" for f in fields)])
            found[label] = Combination(label, config, setup.card)
    return list(found.values())


def _with_gradients(
    load: Callable[[str, dict[str, str]], ml_collections.ConfigDict],
    method: str,
    varied: Sequence[dict[str, str]],
    gradients: Sequence[str],
) -> Iterator[tuple[dict[str, str], str | None]]:
    """Each choice of fields with each gradient; None where the method's own is the only one."""
    chosen = []
    for fields in varied:
        config = load(method, fields)
        single = config.objective not in WITH_INNER_STEP or config.meta.variant == "detached"
        chosen.append([None] if single else gradients)
    for gradient in dict.fromkeys(itertools.chain(*chosen)):
        for fields, own in zip(varied, chosen, strict=True):
            if gradient in own:
                yield fields, gradient


def _check_teacher_is_shared(varied: Iterable[str]) -> None:
    """Refuse fields that a teacher trained for all runs alike can have one value of only."""
    for field in varied:
        if field.startswith(("teacher.", "dataset.")):
            raise UserError(
                f"--vary is given for {field}, but one teacher is trained for all runs; allowed "
                "are fields of neither teacher nor dataset, or a trained teacher in "
                "--config.teacher.checkpoint."
            )


def settings(varied: Sequence[str]) -> list[dict[str, str]]:
    """Every choice of one value for each field of --vary; one empty choice without.

    Args:
      varied: such as "meta.inner_lr=0.01,0.1".

    Raises:
      UserError: it is not of that form, or a field is set by another flag.
    """
    choices: dict[str, list[str]] = {}
    for given in varied:
        field, _, values = given.partition("=")
        if not field or not all(values.split(",")):
            raise UserError(f"--vary is {given!r}; allowed is FIELD=VALUE,VALUE.")
        if field in RESERVED or field == "seed":
            flag = RESERVED.get(field, "--seeds")
            raise UserError(f"--vary is {given!r}; {field} is set by {flag}.")
        choices[field] = values.split(",")
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def _configurations() -> Callable[..., ml_collections.ConfigDict]:
    """Configurations of the command line; UserError if that sets what it must not."""
    for field, flag in RESERVED.items():
        if field in config_flags.get_override_values(flags.FLAGS[CONFIG.name]):
            raise UserError(f"--config.{field} is set by {flag} in a comparison; give that.")
    return command_line.configurations()


def _check_methods(names: Sequence[str]) -> None:
    if not names:
        raise UserError(f"--methods is empty; allowed are {', '.join(METHODS)}.")
    for name in names:
        try:
            table.find(name)
        except UserError as error:
            text = str(error).replace("The method is", "--methods is")
            raise UserError(text) from error


def _check_names(flag: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    wrong = [name for name in names if name not in allowed]
    if wrong or not names:
        given = repr(wrong[0]) if wrong else "empty"
        raise UserError(f"{flag} is {given}; allowed are {', '.join(allowed)}.")


def plan(found: Sequence[Combination], seeds: int, workdir: Path) -> tuple[list[Job], int]:
    """The jobs still to do, and how many runs are finished.

    Args:
      found: what to run.
      seeds: how many, counted from the configuration's own; at least 1.
      workdir: of the comparison.

    Raises:
      UserError: `seeds` is too small, or a folder holds another run.
    """
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; allowed is 1 or more.")
    jobs, finished = [], 0
    for label, config, card in found:
        for seed in range(config.seed, config.seed + seeds):
            folder = workdir / "runs" / label.replace(" ", "_") / f"seed{seed}"
            # A job is pickled for its process, which no field that derives from another survives.
            own = config.copy_and_resolve_references()
            own.seed = seed
            if run_folders.is_finished(own, card, folder):
                finished += 1
            else:
                jobs.append(Job(label, own, folder))
    return jobs, finished


def compare(jobs: Sequence[Job], finished: int, workdir: Path) -> list[str]:
    """Train the teacher if there is none, then do the jobs, each in a process of its own.

    Args:
      jobs: as from `plan`.
      finished: how many runs were finished before, for the display.
      workdir: of the comparison.

    Returns:
      The names of the jobs that failed; the sentence why is in their folders.

    Raises:
      UserError: there is no teacher, and none could be trained; or another process compares in
        this folder.
      Stopped: SIGTERM or Ctrl-C came; the same jobs go on.
    """
    total = finished + len(jobs)
    failed = []
    with folder_lock.only_user(workdir), stop_requests() as stop_requested:
        if jobs:
            _obtain_teacher(jobs[0].config, workdir, stop_requested)
        with OverallProgress(total, finished) as progress:
            if finished:
                progress.log(f"{finished} of {total} runs are finished already.")
            for job in jobs:
                (job.workdir / run_folders.FAILURE).unlink(missing_ok=True)
                progress.start(job.name, job.workdir, job.config.epochs)
                started = time.monotonic()
                arguments = (job.config, job.workdir)
                outcome = in_child(train.run, arguments, job.log, stop_requested, progress.poll)
                if not outcome.finished and stop_requested():
                    raise Stopped(f"{stop_requested()} came; {job.name} is not finished.")
                if outcome.stopped:  # by a signal that this process did not get
                    raise Stopped(f"{outcome.sentence} {job.name} is not finished.")
                if not outcome.finished:
                    failed.append(job.name)
                    _record_failure(job, outcome.sentence)
                progress.finish(job.name, time.monotonic() - started, outcome)
                if stop_requested():
                    raise Stopped(f"{stop_requested()} came; {job.name} is finished.")
    return failed


def _obtain_teacher(
    config: ml_collections.ConfigDict, workdir: Path, stop_requested: Callable[[], str | None]
) -> None:
    """Train the common teacher if there is none."""
    if is_teacher(config.teacher.checkpoint):
        return
    own = config.copy_and_resolve_references()
    own.teacher.checkpoint = None
    log = workdir / "teacher.log"
    print(f"Training the teacher that all runs share ({log}).", flush=True)
    outcome = in_child(train.train_teacher, (own, workdir), log, stop_requested)
    if stop_requested():
        raise Stopped(f"{stop_requested()} came while training the teacher.")
    if outcome.stopped:
        raise Stopped(outcome.sentence)
    if not outcome.finished:
        raise UserError(f"The teacher could not be trained: {outcome.sentence}")


def _record_failure(job: Job, sentence: str) -> None:
    if not (job.workdir / "summary.json").exists():
        names = {**method_names(job.config), "failure": sentence}
        files.write_json(job.workdir / run_folders.FAILURE, names)


def main(arguments: Sequence[str]) -> int | None:
    """Run what the flags ask for; the exit code, `STOPPED` if it was asked to stop."""
    del arguments
    if WORKDIR.value is None:
        return fail("--workdir is missing; give the folder for the comparison's results.", 2)
    workdir = Path(WORKDIR.value)  # as given: what is kept of runs in a repository has no home
    try:
        methods, variants = METHODS_FLAG.value, chosen_gradients(default=["exact"])
        varied = settings(VARY.value)
        found = combinations(_configurations(), methods, variants, workdir, varied)
        if BASELINE.value is not None:
            report.choose_baseline([c.label for c in found], BASELINE.value)
        jobs, finished = plan(found, SEEDS.value, workdir)
    except UserError as error:
        return fail(str(error), 2)
    try:
        failed = compare(jobs, finished, workdir)
        print(report.write([workdir], baseline=BASELINE.value))
    except (UserError, OSError) as error:
        return fail(str(error), 1)
    except Stopped as stopped:
        print(f"{stopped} The same command goes on from there.")
        return STOPPED
    print(f"files in {workdir}")
    return fail(f"These runs failed: {'; '.join(failed)}.", 1) if failed else None


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
