"""The figure of an ablation: accuracy and alignment against the values of one field."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dfkd_jax.comparison import run_folders, tables
from dfkd_jax.comparison.axes import (
    Groups,
    Style,
    create_figure,
    fit_values,
    legend_beside,
    progress_measure_of,
    say,
    styles_of,
)
from dfkd_jax.comparison.run_folders import Run, method_label
from dfkd_jax.comparison.statistics import mean_interval
from dfkd_jax.comparison.tables import Measure
from dfkd_jax.run.figures import panel, save

LOG_RATIO = 10  # values that differ by more stand on a logarithmic scale


def varied_field(groups: Groups) -> str | None:
    """The field, a number, whose value alone tells labels of the same method and gradient apart.

    Args:
      groups: label ↦ its finished runs.

    Returns:
      Its dotted name; None where no field varies, several do, or its values are no numbers.
    """
    found: dict[tuple[str, str], list] = {}
    for runs in groups.values():
        for field, value in run_folders.compared_fields(runs[0]).items():
            values = found.setdefault((method_label(runs[0].summary), field), [])
            values += [] if value in values else [value]
    varied = {field: values for (_, field), values in found.items() if len(values) > 1}
    if len(varied) != 1:
        return None
    (field,) = varied
    points = {(method_label(runs[0].summary), _value(runs[0], field)) for runs in groups.values()}
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for _, v in points)
    # Otherwise labels differ by their teachers too.
    return field if numbers and len(points) == len(groups) else None


def ablation(groups: Groups, *paths: str | os.PathLike) -> None:
    """Draw μ, final accuracy and mean alignment over the values of the field.

    A point is a mean over seeds, its bar the 95 % interval; a method that has one value of the
    field only is a horizontal line.

    Args:
      groups: label ↦ its finished runs, of which `varied_field` finds a field.
      paths: files, replaced atomically; their endings set the formats (.png, .pdf, .svg).

    Raises:
      OSError: a file cannot be written.
    """
    field, progress = varied_field(groups), progress_measure_of(groups)
    kind = run_folders.accuracy_or_agreement(groups)
    assert field is not None
    by_method: dict[str, list[Run]] = {}
    for runs in groups.values():
        by_method.setdefault(method_label(runs[0].summary), []).extend(runs)
    styles = styles_of(by_method)
    shown = tables.measures(kind, run_folders.tested_split(groups))
    measures = {measure.key: measure for measure in shown}
    mean = measures[f"mean_{kind}"]
    figure = create_figure(13, 4.2)
    panels = figure.subplots(1, 3)
    cosine = r"$\cos(\nabla L_{acq},\,\nabla L_{ret})$"
    for axes, title, unit, measure, limits in (
        (panels[0], f"μ: {progress.title}", progress.unit, mean, (0, 100)),
        (panels[1], "after the last epoch", progress.unit, measures[progress.final], (0, 100)),
        (panels[2], "mean gradient alignment", cosine, measures["mean_alignment"], (-1, 1)),
    ):
        panel(axes, title, unit)
        measured = _draw(axes, by_method, styles, field, measure)
        fit_values(axes, measured, *limits)
    legend_beside(figure, panels)
    save(figure, *paths)


def _draw(
    axes: Axes,
    by_method: Mapping[str, Sequence[Run]],
    styles: Mapping[str, Style],
    field: str,
    measure: Measure,
) -> list[float]:
    """A panel's points and lines; what was measured, of every run."""
    values = {name: {_value(run, field) for run in runs} for name, runs in by_method.items()}
    ticks = sorted(set().union(*(own for own in values.values() if len(own) > 1)))
    logarithmic = ticks[0] > 0 and ticks[-1] / ticks[0] >= LOG_RATIO
    measured = []
    for i, (name, runs) in enumerate(by_method.items()):
        by_value: dict[float, list[float]] = {}
        for run in runs:
            value = measure.of(run)
            if value is not None:
                by_value.setdefault(_value(run, field), []).append(value)
        if not by_value:
            continue
        measured += itertools.chain(*by_value.values())
        style, means = styles[name], [mean_interval(by_value[x]) for x in sorted(by_value)]
        line = {"color": style.color, "linestyle": (0, (4, 1.6)) if style.joint else "-"}
        if len(values[name]) == 1:
            axes.axhline(means[0].mean, linewidth=1.4, label=name, **line)
            continue
        # Side by side, or the bars of methods would cover each other.
        aside = 0.012 * (i - (len(by_method) - 1) / 2)
        x = np.array(sorted(by_value), float)
        x = x * (ticks[-1] / ticks[0]) ** aside if logarithmic else x + aside * np.ptp(ticks)
        axes.errorbar(
            x,
            [interval.mean for interval in means],
            yerr=[interval.half_width for interval in means],  # NaN of one seed: no bar
            marker=style.marker,
            markerfacecolor="white" if style.joint else style.color,
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=3,
            label=name,
            **line,
        )
    if not measured:
        say(axes, "not measured in any of the runs")
    axes.set_xlabel(field)
    axes.set_xscale("log" if logarithmic else "linear")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    return measured


def _value(run: Run, field: str) -> Any:
    return run_folders.compared_fields(run).get(field)  # None of a run of an older version
