"""Preparing data sets, by a builder that needs neither network nor TensorFlow."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from dfkd_jax import prepare
from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import SPECS
from tests.helpers.prepared import prepare_tfds, random_split

SHAPE = (28, 28, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def built(monkeypatch):
    """The names and folders of the builders asked for, and their class, which writes images."""
    import tensorflow_datasets as tfds

    asked = []

    class Builder:
        def __init__(self, name, data_dir):
            self.name, self.root = name, data_dir
            self.data_dir = f"{data_dir}/{name}/3.0.1"

        def download_and_prepare(self, file_format):
            assert file_format == "array_record"
            splits = {"train": random_split(5, SHAPE, 0), "test": random_split(3, SHAPE, 1)}
            prepare_tfds(Path(self.root), self.name, "3.0.1", splits, SHAPE)

    def builder(name, data_dir):
        asked.append((name, data_dir))
        return Builder(name, data_dir)

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    return asked, Builder


def run(capsys, *arguments):
    """(exit code, the one line that was printed, on whichever stream)."""
    code = prepare.main(list(arguments))
    out, err = capsys.readouterr()
    (line,) = (err if code else out).splitlines()
    return code, line


def test_what_is_prepared_can_be_loaded_and_is_not_prepared_again(
    built, capsys, tmp_path, monkeypatch
):
    asked, _ = built
    arguments = ("--dataset=mnist", f"--data_dir={tmp_path}")
    folder = tmp_path / "mnist" / "3.0.1"
    assert run(capsys, *arguments) == (0, f"mnist is now prepared, in {folder}.")
    assert asked == [("mnist", str(tmp_path))]
    monkeypatch.delitem(sys.modules, "tensorflow")  # from here on it is not needed
    np.testing.assert_array_equal(
        data.load(SPECS["mnist"], "test", tmp_path).labels, random_split(3, SHAPE, 1)[1]
    )
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(capsys, *arguments) == (0, f"mnist is prepared already, in {folder}.")
    assert asked == [("mnist", str(tmp_path))]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_data_set_is_asked_for_by_its_name_in_tensorflow_datasets(built, capsys, tmp_path):
    asked, _ = built
    run(capsys, "--dataset=svhn", f"--data_dir={tmp_path}")
    assert asked == [("svhn_cropped", str(tmp_path))]


def test_the_default_folder_is_that_of_runs(built, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    run(capsys, "--dataset=fashion_mnist")
    data.check_prepared(SPECS["fashion_mnist"])


def test_a_failed_download_is_one_sentence(built, capsys, tmp_path, monkeypatch):
    def fail(self, file_format):
        raise ConnectionError("no route to host\nmore about it")

    monkeypatch.setattr(built[1], "download_and_prepare", fail)
    code, line = run(capsys, "--dataset=mnist", f"--data_dir={tmp_path}")
    words = f"mnist could not be prepared in {tmp_path}/mnist/3.0.1: no route to host."
    assert code == 2 and words in line


def test_another_file_format_in_the_place_is_said(built, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(built[1], "download_and_prepare", lambda self, file_format: None)
    code, line = run(capsys, "--dataset=mnist", f"--data_dir={tmp_path}")
    assert code == 2
    assert f"{tmp_path}/mnist/3.0.1 holds mnist in another file format" in line


def test_without_tensorflow_the_extra_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it fails
    code, line = run(capsys, "--dataset=cifar100", f"--data_dir={tmp_path}")
    assert code == 2
    assert "Preparing cifar100 needs TensorFlow" in line and "'.[prepare]'" in line
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_refused_with_the_allowed_ones(capsys):
    code, line = run(capsys, "--dataset=imagenet")
    assert code == 2 and "--dataset is 'imagenet'; allowed are digits, mnist" in line


@pytest.mark.parametrize("name", ["digits", "folder", "none"])
def test_some_need_no_preparing(capsys, name):
    code, line = run(capsys, f"--dataset={name}")
    assert code == 0 and line.startswith(f"{name} needs no preparing")


def test_tiny_imagenet_says_what_to_unpack_where(capsys, tmp_path):
    code, line = run(capsys, "--dataset=tiny_imagenet", f"--data_dir={tmp_path}")
    assert code == 2 and f"tiny-imagenet-200.zip in {tmp_path}" in line
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "train").mkdir()
    for file in ("wnids.txt", "val/val_annotations.txt"):
        (folder / file).write_text("")
    code, line = run(capsys, "--dataset=tiny_imagenet", f"--data_dir={tmp_path}")
    assert (code, line) == (0, f"tiny_imagenet is prepared already, in {folder}.")
