import os
import re
import signal
import time

import pytest

from dfkd_jax.comparison.child_process import in_child


def never():
    return None


def sigterm():
    return "SIGTERM"


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, arguments, stop, expected",
    [
        (print, ("heard",), never, r"^$"),
        (os._exit, (3,), never, "exit code 3; what it printed is in"),
        (signal.raise_signal, (signal.SIGKILL,), never, "SIGKILL, perhaps for want of memory"),
        (int, ("x",), never, r"^ValueError: invalid literal .* \(the traceback is in"),
        (time.sleep, (300,), sigterm, "It was interrupted"),
    ],
)
def test_a_child_cannot_take_its_parent_along(tmp_path, function, arguments, stop, expected):
    log = tmp_path / "run" / "log.txt"
    outcome = in_child(function, arguments, log, stop)
    assert outcome.finished == (function is print)
    assert re.search(expected, outcome.sentence), outcome
    assert outcome.stopped == (stop is sigterm)
    assert ("heard" in log.read_text()) == (function is print)
