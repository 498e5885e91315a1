"""Any folder of class folders: what is read, in which order, and what is refused."""

import os
import re

import numpy as np
import pytest
from PIL import Image

from dfkd_jax.data import data_specs, decoded_cache
from dfkd_jax.data import splits as data
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import SMALL_NET, tiny_config

FIELDS = {"image_size": 8, "channels": 3, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
COLOURS = {"red": (250, 10, 20), "green": (10, 250, 20), "blue": (20, 10, 250)}
CLASSES = sorted(COLOURS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "dfkd_jax"


def save(path, colour, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes of one colour each, in files of every kind; two of each to train, one to test.

    Among them is what is no image or no class.
    """
    root = tmp_path / "photos"
    for name, colour in COLOURS.items():
        save(root / "train" / name / "b.PNG", colour, size=(16, 12))
        save(root / "train" / name / "a.bmp", colour)
        save(root / "test" / name / "1.webp", colour)
        (root / "train" / name / "notes.txt").write_text("no image")
        (root / "train" / name / "._a.bmp").write_bytes(b"left by a file system")
    (root / "train" / ".hidden").mkdir()
    (root / "readme.md").write_text("no class")
    (root / "test" / "readme.md").write_text("no class")
    return root


def config_of(root, **fields):
    own = {"name": "folder", "data_dir": None if root is None else str(root), **FIELDS, **fields}
    return tiny_config(**{f"dataset.{name}": value for name, value in own.items()})


def load(root, split, **fields):
    return data.load(data_specs.spec(config_of(root, **fields)), split, root)


def test_classes_are_the_sorted_folders_and_images_follow_their_names(folder):
    spec = data_specs.spec(config_of(folder))
    assert spec.image_shape == (8, 8, 3) and spec.num_classes == 3
    assert (spec.mean, spec.std) == (FIELDS["mean"], FIELDS["std"])
    images, labels = load(folder, "train")
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.dtype == np.uint8 and images.shape == (6, 8, 8, 3)
    for image, label in zip(images, labels, strict=True):
        np.testing.assert_array_equal(image, np.broadcast_to(COLOURS[CLASSES[label]], (8, 8, 3)))
    images, labels = load(folder, "test")
    assert labels.tolist() == [0, 1, 2] and images.shape == (3, 8, 8, 3)


def test_images_are_resized_with_antialiasing_and_turned_grey(tmp_path):
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: their mean if averaged, 0 or 255 if only sampled
    for name in ("a", "b"):
        path = tmp_path / "test" / name / "stripes.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(stripes).save(path)
    images, _ = load(tmp_path, "test", channels=1, mean=(0.5,), std=(0.5,))
    assert images.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(images[:, 1:-1, 1:-1], 127.5, atol=1)


def test_decoded_images_are_kept_until_a_file_changes(folder, cache, monkeypatch):
    first = load(folder, "test")
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as context:
        context.setattr(decoded_cache, "decode", None)  # fails if the files are read again
        np.testing.assert_array_equal(load(folder, "test").images, first.images)
    red = folder / "test" / "red" / "1.webp"
    os.utime(red, ns=(1, 1))  # another time
    load(folder, "test")
    red.rename(red.with_name("2.webp"))  # another path
    load(folder, "test")
    load(folder, "test", image_size=4)  # another shape
    assert len(list(cache.iterdir())) == 4
    save(red.with_name("3.webp"), COLOURS["red"])
    assert load(folder, "test").labels.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_a_broken_image_is_named(folder, cache, content):
    broken = folder / "test" / "green" / "1.webp"
    content = broken.read_bytes()[:-8] if content == "truncated" else content
    broken.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load(folder, "test")
    assert str(caught.value) == f"{broken} cannot be decoded as an image."
    assert not cache.exists()


def check(config):
    with pytest.raises(UserError) as caught:
        parse(config)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_a_folder_passes_the_check(folder):
    parse(config_of(folder))
    parse(config_of(folder, num_classes=3))


def test_classes_that_differ_between_the_splits_are_named(folder):
    save(folder / "train" / "yellow" / "a.png", (250, 250, 0))
    (folder / "test" / "violet").mkdir()
    sentence = check(config_of(folder))
    assert "must hold the same class folders" in sentence and "violet, yellow" in sentence


def test_the_number_of_classes_is_counted(folder):
    sentence = check(config_of(folder, num_classes=10))
    assert "config.dataset.num_classes is 10 but" in sentence and "3 class folders" in sentence


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"data_dir": None}, "config.dataset.data_dir is None"),
        ({"data_dir": "/nowhere"}, "/nowhere/test is no folder"),
        ({"image_size": None, "std": None}, "needs config.dataset.image_size, config.dataset.std"),
        ({"image_size": 0}, "config.dataset.image_size is 0; allowed is 1 or more"),
        ({"image_size": 30}, "config.dataset.image_size is 30: .* multiple of 4"),
        ({"channels": 2}, "config.dataset.channels is 2; allowed is 1 or 3"),
        ({"channels": 1}, r"config.dataset.mean is \(0.5, 0.4, 0.3\); .* each of 1 channels"),
        ({"mean": (0.5, "a", 0.5)}, "config.dataset.mean is .*'a'"),
        ({"std": (0.5, 0.0, 0.5)}, "config.dataset.std is .*above 0"),
    ],
)
def test_fields_that_cannot_work_are_one_sentence(folder, fields, words):
    assert re.search(words, check(config_of(folder, **fields)))


def test_training_images_may_be_missing_if_a_teacher_is_given(folder, tmp_path):
    (folder / "train").rename(tmp_path / "elsewhere")
    assert "photos/train is no folder" in check(config_of(folder))
    card = {"model": SMALL_NET, "num_classes": 3, "image_shape": [8, 8, 3]}
    files.write_json(tmp_path / "teacher.json", card)
    config = config_of(folder)
    config.teacher.checkpoint = str(tmp_path)
    parse(config)


def test_what_is_not_given_is_what_the_teacher_takes(folder, tmp_path):
    card = {"model": SMALL_NET, "num_classes": 3, "image_shape": [8, 8, 3]}
    card |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    files.write_json(tmp_path / "teacher.json", card)
    config = config_of(folder, **dict.fromkeys(FIELDS))
    config.teacher.checkpoint = str(tmp_path)
    parse(config)
    spec = data_specs.spec(config)
    assert (spec.image_shape, spec.num_classes) == ((8, 8, 3), 3)
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert not spec.flip
    config.dataset.flip = True
    assert data_specs.spec(config).flip
    config.dataset.std = (0.4, 0.5, 0.7)
    assert "a teacher with std [0.4, 0.5, 0.6]" in check(config)
    files.write_json(tmp_path / "teacher.json", {**card, "num_classes": 5})
    config.dataset.std = None
    assert "a teacher with num_classes 5" in check(config)


def test_an_empty_split_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "test" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"The test split of folder in .* holds no images"):
        load(tmp_path, "test")
