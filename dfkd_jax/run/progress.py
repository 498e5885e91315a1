"""Where a run stands: a live bar on a terminal, one plain line per epoch in a log."""

import datetime
import math
import os
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

# What is shown of a record: its key and the format of its value.
STUDENT_FIELDS = {
    "student_accuracy": "accuracy {:.2f} %",
    "acquisition_loss": "L_acq {:.3f}",
    "retention_loss": "L_ret {:.3f}",
    "generator_loss": "L_gen {:.2f}",
    "gradient_alignment": "alignment {:+.2f}",
    "steps_per_second": "{:.0f} steps/s",
}
WITHOUT_DATA = {
    "generated_agreement": "agreement {:.2f} %",
    "generated_class_share": "one class {:.0f} %",
    "generated_distance": "distance {:.3f}",
}
TEACHER_FIELDS = {"teacher_accuracy": "accuracy {:.2f} %", "loss": "loss {:.3f}"}
ABSENT = "–"


def student_fields(data: bool) -> dict[str, str]:
    """`STUDENT_FIELDS`; without data they give agreement and distance instead of the accuracy."""
    if data:
        return STUDENT_FIELDS
    others = {key: form for key, form in STUDENT_FIELDS.items() if key != "student_accuracy"}
    return WITHOUT_DATA | others


def default_console() -> Console:
    """Standard output, taken for a terminal only if it is one.

    Rich alone would also believe environment variables like FORCE_COLOR, and then fill a log with
    the frames of a bar.
    """
    return Console(force_terminal=sys.stdout.isatty())


class Progress:
    """Shows the epochs of a training; a context manager.

    `with Progress(40, 0, "student") as progress: progress.update({"epoch": 1, ...})`
    """

    def __init__(
        self,
        total_epochs: int,
        start_epoch: int = 0,
        description: str = "",
        fields: Mapping[str, str] = STUDENT_FIELDS,
        console: Console | None = None,
    ) -> None:
        """Prepare the display.

        Args:
          total_epochs: of the whole training.
          start_epoch: how many of them were done before (by the run that this one resumes).
          description: what is trained; stands before the bar.
          fields: what is shown of a record, as key → format; None and missing values show as "–".
          console: where to show it; None for standard output, `Console(quiet=True)` for nowhere.
        """
        self._total = total_epochs
        self._done = start_epoch
        self._fields = dict(fields)
        self._console = console or default_console()
        self._durations: deque[float] = deque(maxlen=9)
        self._last = time.monotonic()
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = [TextColumn("{task.description}", markup=False), BarColumn()]
            columns += [TextColumn("epoch"), MofNCompleteColumn(), TimeElapsedColumn()]
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task(
                description, total=total_epochs, completed=start_epoch, start=False
            )
            # A line of its own: beside the bar it would be cut off at 80 columns.
            self._status = Text("the first epoch includes compilation", style="dim")
            self._live = Live(Group(self._bar, self._status), console=self._console)

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        if self._live:
            self._bar.start_task(self._task)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._bar.stop_task(self._task)
            self._live.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show one more finished epoch; `record["epoch"]`, if given, is its number from 1."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now
        self._done = record.get("epoch", self._done + 1)
        line = self._line(record)
        if self._live:
            self._bar.update(self._task, completed=self._done)
            self._status.plain = line
            self._live.refresh()
        else:
            self._print(f"epoch {self._done}/{self._total}  {line}")

    def log(self, message: str) -> None:
        """Print a message, above the bar if there is one."""
        self._print(message)

    def _line(self, record: Mapping[str, Any]) -> str:
        parts = [_show(form, record.get(key)) for key, form in self._fields.items()]
        # The median, as the first epoch also compiles.
        left = statistics.median(self._durations) * max(self._total - self._done, 0)
        return "  ".join([*parts, f"left {_clock(left)}"])

    def _print(self, message: str) -> None:
        # Text as it is: no wrapping to 80 columns in logs, no [brackets] taken for styles.
        self._console.print(message, soft_wrap=True, markup=False, highlight=False)


def summary_table(
    summary: Mapping[str, Any],
    folder: str | os.PathLike | None = None,
    console: Console | None = None,
) -> None:
    """Print the few numbers a run ends with.

    Args:
      summary: as `records.summarize` returns it.
      folder: where the run's files are; None leaves the line out.
      console: see `Progress`.
    """
    console = console or default_console()
    name, subject, more = "accuracy", "student", {}
    teacher = _show("{:.2f} %", summary.get("teacher_accuracy"))
    if summary.get("teacher_accuracy") is None and summary.get("final_agreement") is not None:
        name, subject, teacher = "agreement", "agreement", "no data to test on"
        more = {
            # Images of one class are easy to agree on.
            "in one class, final": _show("{:.2f} %", summary.get("final_generated_class_share")),
            "distance, final": _show("{:.3f}", summary.get("final_generated_distance")),
            "in memory, final": f"{_show('{:.2f} %', summary.get('final_memory_agreement'))}, "
            f"distance {_show('{:.3f}', summary.get('final_memory_distance'))}",
        }
    words = [summary.get(key) for key in ("method", "replay", "objective", "gradient")]
    rows = {
        "method": " · ".join(str(word) for word in words if word),
        "teacher": teacher,
        f"{subject}, final": _show("{:.2f} %", summary.get(f"final_{name}")),
        f"{subject}, max": _show("{:.2f} %", summary.get(f"max_{name}")),
        "mean over epochs μ": _show("{:.2f} %", summary.get(f"mean_{name}")),
        "variance σ²": _show("{:.2f} %²", summary.get(f"{name}_variance")),
        **more,
        "epochs": _show("{}", summary.get("epochs")),
        "time": _clock(summary.get("seconds")),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        if value:
            table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
    for sentence in summary.get("warnings", ()):
        console.print(f"Warning: {sentence}", soft_wrap=True, markup=False, highlight=False)
    if folder is not None:
        # Outside the table, whose cells would break a long path into lines.
        console.print(f"files in {folder}", soft_wrap=True, markup=False, highlight=False)


def _show(form: str, value: float | None) -> str:
    measured = value is not None and math.isfinite(value)
    return form.format(value) if measured else re.sub(r"\{[^}]*\}", ABSENT, form)


def _clock(seconds: float | None) -> str:
    """Hours, minutes and seconds: 0:01:12."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    return str(datetime.timedelta(seconds=round(seconds)))
