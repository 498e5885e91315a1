"""What figures of a comparison are made of: styles of labels, panels, a legend beside them."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from dfkd_jax.comparison import run_folders
from dfkd_jax.comparison.run_folders import Run, is_authors_code, is_joint
from dfkd_jax.run.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, panel
from dfkd_jax.run.records import ACCURACY, AGREEMENT

Groups = Mapping[str, Sequence[Run]]  # the finished runs of each label

# Okabe and Ito's without the yellow that white paper swallows, then three of Tol's muted ones.
COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#222222")
COLORS += ("#882255", "#999933", "#332288")
MARKERS = "osD^vPX<>p"

LINE_LENGTH = 30  # characters of a label that stand on one line, if it can be broken
LINE_HEIGHT = 0.17  # inches


class ProgressMeasure(NamedTuple):
    """What the curves show of a student, percent."""

    key: str  # in a record
    final: str  # in a summary
    title: str
    unit: str


PROGRESS_MEASURES = {  # by what `run_folders.accuracy_or_agreement` names
    "accuracy": ProgressMeasure(
        ACCURACY, "final_accuracy", "accuracy on the {split} set", "top-1, %"
    ),
    "agreement": ProgressMeasure(
        AGREEMENT,
        "final_agreement",
        "agreement with the teacher on generated images",
        "same class, %",
    ),
}


def progress_measure_of(groups: Groups) -> ProgressMeasure:
    """What the curves of these runs show, in words that name the images."""
    measure = PROGRESS_MEASURES[run_folders.accuracy_or_agreement(groups)]
    return measure._replace(title=measure.title.format(split=run_folders.tested_split(groups)))


class Style(NamedTuple):
    """How a label is drawn."""

    color: str
    marker: str
    joint: bool


def styles_of(groups: Groups) -> dict[str, Style]:
    """A style for each label, in their order."""
    return {
        name: Style(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], is_joint(runs[0]))
        for i, (name, runs) in enumerate(groups.items())
    }


def display_name(name: str, runs: Sequence[Run]) -> str:
    """The label, and what nobody would guess from it."""
    return f"{name} (as the authors' code)" if is_authors_code(runs[0]) else name


def fit_values(
    axes: Axes, measured: Sequence[float], lower: float = 0.0, upper: float = 100.0
) -> None:
    """Fit the values, not the bands, which few seeds make very wide."""
    if measured:
        low, high = min(measured), max(measured)
        margin = max(0.06 * (high - low), 0.01 * (upper - lower))
        axes.set_ylim(max(low - margin, lower - margin), min(high + margin, upper + margin))


def create_figure(width: float, height: float) -> Figure:
    """A figure of so many inches whose parts keep apart."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    return figure


def over_epochs(axes: Axes, title: str, unit: str) -> None:
    """Title and scale of a panel of curves over the epochs."""
    panel(axes, title, unit)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def say(axes: Axes, words: str) -> None:
    """Write into the middle of an empty panel."""
    axes.text(0.5, 0.5, words, color=GREY, transform=axes.transAxes, ha="center", va="center")


def legend_beside(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend beside the panels, where it cannot cover a curve."""
    entries = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    # The teacher last, however many panels come before.
    names = sorted(entries, key=lambda name: name.startswith("teacher "))
    handles, names = [entries[name] for name in names], [wrapped(name) for name in names]
    height = LINE_HEIGHT * sum(count_lines(name) + 0.5 for name in names) + 0.4
    figure.set_figheight(max(figure.get_figheight(), height))
    figure.legend(
        handles, names, loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2
    )


def wrapped(name: str) -> str:
    """A label that names several fields, on several lines."""
    return textwrap.fill(name, LINE_LENGTH, break_long_words=False, break_on_hyphens=False)


def count_lines(name: str) -> int:
    """Of a wrapped label."""
    return name.count("\n") + 1
