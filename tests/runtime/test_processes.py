"""Several processes on the loopback interface: the same numbers, stopped and killed together."""

import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dfkd_jax.run import records
from dfkd_jax.runtime import processes
from dfkd_jax.runtime.stop import STOPPED
from tests.helpers.commands import command, without_seconds
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
EPOCHS = 12  # three times interrupted
FIELDS = {"epochs": EPOCHS, "batch_size": 16, "replay.entry_size": 8, "parallel.devices": 0}
METHOD = "mb-dfkd"  # has a memory bank to split, and compiles sooner than LRA


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def started(environment, count, devices, arguments_of):
    """`count` processes with so many emulated devices each."""
    coordinator = f"localhost:{free_port()}"
    flags = f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            arguments_of(coordinator, index),
            cwd=ROOT,
            env={**environment, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def run(environment, workdir, count, devices):
    """A run that ends after `EPOCHS`."""

    def arguments(coordinator, index):
        several = [
            f"--coordinator={coordinator}",
            f"--num_processes={count}",
            f"--process_id={index}",
        ]
        return command(workdir, *(several if count > 1 else []), method=METHOD, **FIELDS)

    return started(environment, count, devices, arguments)


def ends(processes, timeout=300):
    """(exit code, standard output, standard error) of each."""
    ended = [p.communicate(timeout=timeout) for p in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, ended, strict=True)]


def after_epoch(processes, number):
    """What process 0 has said when that epoch is done."""
    said = ""
    for line in processes[0].stdout:
        said += line
        if re.match(rf"epoch {number}/{EPOCHS} .*L_acq", line):
            return said
    raise AssertionError(said + processes[0].stderr.read())


def assert_close(a, b):
    """The curves of two runs, in float32."""
    a, b = (without_seconds(workdir / "metrics.jsonl") for workdir in (a, b))
    assert len(a) == len(b) == EPOCHS
    for x, y in zip(a, b, strict=True):
        for key, value in x.items():
            percent = key.endswith(("accuracy", "agreement", "share"))
            # A cosine near 0 has the rounding of one near 1.
            bound = 2.0 if percent else 1e-2 if key == "gradient_alignment" else 1e-3
            assert y[key] == pytest.approx(value, rel=1e-2, abs=bound), key


@pytest.mark.parametrize("method, mapping", [("lra-mb", "pmap"), ("mb-dfkd", "shard_map")])
def test_2_processes_of_2_devices_equal_1_of_4(environment, tmp_path, method, mapping):
    for count, devices in ((1, 4), (2, 2)):
        output = tmp_path / f"{count}.npz"

        def arguments(coordinator, index, output=output, count=count):
            script = [sys.executable, "-m", "tests.helpers.float64_epochs", str(output)]
            return [*script, method, mapping, coordinator, str(count), str(index)]

        for code, _, error in ends(started(environment, count, devices, arguments)):
            assert code == 0, error
    one, two = (np.load(tmp_path / f"{count}.npz") for count in (1, 2))
    assert len(one.files) == len(two.files) > 20
    for name in one.files:
        scale = max(np.max(np.abs(one[name]), initial=0), 1e-2)
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-9 * scale)


def saved_epochs(workdir):
    folders = (workdir / "checkpoints").iterdir()
    return max(int(path.name) for path in folders if path.name.isdigit())


def test_a_run_that_is_stopped_and_killed_is_one_never_interrupted(environment, tmp_path):
    """On one process with 4 devices, and on two with 2 each, of which the last start has one."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    ((code, out, error),) = ends(run(environment, whole, 1, 4))
    assert code == 0 and "on 4 devices" in out, error

    # A signal to one of them stops both, after the epoch.
    both = run(environment, workdir, 2, 2)
    after_epoch(both, 1)
    both[1].send_signal(signal.SIGTERM)
    (code, out, error), (other_code, other_out, _) = ends(both)
    assert (code, other_code) == (STOPPED, STOPPED), error
    assert "The same command goes on from there" in out and "epoch" not in other_out
    done = saved_epochs(workdir)
    assert 1 <= done < EPOCHS - 6 and len(records.read_metrics(workdir / "metrics.jsonl")) == done
    assert not (workdir / "summary.json").exists()

    # When one is killed the other ends; process 0 is the coordinator.
    for killed in (1, 0):
        both = run(environment, workdir, 2, 2)
        assert f", after epoch {done}." in after_epoch(both, done + 1)
        both[killed].kill()
        moment = time.monotonic()
        code, _, error = ends(both, timeout=3 * processes.HEARTBEAT_SECONDS)[1 - killed]
        assert code != 0 and time.monotonic() - moment < 3 * processes.HEARTBEAT_SECONDS
        assert re.search("Another process of this run was lost|another task died", error), error
        before, done = done, saved_epochs(workdir)
        assert before < done < EPOCHS

    ((code, out, error),) = ends(run(environment, workdir, 1, 2))
    assert code == 0 and f", after epoch {done}." in out, error
    assert_close(whole, workdir)
    assert len(list((workdir / "tensorboard").iterdir())) == 4  # one for each start


CLUSTERS = {
    "SLURM": {
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{index}",
        "SLURM_LOCALID": "{index}",
    },
    "Open MPI": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "{index}",
        "OMPI_COMM_WORLD_LOCAL_RANK": "{index}",
    },
}
# Where it is, then what both agree on: that process 1 says so, and what process 0 says.
MEETING = """
import jax
from dfkd_jax.runtime import processes
processes.start("cluster", None, None, None)
me = jax.process_index()
print(me, jax.process_count(), processes.any_of(me == 1), processes.from_main(7 - me))
"""


@pytest.mark.parametrize("name", CLUSTERS)
def test_processes_of_a_cluster_find_each_other_by_its_environment(environment, name):
    port = free_port()

    def arguments(_, index):
        variables = {**CLUSTERS[name], "JAX_COORDINATOR_PORT": str(port)}
        words = [f"{key}={value.format(index=index)}" for key, value in variables.items()]
        return ["env", *words, sys.executable, "-c", MEETING]

    for index, (code, out, error) in enumerate(ends(started(environment, 2, 2, arguments), 60)):
        assert code == 0, error
        assert out.splitlines()[-1] == f"{index} 2 True 7"  # Gloo prints before it


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--num_processes=2"], "--coordinator is missing"),
        (["--coordinator=localhost:1", "--num_processes=2"], "--process_id is missing"),
        (
            ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
            "--process_id is 2; allowed are 0 to 1",
        ),
        (["--distributed=cluster", "--process_id=0"], "--distributed is cluster and --process_id"),
        (["--distributed=cluster"], "the environment does not describe one"),
    ],
)
def test_a_wrong_call_is_one_sentence(environment, tmp_path, flags, sentence):
    done = subprocess.run(
        command(tmp_path / "run", *flags), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
