"""Figures of a run: its learning curves, and what the generator and the memory hold.

They are drawn without pyplot, whose global state would meet that of a notebook that calls a run.
The colours are Okabe and Ito's, told apart by colour-blind readers too.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dfkd_jax.run.records import ACCURACY, AGREEMENT, CLASS_SHARE
from dfkd_jax.run.samples import Panel
from dfkd_jax.runtime.files import replacing

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B6B6B"
MOST_IMAGES = 32  # of a panel in a sample grid
COLUMNS = 4  # of the figure of all other measures
# What the learning curve shows, or what is no measure.
_IN_LEARNING_CURVE = {
    *("epoch", "seconds", "seconds_of_synthesis", ACCURACY, "acquisition_loss", "retention_loss"),
    *("generator_loss", "gradient_alignment"),
}


def learning_curve(
    history: Sequence[Mapping[str, Any]],
    teacher_accuracy: float | None,
    path: str | os.PathLike,
    split: str = "test",
) -> None:
    """Draw accuracy, losses and gradient alignment over the epochs.

    Args:
      history: one record per epoch: `epoch`, `student_accuracy` in percent, `acquisition_loss`,
        `retention_loss`, `generator_loss`, `gradient_alignment` in [-1, 1]. None or a missing key
        leaves a gap; a measure that no record has is said to be missing.
      teacher_accuracy: percent; None: the run had no data. Then `generated_agreement` and
        `generated_class_share` are drawn instead of the accuracy.
      path: the file, replaced atomically; its ending sets the format (.png, .pdf, .svg).
      split: what the accuracies were measured on, test or validation.

    Raises:
      OSError: the file cannot be written.
    """
    epochs = np.array([record["epoch"] for record in history], float)
    figure = Figure(figsize=(9, 5.6))
    _leave_room(figure, rows=2, columns=2)
    (accuracy, student), (generator, alignment) = figure.subplots(2, 2, sharex=True)

    if teacher_accuracy is None:
        panel(accuracy, "agreement with the teacher, generated images", "% of the images")
        # Of images in one class the agreement says nothing, so it is not shown without their share.
        share = _series(history, CLASS_SHARE)
        _line(accuracy, epochs, share, GREY, "images in the commonest class")
        _draw_progress(accuracy, epochs, _series(history, AGREEMENT))
        # The share falls where the agreement rises; the middle is what both leave free.
        accuracy.legend(loc="center right", fontsize=8)
    else:
        panel(accuracy, f"accuracy on the {split} set", "top-1, %")
        label = f"teacher {teacher_accuracy:.2f}"
        accuracy.axhline(teacher_accuracy, color=GREY, linestyle="--", linewidth=1.2, label=label)
        _draw_progress(accuracy, epochs, _series(history, ACCURACY))
    panel(student, "student's losses", "d(S, T), mean over the images")
    _line(student, epochs, _series(history, "acquisition_loss"), BLUE, "acquisition")
    retention = _series(history, "retention_loss")
    _line(student, epochs, retention, ORANGE, "retention", missing="no replay")
    student.legend(fontsize=8)
    panel(generator, "generator's loss", "loss")
    _line(generator, epochs, _series(history, "generator_loss"), PURPLE)
    panel(alignment, "gradient alignment", r"$\cos(\nabla L_{acq},\,\nabla L_{ret})$")
    alignment.axhline(0, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    alignment.set_ylim(-1.05, 1.05)
    cosines = _series(history, "gradient_alignment")
    # Where nobody asked for it there is replay and no alignment.
    replayed = np.any(np.isfinite(retention))
    _line(alignment, epochs, cosines, GREEN, missing="not measured" if replayed else "no replay")

    for axes in (generator, alignment):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(epochs):
        margin = 0.5 + 0.02 * np.ptp(epochs)
        accuracy.set_xlim(epochs.min() - margin, epochs.max() + margin)
    save(figure, path)


def measures(history: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draw what the learning curve leaves out: every other measure, each in a panel of its own.

    Nobody lists them: what a part of the method measures is drawn because the records have it.

    Args:
      history: one record per epoch; None or a missing key leaves a gap, and a measure that no
        record has a value of is left out.
      path: the file, replaced atomically; its ending sets the format (.png, .pdf, .svg).

    Raises:
      OSError: the file cannot be written.
    """
    epochs = np.array([record["epoch"] for record in history], float)
    names = sorted({name for record in history for name in record} - _IN_LEARNING_CURVE)
    series = {name: _series(history, name) for name in names}
    series = {name: values for name, values in series.items() if np.isfinite(values).any()}
    rows = max(1, -(-len(series) // COLUMNS))
    figure = Figure(figsize=(12, 0.6 + 2.1 * rows))
    _leave_room(figure, rows, COLUMNS)
    grid = figure.subplots(rows, COLUMNS, sharex=True, squeeze=False)
    for axes, (name, values) in zip(grid.flat, series.items(), strict=False):
        panel(axes, name.replace("_", " "), "")
        _line(axes, epochs, values, BLUE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for index, axes in enumerate(grid.flat):
        axes.set_visible(index < len(series))
        # Below the last panel of a column, which need not be in the last row.
        if index < len(series) <= index + COLUMNS:
            axes.set_xlabel("epoch")
            axes.tick_params(labelbottom=True)
    save(figure, path)


def sample_grid(
    panels: Sequence[Panel | tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    path: str | os.PathLike,
) -> None:
    """Draw images in titled blocks, each captioned with the teacher's class and confidence.

    Args:
      panels: see `samples.Panel`; of each the first 32 images are drawn, and one without images is
        said to be empty.
      path: the file, replaced atomically; its ending sets the format (.png, .pdf, .svg).

    Raises:
      ValueError: a panel's arrays do not belong together.
      OSError: the file cannot be written.
    """
    panels = [_checked(Panel(*panel)) for panel in panels]
    most = max((len(panel.images) for panel in panels), default=0)
    columns = 8 if most <= 16 else 16
    # All in units of one cell, an image with its margin; a row has room for the caption too.
    row, head = 1.3, 0.6
    bodies = [-(-len(panel.images) // columns) * row or row / 2 for panel in panels]
    height = max(sum(bodies) + len(bodies) * head, 1.0)
    inches = 0.72
    figure = Figure(figsize=(columns * inches, height * inches))
    axes = figure.add_axes((0, 0, 1, 1))
    top = 0.0
    for panel, body in zip(panels, bodies, strict=True):
        axes.text(0.06, top + head / 2 + 0.08, panel.title, fontsize=10, weight="bold", va="center")
        if not len(panel.images):
            axes.text(0.06, top + head + body / 2, "empty", color=GREY, va="center")
        for i, image in enumerate(panel.images):
            left, upper = i % columns, top + head + i // columns * row
            _draw_image(axes, image, left, upper)
            label, confidence = int(panel.labels[i]), float(panel.confidence[i])
            # Of NaN logits the class would be 0.
            caption = f"{label} · {confidence:.0%}" if np.isfinite(confidence) else "–"
            axes.text(left + 0.5, upper + 1.08, caption, fontsize=7, ha="center", va="center")
        top += head + body
    # After the images, as each of them moves the limits.
    axes.set(xlim=(0, columns), ylim=(height, 0), aspect="auto")
    axes.set_axis_off()
    save(figure, path)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One measure over the epochs, NaN where it is missing (which a line leaves out)."""
    values = [record.get(key) for record in history]
    return np.array([np.nan if value is None else value for value in values], float)


def _leave_room(figure: Figure, rows: int, columns: int) -> None:
    """Margins for titles, ticks and labels, in inches: matplotlib's layouts draw a figure twice."""
    width, height = figure.get_size_inches()
    left, right, bottom, top, between_columns, between_rows = 0.8, 0.3, 0.55, 0.35, 0.8, 0.5
    panel_width = (width - left - right - (columns - 1) * between_columns) / columns
    panel_height = (height - bottom - top - (rows - 1) * between_rows) / rows
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=between_columns / panel_width,
        hspace=between_rows / panel_height,
    )


def panel(axes: Axes, title: str, unit: str) -> None:
    """Title, unit and the frame that all our figures share."""
    # The height is given, as matplotlib's search for one takes as long as drawing the panel.
    axes.set_title(title, fontsize=10, loc="left", weight="bold", y=1.0)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)


def _line(
    axes: Axes,
    epochs: np.ndarray,
    values: np.ndarray,
    color: str,
    label: str = "",
    missing: str = "not measured",
) -> None:
    """Draw a series, or say why there is none."""
    if np.isfinite(values).any():
        # Dots, as an epoch between two gaps has no line.
        marker = "o" if len(epochs) <= 60 else None
        axes.plot(epochs, values, color=color, marker=marker, markersize=3, label=label or None)
    elif label:
        axes.plot([], [], linestyle="none", label=f"{label}: {missing}")
    else:
        axes.text(0.5, 0.6, missing, color=GREY, transform=axes.transAxes, ha="center")


def _draw_progress(axes: Axes, epochs: np.ndarray, values: np.ndarray) -> None:
    """The student's percentage over the epochs, with its maximum and last value."""
    _line(axes, epochs, values, BLUE, "student")
    measured = np.flatnonzero(np.isfinite(values))
    if measured.size:
        best, last = measured[np.argmax(values[measured])], measured[-1]
        # In the legend rather than beside the points, where the two would often overlap.
        for i, name, marker, color in ((best, "max", "^", ORANGE), (last, "final", "s", GREEN)):
            label = f"{name} {values[i]:.2f} (epoch {epochs[i]:.0f})"
            # Hollow, as the last epoch is often the best.
            style = {"markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.6}
            axes.plot(epochs[i], values[i], marker, color=color, label=label, **style)
    axes.legend(loc="lower right", fontsize=8)


def _checked(panel: Panel) -> Panel:
    """The panel's first images as arrays; ValueError if its arrays do not belong together."""
    title, images, labels, confidence = panel
    images, labels, confidence = np.asarray(images), np.asarray(labels), np.asarray(confidence)
    if len(images) and (images.ndim != 4 or images.shape[-1] not in (1, 3)):
        raise ValueError(f"panel {title!r}: images are (N, H, W, 1 or 3), not {images.shape}.")
    if not len(images) == len(labels) == len(confidence):
        counts = f"{len(images)} images, {len(labels)} labels, {len(confidence)} confidences"
        raise ValueError(f"panel {title!r} holds {counts}.")
    return Panel(title, images[:MOST_IMAGES], labels[:MOST_IMAGES], confidence[:MOST_IMAGES])


def _draw_image(axes: Axes, image: np.ndarray, left: float, upper: float) -> None:
    """Fit one image into the cell whose upper left corner is given."""
    height, width, channels = image.shape
    shown = 0.94 / max(height, width)
    x, y = left + (1 - shown * width) / 2, upper + (1 - shown * height) / 2
    axes.imshow(
        np.clip(image[..., 0] if channels == 1 else image, 0, 1).astype(np.float32),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(x, x + shown * width, y + shown * height, y),
    )


def save(figure: Figure, *paths: str | os.PathLike) -> None:
    """Write atomically; the endings set the formats."""
    for path in paths:
        kind = Path(path).suffix.removeprefix(".") or "png"
        # No date, so that the same numbers give the same file.
        metadata = {"CreationDate": None} if kind == "pdf" else None
        with replacing(path) as file:
            figure.savefig(file, format=kind, dpi=150, metadata=metadata)
