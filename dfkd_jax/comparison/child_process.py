"""Runs in processes of their own, so that none takes others along or shares their peak memory."""

import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

from dfkd_jax.run.checkpoint import DamagedCheckpoint, SaveFailed
from dfkd_jax.runtime.compilation import keep_compiled_programs
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.host_memory import keep_freed_memory
from dfkd_jax.runtime.stop import Stopped

POLL_SECONDS = 0.2

# To a child that got the signal too (Ctrl-C reaches all processes of a terminal) a second one of
# the same kind would mean "at once", so it is told by the other.
_FORWARDED = {"SIGTERM": signal.SIGINT, "SIGINT": signal.SIGTERM}
_SIGNALS = tuple(_FORWARDED.values())


class Outcome(NamedTuple):
    """How a child ended."""

    finished: bool
    sentence: str = ""  # why not
    stopped: bool = False  # it was asked to stop, which is no failure


def in_child(
    function: Callable[..., object],
    arguments: tuple,
    log: str | Path,
    stop_requested: Callable[[], str | None],
    poll: Callable[[], None] = lambda: None,
) -> Outcome:
    """Call a function of a module in a new process and wait for it.

    Args:
      function: its result is dropped.
      arguments: what it is called with; must pickle.
      log: the file that gets all it prints, after what is there.
      stop_requested: names the signal that this process has received, if any; the child is then
        asked to stop as well, and waited for.
      poll: called several times a second meanwhile.

    Raises:
      OSError: the log cannot be written.
    """
    log = Path(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, arguments, str(log), sender))
    # Held back until the child can take them: while it still imports it would print a traceback.
    resource_tracker.ensure_running()  # else `start` does so, and lets signals through again
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    sender.close()
    try:
        told = False
        while process.is_alive():
            process.join(POLL_SECONDS)
            poll()
            request = stop_requested()
            if request and process.pid and not told and process.is_alive():
                os.kill(process.pid, _FORWARDED[request])
                told = True
    except BaseException:  # the second Ctrl-C
        process.kill()
        raise
    return _outcome(process.exitcode or 0, receiver, log)


def _outcome(code: int, receiver: Any, log: Path) -> Outcome:
    try:
        return Outcome(*receiver.recv())
    except EOFError:  # it ended without a word
        reason = f"exit code {code}"
        if code < 0:
            reason = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                reason += ", perhaps for want of memory"
        return Outcome(False, f"The process ended by {reason}; what it printed is in {log}.")


def _child(function: Callable[..., object], arguments: tuple, log: str, sender: Any) -> None:
    """The child's main function: output to the log, the outcome to the sender."""
    _end_with_parent()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    print(time.strftime("%Y-%m-%d %H:%M:%S"), "started")
    keep_freed_memory()
    keep_compiled_programs()
    # A shell's background jobs start with SIGINT ignored, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        function(*arguments)
    except (UserError, DamagedCheckpoint, SaveFailed, Stopped) as error:
        print(error)
        sender.send((False, str(error), isinstance(error, Stopped)))
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0][:300]
        sender.send((False, f"{type(error).__name__}: {first} (the traceback is in {log})"))
    except KeyboardInterrupt:  # before the run could listen for it
        sender.send((False, "It was interrupted.", True))
    else:
        sender.send((True, ""))


def _end_with_parent() -> None:
    """End at once when the parent does, even if killed: two processes must not share a folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # as this is a child

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
