"""Where a comparison stands: a bar over its runs on a terminal, one plain line a run in a log."""

import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dfkd_jax.comparison.child_process import Outcome
from dfkd_jax.run.progress import default_console


class OverallProgress:
    """Shows the runs of a comparison; a context manager."""

    def __init__(self, total: int, finished: int, console: Console | None = None) -> None:
        """Prepare the display.

        Args:
          total: how many runs there are.
          finished: how many an earlier process has finished.
          console: where to show it; standard output by default.
        """
        self._console = console or default_console()
        self._total = total
        self._done = finished
        self._seconds: list[float] = []  # a run, of those done here
        self._metrics: Path | None = None
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = [BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()]
            columns.append(TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=total, completed=finished)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def log(self, message: str) -> None:
        """Print a message, above the bar if there is one."""
        self._console.print(message, soft_wrap=True, markup=False, highlight=False)

    def start(self, name: str, folder: Path, epochs: int) -> None:
        """The run that goes on from here: its folder, its epochs."""
        self._name, self._metrics, self._epochs = name, folder / "metrics.jsonl", epochs
        self.poll()

    def poll(self) -> None:
        """Show the epoch of the current run; may be called often."""
        if self._bar and self._metrics:
            done = self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0
            words = f"{self._name}  epoch {done}/{self._epochs}"
            left = self._left()
            self._bar.update(self._task, description=words + (f"  left {left}" if left else ""))

    def finish(self, name: str, seconds: float, outcome: Outcome) -> None:
        """The current run has ended."""
        self._done += 1
        if outcome.finished:
            self._seconds.append(seconds)
        ending = "finished" if outcome.finished else f"FAILED: {outcome.sentence}"
        left = f"  left {self._left() or 'unknown'}"
        self.log(f"run {self._done}/{self._total}  {name}  {_clock(seconds)}{left}  {ending}")
        if self._bar:
            self._bar.update(self._task, completed=self._done)

    def _left(self) -> str:
        """Time left by the mean of the runs so far; empty before the first."""
        if not self._seconds:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        return _clock(mean * (self._total - self._done))


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
