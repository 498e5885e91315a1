"""Stopping when asked: SIGTERM (preemption) and Ctrl-C end a run after the epoch in progress."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPED = 75  # exit status of a command that was stopped and can go on: EX_TEMPFAIL of sysexits.h
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop and has saved what it had."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str | None]]:
    """Within this context, a function that names the signal received so far, or None.

    What will happen is said at once on standard error, even while a program compiles. The second
    signal of a kind acts as if nothing had been installed: the process ends at once and loses the
    epoch in progress. Outside of the main thread signals cannot be caught; there the function
    always gives None.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    # The interpreter calls a handler only between two of its own steps, and compiling is one long
    # step. Into this pipe it writes the signal's number when that comes.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_announce, args=(reader, received), daemon=True).start()
    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        os.close(writer)  # which ends the thread


def _announce(reader: int, received: list[str]) -> None:
    """Say what a signal does when it comes; end the process at the second of a kind.

    That is left to the handler where it has run; in the middle of a long step it has not.
    """
    seen = set()
    while found := os.read(reader, 1):
        number = found[0]
        if number not in _SIGNALS:
            continue
        name = signal.Signals(number).name
        if number not in seen:
            seen.add(number)
            sentence = (
                f"dfkd_jax: {name}: the epoch in progress is finished and saved, then the run "
                f"ends; a second {name} ends it at once.\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, sentence.encode())
        elif name not in received:
            os._exit(128 + number)
    os.close(reader)
