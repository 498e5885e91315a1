"""Two processes on one folder: the second is refused, and a crash leaves nothing locked."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from dfkd_jax import compare
from dfkd_jax.run import train
from dfkd_jax.runtime import folder_lock
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.folder_lock import LOCK, only_user
from tests.helpers.paths import ROOT
from tests.helpers.tiny import SMALL_NET, TINY, tiny_config

pytestmark = pytest.mark.skipif(folder_lock.fcntl is None, reason="no flock here")

HOLDER = """
import sys, time
from pathlib import Path
from dfkd_jax.runtime.folder_lock import only_user
with only_user(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_refused_and_told_who_is_there(tmp_path):
    with only_user(tmp_path):
        holder = json.loads((tmp_path / LOCK).read_text())
        assert holder["pid"] == os.getpid() and holder["host"] and holder["started"]
        words = rf"{tmp_path} is in use by process {os.getpid()} on .*, since \d+-"
        with pytest.raises(UserError, match=words), only_user(tmp_path, patience=0):
            pass
        assert (tmp_path / LOCK).exists()
    assert not list(tmp_path.iterdir())
    with only_user(tmp_path), only_user(tmp_path / "another"):
        pass


def test_it_is_released_by_an_exception(tmp_path):
    with pytest.raises(KeyError), only_user(tmp_path):
        raise KeyError
    with only_user(tmp_path, patience=0):
        pass


def test_a_run_and_a_comparison_are_refused_while_another_process_is_there(
    tmp_path, holder, monkeypatch
):
    monkeypatch.setattr(only_user.__wrapped__, "__defaults__", (0.0,))
    words = rf"is in use by process {holder.pid} on "
    with pytest.raises(UserError, match=words):
        train.run(tiny_config(), tmp_path, Console(quiet=True))
    with pytest.raises(UserError, match=words):
        compare.compare([], 0, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK}


def test_a_killed_process_leaves_the_folder_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with only_user(tmp_path, patience=0):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_holder_that_is_just_ending_is_waited_for(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    started = time.monotonic()
    end = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -KILL {holder.pid}"])
    with end, only_user(tmp_path, patience=20):
        assert 0.2 < time.monotonic() - started < 15


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_where_there_are_no_locks_it_goes_on_without(tmp_path, monkeypatch, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    with only_user(tmp_path), only_user(tmp_path):
        pass
    monkeypatch.setattr(folder_lock, "fcntl", None)
    with only_user(tmp_path / "other"), only_user(tmp_path / "other"):
        pass


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--workdir .* cannot be used: "):
        with only_user(tmp_path / "file" / "folder"):
            pass


@pytest.mark.slow
def test_the_same_command_twice_at_once(tmp_path):
    """As of public report: both ended well and every epoch was there twice."""
    command = [sys.executable, "-m", "dfkd_jax.main", "--config=configs/digits.py:mb-dfkd"]
    command += [f"--config.{name}={value}" for name, value in {**TINY, "epochs": 40}.items()]
    command.append(f"--workdir={tmp_path}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        for line in first.stdout:
            if f"training {SMALL_NET}" in line:
                break
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 2 and second.stdout == ""
        words = rf"dfkd_jax: {tmp_path} is in use by process {first.pid} on .*\n"
        assert re.fullmatch(words, second.stderr)
    finally:
        first.kill()
        first.communicate()
    assert not (tmp_path / "summary.json").exists()
