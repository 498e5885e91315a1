"""Folders of runs, read back: which runs there are, what each is called, how they differ."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from dfkd_jax.data import splits as data
from dfkd_jax.distillation.meta import VARIANTS
from dfkd_jax.distillation.objectives import OBJECTIVES
from dfkd_jax.methods.table import METHODS, RENAMED
from dfkd_jax.run import records
from dfkd_jax.run.config import FREE_FIELDS
from dfkd_jax.run.resume import another_run, other_fields
from dfkd_jax.run.student import TEACHER_COPY
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError

FAILURE = "failure.json"  # in the folder of a run that ended with an error
SCHEMES = {
    "memory_bank": "memory bank",
    "generative": "generative replay",
    "pool": "pool of all that was synthesised",
    "momentum": "moving average of the generator",
    "none": "no replay",
}
AUTHORS_CODE = (
    "joint replay in one pass over [x̂; x̂_m], which is what the authors' code computes for MB-DFKD "
    "and PRE-DFKD, and in effect for LRA too, as its retention term at θ' sends no gradient"
)

# Runs that differ in these only are runs of one label.
_NOT_COMPARED = {
    *("seed", "method", "objective", "meta.variant", "teacher.checkpoint"),
    *FREE_FIELDS,
}


class Run(NamedTuple):
    """A finished run, or one that failed (then without history, its config perhaps empty)."""

    label: str
    seed: int
    folder: Path
    config: dict[str, Any]  # as in config.json
    summary: dict[str, Any]  # as in summary.json; of a failed run what names it
    history: list[dict[str, Any]]  # as in metrics.jsonl
    failure: str | None = None  # the sentence a failed run ended with


def label(method: str, gradient: str | None, objective: str) -> str:
    """The name of a combination: the method alone where it has but one gradient.

    `mb-dfkd`, `lra-mb_exact`, `lra-mb_first_order_lra_concatenated`; fit for a folder and the
    command line.

    Args:
      method: a key of `METHODS`, or a name of an earlier version.
      gradient: a key of `VARIANTS`; None where the objective has no inner step.
      objective: a key of `OBJECTIVES`.
    """
    preset = _preset(method)
    parts = [method]
    if gradient is not None and (gradient, preset.get("meta.variant")) != ("detached", "detached"):
        parts.append(gradient)
    if objective != preset.get("objective", objective):
        parts.append(objective)
    return "_".join(parts)


def method_label(names: Mapping[str, Any]) -> str:
    """`label` of what names a run, in summary.json or failure.json."""
    return label(names["method"], names["gradient"], names["objective"])


def is_authors_code(run: Run) -> bool:
    """Whether the run takes the update that the authors' code takes in effect."""
    objective, gradient = run.summary.get("objective"), run.summary.get("gradient")
    return objective == "concatenated" or (objective, gradient) == ("lra_concatenated", "detached")


def meaning(run: Run) -> str:
    """What the run's label stands for: its replay and what the student descends."""
    names: list[Any] = [run.summary.get(k) for k in ("method", "replay", "objective", "gradient")]
    method, replay, objective, gradient = names
    words = [SCHEMES.get(replay, str(replay).replace("_", " "))]
    if is_authors_code(run):
        words.append(AUTHORS_CODE)
    else:
        words.append(OBJECTIVES.get(objective, str(objective)))
        if gradient is not None:
            words.append(f"its gradient {VARIANTS.get(gradient, gradient)}")
    if any(field.startswith("loss.") for field in _preset(method)):
        words.append(f"with the losses of {method}")
    return "; ".join(words)


def find(directories: Iterable[str | os.PathLike]) -> tuple[list[Run], list[str]]:
    """The finished and failed runs in and below the directories, and notes on what is odd.

    Sorted by label (methods without a meta-gradient first) and seed. Runs that share method and
    gradient but differ in another field get that field in their label.

    Raises:
      UserError: a directory is missing, a file is damaged, or there is no finished run.
    """
    directories = [Path(directory) for directory in directories]
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"{directory} is no folder.")
    folders = {
        path.parent.resolve(): None
        for name in ("summary.json", FAILURE)
        for directory in directories
        for path in sorted(directory.rglob(name))
    }
    try:
        read = [_read(folder) for folder in folders]
    except (KeyError, OSError, UserError) as error:
        raise UserError(f"A run cannot be read: {error}") from error
    runs = [run for run in read if isinstance(run, Run)]
    notes = [note for note in read if isinstance(note, str)]
    runs = _with_differing_fields(sorted(runs, key=_order))
    runs, repeated = _without_repeats(runs)
    finished = [run for run in runs if run.failure is None]
    if not finished:
        raise UserError(
            f"{', '.join(map(str, directories))}: no finished run, that is a folder with "
            "summary.json, metrics.jsonl and config.json, is here or below."
        )
    return runs, notes + repeated + _differences(finished)


def is_finished(config: ml_collections.ConfigDict, card: dict[str, Any], folder: Path) -> bool:
    """Whether `folder` holds the finished run of `config`, whose teacher has this card.

    Raises:
      UserError: it holds a run of another configuration, or a damaged one.
    """
    path = folder / "config.json"
    try:
        if not path.exists():
            return False
        found = other_fields(folder, config, card)
    except (OSError, UserError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if found:
        raise UserError(another_run(folder, found))
    return (folder / "summary.json").exists()


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The finished runs by label, in their order."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        if run.failure is None:
            by_label.setdefault(run.label, []).append(run)
    return by_label


def accuracy_or_agreement(groups: Mapping[str, Sequence[Run]]) -> str:
    """What says how far the students are: "accuracy", or "agreement" if no run has data to test on.

    It completes the keys of `summary.json`: `mean_accuracy`, `final_agreement`.
    """
    runs = [run for group in groups.values() for run in group]
    tested = any(run.summary.get("final_accuracy") is not None for run in runs)
    compared = any(run.summary.get("final_agreement") is not None for run in runs)
    return "agreement" if compared and not tested else "accuracy"


def tested_split(groups: Mapping[str, Sequence[Run]]) -> str:
    """What accuracies were measured on: "test", "validation", or "test or validation"."""
    runs = [run for group in groups.values() for run in group]
    return " or ".join(sorted({data.tested_split(run.config.get("dataset", {})) for run in runs}))


def curve(run: Run, key: str) -> list[float]:
    """A measure of the records over the epochs that have it."""
    return [record[key] for record in run.history if record.get(key) is not None]


def is_joint(run: Run) -> bool:
    """Whether the retention loss sends nothing through an inner step."""
    return run.summary.get("gradient") in (None, "detached")


def _preset(method: str) -> Mapping[str, Any]:
    """What makes a method what it is; of one that is not in the table nothing is known here."""
    return METHODS[method].PRESETS[method] if method in METHODS else {}


def _read(folder: Path) -> Run | str:
    """The run of a folder; a note if it is none."""
    finished = (folder / "summary.json").exists()
    if finished:
        missing = [n for n in ("config.json", "metrics.jsonl") if not (folder / n).exists()]
        if missing:
            return f"{folder} has a summary but no {' or '.join(missing)}; it is left out."
    names = _today(files.read_json(folder / ("summary.json" if finished else FAILURE)))
    config = folder / "config.json"
    return Run(
        method_label(names),
        names["seed"],
        folder,
        files.read_json(config) if config.exists() else {},
        names,
        records.read_metrics(folder / "metrics.jsonl") if finished else [],
        None if finished else names.get("failure", "failed"),
    )


def _today(names: dict[str, Any]) -> dict[str, Any]:
    """What names a run, in the words of this version.

    Earlier ones had the objectives "paper" and "code", and a gradient for joint replay too; some
    methods had other names.
    """
    names = {**names, "method": RENAMED.get(names["method"], names["method"])}
    objective, gradient = names.get("objective", "paper"), names["gradient"]
    if objective not in ("paper", "code"):
        return names
    if gradient == "none":
        joint = "joint" if objective == "paper" else "concatenated"
        objective = "acquisition" if names.get("replay") == "none" else joint
        gradient = None
    else:
        objective = "lra" if objective == "paper" else "lra_concatenated"
    return {**names, "objective": objective, "gradient": gradient}


def _order(run: Run) -> tuple:
    def position(name: str | None, names: Mapping[str, Any]) -> int:
        return [*names, name].index(name)

    method, gradient = run.summary["method"], run.summary["gradient"]
    return (
        not is_joint(run),
        position(method, METHODS),
        position(gradient, VARIANTS),
        run.label,
        run.seed,
        str(run.folder),
    )


def _with_differing_fields(runs: list[Run]) -> list[Run]:
    """Runs of one label but several configurations get the differing fields in their labels.

    They are sorted by the values of these fields, numbers by size.
    """
    configs: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        configs.setdefault(run.label, []).append(compared_fields(run))

    def varied(found: list[dict[str, Any]]) -> list[str]:
        """A field is None in runs of versions that lacked it; a failed run may have no fields."""
        found = [own for own in found if own]
        fields = sorted(set().union(*found))
        return [f for f in fields if len({repr(own.get(f)) for own in found}) > 1]

    differing = {label: varied(found) for label, found in configs.items()}
    positions = {label: i for i, label in enumerate(differing)}

    def size(value: Any) -> tuple:
        number = isinstance(value, (int, float))
        return (not number, value if number else 0, str(value))

    def order(run: Run) -> tuple:
        own = compared_fields(run)
        return positions[run.label], [size(own.get(f)) for f in differing[run.label]]

    def renamed(run: Run) -> Run:
        own = compared_fields(run)
        suffix = [f"{f}={own.get(f)}" for f in differing[run.label] if own]
        return run._replace(label=" ".join([run.label, *suffix]))

    return _with_differing_teachers([renamed(run) for run in sorted(runs, key=order)])


def _with_differing_teachers(runs: list[Run]) -> list[Run]:
    """Where a seed is there with several teachers, their folders get into the labels."""

    def folder(run: Run) -> str | None:
        return run.config.get("teacher", {}).get("checkpoint")

    def content(run: Run) -> str | None:
        """The same for one teacher in two places, if the run has kept what its weights are."""
        copy = run.folder / TEACHER_COPY
        kept = files.read_json(copy) if copy.is_file() else {}
        return kept.get("digest") or folder(run)

    teachers: dict[tuple[str, int], set[str | None]] = {}
    for run in runs:
        teachers.setdefault((run.label, run.seed), set()).add(content(run))
    several = {label for (label, _), folders in teachers.items() if len(folders) > 1}
    return [
        run._replace(label=f"{run.label} teacher.checkpoint={folder(run)}")
        if run.label in several
        else run
        for run in runs
    ]


def _without_repeats(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """One run of each label and seed, as pairing needs; notes on the others."""
    kept: dict[tuple[str, int], Run] = {}
    notes = []
    for run in sorted(runs, key=lambda run: run.failure is not None):  # finished ones win
        first = kept.setdefault((run.label, run.seed), run)
        if first is not run:
            notes.append(
                f"{run.label}, seed {run.seed}, is there twice: {first.folder} is taken, "
                f"{run.folder} is left out."
            )
    return [run for run in runs if kept[run.label, run.seed] is run], notes


def _differences(finished: list[Run]) -> list[str]:
    """What else than method, gradient and seed differs between the runs."""
    values: dict[str, dict[str, list[str]]] = {}
    for run in finished:
        preset = _preset(run.summary["method"])
        own = {f: v for f, v in compared_fields(run).items() if f not in preset or preset[f] != v}
        accuracy = run.summary.get("teacher_accuracy")
        own["the teacher's accuracy"] = "not measured" if accuracy is None else accuracy
        for field, value in own.items():
            labels = values.setdefault(field, {}).setdefault(str(value), [])
            labels += [] if run.label in labels else [run.label]
    return [
        f"Configurations differ in {field}: "
        + "; ".join(f"{value} ({', '.join(labels)})" for value, labels in found.items())
        + "."
        for field, found in values.items()
        if len(found) > 1
    ]


def compared_fields(run: Run) -> dict[str, Any]:
    """The fields of a run's configuration by dotted name, without those that runs may differ in."""
    flat: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif prefix + key not in _NOT_COMPARED:
                flat[prefix + key] = value

    walk(run.config, "")
    return flat
