"""Whole runs as a user starts them: real processes, killed, stopped, resumed and misused."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dfkd_jax.run import checkpoint, records
from dfkd_jax.runtime import files
from tests.helpers.commands import EPOCHS, command, without_seconds
from tests.helpers.paths import ROOT
from tests.helpers.tiny import SMALL_NET, TINY, build, tiny_config
from tests.helpers.trees import same_bits

pytestmark = pytest.mark.slow


def run(environment, *args, **kwargs):
    return subprocess.run(
        command(*args, **kwargs), cwd=ROOT, env=environment, capture_output=True, text=True
    )


def final_state(workdir, config):
    """The newest checkpoint, as arrays, and the history in it."""
    _, state, _ = build(config)
    with checkpoint.open_checkpoints(workdir / "checkpoints") as manager:
        assert manager.latest_step() == config.epochs
        return checkpoint.restore_latest(manager, state, pytest.fail)


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    done = run(environment, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_a_run_leaves_what_it_promises(whole):
    workdir, out = whole
    assert f"training {SMALL_NET} on the training split of digits" in out
    assert f"epoch {EPOCHS}/{EPOCHS}" in out and "student, final" in out

    metrics = records.read_metrics(workdir / "metrics.jsonl")
    assert [record["epoch"] for record in metrics] == list(range(1, EPOCHS + 1))
    keys = {
        "epoch",
        "student_accuracy",
        "acquisition_loss",
        "retention_loss",
        "replayed_share",
        "generator_loss",
        "generator_one_hot",
        "generator_information_entropy",
        "generator_activation",
        "generator_adversarial",
        "gradient_alignment",
        "early_agreement",
        "generated_agreement",
        "generated_distance",
        "generated_class_share",
        "generated_spread",
        "memory_agreement",
        "memory_distance",
        "seconds",
        "seconds_of_synthesis",
    }
    for record in metrics:
        assert set(record) == keys
        assert all(np.isfinite(value) for value in record.values())
        assert 0 <= record["student_accuracy"] <= 100 and -1 <= record["gradient_alignment"] <= 1

    summary = files.read_json(workdir / "summary.json")
    accuracies = [record["student_accuracy"] for record in metrics]
    assert summary["mean_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["accuracy_variance"] == pytest.approx(np.var(accuracies))
    assert summary["max_accuracy"] == max(accuracies)
    assert summary["final_accuracy"] == accuracies[-1]
    assert summary["epochs"] == EPOCHS
    assert (summary["method"], summary["gradient"], summary["replay"]) == (
        "lra-mb",
        "exact",
        "memory_bank",
    )
    assert isinstance(summary["warnings"], list)
    card = files.read_json(workdir / "teacher" / "teacher.json")
    assert summary["teacher_accuracy"] == card["accuracy"]
    assert files.read_json(workdir / "config.json")["replay"]["capacity"] == TINY["replay.capacity"]
    for figure in ("learning_curve.png", "samples.png"):
        assert (workdir / figure).stat().st_size > 10_000
    assert list((workdir / "tensorboard").glob("events*"))


def test_the_same_command_on_a_finished_run_changes_nothing(whole, environment):
    workdir, _ = whole
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run(environment, workdir)
    assert again.returncode == 0 and f"training {SMALL_NET}" not in again.stdout
    assert (workdir / "metrics.jsonl").read_bytes() == before


def kill_after_epoch(process, number, signal_number):
    for line in process.stdout:
        if re.match(rf"epoch {number}/{EPOCHS} .*L_acq", line):
            process.send_signal(signal_number)
            break
    rest, _ = process.communicate(timeout=60)
    return rest


def started(environment, *args, **kwargs):
    return subprocess.Popen(
        command(*args, **kwargs), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def assert_same_run(whole, workdir):
    config = tiny_config(epochs=EPOCHS)
    state, _ = final_state(workdir, config)
    expected, _ = final_state(whole, config)
    assert same_bits(state, expected)  # bit for bit, bank and all
    assert without_seconds(workdir / "metrics.jsonl") == without_seconds(whole / "metrics.jsonl")
    a, b = (files.read_json(w / "summary.json") for w in (workdir, whole))
    a, b = (
        {k: v for k, v in summary.items() if not k.startswith(("seconds", "peak_memory"))}
        for summary in (a, b)
    )
    assert a == b and a["student_images"] > 0


def test_a_run_killed_twice_ends_as_one_never_killed(whole, environment, tmp_path):
    for number in (1, 3):
        process = started(environment, tmp_path)
        kill_after_epoch(process, number, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    done = run(environment, tmp_path)
    assert done.returncode == 0 and "after epoch" in done.stdout
    assert_same_run(whole[0], tmp_path)


def test_a_run_killed_while_training_its_teacher_goes_on_with_it(whole, environment, tmp_path):
    process = started(environment, tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 1/2 "):
            process.kill()
            break
    process.communicate()
    done = run(environment, tmp_path)
    assert "epoch 1/2 " not in done.stdout and "epoch 2/2 " in done.stdout
    assert_same_run(whole[0], tmp_path)


def test_sigterm_saves_the_epoch_and_exits_cleanly(whole, environment, tmp_path):
    process = started(environment, tmp_path)
    rest = kill_after_epoch(process, 1, signal.SIGTERM)
    assert process.returncode == 75
    # The signal may come before or after the next epoch begins.
    stopped = re.search(r"SIGTERM came; epoch (\d) is saved\. The same command goes on", rest)
    assert len(records.read_metrics(tmp_path / "metrics.jsonl")) == int(stopped[1]) < EPOCHS
    assert run(environment, tmp_path).returncode == 0
    assert_same_run(whole[0], tmp_path)


def test_a_damaged_newest_checkpoint_costs_one_epoch(whole, environment, tmp_path):
    process = started(environment, tmp_path)
    kill_after_epoch(process, 3, signal.SIGKILL)
    newest = max((tmp_path / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    done = run(environment, tmp_path)
    assert done.returncode == 0
    assert f"The checkpoint of epoch {newest.name} is damaged" in done.stdout
    assert_same_run(whole[0], tmp_path)


def test_a_teacher_of_another_run_is_reused(whole, environment, tmp_path):
    done = run(
        environment,
        tmp_path,
        method="mb-dfkd",
        **{"teacher.checkpoint": whole[0] / "teacher", "epochs": 1},
    )
    assert done.returncode == 0, done.stderr
    assert f"training {SMALL_NET}" not in done.stdout
    summary = files.read_json(tmp_path / "summary.json")
    assert (summary["method"], summary["objective"]) == ("mb-dfkd", "joint")
    assert summary["gradient"] is None


def test_no_replay_has_no_retention_loss(whole, environment, tmp_path):
    fields = {"teacher.checkpoint": whole[0] / "teacher", "epochs": 1}
    done = run(environment, tmp_path, method="no-replay", **fields)
    assert done.returncode == 0, done.stderr
    (record,) = records.read_metrics(tmp_path / "metrics.jsonl")
    for name in ("retention_loss", "gradient_alignment", "memory_agreement", "memory_distance"):
        assert record[name] is None


def test_without_any_data(whole, environment, tmp_path):
    fields = {"name": "none", "data_dir": "/nowhere", "image_size": 8, "channels": 1}
    fields |= {"num_classes": 10, "mean": (0.3053,), "std": (0.376,)}
    fields = {f"dataset.{name}": value for name, value in fields.items()}
    fields |= {"teacher.checkpoint": whole[0] / "teacher", "epochs": 1}
    done = run(environment, tmp_path, **fields)
    assert done.returncode == 0, done.stderr
    assert "(no test data)" in done.stdout and "no data to test on" in done.stdout
    assert re.search(
        r"epoch 1/1  agreement [\d.]+ %  one class \d+ %  distance [\d.]+  L_acq", done.stdout
    )
    (record,) = records.read_metrics(tmp_path / "metrics.jsonl")
    assert record["student_accuracy"] is None and 0 <= record["generated_agreement"] <= 100
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000


def test_a_folder_of_another_configuration_is_refused(whole, environment):
    done = run(environment, whole[0], **{"meta.inner_lr": 0.7, "replay.capacity": 3})
    assert done.returncode == 2
    assert "meta.inner_lr: 0.1 → 0.7; replay.capacity: 2 → 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(whole, environment, tmp_path):
    fields = {"teacher.checkpoint": whole[0] / "teacher", "student.learning_rate": 1e30}
    done = run(environment, tmp_path, **fields)
    assert done.returncode != 0
    assert "non-finite in epoch 1" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config=configs/digits.py:magic"], "'magic'; allowed are lra-mb"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config.replay.capacities=3"], "capacit"),
        (["--config.epochs=many"], "epochs"),
        (["--config.meta.variant=second"], "config.meta.variant is 'second'; allowed are detached"),
        (["--config.meta.variant=none"], "joint replay is --config.objective=joint"),
        (["--config.meta.objective=code"], "config.meta.objective is no field any more; allowed"),
        (["--config.method=dafl"], "the method follows the colon, --config=FILE:dafl"),
        (["--config.method", "dafl"], "the method follows the colon, --config=FILE:dafl"),
        (
            ["--config.dataset.name=cifar100", "--config.dataset.data_dir=/nowhere"],
            "dfkd_jax.prepare",
        ),
        (["--config.dataset.name=none"], "config.teacher.checkpoint is None"),
        (["--config.teacher.checkpoint=/nowhere"], "config.teacher.checkpoint"),
        (["surplus"], "surplus"),
        (["--nonsense=1"], "nonsense"),
    ],
)
def test_misuse_is_one_sentence_before_anything_compiles(environment, tmp_path, flags, words):
    started_at = time.monotonic()
    base = [sys.executable, "-m", "dfkd_jax.main", "--config=configs/digits.py"]
    done = subprocess.run(
        [*base, f"--workdir={tmp_path}", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - started_at < 30


def test_config_json_is_what_ran(whole):
    stored = json.loads((whole[0] / "config.json").read_text())
    assert stored == json.loads(tiny_config(epochs=EPOCHS).to_json())


def test_bits_do_not_depend_on_the_process(whole, environment, tmp_path):
    done = run(environment, tmp_path)
    assert done.returncode == 0
    assert_same_run(whole[0], tmp_path)
