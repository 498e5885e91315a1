"""Comparisons as a user starts them: children, real processes, killed, stopped and misused."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfkd_jax.comparison import run_folders
from dfkd_jax.runtime import files
from dfkd_jax.runtime.stop import STOPPED
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY


def command(workdir, *flags, config="configs/digits.py", **fields):
    fields = {**TINY, "epochs": 2, **fields}
    return [
        *(sys.executable, "-m", "dfkd_jax.compare", f"--config={config}"),
        *("--methods=mb-dfkd,lra-mb", "--seeds=2", f"--workdir={workdir}"),
        *[f"--config.{name}={value}" for name, value in fields.items()],
        *flags,
    ]


def start(environment, *arguments):
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for children in /proc")
def test_a_killed_and_a_stopped_comparison_go_on_without_repeating(environment, tmp_path):
    process = start(environment, *command(tmp_path))
    for line in process.stdout:
        if line.startswith("run 1/4  mb-dfkd, seed 1") and "finished" in line:
            break
    second = tmp_path / "runs/mb-dfkd/seed2/log.txt"
    wait_for(second.exists)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [pid for path in tasks for pid in path.read_text().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    # None stays behind to write where the next command will.
    wait_for(lambda: children and not any(is_running(pid) for pid in children), 30)
    first = stamps(tmp_path / "runs/mb-dfkd/seed1")
    teacher = stamps(tmp_path / "teacher")

    process = start(environment, *command(tmp_path))
    log = tmp_path / "runs/lra-mb_exact/seed1/log.txt"
    wait_for(log.exists)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED and "Traceback" not in out, out
    assert "The same command goes on from there." in out and "SIGTERM came" in out
    assert not list(tmp_path.rglob(run_folders.FAILURE))

    process = start(environment, *command(tmp_path))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert re.search("[23] of 4 runs are finished already", out)
    assert "mb-dfkd, seed 1" not in out and "Training the teacher" not in out
    assert stamps(tmp_path / "runs/mb-dfkd/seed1") == first
    assert stamps(tmp_path / "teacher") == teacher
    table = (tmp_path / "comparison.md").read_text()
    assert "| mb-dfkd | 2 |" in table and "| lra-mb_exact | 2 |" in table
    assert (tmp_path / "report.html").stat().st_size > 100_000
    for seed in (1, 2):
        config = files.read_json(tmp_path / f"runs/lra-mb_exact/seed{seed}/config.json")
        assert (config["seed"], config["meta"]["variant"], config["epochs"]) == (seed, "exact", 2)

    # A failing combination leaves the others and the tables; the finished ones stay.
    fields = {"loss.one_hot": 1e38, "loss.activation": -1e38}
    process = start(environment, *command(tmp_path, "--methods=dafl", "--seeds=1", **fields))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in out, out
    assert "dafl, seed 1" in out and "FAILED: A loss became non-finite in epoch 1" in out
    assert "| dafl | 1 | A loss became non-finite" in (tmp_path / "comparison.md").read_text()
    assert stamps(tmp_path / "runs/mb-dfkd/seed1") == first


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--methods=magic"], "--methods is 'magic'"),
        (["--baseline=magic"], "--baseline is 'magic'; allowed are mb-dfkd, lra-mb_exact"),
        (["--seeds=none"], "seeds"),
        (["--vectorize_seeds"], "Unknown command line flag 'vectorize_seeds'"),
        (["--config.meta.variant=exact"], "--config.meta.variant is set by --gradients"),
    ],
)
def test_misuse_is_one_sentence_before_anything_starts(environment, tmp_path, flags, words):
    misused(environment, words, command(tmp_path, *flags))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_method_after_the_colon_is_refused(environment, tmp_path):
    words = "--config=configs/digits.py, and the method is given as --methods=dafl"
    misused(environment, words, command(tmp_path, config="configs/digits.py:dafl"))


def misused(environment, words, arguments):
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_planning_touches_no_accelerator(environment, tmp_path):
    program = (
        "import sys; from pathlib import Path; from dfkd_jax import compare;"
        "from tests.helpers.tiny import tiny_config; from jax._src import xla_bridge;"
        "found = compare.combinations(tiny_config, ['lra-mb', 'lra-gr'], ['exact'], Path('x'));"
        "compare.plan(found, 2, Path('x')); sys.exit(xla_bridge.backends_are_initialized())"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment).returncode == 0
    )
