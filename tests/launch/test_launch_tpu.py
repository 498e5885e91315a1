"""launch/tpu_pod.sh against a stand-in for gcloud whose workers are folders of this machine."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from tests.helpers.launching import CONFIG, FINISH, LAUNCH, PIP, Pod, environment, executable


@pytest.fixture
def pod(tmp_path):
    return lambda behaviour=FINISH: Pod(tmp_path, behaviour)


DESCRIBE = "tpu-vm describe"
BEGIN = ["0 status", "tpu-vm scp", "all install", "all start", "0 follow"]


@pytest.mark.slow
def test_a_preempted_slice_is_created_again_and_the_run_goes_on(pod):
    pod = pod(
        'if [[ ! -e "$workdir/checkpoints" ]]; then touch "$workdir/checkpoints"; '
        'echo "epoch 1/2"; sleep 1; echo PREEMPTED >"$CLOUD/state"; kill -KILL $$; fi; ' + FINISH
    )
    code, out, err = pod.run(PROJECT="mine")
    assert code == 0, err
    assert "epoch 1/2" in out and "epoch 2/2" in out
    assert "is PREEMPTED" in err and "finished" in err
    assert pod.calls() == [
        *(DESCRIBE, "tpu-vm create", DESCRIBE, *BEGIN),
        *(DESCRIBE, "tpu-vm delete", DESCRIBE, "tpu-vm create", DESCRIBE, *BEGIN),
        *(DESCRIBE, "0 status"),
    ]
    program = f"-m dfkd_jax.main --distributed=cluster {CONFIG} --workdir={pod.workdir}"
    assert pod.started() == [program] * 4  # twice on two workers
    assert not (pod.cloud / "w0" / "dfkd_jax" / "runs").exists()
    calls = (pod.cloud / "calls").read_text().splitlines()
    assert all("--project=mine" in json.loads(line) for line in calls)

    # Another start of the same finds it finished.
    (pod.cloud / "calls").unlink()
    assert pod.run()[0] == 0
    assert pod.calls() == [DESCRIBE, "0 status"]

    # The dry run printed the commands that were run.
    code, out, _ = pod.run("--dry-run", CONFIG, f"--workdir={pod.workdir}", PROJECT="mine")
    assert code == 0
    printed = [shlex.split(line) for line in out.splitlines() if line.startswith("gcloud")]
    kinds = [pod.short(command[1:]) for command in printed]
    assert kinds == [DESCRIBE, "tpu-vm create", *BEGIN, "tpu-vm delete"]
    really = [json.loads(line) for line in calls]
    assert all(
        command[1:] in really
        for command, kind in zip(printed, kinds, strict=True)
        if "scp" not in kind
    )


@pytest.mark.slow
def test_a_failed_run_ends_with_its_code_and_the_logs(pod):
    pod = pod('echo "dfkd_jax: the field is wrong." && exit 2')
    code, out, err = pod.run()
    assert code == 2 and "exit code 2" in err
    assert out.count("the field is wrong") == 2  # followed, and the end of the log
    assert pod.calls()[-1] == "all tail" and len(pod.started()) == 2


@pytest.mark.slow
def test_a_stopped_run_is_started_again_and_has_not_failed(pod):
    """As when a maintenance event sends SIGTERM and the slice stays."""
    pod = pod(f'[[ -e $CLOUD/stopped ]] || {{ touch "$CLOUD/stopped"; exit 75; }}; {FINISH}')
    code, out, err = pod.run()
    assert code == 0 and "epoch 2/2" in out and "failed" not in err, err
    assert len(pod.started()) == 4  # twice on two workers


@pytest.mark.slow
def test_an_interrupted_script_leaves_the_run_and_finds_it_again(pod, tmp_path):
    pod = pod(f'echo "epoch 1/2"; until [[ -e "{tmp_path}/go" ]]; do sleep 0.1; done; {FINISH}')
    process = pod.start()
    assert process.stdout.readline() == "epoch 1/2\n"
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command follows it" in err

    (pod.cloud / "calls").unlink()
    process = pod.start()
    assert process.stdout.readline() == "epoch 1/2\n"
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "epoch 2/2" in out
    assert pod.calls() == [DESCRIBE, "0 status", "0 follow", DESCRIBE, "0 status"]
    assert len(pod.started()) == 2


@pytest.mark.slow
def test_a_queued_resource_is_waited_for_and_deleted(pod):
    pod = pod()
    code, _, err = pod.run(QUEUED="1", SPOT="1")
    assert code == 0, err
    assert "WAITING_FOR_RESOURCES" in err
    ask = [DESCRIBE, "queued-resources describe"]
    assert pod.calls()[:6] == [*ask, "queued-resources create", *ask, DESCRIBE]
    create = json.loads((pod.cloud / "calls").read_text().splitlines()[2])
    assert {"--node-id=pod", "--spot", "--runtime-version=tpu-ubuntu2204-base"} <= set(create)
    assert pod.run("--delete", QUEUED="1")[0] == 0
    assert pod.calls()[-1] == "queued-resources delete" and not (pod.cloud / "request").exists()


def test_gcloud_failing_is_not_an_absent_slice(pod):
    pod = pod()
    (pod.cloud / "broken").touch()
    code, _, err = pod.run()
    assert code == 1 and "PERMISSION_DENIED" in err and "five attempts" in err
    assert pod.calls() == [DESCRIBE] * 5


@pytest.mark.parametrize(
    ("flags", "variables", "word"),
    [
        (["--workdir=w"], {}, "--config"),
        ([CONFIG], {}, "--workdir"),
        ([CONFIG, "--workdir=w"], {"NAME": ""}, "NAME is missing"),
        (["--delete"], {"ZONE": ""}, "ZONE is missing"),
        ([CONFIG, "--workdir=gs://bucket/run"], {}, "'gs://bucket/run'"),
        ([CONFIG, "--workdir=runs"], {"NFS": "1.2.3.4:/share"}, "below /mnt/nfs"),
        ([CONFIG, "--workdir=w"], {"REPO": "nowhere"}, "REPO is 'nowhere'"),
    ],
)
def test_what_is_wrong_is_one_sentence(pod, flags, variables, word):
    code, out, err = pod().run(*flags, **variables)
    assert code == 2 and out == ""
    assert word in err and len(err.splitlines()) == 1


def test_dry_run_needs_no_gcloud(pod, tmp_path):
    pod = pod()
    path = tmp_path / "few"
    path.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm"):
        (path / name).symlink_to(shutil.which(name))
    path = str(path)
    code, out, err = pod.run("--delete", PATH=path)
    assert code == 2 and out == ""
    assert "gcloud is not on the PATH" in err and len(err.splitlines()) == 1
    flags = ["--dry-run", CONFIG, "--workdir=/mnt/nfs/it's mine"]
    variables = {"PATH": path, "NFS": "1.2.3.4:/share", "REPO": "https://host/repo.git"}
    code, out, err = pod.run(*flags, **variables)
    assert code == 0, err
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("gcloud")]
    remote = [a.removeprefix("--command=") for c in commands for a in c if a[:10] == "--command="]
    assert any("git clone -q https://host/repo.git dfkd_jax" in command for command in remote)
    assert any(command.endswith("install 1.2.3.4:/share") for command in remote)
    start = next(shlex.split(command) for command in remote if " start " in command)
    assert start[1:] == ["start", *flags[1:]]  # what the worker's shell makes of it
    code, out, _ = pod.run("--dry-run", "--delete", PATH=path)
    assert code == 0
    assert shlex.split(out)[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "delete", "pod"]


def test_a_worker_mounts_the_share_once(tmp_path):
    home = tmp_path / "w0"
    shutil.copytree(LAUNCH, home / "dfkd_jax" / "launch")
    bin = tmp_path / "bin"
    executable(bin / "sudo", f'#!/bin/sh\necho "$@" >>{tmp_path}/sudo\n')
    executable(bin / "mountpoint", f"#!/bin/sh\ngrep -q mount {tmp_path}/sudo 2>/dev/null\n")
    executable(bin / "python3", PIP)
    executable(bin / "program", "")
    variables = environment(HOME=home, PATH=f"{bin}:/usr/bin:/bin", CLOUD=tmp_path)
    for _ in range(2):
        command = [home / "dfkd_jax" / "launch" / "tpu_worker.sh", "install", "1.2.3.4:/share"]
        subprocess.run(command, env=variables, check=True)
    root = (tmp_path / "sudo").read_text().splitlines()
    assert root[1:] == [
        *("mkdir -p /mnt/nfs", "mount 1.2.3.4:/share /mnt/nfs", "chmod a+rwx /mnt/nfs")
    ]
    assert (tmp_path / "installed").read_text().splitlines()[:2] == [
        "uv venv -q --python 3.11 .venv",
        "uv pip install -q --python .venv/bin/python -e .[tpu]",
    ]


@pytest.mark.slow
def test_a_start_waits_for_what_is_left_of_an_earlier_one(tmp_path):
    """A worker whose peers died may still be running when the others start again."""
    home = tmp_path / "dfkd_jax"
    shutil.copytree(LAUNCH, home / "launch")
    executable(home / ".venv" / "bin" / "python", "#!/bin/sh\necho begin\nsleep 1\necho end\n")
    worker = home / "launch" / "tpu_worker.sh"
    ask = [worker, "status", tmp_path]

    def status():
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()

    assert status() == "run: none"
    subprocess.run([worker, "start", CONFIG], check=True)
    assert status() == "run: running"
    before = time.monotonic()
    subprocess.run([worker, "start", CONFIG], check=True)
    assert time.monotonic() - before > 0.5
    assert (home / "run.log").read_text() in ("", "begin\n")
    follow = [worker, "follow", "+1"]
    out = subprocess.run(follow, capture_output=True, text=True, timeout=20).stdout
    assert out == "begin\nend\n" and status() == "run: exit 0"
