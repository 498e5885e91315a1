"""The benchmark of an accelerator, run whole at tiny sizes and without what it may lack."""

import json
import re
import subprocess
import sys

import pytest

from tests.helpers.tiny import SMALL_NET

# What is not installed beside JAX on many machines with an accelerator.
WITHOUT = ("tensorflow_datasets", "array_record", "tensorboardX", "higher")
START = f"""
import sys
sys.modules.update(dict.fromkeys({WITHOUT}))
from benchmarks import accelerator
small = dict.fromkeys(("teacher.model", "student.model"), "{SMALL_NET}")
tiny = accelerator.TINY
accelerator.TINY = tiny._replace(run={{**tiny.run, **small}}, step={{**tiny.step, **small}})
sys.exit(accelerator.main(sys.argv[1:]))
"""


# The others go through the same functions.
PARTS = ("digits", "agreement", "interruption", "exact", "devices")


@pytest.mark.slow
def test_the_parts_are_measured(tmp_path, environment):
    flags = re.sub(r"device_count=\d+", "device_count=2", environment["XLA_FLAGS"])
    command = [sys.executable, "-c", START, "--tiny", f"--output={tmp_path}"]
    command += [f"--only={part}" for part in PARTS]
    ended = subprocess.run(
        command, env={**environment, "XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "cpu.json").read_text())
    parts = report["parts"]
    assert not report["not_measured"]
    assert parts["digits"]["seconds"] > 0 and 0 <= parts["digits"]["final_accuracy"] <= 100
    assert parts["agreement"]["float32"] == 0  # the CPU against itself
    assert parts["interruption"] == {
        "epochs": 2,
        "epochs_after_the_cut": [2],
        "same_state": True,
        "same_metrics": True,
    }
    exact = parts["exact"]
    assert exact["seconds_per_epoch"] > 0 and exact["temporary_bytes_per_student_step"] > 0
    assert exact["torch"] == "not measured: higher missing"
    measured = [(found.get("mapping"), found["devices"]) for found in parts["devices"]]
    assert measured == [(None, 1), ("pmap", 2), ("shard_map", 2)]
    table = (tmp_path / "cpu.md").read_text()
    assert "| exact |" in table and "failed" not in table


def test_a_part_that_fails_is_said_and_the_report_is_kept(tmp_path, monkeypatch, capsys):
    from benchmarks import accelerator

    def broken(bench):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nat length")

    parts = {"digits": broken, "agreement": lambda bench: {"float32": 1e-6}}
    monkeypatch.setattr(accelerator, "PARTS", {**parts, "devices": broken})
    assert accelerator.main(["--tiny", f"--output={tmp_path}", "--only=digits"]) == 1
    assert "digits: failed RuntimeError: RESOURCE_EXHAUSTED" in capsys.readouterr().out
    assert accelerator.main(["--tiny", f"--output={tmp_path}", "--only=agreement"]) == 0
    assert "agreement: float32 1e-06" in (tmp_path / "cpu.md").read_text()
    assert accelerator.main(["--tiny", f"--output={tmp_path}", "--minutes=-1"]) == 0
    left = json.loads((tmp_path / "cpu.json").read_text())["not_measured"]
    assert left == ["digits", "agreement", "devices"]
