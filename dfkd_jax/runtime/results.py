"""Files of a run: metrics per epoch, the summary, and the same scalars for TensorBoard.

A record is one epoch's plain dictionary, for example
`{"epoch": 3, "student_accuracy": 91.25, "acquisition_loss": 0.41, "retention_loss": None, ...}`.
Accuracies are percentages in [0, 100]; `None` (JSON `null`) stands for "not measured".
"""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dfkd_jax.runtime.errors import UserError

Record = Mapping[str, Any]

ACCURACY = "student_accuracy"  # the key of the student's top-1 accuracy, percent
# The key of what stands in for it without data: on how many generated images student and teacher
# name the same class, percent.
AGREEMENT = "generated_agreement"
# Without which that says little: percent of these images that the teacher puts into one class.
CLASS_SHARE = "generated_class_share"


class CannotWrite(OSError):
    """A file or folder could not be written; the text names it and says why."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` only once it is complete.

    Readers see the old content or the new, never a part; if the block raises, `path` is untouched.
    Missing parent folders are made, and removed again if the block raises.

    Raises:
      CannotWrite: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary = _beside(path)
    with _parents(path), _naming(temporary, path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def replacing_together(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to write files to, which take their places in `folder` once all are complete.

    If the block raises, `folder` is untouched, or not there if it was not.

    Raises:
      CannotWrite: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    with temporary_folder(folder / "files") as new, _naming(new, folder):
        yield new
        for path in sorted(new.iterdir()):
            os.replace(path, folder / path.name)


@contextlib.contextmanager
def temporary_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside `path`, which the block may rename to it; else it is removed at the end.

    Missing parent folders are made, and removed again if the block raises.

    Raises:
      CannotWrite: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    new = _beside(path)
    with _parents(path), _naming(new, path):
        try:
            new.mkdir()
            yield new
        except BaseException:
            for _ in range(3):  # threads of a writer that failed may still make the folder again
                shutil.rmtree(new, ignore_errors=True)
                time.sleep(0.1)
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)


def reserve(folder: Path, size: int) -> None:
    """Raise now if `size` bytes more do not fit on the disk: for writers that fail badly later.

    Raises:
      CannotWrite: they do not fit.
    """
    path = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # else it cannot be told
            raise CannotWrite(error.errno, error.strerror, str(folder)) from error
    finally:
        path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    # In the same folder, as a rename is atomic only within one file system; random, as several
    # processes may write the same file.
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The parent folders of `path` are there; those that were not are gone if the block raises."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWrite(error.errno, error.strerror, error.filename) from error
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # another process may have put something there
                folder.rmdir()
        raise


@contextlib.contextmanager
def _naming(temporary: Path, path: Path) -> Iterator[None]:
    """An error of writing `temporary`, or something in it, names what it was to become.

    Errors of a full disk name nothing by themselves.
    """
    try:
        yield
    except OSError as error:
        where = str(path if error.filename is None else error.filename)
        if error.errno is None or (error.filename and str(temporary) not in where):
            raise  # of something else than writing, or of something else than this
        where = where.replace(str(temporary), str(path))
        raise CannotWrite(error.errno, error.strerror, where) from error


def plain(value: Any) -> Any:
    """The value as JSON can hold it: arrays as lists, array scalars as numbers, NaN and ±∞ as None.

    Raises:
      TypeError: a value of a kind that a JSON file cannot hold.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


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
    with _naming(path, path), open(path, "ab+") as file:
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


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write `obj` atomically as indented JSON with sorted keys; NaN and ±∞ become null.

    Raises:
      CannotWrite: the disk is full, or the folder cannot be written.
      TypeError: it holds a value of a kind that a JSON file cannot hold.
    """
    text = json.dumps(plain(obj), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is not JSON; names the file.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}.") from error


class TensorBoard:
    """Writes each number of a record as a TensorBoard scalar at step = epoch."""

    def __init__(self, logdir: str | os.PathLike, first_epoch: int | None = None) -> None:
        """Open `logdir`.

        Args:
          logdir: the folder of the event files, made if missing.
          first_epoch: when a run resumes, the first epoch it will write: what an earlier process
            wrote from there on is hidden.
        """
        # Costs start-up time, and only the process that writes files needs it.
        from tensorboardX import SummaryWriter

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
        for key, value in plain(record).items():
            if key != "epoch" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, record["epoch"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
