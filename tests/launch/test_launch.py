"""The launch scripts: what they would run, and what they do with stand-ins for the program."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.launching import CONFIG, LAUNCH, environment, executable

SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


def launch(script, *flags, **variables):
    return subprocess.run(
        ["bash", LAUNCH / script, *flags],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "flags", "variables", "word"),
    [
        ("local.sh", ["--workdir=w"], {}, "--config"),
        ("local.sh", [CONFIG], {}, "--workdir"),
        ("local.sh", [CONFIG, "--workdir=w"], {"PROCESSES": "two"}, "PROCESSES is 'two'"),
        ("local.sh", [CONFIG, "--workdir=w"], {"EMULATED_DEVICES": 0}, "EMULATED_DEVICES is '0'"),
        (
            "local.sh",
            [CONFIG, "--workdir=w"],
            {"PROCESSES": 2, "CUDA_VISIBLE_DEVICES": "0,1,2"},
            "does not divide 3 GPUs",
        ),
        ("slurm.sbatch", ["--workdir=w"], {}, "--config"),
        ("slurm.sbatch", [CONFIG], {}, "--workdir"),
        ("slurm.sbatch", [CONFIG, "--workdir=w"], {}, "no SLURM job"),
    ],
)
def test_what_is_wrong_is_one_sentence(script, flags, variables, word):
    done = launch(script, *flags, **variables)
    assert done.returncode == 2 and done.stdout == ""
    assert word in done.stderr and len(done.stderr.splitlines()) == 1


PROGRAM = ["python3", "-m", "dfkd_jax.main", CONFIG, "--workdir=a b/'c"]


def test_local_dry_run():
    def commands(**variables):
        done = launch("local.sh", CONFIG, "--dry-run", "--workdir=a b/'c", **variables)
        assert done.returncode == 0, done.stderr
        return [shlex.split(line) for line in done.stdout.splitlines()]

    assert commands() == [["env", *PROGRAM]]
    several = {"PROCESSES": 2, "PORT": 12345}
    meet = ["--coordinator=127.0.0.1:12345", "--num_processes=2"]
    assert commands(CUDA_VISIBLE_DEVICES="4,5,6,7", **several) == [
        ["env", "CUDA_VISIBLE_DEVICES=4,5", *PROGRAM, *meet, "--process_id=0", "&"],
        ["env", "CUDA_VISIBLE_DEVICES=6,7", *PROGRAM, *meet, "--process_id=1", "&"],
    ]
    cpu = ["JAX_PLATFORMS=cpu", "XLA_FLAGS=--a=1 --xla_force_host_platform_device_count=4"]
    assert commands(EMULATED_DEVICES=4, XLA_FLAGS="--a=1", **several) == [
        ["env", *cpu, *PROGRAM, *meet, "--process_id=0", "&"],
        ["env", *cpu, *PROGRAM, *meet, "--process_id=1", "&"],
    ]


# Records its command line, then does what the test says for its process id.
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["FOLDER"])
id = sys.argv[-1].removeprefix("--process_id=")
received = []
def handle(number, frame):
    received.append(signal.Signals(number).name)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, handle)
record = {{"arguments": sys.argv[1:], "pid": os.getpid(), "xla": os.environ.get("XLA_FLAGS")}}
(folder / "new").joinpath(id).write_text(json.dumps(record))
(folder / "new" / id).rename(folder / id)
behaviour = os.environ.get("BEHAVIOUR_" + id, "finish")
if behaviour == "fail":
    sys.exit(3)
end = time.monotonic() + 30
while time.monotonic() < end and (behaviour == "hang" or behaviour == "wait" and not received):
    time.sleep(0.02)
time.sleep(0.5)  # a second signal would show
(folder / f"received_{{id}}").write_text(" ".join(received))
sys.exit(75 if received and behaviour == "wait" else 0)
"""


@pytest.fixture
def stand_in(tmp_path):
    """start(**variables): local.sh with two processes, each of which is the stand-in."""
    (tmp_path / "new").mkdir()
    python = executable(tmp_path / "python", STAND_IN.format(python=sys.executable))
    started = []

    def start(**variables):
        process = subprocess.Popen(
            ["bash", LAUNCH / "local.sh", CONFIG, "--workdir=a b"],
            env=environment(
                PYTHON=python, PROCESSES=2, EMULATED_DEVICES=2, FOLDER=tmp_path, **variables
            ),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell cannot trap what it was started to ignore, as in a background job.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        deadline = time.monotonic() + 20
        while not all((tmp_path / id).exists() for id in "01"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        return process, [json.loads((tmp_path / id).read_text()) for id in "01"]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def test_local_processes_share_the_machine(stand_in):
    process, records = stand_in()
    assert process.wait(20) == 0
    for id, record in enumerate(records):
        program = ["-m", "dfkd_jax.main", CONFIG, "--workdir=a b"]
        assert record["arguments"][:4] == program
        assert re.fullmatch(r"--coordinator=127\.0\.0\.1:2\d{4}", record["arguments"][4])
        assert record["arguments"][5:] == ["--num_processes=2", f"--process_id={id}"]
        assert record["xla"] == "--xla_force_host_platform_device_count=2"
    assert records[0]["arguments"][4] == records[1]["arguments"][4]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_local_passes_a_signal_on_once(stand_in, tmp_path, name):
    process, _ = stand_in(BEHAVIOUR_0="wait", BEHAVIOUR_1="wait")
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert [(tmp_path / f"received_{id}").read_text() for id in "01"] == [name, name]


@pytest.mark.slow
def test_local_lets_the_others_stop_when_the_first_has(stand_in, tmp_path):
    """One that has stopped is no failure: the others get no second signal, which would end them."""
    process, records = stand_in(BEHAVIOUR_0="wait", BEHAVIOUR_1="wait", GRACE=0)
    os.kill(records[0]["pid"], signal.SIGTERM)
    deadline = time.monotonic() + 20
    while not (tmp_path / "received_0").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)
    os.kill(records[1]["pid"], signal.SIGTERM)
    assert process.wait(20) == 75
    assert (tmp_path / "received_1").read_text() == "SIGTERM"


def test_local_ends_the_others_when_one_fails(stand_in):
    process, records = stand_in(BEHAVIOUR_0="hang", BEHAVIOUR_1="fail", GRACE=1)
    assert process.wait(20) == 3
    assert "exit code 3" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(records[0]["pid"], 0)


def test_slurm_dry_run_and_its_resources():
    done = launch("slurm.sbatch", CONFIG, "--workdir=a b", DRY_RUN=1, PYTHON="/env/bin/python")
    assert done.returncode == 0, done.stderr
    *resources, step, after = done.stdout.splitlines()
    step = shlex.split(step)
    assert step[3:5] == ["bash", "-c"] and "75" in step.pop(5)
    assert step == [
        *("srun", "--kill-on-bad-exit=1", "--cpus-per-task=8", "bash", "-c", "dfkd_jax"),
        *("/env/bin/python", "-m", "dfkd_jax.main", "--distributed=cluster"),
        *(CONFIG, "--workdir=a b"),
    ]
    test, requeue = after.split(" || ")
    assert shlex.split(test) == ["test", "-e", "a b/summary.json"]
    assert requeue == "scontrol requeue JOB"
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in resources)
    assert "requeue" in options and options["signal"].startswith("TERM@")
    # JAX takes the GPU of number SLURM_LOCALID, so each has its process.
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
    # sbatch reads no line after the first command.
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert text.rindex("\n#SBATCH") < text.index("\nset -euo pipefail")


@pytest.mark.parametrize(
    ("leaves", "code", "state", "requeued"),
    [
        ("checkpoints", 0, "RUNNING", True),  # stopped before the time limit
        ("checkpoints", 0, "CANCELLED", False),  # by its owner
        ("checkpoints", 0, "PENDING", False),  # SLURM has requeued it
        ("summary.json", 0, "RUNNING", False),
        ("checkpoints", 2, "RUNNING", False),
    ],
)
def test_slurm_requeues_what_was_stopped(tmp_path, leaves, code, state, requeued):
    workdir = tmp_path / "run of mine"
    workdir.mkdir()
    bin = tmp_path / "bin"
    executable(bin / "srun", f'#!/bin/sh\ntouch "{workdir}/{leaves}"\nexit {code}\n')
    executable(bin / "squeue", f'#!/bin/sh\ntest "$2" = --jobs=77 && echo {state}\n')
    executable(bin / "scontrol", f'#!/bin/sh\necho "$@" >"{tmp_path}/called"\n')
    path = f"{bin}:{os.environ['PATH']}"
    done = launch("slurm.sbatch", CONFIG, f"--workdir={workdir}", PATH=path, SLURM_JOB_ID=77)
    assert done.returncode == code, done.stderr
    called = tmp_path / "called"
    assert called.exists() == requeued
    assert not requeued or called.read_text() == "requeue 77\n"


@pytest.mark.parametrize(("ends", "code"), [(0, 0), (3, 3), (75, 0)])
def test_slurm_takes_a_stopped_process_for_no_failure(tmp_path, ends, code):
    """srun would end the others, which may still be saving, and the job would not be requeued."""
    bin = tmp_path / "bin"
    executable(bin / "srun", '#!/bin/sh\nshift 2\nexec "$@"\n')
    executable(bin / "squeue", "#!/bin/sh\necho RUNNING\n")
    executable(bin / "scontrol", f'#!/bin/sh\necho "$@" >"{tmp_path}/called"\n')
    # Signalled as SLURM does, all processes of the step: the shell before it too.
    python = executable(
        tmp_path / "python",
        "#!/bin/bash\n"
        'trap "touch \\"$FOLDER/signalled\\"" TERM\n'
        "kill -TERM $PPID $$\nsleep 0.3\nexit $ENDS\n",
    )
    variables = {"PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": 77, "FOLDER": tmp_path}
    flags = [CONFIG, f"--workdir={tmp_path / 'run'}"]
    done = launch("slurm.sbatch", *flags, PYTHON=python, ENDS=ends, **variables)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "signalled").exists()
    assert (tmp_path / "called").exists() == (code == 0)
