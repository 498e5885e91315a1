"""One process at a time in a run's folder: two would write into each other's files."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dfkd_jax.runtime.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
PATIENCE = 3.0  # seconds that a holder which is just ending gets
# Of file systems that know no locks, such as some network ones.
_UNKNOWN = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}
_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}


@contextlib.contextmanager
def only_user(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Within this context no other process can enter one of the same folder.

    A lock on the file `.lock`, which says who holds it, and which the system releases however the
    process ends. Where there are no locks the folder is entered without.

    Args:
      folder: made if missing.
      patience: seconds to wait for a holder.

    Raises:
      UserError: another process is in there, named in the sentence, or the folder cannot be used.
    """
    if fcntl is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK, patience)
    except OSError as error:
        raise UserError(f"--workdir {folder} cannot be used: {error}") from error
    if file is None:
        yield
        return
    try:
        yield
    finally:
        # While it is held, so that nobody locks a file that is about to disappear.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        os.close(file)


def _locked(path: Path, patience: float) -> int | None:
    """The descriptor of the locked file; None where there are no locks."""
    assert fcntl is not None
    deadline = time.monotonic() + patience
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(file, path):  # and not one that its last holder has removed meanwhile
                _name_holder(file)
                return file
            os.close(file)
        except OSError as error:
            os.close(file)
            if error.errno in _UNKNOWN:
                return None
            if error.errno not in _HELD:
                raise
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path.parent} is in use by {_holder(path)}; wait for it, or give another "
                    "--workdir."
                ) from error
            time.sleep(0.1)


def _is_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _name_holder(file: int) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with contextlib.suppress(OSError):  # a full disk; the lock holds without a name
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode() + b"\n", 0)


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_bytes())
        return f"process {found['pid']} on {found['host']}, since {found['started']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written yet
        return "another process"
