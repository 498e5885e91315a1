"""Figures that set methods against each other: curves over the epochs, final accuracies.

A label keeps its colour and marker in every figure. Dashed with hollow markers: joint replay or
none; solid and filled: a meta-gradient. Bands and bars are 95 % intervals over seeds.
"""

import os
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfkd_jax.comparison.axes import (
    LINE_HEIGHT,
    Groups,
    Style,
    count_lines,
    create_figure,
    display_name,
    fit_values,
    legend_beside,
    over_epochs,
    progress_measure_of,
    say,
    styles_of,
    wrapped,
)
from dfkd_jax.comparison.run_folders import SCHEMES, curve
from dfkd_jax.comparison.statistics import band, mean_interval
from dfkd_jax.run.figures import GREY, save
from dfkd_jax.run.records import AGREEMENT, CLASS_SHARE


def learning_evolution(groups: Groups, *paths: str | os.PathLike) -> None:
    """Draw mean accuracy per epoch for each label, the teacher's dashed.

    Where no run has data to test on, agreement with the teacher takes the accuracy's place, here
    and in the other figures.

    Args:
      groups: label ↦ its finished runs; at least one.
      paths: files, replaced atomically; their endings set the formats (.png, .pdf, .svg).

    Raises:
      OSError: a file cannot be written.
    """
    measure = progress_measure_of(groups)
    if measure.key == AGREEMENT:
        _agreement_evolution(groups, *paths)
        return
    figure, axes = _single(f"{measure.title} over the epochs", measure.unit)
    _curves(axes, groups, measure.key, styles_of(groups))
    _teachers(axes, groups)
    legend_beside(figure, [axes])
    save(figure, *paths)


def _agreement_evolution(groups: Groups, *paths: str | os.PathLike) -> None:
    """Agreement, and beside it the share of the commonest class.

    Of images in one class the agreement says nothing, so it is not shown without that.
    """
    figure = create_figure(13, 4.6)
    agreement, share = figure.subplots(1, 2, sharex=True)
    over_epochs(agreement, "agreement with the teacher on generated images", "same class, %")
    over_epochs(share, "generated images in the commonest class", "% of the images")
    for axes, key in ((agreement, AGREEMENT), (share, CLASS_SHARE)):
        _curves(axes, groups, key, styles_of(groups))
    legend_beside(figure, [agreement, share])
    save(figure, *paths)


def replay_schemes(groups: Groups, *paths: str | os.PathLike) -> None:
    """Draw accuracy per epoch in one panel for each replay scheme; arguments as above."""
    styles, measure = styles_of(groups), progress_measure_of(groups)
    kinds = {kind: None for kind in ("memory_bank", "generative")}  # shown even without runs
    for runs in groups.values():
        kinds.setdefault(runs[0].summary.get("replay", "none"))
    kinds = [*(kind for kind in kinds if kind != "none"), *(k for k in kinds if k == "none")]
    figure = create_figure(max(4.2 * len(kinds), 7) + 1.5, 4.2)
    panels = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        over_epochs(axes, SCHEMES.get(kind, kind.replace("_", " ")), "")
        shown = {n: r for n, r in groups.items() if r[0].summary.get("replay", "none") == kind}
        if shown:
            _curves(axes, shown, measure.key, styles)
        else:
            say(axes, "no runs")
    panels[0].set_ylabel(f"{measure.title}, %")
    measured = [v for runs in groups.values() for run in runs for v in curve(run, measure.key)]
    fit_values(panels[0], measured)
    for axes in panels:
        _teachers(axes, groups)
    legend_beside(figure, panels)
    save(figure, *paths)


def alignment(groups: Groups, *paths: str | os.PathLike) -> None:
    """Draw the cosine of the two tasks' gradients per epoch; arguments as above."""
    title = "alignment of the gradients of acquisition and retention"
    figure, axes = _single(title, r"$\cos(\nabla L_{acq},\,\nabla L_{ret})$")
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    _curves(axes, groups, "gradient_alignment", styles_of(groups), lower=-1, upper=1)
    legend_beside(figure, [axes])
    save(figure, *paths)


def forgetting(groups: Groups, *paths: str | os.PathLike) -> None:
    """Draw agreement with the teacher on early generated images; arguments as above."""
    title = "agreement with the teacher on images generated early in the run"
    figure, axes = _single(title, "same class, %")
    _curves(axes, groups, "early_agreement", styles_of(groups), lower=0, upper=100)
    legend_beside(figure, [axes])
    save(figure, *paths)


def final_accuracy(groups: Groups, *paths: str | os.PathLike) -> None:
    """Draw the last epoch's accuracy of each seed, mean and interval; arguments as above."""
    names = [wrapped(display_name(name, runs)) for name, runs in groups.items()]
    row_height = max(0.42, LINE_HEIGHT * (max(map(count_lines, names)) + 0.5))
    figure = create_figure(8, 1.4 + row_height * len(groups))
    axes = figure.subplots()
    measure = progress_measure_of(groups)
    axes.set_title(f"{measure.title} after the last epoch", fontsize=10, loc="left", weight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    finals = {n: [run.summary.get(measure.final) for run in r] for n, r in groups.items()}
    for row, (name, style) in enumerate(styles_of(groups).items()):
        values = np.array([np.nan if v is None else v for v in finals[name]], float)
        # Apart, so that the bar does not cover the dots.
        axes.plot(values, np.full(len(values), row + 0.16), "o", color=style.color, alpha=0.6, ms=4)
        mean, half_width, _ = mean_interval(values)
        error = None if np.isnan(half_width) else [half_width]
        fill = "white" if style.joint else style.color
        axes.errorbar(
            [mean],
            [row - 0.12],
            xerr=error,
            markersize=7,
            capsize=3,
            lw=1.6,
            fmt=style.marker,
            color=style.color,
            markerfacecolor=fill,
        )
    measured = [value for values in finals.values() for value in values if value is not None]
    low, high = axes.get_xlim()
    if measured:  # two seeds can have an interval wider than the scale
        span = max(np.ptp(measured), 1.0)
        axes.set_xlim(max(low, min(measured) - span, -1), min(high, max(measured) + span, 101))
    axes.set_yticks(range(len(finals)), names)
    axes.set_ylim(len(finals) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{measure.unit}; small dots: seeds, bar: mean and 95 % interval")
    save(figure, *paths)


def _curves(
    axes: Axes,
    groups: Groups,
    key: str,
    styles: Mapping[str, Style],
    lower: float = 0.0,
    upper: float = 100.0,
) -> None:
    """Draw mean and band of each label, or say in the legend that nothing was measured."""
    missing, measured = [], []
    opacity = 0.13 if len(groups) <= 5 else 0.07  # many bands would add up to grey
    for i, (name, runs) in enumerate(groups.items()):
        means = band([{record["epoch"]: record.get(key) for record in r.history} for r in runs])
        style = styles[name]
        if not len(means.epochs):
            missing.append(name)
            continue
        measured += [value for run in runs for value in curve(run, key)]
        every = max(len(means.epochs) // 10, 1)
        axes.plot(
            means.epochs,
            means.mean,
            color=style.color,
            linestyle=(0, (4, 1.6)) if style.joint else "-",
            linewidth=1.6 if len(means.epochs) <= 60 else 1.1,
            marker=style.marker,
            markersize=5,
            markerfacecolor="white" if style.joint else style.color,
            # Shifted, or the markers of close curves would cover each other.
            markevery=(i % every if len(means.epochs) > every else 0, every),
            label=display_name(name, runs),
        )
        low, high = means.mean - means.half_width, means.mean + means.half_width
        low, high = np.clip(low, lower, upper), np.clip(high, lower, upper)
        axes.fill_between(means.epochs, low, high, color=style.color, alpha=opacity, linewidth=0)
    if not measured:
        say(axes, "not measured in any of the runs")
    for name in missing:
        axes.plot(
            [], [], linestyle="none", label=f"{display_name(name, groups[name])}: not measured"
        )
    fit_values(axes, measured, lower, upper)


def _teachers(axes: Axes, groups: Groups) -> None:
    """One dashed line for each accuracy a teacher had; usually there is one teacher."""
    found = {run.summary.get("teacher_accuracy") for runs in groups.values() for run in runs}
    for accuracy in sorted(value for value in found if value is not None):
        axes.axhline(
            accuracy,
            color=GREY,
            linestyle=(0, (1.5, 1.5)),
            linewidth=1.3,
            label=f"teacher {accuracy:.2f}",
            zorder=1,
        )
        low, high = axes.get_ylim()
        margin = 0.02 * (high - low)
        axes.set_ylim(min(low, accuracy - margin), max(high, accuracy + margin))


def _single(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = create_figure(9, 4.6)
    axes = figure.subplots()
    over_epochs(axes, title, unit)
    return figure, axes
