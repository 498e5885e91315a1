"""Command line: `python -m dfkd_jax.report DIR…`: tables and figures of the runs in folders."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dfkd_jax.comparison import (
    ablation_figure,
    axes,
    figures,
    report_page,
    run_folders,
    tables,
)
from dfkd_jax.comparison.report_page import Table
from dfkd_jax.run.command_line import create_parser, fail
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.files import replacing, replacing_together

DEFAULT_BASELINE = "mb-dfkd"
NO_DATA = (
    "No run has data to test on, so there are no accuracies: all measures and curves are of the "
    "student's agreement with its teacher on fresh generated images, in percent. Each run's "
    "generator makes its own, so the images of two runs are not the same."
)

FIGURES = {
    "learning_evolution.png": (
        figures.learning_evolution,
        "{measure} over the epochs: mean over seeds, 95 % band. Dashed with hollow markers: "
        "joint replay or none; solid: a meta-gradient.",
    ),
    "replay_schemes.png": (
        figures.replay_schemes,
        "The same curves, one panel for each replay scheme.",
    ),
    "final_accuracy.png": (
        figures.final_accuracy,
        "{measure} after the last epoch: each seed, the mean and its 95 % interval.",
    ),
    "alignment.png": (
        figures.alignment,
        "Cosine of the gradients of acquisition and retention at θ. To first order in α the exact "
        "meta-gradient also climbs their dot product, along α (H_ret ∇L_acq + H_acq ∇L_ret); the "
        "first-order one has the first of these two terms, joint replay neither.",
    ),
    "forgetting.png": (
        figures.forgetting,
        "Share of images, generated after the first epoch, on which the student gives the "
        "teacher's class: a falling curve is forgetting.",
    ),
}

ABLATION = (
    ablation_figure.ablation,
    "What {field} does: each point the mean over seeds, with its 95 % interval; lines across are "
    "methods that were run with one value of it.",
)


def write(
    directories: Sequence[str | Path],
    output: str | Path | None = None,
    baseline: str | None = None,
) -> str:
    """Write tables, figures and `report.html` of the runs in and below `directories`: all or none.

    Args:
      directories: searched for finished and failed runs.
      output: where to write; the first directory by default.
      baseline: the label that others are compared with; by default `mb-dfkd`, or the first label.

    Returns:
      The tables as Markdown.

    Raises:
      UserError: no such folder, no finished run, an unknown baseline, or nothing can be written.
    """
    runs, notes = run_folders.find(directories)
    groups = run_folders.groups(runs)
    failed = [run for run in runs if run.failure is not None]
    if baseline not in groups and baseline in {run.label for run in failed}:
        notes.append(f"The baseline {baseline} has no finished run, so another is taken.")
        baseline = None
    baseline = choose_baseline(list(groups), baseline)
    output = Path(output or directories[0])
    kind = run_folders.accuracy_or_agreement(groups)
    if kind == "agreement":
        notes.insert(0, NO_DATA)
    notes += [
        f"{run.label}, seed {run.seed}: {sentence}"
        for run in runs
        for sentence in run.summary.get("warnings", ())
    ]
    shown = tables.measures(kind, run_folders.tested_split(groups))
    aggregates = tables.aggregate(groups, baseline, shown)
    written = [
        tables.means_table(aggregates, shown),
        tables.differences_table(aggregates, baseline, shown),
    ]
    if failed:
        rows = [[run.label, str(run.seed), run.failure] for run in failed]
        written.append(Table("Failed runs", ["label", "seed", "failed with"], rows))
    data_sets = sorted({run.summary.get("dataset") or "none" for run in runs} - {"none"})
    title = f"Comparison on {', '.join(data_sets)}" if data_sets else "Comparison without data"
    glossaries = tables.glossaries(groups, shown)
    text = report_page.markdown(title, written, notes, glossaries)
    csv_files = {
        "comparison.csv": tables.run_rows(runs, shown),
        "comparison_summary.csv": tables.summary_rows(aggregates, baseline, shown),
    }
    field = ablation_figure.varied_field(groups)
    drawings = {**FIGURES, "ablation.png": ABLATION} if field else FIGURES
    try:
        with replacing_together(output) as new:
            for name, (draw, _) in drawings.items():
                draw(groups, new / name, (new / name).with_suffix(".pdf"))
            words = axes.progress_measure_of(groups).title
            captioned = [
                (new / name, caption.format(measure=words[0].upper() + words[1:], field=field))
                for name, (_, caption) in drawings.items()
            ]
            for name, rows in csv_files.items():
                _write(new / name, tables.csv_text(rows))
            _write(new / "comparison.md", text)
            page = report_page.html(title, written, notes, glossaries, captioned)
            _write(new / "report.html", page)
    except OSError as error:
        raise UserError(f"There is no report: {error}.") from error
    return report_page.markdown(title, written)


def choose_baseline(labels: Sequence[str], wanted: str | None) -> str:
    """The wanted label, which may be given as its folder's name, else `mb-dfkd`, else the first.

    Raises:
      UserError: the wanted label is not among them.
    """
    if wanted is None:
        return DEFAULT_BASELINE if DEFAULT_BASELINE in labels else labels[0]
    wanted = {label.replace(" ", "_"): label for label in labels}.get(wanted, wanted)
    if wanted not in labels:
        raise UserError(f"--baseline is {wanted!r}; allowed are {', '.join(labels)}.")
    return wanted


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report that the arguments ask for; the exit code."""
    parser = create_parser("report", __doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="searched for runs")
    parser.add_argument("--output", help="where to write; the first DIR by default")
    parser.add_argument("--baseline", help="the label that others are compared with")
    try:
        given = parser.parse_args(arguments)
        print(write(given.directories, given.output, given.baseline))
    except UserError as error:
        return fail(str(error), 2)
    print(f"files in {given.output or given.directories[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
