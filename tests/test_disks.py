"""A full disk, or one that cannot be written: one sentence, and all is as it was before."""

import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from dfkd_jax import convert, evaluate, export, prepare, report
from dfkd_jax.interchange.torch_layouts import to_torch
from dfkd_jax.run import checkpoint, figures, records, teacher
from dfkd_jax.run.config import to_dict
from dfkd_jax.runtime import files
from tests.helpers.disks import small_disk, tree
from tests.helpers.fabricated import fabricate
from tests.helpers.students import random_student
from tests.helpers.tiny import tiny_config

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run after one epoch, whose student has 16,000 parameters."""
    student = random_student("cnn_half", SHAPE)
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(**{"student.model": "cnn_half"})
    files.write_json(folder / "config.json", to_dict(config))
    teacher.save_teacher(folder / "teacher", student.variables, {**student.card, "accuracy": 50.0})
    with checkpoint.open_checkpoints(folder / "checkpoints") as manager:
        checkpoint.save(manager, 1, {"student": student.variables}, [{"epoch": 1}])
    save_file(to_torch("cnn_half", student.variables), folder / "weights.safetensors")
    for method in ("mb-dfkd", "lra-mb"):
        fabricate(folder / "compared", method, 1, [10.0, 20.0])
    return folder


@pytest.fixture(params=["full", "read-only", "new folder"])
def place(request, tmp_path):
    """A folder on a disk where nothing more can be written, or one to make in such a folder."""
    with small_disk(tmp_path / "disk") as make_read_only:
        place = tmp_path / "disk" / "output"
        if request.param != "new folder":
            place.mkdir()
        if request.param == "read-only":
            make_read_only()
        else:
            free = shutil.disk_usage(tmp_path / "disk").free
            (tmp_path / "disk" / "filling").write_bytes(bytes(free - 8192))
        yield place


def assert_refused(command, place, capsys):
    """The exit code is not 0, the one sentence names the place, the disk is as it was before."""
    before = tree(place.parent)
    assert command() not in (0, None)
    assert tree(place.parent) == before
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("dfkd_jax: ")
    assert str(place) in error and error.endswith(".\n")
    assert "No space left on device" in error or "Read-only file system" in error
    assert ".tmp" not in error


def test_convert(run, place, capsys):
    arguments = [str(run / "weights.safetensors"), "--model=cnn_half", "--dataset=digits"]
    assert_refused(lambda: convert.main([*arguments, f"--output={place}"]), place, capsys)


@pytest.mark.parametrize("format", ["safetensors", "stablehlo"])
def test_export(run, place, capsys, format):
    arguments = [str(run), f"--format={format}", f"--output={place}"]
    assert_refused(lambda: export.main(arguments), place, capsys)


def test_a_checkpoint_that_does_not_fit(tmp_path, open_checkpoints):
    """One sentence, and the checkpoint before it can still be read."""
    small, large = ({"weights": np.ones(count, np.float32)} for count in (100, 100_000))
    with small_disk(tmp_path / "disk") as _:
        manager = open_checkpoints(tmp_path / "disk")
        checkpoint.save(manager, 1, small, [{"epoch": 1}])
        words = r"Epoch 2 could not be saved in .* cannot be written: No space left"
        with pytest.raises(checkpoint.SaveFailed, match=words):
            checkpoint.save(manager, 2, large, [{"epoch": 1}, {"epoch": 2}])
        state, history = checkpoint.restore_latest(manager, small, print)
        np.testing.assert_array_equal(state["weights"], small["weights"])
        assert history == [{"epoch": 1}]
        with pytest.raises(files.CannotWrite, match="No space left"):
            teacher.save_teacher(tmp_path / "disk" / "teacher", {"params": large}, {})
        manager.close()


def test_export_to_onnx(run, place, capsys, monkeypatch):
    pytest.importorskip("jax2onnx")  # which the command looks for first
    monkeypatch.setitem(export.FORMATS, "onnx", {"student.onnx": lambda student: bytes(50_000)})
    arguments = [str(run), "--format=onnx", f"--output={place}"]
    assert_refused(lambda: export.main(arguments), place, capsys)


def test_an_earlier_export_stays_whole(run, tmp_path, capsys):
    """Also where the new student would fit, and its card no more."""
    with small_disk(tmp_path / "disk"):
        place = tmp_path / "disk" / "output"
        arguments = [str(run), "--format=safetensors", f"--output={place}"]
        assert export.main(arguments) == 0
        capsys.readouterr()
        size = (place / "student.safetensors").stat().st_size
        free = shutil.disk_usage(place).free
        page = os.statvfs(place).f_frsize
        (tmp_path / "disk" / "filling").write_bytes(bytes(free - size // page * page - page))
        assert_refused(lambda: export.main(arguments), place, capsys)
        assert len(list(place.iterdir())) == 3


def test_evaluate(run, place, capsys, monkeypatch):
    found = {"class_accuracy": np.arange(5000.0)}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: found)
    values = {"OUTPUT": str(place / "found.json"), "CONFIG": None, "BATCH": 1, "JUDGE": None}
    for flag, value in values.items():
        monkeypatch.setattr(evaluate, flag, type("Flag", (), {"value": value}))
    assert_refused(lambda: evaluate.main(["", str(run)]), place, capsys)


def test_report(run, place, capsys, monkeypatch):
    figure = {"learning_evolution.png": report.FIGURES["learning_evolution.png"]}
    monkeypatch.setattr(report, "FIGURES", figure)
    arguments = [str(run / "compared"), f"--output={place}"]
    assert_refused(lambda: report.main(arguments), place, capsys)


def test_a_report_that_does_not_fit_leaves_the_earlier_one(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", {})
    with small_disk(tmp_path / "disk"):
        place = tmp_path / "disk" / "output"
        arguments = [str(run / "compared"), f"--output={place}"]
        assert report.main(arguments) == 0
        capsys.readouterr()
        (place / "comparison.md").write_text("an earlier one")
        monkeypatch.setattr(report.report_page, "html", lambda *_: "page" * 100_000)
        assert_refused(lambda: report.main(arguments), place, capsys)
        assert (place / "comparison.md").read_text() == "an earlier one"


def test_figures_and_files_of_a_run(place):
    record = {"epoch": 1, "student_accuracy": 50.0, "text": "x" * 20_000}
    before = tree(place.parent)
    for write, name in (
        (lambda path: figures.learning_curve([record], 97.5, path), "curve.png"),
        (lambda path: records.write_metrics(path, [record]), "metrics.jsonl"),
        (lambda path: files.write_json(path, record), "summary.json"),
    ):
        with pytest.raises(files.CannotWrite) as caught:
            write(place / name)
        assert str(place) in str(caught.value) and ".tmp" not in str(caught.value)
        assert tree(place.parent) == before


def test_prepare_names_the_folder(tmp_path, capsys, monkeypatch):
    class Builder:
        data_dir = tmp_path / "mnist" / "3.0.1"

        def download_and_prepare(self, file_format):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_builder", lambda name, data_dir: Builder())
    arguments = ["--dataset=mnist", f"--data_dir={tmp_path}"]
    assert_refused(lambda: prepare.main(arguments), tmp_path / "mnist", capsys)
