import json
import math
import struct
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from dfkd_jax.run import records
from dfkd_jax.runtime import files

HISTORY = [
    {"student_accuracy": 10.0, "epoch": 1, "retention_loss": None, "seconds": 2.0},
    {"student_accuracy": 40.0, "epoch": 2, "retention_loss": 0.5, "seconds": 1.5},
    {"student_accuracy": 30.0, "epoch": 3, "retention_loss": 0.25, "seconds": 1.0},
]


def test_metrics_come_back_as_written(tmp_path):
    path = tmp_path / "run/metrics.jsonl"
    records.write_metrics(path, HISTORY[:2])
    records.append_metrics(path, HISTORY[2])
    assert records.read_metrics(path) == HISTORY
    assert len(path.read_text().splitlines()) == 3
    # Rewritten by a run that resumes after epoch 1.
    records.write_metrics(path, HISTORY[:1])
    assert records.read_metrics(path) == HISTORY[:1]
    assert list(path.parent.iterdir()) == [path]


def test_appending_makes_the_file(tmp_path):
    path = tmp_path / "run/metrics.jsonl"
    records.append_metrics(path, HISTORY[0])
    assert records.read_metrics(path) == HISTORY[:1]


def test_keys_are_in_a_stable_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for record in ({"b": 1, "epoch": 1, "a": 2}, {"a": 2, "b": 1, "epoch": 1}):
        records.append_metrics(path, record)
    assert path.read_text() == '{"epoch": 1, "a": 2, "b": 1}\n' * 2


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"nan": math.nan, "inf": np.float32(np.inf), "array": jnp.array([1.0, jnp.nan])}
    records.append_metrics(path, {"epoch": np.int64(1), **values, "loss": jnp.float32(0.5)})
    # Parsed strictly: Python's own parser would let NaN pass.
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record == {"epoch": 1, "nan": None, "inf": None, "array": [1.0, None], "loss": 0.5}


@pytest.mark.parametrize("cut", [1, 2, 9, 30])
def test_a_torn_last_line_is_ignored_and_does_not_swallow_the_next(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    records.write_metrics(path, [*HISTORY[:2], {"epoch": 3, "note": "μ and σ² of the run"}])
    path.write_bytes(path.read_bytes()[:-cut])
    whole = 3 if cut == 1 else 2  # only the end of the line is missing
    assert len(records.read_metrics(path)) == whole
    assert records.read_metrics(path)[:2] == HISTORY[:2]
    records.append_metrics(path, HISTORY[2])
    assert len(records.read_metrics(path)) == whole + 1
    assert records.read_metrics(path)[-1] == HISTORY[2]


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        records.read_metrics(tmp_path / "metrics.jsonl")


def test_the_summary_is_what_one_computes_by_hand():
    summary = records.summarize(HISTORY, 99.0, {"method": "ours-1", "seed": np.int32(3)})
    variance = summary.pop("accuracy_variance")
    # Deviations from 80/3 are −50/3, 40/3, 10/3.
    assert variance == pytest.approx((2500 + 1600 + 100) / 9 / 3)
    assert summary.pop("mean_accuracy") == pytest.approx(80 / 3)
    assert summary == {
        "method": "ours-1",
        "seed": 3,
        "teacher_accuracy": 99.0,
        "max_accuracy": 40.0,
        "final_accuracy": 30.0,
        "mean_agreement": None,
        "agreement_variance": None,
        "max_agreement": None,
        "final_agreement": None,
        "epochs": 3,
        "seconds": 4.5,
    }


def test_without_data_the_agreement_is_summed_up():
    history = [
        {"student_accuracy": None, "generated_agreement": agreement, "seconds": 1.0}
        for agreement in (50.0, 90.0, 70.0)
    ]
    summary = records.summarize(history, None, {})
    assert summary["teacher_accuracy"] is summary["mean_accuracy"] is None
    assert summary["mean_agreement"] == 70
    assert summary["agreement_variance"] == pytest.approx((20**2 + 20**2) / 3)
    assert (summary["max_agreement"], summary["final_agreement"]) == (90, 70)


def test_a_summary_of_nothing_has_no_numbers():
    summary = records.summarize([], 99.0, {})
    assert summary["epochs"] == 0 and summary["seconds"] == 0
    assert summary["mean_accuracy"] is summary["final_accuracy"] is None


def test_json_comes_back_and_is_sorted(tmp_path):
    path = tmp_path / "a/summary.json"
    files.write_json(path, {"b": (1, 2.5), "a": {"path": Path("x"), "nan": math.nan}})
    assert files.read_json(path) == {"a": {"nan": None, "path": "x"}, "b": [1, 2.5]}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        files.write_json(path, {"a": object()})
    with pytest.raises(RuntimeError), files.replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not a JSON file"):
        files.read_json(tmp_path / "summary.json")


def events(folder):
    """(step, tag, value) of every scalar in the folder, and the steps from which runs resumed."""
    scalars, resumed = [], []
    for file in sorted(folder.glob("events*"), key=lambda file: file.stat().st_mtime_ns):
        content, position = file.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + length])
            scalars += [
                (event.step, value.tag, value.simple_value) for value in event.summary.value
            ]
            resumed += [event.step] if event.HasField("session_log") else []
            position += 16 + length
    return scalars, resumed


def test_tensorboard_gets_the_scalars_at_their_epoch(tmp_path):
    board = records.TensorBoard(tmp_path)
    board.write({"epoch": 1, "loss": jnp.float32(0.5), "retention_loss": None, "name": "a"})
    board.write({"epoch": 2, "loss": 0.25, "gradient_alignment": math.nan})
    expected = [(1, "loss", 0.5), (2, "loss", 0.25)]
    deadline = time.monotonic() + 20
    while events(tmp_path)[0] != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert events(tmp_path) == (expected, [])  # without closing: a killed run keeps its curves
    board.close()
    # Resumed after epoch 1 within the same second, without overwriting the first file.
    board = records.TensorBoard(tmp_path, first_epoch=2)
    board.write({"epoch": 2, "loss": 0.125})
    board.close()
    assert events(tmp_path) == ([*expected, (2, "loss", 0.125)], [2])
