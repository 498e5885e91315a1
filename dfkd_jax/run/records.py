"""Files of a run: metrics per epoch, the summary, and the same scalars for TensorBoard.

A record is one epoch's plain dictionary, for example
`{"epoch": 3, "student_accuracy": 91.25, "acquisition_loss": 0.41, "retention_loss": None, ...}`.
Accuracies are percentages in [0, 100]; `None` (JSON `null`) stands for "not measured".
"""

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfkd_jax.runtime.files import naming_path, plain, replacing

Record = Mapping[str, Any]

ACCURACY = "student_accuracy"  # the key of the student's top-1 accuracy, percent
# The key of what stands in for it without data: on how many generated images student and teacher
# name the same class, percent.
AGREEMENT = "generated_agreement"
# Without which that says little: percent of these images that the teacher puts into one class.
CLASS_SHARE = "generated_class_share"


def _line(record: Record) -> bytes:
    ordered = sorted(record, key=lambda key: (key != "epoch", key))
    values = {key: plain(record[key]) for key in ordered}
    return json.dumps(values, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def write_metrics(path: str | os.PathLike, history: Sequence[Record]) -> None:
    """Rewrite `path` atomically: one JSON object a line, "epoch" first, other keys sorted.

    Used when a run resumes, so that lines of epochs that will be repeated disappear.
    """
    with replacing(path) as file:
        file.writelines(_line(record) for record in history)


def append_metrics(path: str | os.PathLike, record: Record) -> None:
    """Append one line to `path` (made if missing) and flush it.

    Raises:
      CannotWrite: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = _line(record)
    with naming_path(path, path), open(path, "ab+") as file:
        # A torn line left by a killed process must not swallow this record.
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the records of a metrics file; a line torn by a killed process is left out.

    Raises:
      FileNotFoundError: there is no such file.
    """
    history = []
    for line in Path(path).read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # also the half of a multi-byte character
            continue
        if isinstance(record, dict):
            history.append(record)
    return history


def summarize(
    history: Sequence[Record], teacher_accuracy: float | None, method: Record
) -> dict[str, Any]:
    """Sum a run up in the measures of the paper.

    Args:
      history: one record per epoch with `student_accuracy` and `generated_agreement` in percent and
        `seconds` of the epoch.
      teacher_accuracy: the teacher's top-1 accuracy on the same test images, percent; None without.
      method: what names the run (method, replay, dataset, student, seed, ...), merged in.

    Returns:
      `method`'s entries with
      - `mean_accuracy`: μ, the mean of the student's accuracy over all epochs, percent;
      - `accuracy_variance`: σ², its population variance (divided by the number of epochs, not by
        one less), percent²;
      - `max_accuracy` and `final_accuracy`: over the epochs, and of the last one, percent;
      - `mean_agreement`, `agreement_variance`, `max_agreement`, `final_agreement`: the same of
        `generated_agreement`;
      - `teacher_accuracy`, percent; `epochs`, their number; `seconds`, the epochs' times summed.
      Measures that no epoch has are None; epochs without one do not count in μ and σ².
    """
    return {
        **plain(method),
        "teacher_accuracy": plain(teacher_accuracy),
        **_over_epochs(history, ACCURACY, "accuracy"),
        **_over_epochs(history, AGREEMENT, "agreement"),
        "epochs": len(history),
        "seconds": float(sum(record.get("seconds") or 0.0 for record in history)),
    }


def _over_epochs(history: Sequence[Record], key: str, name: str) -> dict[str, float | None]:
    measured = [record.get(key) for record in history]
    values = np.array([v for v in measured if v is not None and math.isfinite(v)], np.float64)
    some = values.size > 0
    return {
        f"mean_{name}": float(values.mean()) if some else None,
        f"{name}_variance": float(values.var()) if some else None,
        f"max_{name}": float(values.max()) if some else None,
        f"final_{name}": float(values[-1]) if some else None,
    }


class TensorBoard:
    """Writes each number of a record as a TensorBoard scalar at step = epoch.

    Without tensorboardX it writes nothing; metrics.jsonl holds the same numbers.
    """

    def __init__(self, logdir: str | os.PathLike, first_epoch: int | None = None) -> None:
        """Open `logdir`.

        Args:
          logdir: the folder of the event files, made if missing.
          first_epoch: when a run resumes, the first epoch it will write: what an earlier process
            wrote from there on is hidden.
        """
        # Costs start-up time, and only the process that writes files needs it.
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self._writer = None
            return
        # Its `flush` does not wait for its own queue, so it is told to empty that every second.
        # The suffix keeps a resumed run from overwriting a file of the same second.
        self._writer = SummaryWriter(
            os.fspath(logdir),
            purge_step=first_epoch,
            flush_secs=1,
            filename_suffix=f".{secrets.token_hex(4)}",
        )

    def write(self, record: Record) -> None:
        """Write one epoch's record, on disk within a second or two.

        None, non-finite numbers and text are left out.
        """
        if not self._writer:
            return
        for key, value in plain(record).items():
            if key != "epoch" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["epoch"])

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer:
            self._writer.close()
