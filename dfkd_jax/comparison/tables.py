"""The tables of a comparison: means over seeds, differences to a baseline, rows for CSV files."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from dfkd_jax.comparison.report_page import Glossary, Table
from dfkd_jax.comparison.run_folders import Run, curve, meaning
from dfkd_jax.comparison.statistics import Difference, Interval, mean_interval, paired_difference

ABSENT = "–"


class Measure(NamedTuple):
    """A number of a run that the tables show."""

    key: str  # in the CSV files, and in `summary.json` without `of_curve`
    title: str
    meaning: str
    scale: float = 1.0  # from the run's unit to the table's
    decimals: int = 2
    of_cost: bool = False  # shown without an interval, not compared with the baseline
    # The key of a record of `metrics.jsonl`, and what is made of its values over the epochs.
    of_curve: tuple[str, Callable[[Sequence[float]], float]] | None = None

    def of(self, run: Run) -> float | None:
        """In the run's unit; None where it was not measured."""
        if self.of_curve is None:
            return run.summary.get(self.key)
        key, reduce = self.of_curve
        values = curve(run, key)
        return reduce(values) if values else None


# What `run_folders.accuracy_or_agreement` names, in words, and the title of its maximum.
_IN_WORDS = {
    "accuracy": ("{split} accuracy", "Acc_max"),
    "agreement": ("agreement with the teacher on fresh generated images", "max"),
}
_COSTS = (
    Measure(
        "seconds_per_student_step",
        "s / student step ↓",
        "an epoch's time divided by its student steps, so each with its share of the generator's "
        "steps and of what the replay learns, but not of testing; median over the epochs without "
        "the first, which compiles, and mean over seeds",
        decimals=5,
        of_cost=True,
    ),
    Measure(
        "peak_memory_bytes",
        "peak memory ↓ (MiB)",
        "the most memory the run held, mean over seeds: of the device, or on CPU of the process, "
        "compilation included",
        scale=2**-20,
        decimals=0,
        of_cost=True,
    ),
    Measure(
        "generated_images",
        "images made (k)",
        "generated images that the student could learn from, in thousands",
        scale=1e-3,
        decimals=1,
        of_cost=True,
    ),
    Measure(
        "synthesis_steps",
        "generator updates",
        "optimisation steps of the generator, or of the pixels",
        decimals=0,
        of_cost=True,
    ),
    Measure(
        "teacher_images",
        "T passes (k)",
        "images that the teacher was shown, in thousands: a forward pass of a batch of B counts B",
        scale=1e-3,
        decimals=1,
        of_cost=True,
    ),
    Measure(
        "student_images",
        "S passes (k)",
        "images that the student was shown, likewise",
        scale=1e-3,
        decimals=1,
        of_cost=True,
    ),
    Measure(
        "seconds_of_synthesis",
        "synthesis (s)",
        "seconds of all epochs in which images were made, compilation included; known on CPU, "
        "where the steps are dispatched one by one",
        decimals=0,
        of_cost=True,
    ),
    Measure(
        "seconds_of_distillation",
        "distillation (s)",
        "seconds of all epochs in which the student learned, likewise",
        decimals=0,
        of_cost=True,
    ),
)
_RETENTION = (
    Measure(
        "mean_alignment",
        "alignment ↑",
        "the cosine of the gradients of acquisition and retention at θ, mean over the epochs that "
        "replayed",
        decimals=3,
        of_curve=("gradient_alignment", fmean),
    ),
    Measure(
        "final_early_agreement",
        "early ↑ (%)",
        "on what share of images, generated after the first epoch, the student names the "
        "teacher's class after the last: the rest it has forgotten, or never learned",
        of_curve=("early_agreement", lambda values: values[-1]),
    ),
)

# Beside agreement, which images that are all alike make easy.
_CLASS_SHARE = Measure(
    "final_generated_class_share",
    "one class ↓ (%)",
    "what share of the last epoch's generated images the teacher puts into one class: near 100 the "
    "generator has collapsed, and agreement says little",
)

_TERMS = (
    (
        "±",
        "half the width of the 95 % interval of the mean over seeds, by Student's t; "
        f"{ABSENT} with a single seed.",
    ),
    (
        "paired difference",
        "label minus baseline on the same seeds and the same teacher, its mean with a 95 % "
        "t-interval and the two-sided p-value of the paired t-test. * marks an interval that "
        "excludes 0. No correction is made for the number of comparisons.",
    ),
)


def measures(kind: str, split: str) -> tuple[Measure, ...]:
    """What the tables show where `run_folders.accuracy_or_agreement` is "accuracy" or "agreement".

    Args:
      kind: of the runs.
      split: what accuracies were measured on, as `run_folders.tested_split` names it.
    """
    words, best = _IN_WORDS[kind]
    words = words.format(split=split)
    return (
        Measure(
            f"mean_{kind}",
            "μ ↑ (%)",
            f"the mean of the student's {words} over all epochs of a run: how much it knows all "
            "along, which counts where no test data says when to stop",
        ),
        Measure(
            f"{kind}_variance",
            "σ² ↓ (%²)",
            f"the variance of that {kind} over the epochs of a run (divided by their number), "
            "averaged over seeds: slow learning and forgetting both raise it",
        ),
        Measure(f"max_{kind}", f"{best} ↑ (%)", f"the best epoch's {words}"),
        Measure(f"final_{kind}", "final ↑ (%)", f"the last epoch's {words}"),
        *([_CLASS_SHARE] if kind == "agreement" else []),
        *_RETENTION,
        *_COSTS,
    )


def glossaries(groups: Mapping[str, Sequence[Run]], shown: Sequence[Measure]) -> list[Glossary]:
    """What the columns and the rows of the tables mean."""
    columns = [*((measure.title, measure.meaning + ".") for measure in shown), *_TERMS]
    rows = [(label, meaning(runs[0]) + ".") for label, runs in groups.items()]
    return [Glossary("Measures", columns), Glossary("Labels", rows)]


class Aggregate(NamedTuple):
    """What the runs of one label come to."""

    label: str
    seeds: list[int]
    intervals: dict[str, Interval]  # by the measure's key, in the table's unit
    differences: dict[str, Difference] | None  # to the baseline; None for the baseline itself


def aggregate(
    groups: Mapping[str, Sequence[Run]], baseline: str, shown: Sequence[Measure]
) -> list[Aggregate]:
    """Means with intervals over seeds, and differences to the baseline on common seeds."""

    def by_seed(name: str, measure: Measure) -> dict[int, float | None]:
        values = {run.seed: measure.of(run) for run in groups[name]}
        return {s: None if v is None else v * measure.scale for s, v in values.items()}

    def one(name: str) -> Aggregate:
        values = {measure.key: by_seed(name, measure) for measure in shown}
        return Aggregate(
            name,
            sorted(run.seed for run in groups[name]),
            {key: mean_interval(of_seeds.values()) for key, of_seeds in values.items()},
            None
            if name == baseline
            else {
                m.key: paired_difference(values[m.key], by_seed(baseline, m))
                for m in _paired(shown)
            },
        )

    return [one(name) for name in groups]


def _paired(shown: Sequence[Measure]) -> list[Measure]:
    return [measure for measure in shown if not measure.of_cost]


def means_table(aggregates: Sequence[Aggregate], shown: Sequence[Measure]) -> Table:
    """One row per label: each measure's mean, with its interval where seeds say something of it."""

    def cell(measure: Measure, interval: Interval) -> str:
        mean = _number(interval.mean, measure.decimals)
        if measure.of_cost or mean == ABSENT:
            return mean
        return f"{mean} ± {_number(interval.half_width, measure.decimals)}"

    rows = [
        [a.label, str(len(a.seeds)), *(cell(m, a.intervals[m.key]) for m in shown)]
        for a in aggregates
    ]
    return Table("Means over seeds", ["label", "seeds", *(m.title for m in shown)], rows)


def differences_table(
    aggregates: Sequence[Aggregate], baseline: str, shown: Sequence[Measure]
) -> Table:
    """One row per label but the baseline: mean, interval and p-value of each measure."""
    paired = _paired(shown)

    def cell(measure: Measure, d: Difference) -> str:
        if not d.count or d.count < 2:
            return _number(d.mean, measure.decimals, signed=True)
        low, high = (_number(d.mean + s * d.half_width, measure.decimals, True) for s in (-1, 1))
        p = "p < 0.001" if d.p_value < 0.001 else f"p = {d.p_value:.3f}"
        mark = " *" if d.excludes_zero else ""
        return f"{_number(d.mean, measure.decimals, True)} [{low}, {high}], {p}{mark}"

    rows = [
        [
            a.label,
            str(max(d.count for d in a.differences.values())),  # not every measure has them all
            *(cell(measure, a.differences[measure.key]) for measure in paired),
        ]
        for a in aggregates
        if a.differences is not None
    ]
    header = ["label", "common seeds", *(f"Δ {measure.title}" for measure in paired)]
    return Table(f"Paired differences to {baseline}", header, rows)


def _number(value: float, decimals: int, signed: bool = False) -> str:
    if value != value:
        return ABSENT
    return f"{value:{'+' if signed else ''}.{decimals}f}"


def run_rows(runs: Sequence[Run], shown: Sequence[Measure]) -> list[dict[str, Any]]:
    """One row per run, finished or failed, in the run's units."""
    names = ("method", "replay", "gradient", "objective", "dataset", "teacher", "student")
    return [
        {
            "label": run.label,
            "seed": run.seed,
            **{name: run.summary.get(name) for name in names},
            "status": "finished" if run.failure is None else "failed",
            "epochs": run.summary.get("epochs"),
            **{measure.key: measure.of(run) for measure in shown},
            **{key: run.summary.get(key) for key in ("teacher_accuracy", "seconds")},
            "failure": run.failure,
            "folder": str(run.folder),
        }
        for run in runs
    ]


def summary_rows(
    aggregates: Sequence[Aggregate], baseline: str, shown: Sequence[Measure]
) -> list[dict[str, Any]]:
    """One row per label with what both tables show, unrounded, in the run's units."""

    def row(a: Aggregate) -> dict[str, Any]:
        cells: dict[str, Any] = {"label": a.label, "seeds": len(a.seeds), "baseline": baseline}
        for measure in shown:
            # In the run's unit, as the key says.
            mean, half_width, _ = a.intervals[measure.key]
            cells[measure.key] = mean / measure.scale
            cells[f"{measure.key}_half_width"] = half_width / measure.scale
        for measure in _paired(shown):
            found = a.differences[measure.key]._asdict() if a.differences else {}
            for name in Difference._fields:
                suffix = {"mean": "difference", "count": "pairs"}.get(name, f"difference_{name}")
                cells[f"{measure.key}_{suffix}"] = found.get(name)
        return {key: None if value != value else value for key, value in cells.items()}

    return [row(a) for a in aggregates]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, at least one and all with the same keys, as CSV with a header; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
