"""Signals: what they do is said at once, the second one counts, and a stop is no failure."""

import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from dfkd_jax import compare
from dfkd_jax.comparison import child_process
from dfkd_jax.comparison.child_process import Outcome, in_child
from dfkd_jax.runtime.stop import STOPPED, Stopped, stop_requests
from tests.helpers.paths import ROOT
from tests.helpers.tiny import tiny_config, untrained_teacher

# Works for many seconds in one step of the interpreter, as the compiler does, or in many.
PROGRAM = """
import hashlib, signal, sys, time
from dfkd_jax.runtime.stop import stop_requests
signal.signal(signal.SIGINT, signal.default_int_handler)
with stop_requests() as requested:
    print("ready", flush=True)
    if sys.argv[1] == "compiling":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)
    else:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.02)
"""


def saying(name):
    return (
        f"dfkd_jax: {name}: the epoch in progress is finished and saved, then the run ends; "
        f"a second {name} ends it at once.\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "number", "code"),
    [
        ("compiling", signal.SIGTERM, 128 + signal.SIGTERM),
        pytest.param("compiling", signal.SIGINT, 128 + signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("stepping", signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
        ("stepping", signal.SIGINT, -signal.SIGINT),
    ],
)
def test_it_says_at_once_what_it_will_do_and_the_second_ends_it(work, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, work],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        started = time.monotonic()
        process.send_signal(number)
        assert process.stderr.readline() == saying(number.name)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(10) == code
        assert time.monotonic() - started < 10
        assert ("KeyboardInterrupt" in process.stderr.read()) == (code == -signal.SIGINT)
    finally:
        process.kill()
        process.communicate()


def test_the_first_signal_is_remembered_and_handlers_come_back(capfd):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    threads = threading.active_count()
    with stop_requests() as requested:
        assert requested() is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert requested() == "SIGTERM"
        with stop_requests() as inner:
            assert inner() is None
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    end = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == threads
    assert capfd.readouterr().err == saying("SIGTERM") + saying("SIGINT")
    with stop_requests() as again:
        assert again() is None


def test_in_another_thread_nothing_is_caught():
    found = []

    def body():
        with stop_requests() as requested:
            found.append(requested())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [None]


def stopping_child():
    raise Stopped("SIGTERM came; epoch 2 is saved.")


@pytest.mark.slow
def test_a_child_that_was_stopped_has_not_failed(tmp_path):
    outcome = in_child(stopping_child, (), tmp_path / "log.txt", lambda: None)
    assert outcome == Outcome(False, "SIGTERM came; epoch 2 is saved.", True)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_comparison_whose_child_alone_was_stopped_is_stopped_itself(
    tmp_path, monkeypatch, stopped
):
    config = tiny_config(**{"teacher.checkpoint": str(untrained_teacher(tmp_path / "teacher"))})
    job = compare.Job("mb-dfkd", config, tmp_path / "run")
    outcome = Outcome(False, "SIGTERM came; epoch 2 is saved.", stopped)
    monkeypatch.setattr(compare, "in_child", lambda *args: outcome)
    if stopped:
        with pytest.raises(Stopped, match=r"^SIGTERM came; epoch 2 is saved\. mb-dfkd, seed 1 is"):
            compare.compare([job], 0, tmp_path)
    else:
        assert compare.compare([job], 0, tmp_path) == ["mb-dfkd, seed 1"]
    assert (tmp_path / "run" / "failure.json").exists() != stopped


def test_the_status_of_a_stop_is_that_of_a_temporary_failure():
    scripts = (ROOT / "launch").iterdir()
    assert STOPPED == 75 and child_process.Outcome(True).stopped is False
    told = [path.name for path in scripts if re.search(r"\b75\b", path.read_text())]
    assert sorted(told) == ["local.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh"]
