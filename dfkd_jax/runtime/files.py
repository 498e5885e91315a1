"""Files that are whole or not there: written beside their place, then renamed; and JSON."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dfkd_jax.runtime.errors import UserError


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
    with _parents(path), naming_path(temporary, path):
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
    with temporary_folder(folder / "files") as new, naming_path(new, folder):
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
    with _parents(path), naming_path(new, path):
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
def naming_path(temporary: Path, path: Path) -> Iterator[None]:
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


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the names and the bytes of files, as 64 hexadecimal digits."""
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


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
