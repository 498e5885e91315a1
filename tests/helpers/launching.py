"""What the tests of the launch scripts share: stand-ins for gcloud, its workers and the program."""

import json
import os
import shutil
import signal
import subprocess
import sys

from tests.helpers.paths import ROOT

LAUNCH = ROOT / "launch"
CONFIG = "--config=configs/digits.py"


def environment(**variables):
    """This process's, without what the scripts read; JAX is not needed."""
    ours = "PYTHON PROCESSES EMULATED_DEVICES PORT GRACE DRY_RUN XLA_FLAGS CUDA_VISIBLE_DEVICES"
    kept = {k: v for k, v in os.environ.items() if k not in ours.split() and "SLURM" not in k}
    return kept | {name: str(value) for name, value in variables.items()}


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# A slice of two workers. Requests for it wait once; a command on a worker runs in its folder.
GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
cloud = pathlib.Path(os.environ["CLOUD"])
state, request = cloud / "state", cloud / "request"
workers = [cloud / "w0", cloud / "w1"]
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
group, verb, name = sys.argv[3:6]
flags = dict(a.removeprefix("--").partition("=")[::2] for a in sys.argv[6:])
if (cloud / "broken").exists():
    sys.exit("ERROR: (gcloud) PERMISSION_DENIED: not allowed")

def boot():
    for worker in workers:
        worker.mkdir()
    state.write_text("READY")

if verb == "describe":
    path = state if group == "tpu-vm" else request
    if not path.exists():
        sys.exit("ERROR: (gcloud.compute.tpus.describe) NOT_FOUND: Resource was not found")
    print(path.read_text())
    if path == request and request.read_text() == "WAITING_FOR_RESOURCES":
        request.write_text("ACTIVE")
        boot()
elif verb == "create" and group == "queued-resources":
    request.write_text("WAITING_FOR_RESOURCES")
elif verb == "create":
    boot()
elif verb == "delete":
    for worker in workers:
        shutil.rmtree(worker)
    state.unlink()
    request.unlink(missing_ok=True)
elif state.read_text() != "READY":
    sys.exit(255)
elif verb == "scp":
    for worker in workers:
        shutil.copy(name, worker)
elif verb == "ssh":
    chosen = workers if flags["worker"] == "all" else [workers[int(flags["worker"])]]
    for worker in chosen:
        env = {{**os.environ, "HOME": str(worker), "PATH": str(cloud / "bin") + ":/usr/bin:/bin"}}
        pipes = {{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}}
        command = ["bash", "-c", flags["command"]]
        # As far from this terminal as another machine is.
        remote = subprocess.Popen(command, cwd=worker, env=env, start_new_session=True, **pipes)
        try:
            for line in remote.stdout:
                print(line, end="", flush=True)
        except KeyboardInterrupt:
            sys.exit(130)
        if remote.wait():
            sys.exit(remote.returncode)
"""

# pip brings uv, which makes an environment whose interpreter is PROGRAM.
PIP = """#!/bin/sh
mkdir -p ~/.local/bin
cat >~/.local/bin/uv <<END
#!/bin/sh
echo "uv \\$*" >>"$CLOUD/installed"
mkdir -p .venv/bin && cp "$CLOUD/bin/program" .venv/bin/python
END
chmod +x ~/.local/bin/uv
"""

# dfkd_jax.main: the test's BEHAVIOUR is a line of shell that worker 0 runs.
PROGRAM = """#!/bin/bash
printf '%s\\n' "$*" >>"$CLOUD/started"
[[ $HOME == */w0 ]] || exit 0
workdir=${{!#}} && workdir=${{workdir#--workdir=}}
mkdir -p "$workdir"
{behaviour}
"""
FINISH = 'echo "epoch 2/2" && touch "$workdir/summary.json"'


class Pod:
    """The cloud, and tpu_pod.sh on it."""

    def __init__(self, folder, behaviour):
        self.cloud = folder / "cloud"
        self.workdir = folder / "runs of mine"
        executable(folder / "bin" / "gcloud", GCLOUD.format(python=sys.executable))
        executable(self.cloud / "bin" / "python3", PIP)
        executable(self.cloud / "bin" / "program", PROGRAM.format(behaviour=behaviour))
        repository = folder / "the repository"
        (repository / "runs").mkdir(parents=True)
        shutil.copytree(LAUNCH, repository / "launch")
        self.environment = environment(
            PATH=f"{folder / 'bin'}:{os.environ['PATH']}",
            CLOUD=self.cloud,
            REPO=repository,
            NAME="pod",
            ZONE="us-central2-b",
            POLL=0,
        )

    def start(self, *flags, **variables):
        flags = flags or (CONFIG, f"--workdir={self.workdir}")
        return subprocess.Popen(
            ["bash", LAUNCH / "tpu_pod.sh", *flags],
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *flags, **variables):
        """(exit code, standard output, standard error)."""
        process = self.start(*flags, **variables)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, out, err

    def calls(self):
        """Group and verb of each gcloud command, and on which worker what is done."""
        lines = (self.cloud / "calls").read_text().splitlines()
        return [self.short(json.loads(line)) for line in lines]

    def short(self, arguments):
        assert arguments[:2] == ["compute", "tpus"]
        assert {"--zone=us-central2-b", "--quiet"} <= set(arguments)
        group, verb = arguments[2:4]
        if verb != "ssh":
            return f"{group} {verb}"
        flags = dict(a.removeprefix("--").partition("=")[::2] for a in arguments)
        step = flags["command"].partition("tpu_worker.sh ")[2] or flags["command"]
        step = step.replace("]; then dfkd_jax/launch/tpu_worker.sh ", "").split()[0]
        return f"{flags['worker']} {step}"

    def started(self):
        return (self.cloud / "started").read_text().splitlines()
