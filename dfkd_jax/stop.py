"""Stopping when asked: SIGTERM (preemption) and Ctrl-C end a run after the epoch in progress."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop and has saved what it had."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str | None]]:
    """Within this context, a function that names the signal received so far, or None.

    The second signal of a kind acts as if nothing had been installed: the process ends at once and
    loses the epoch in progress. Outside of the main thread signals cannot be caught; there the
    function always gives None.
    """
    received: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, previous[number])

    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handle)
    except ValueError:
        pass
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
