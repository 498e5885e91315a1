import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.data import splits as data
from dfkd_jax.data import tfds_data
from dfkd_jax.data.data_table import SPECS
from tests.helpers.prepared import encode, prepare_tfds, random_split


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "dfkd_jax"


@pytest.fixture
def mnist(tmp_path):
    shape = (28, 28, 1)
    splits = {"train": random_split(30, shape, 0), "test": random_split(7, shape, 1)}
    prepare_tfds(tmp_path, "mnist", "3.0.1", splits, shape)
    return tmp_path, splits


def test_every_spec_is_complete():
    for name, facts in SPECS.items():
        assert facts.name == name
        assert len(facts.mean) == len(facts.std) == facts.image_shape[2]
        assert all(0 < value < 1 for value in facts.mean + facts.std)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation' but must be 'train' or 'test'"):
        data.load(SPECS["digits"], "validation")


def test_validation_images_are_training_images_that_the_teacher_does_not_see():
    whole = data.load(SPECS["digits"], "train")
    rest = data.load(SPECS["digits"], "train", validation_size=100)
    held_out = data.load(SPECS["digits"], "test", validation_size=100)
    again = data.load(SPECS["digits"], "test", validation_size=100)
    np.testing.assert_array_equal(held_out.images, again.images)
    assert len(held_out.labels) == 100 and len(rest.labels) == len(whole.labels) - 100
    together = np.concatenate([rest.images, held_out.images])
    assert sorted(map(bytes, together)) == sorted(map(bytes, whole.images))
    with pytest.raises(ValueError, match="validation_size is 5000; allowed is less"):
        data.load(SPECS["digits"], "train", validation_size=5000)


def test_the_embedded_digits_are_those_of_their_source():
    """The digest is that of the images and labels as scikit-learn's `load_digits` gives them."""
    with np.load(data._DIGITS) as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (1797, 8, 8) and images.dtype == labels.dtype == np.uint8
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_digits_split_is_whole_disjoint_and_stratified():
    train, test = data.load(SPECS["digits"], "train"), data.load(SPECS["digits"], "test")
    assert len(train.labels) + len(test.labels) == 1797
    # Each original image is in exactly one of the two (counted, should some be alike).
    together = np.concatenate([train.images, test.images]).reshape(1797, -1)
    with np.load(data._DIGITS) as file:
        original = np.rint(file["images"].reshape(1797, -1) * 255.0 / 16).astype(np.uint8)
    np.testing.assert_array_equal(sorted(map(bytes, together)), sorted(map(bytes, original)))
    share = np.bincount(test.labels) / np.bincount(np.r_[train.labels, test.labels])
    np.testing.assert_allclose(share, 1 / 3, atol=0.003)


def test_digits_are_as_described():
    images, labels = data.load(SPECS["digits"], "train")
    facts = SPECS["digits"]
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    assert images.shape[1:] == facts.image_shape and images.max() == 255
    np.testing.assert_allclose(images.mean() / 255, facts.mean[0], atol=5e-3)
    np.testing.assert_allclose(images.std() / 255, facts.std[0], atol=5e-3)


def test_digits_split_is_fixed():
    # Written down, so that accuracies stay comparable across versions of every library.
    test = data.load(SPECS["digits"], "test")
    assert test.labels[:12].tolist() == [3, 5, 7, 3, 6, 9, 2, 6, 5, 0, 8, 7]
    assert np.bincount(test.labels).tolist() == [59, 61, 59, 61, 60, 61, 60, 60, 58, 60]


def test_normalize_is_the_formula():
    images, _ = data.load(SPECS["digits"], "test")
    mean, std = SPECS["digits"].mean, SPECS["digits"].std
    out = jax.jit(data.normalize, static_argnums=(1, 2))(images, mean, std)
    assert out.dtype == jnp.float32 and out.shape == images.shape
    np.testing.assert_allclose(out, (images / 255 - mean[0]) / std[0], rtol=1e-5, atol=1e-6)


def test_normalize_works_per_channel_and_denormalize_undoes_it():
    images, _ = random_split(3, (4, 4, 3), 0)
    _, _, _, mean, std, *_ = SPECS["cifar10"]
    out = data.normalize(images, mean, std)
    np.testing.assert_allclose(
        out[..., 2], (images[..., 2] / 255 - mean[2]) / std[2], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(data.denormalize(out, mean, std), images / 255, atol=1e-6)
    assert data.denormalize(out + 100, mean, std).max() == 1
    assert data.denormalize(out - 100, mean, std).min() == 0


def test_normalizing_twice_is_refused():
    with pytest.raises(ValueError, match="must be uint8, not float32"):
        data.normalize(np.zeros((1, 8, 8, 1), np.float32), (0.5,), (0.5,))


def test_a_prepared_data_set_is_read_and_padded(mnist):
    root, splits = mnist
    for split in ("train", "test"):
        images, labels = data.load(SPECS["mnist"], split, root)
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        assert images.shape[1:] == SPECS["mnist"].image_shape == (32, 32, 1)
        np.testing.assert_array_equal(images[:, 2:-2, 2:-2], splits[split][0])
        np.testing.assert_array_equal(labels, splits[split][1])
        # What is not the image is black.
        assert images.sum(dtype=int) == splits[split][0].sum(dtype=int)


@pytest.mark.parametrize("name", [name for name, facts in SPECS.items() if facts.tfds_name])
def test_every_data_set_of_tensorflow_datasets_is_read(name, tmp_path):
    facts = SPECS[name]
    height, width, channels = facts.image_shape
    shape = (height - 2 * facts.pad, width - 2 * facts.pad, channels)
    splits = {
        split: random_split(5, shape, seed, facts.num_classes)
        for seed, split in enumerate(("train", "test"))
    }
    splits["train"][1][:2] = (facts.num_classes - 1, 0)
    prepare_tfds(tmp_path, facts.tfds_name, "3.0.2", splits, shape, facts.num_classes)
    for split, (images, labels) in splits.items():
        found = data.load(facts, split, tmp_path)
        assert found.images.shape == (5, *facts.image_shape)
        inner = slice(facts.pad, height - facts.pad)
        np.testing.assert_array_equal(found.images[:, inner, inner], images)
        np.testing.assert_array_equal(found.labels, labels)


def test_a_label_that_the_data_set_has_not_is_refused(tmp_path):
    shape = SPECS["cifar10"].image_shape
    images, labels = random_split(2, shape, 0)
    wrong = {"train": (images, labels), "test": (images, np.array([3, 10]))}
    prepare_tfds(tmp_path, "cifar10", "3.0.2", wrong, shape, 11)
    with pytest.raises(ValueError, match="image 1 of cifar10"):
        data.load(SPECS["cifar10"], "test", tmp_path)


def test_the_newest_whole_version_is_read(mnist):
    root, _ = mnist
    shape = (28, 28, 1)
    newer = {"train": random_split(3, shape, 2), "test": random_split(3, shape, 3)}
    prepare_tfds(root, "mnist", "3.0.10", newer, shape)
    prepare_tfds(root, "mnist", "3.0.11", newer, shape)
    (root / "mnist/3.0.11/mnist-test.array_record-00000-of-00001").unlink()
    prepare_tfds(root, "mnist", "9.0.0.incomplete", newer, shape)
    assert len(data.load(SPECS["mnist"], "train", root).labels) == 3


def test_the_data_dir_of_the_environment_is_the_default(mnist, monkeypatch):
    root, splits = mnist
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    np.testing.assert_array_equal(data.load(SPECS["mnist"], "test").labels, splits["test"][1])


def test_a_cached_read_equals_a_fresh_one(mnist, cache, monkeypatch):
    fresh = data.load(SPECS["mnist"], "test", mnist[0])
    assert [file.suffix for file in cache.iterdir()] == [".npy"]
    monkeypatch.setattr(tfds_data, "read", None)  # fails if the files are read again
    cached = data.load(SPECS["mnist"], "test", mnist[0])
    np.testing.assert_array_equal(cached.images, fresh.images)
    np.testing.assert_array_equal(cached.labels, fresh.labels)
    assert cached.images.flags.writeable and cached.images.flags.c_contiguous


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "other type"])
def test_a_damaged_cache_is_read_again_and_repaired(mnist, cache, damage):
    fresh = data.load(SPECS["mnist"], "test", mnist[0])
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if damage == "other type":
        np.save(file, np.zeros(7))
    else:
        file.write_bytes({"empty": b"", "truncated": whole[:-9], "text": b"no array"}[damage])
    again = data.load(SPECS["mnist"], "test", mnist[0])
    np.testing.assert_array_equal(again.images, fresh.images)
    assert file.read_bytes() == whole


def test_a_cache_of_other_files_is_not_used(mnist, tmp_path):
    data.load(SPECS["mnist"], "test", mnist[0])
    shape = (28, 28, 1)
    other = {"train": random_split(5, shape, 4), "test": random_split(9, shape, 5)}
    prepare_tfds(tmp_path / "other", "mnist", "3.0.1", other, shape)
    images = data.load(SPECS["mnist"], "test", tmp_path / "other").images
    np.testing.assert_array_equal(images[:, 2:-2, 2:-2], other["test"][0])


def test_an_unwritable_cache_is_done_without(mnist, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(data.load(SPECS["mnist"], "test", mnist[0]).labels) == 7


def test_files_of_another_shape_or_class_are_refused(tmp_path):
    shape = (20, 28, 1)
    splits = {"train": random_split(2, shape, 0), "test": random_split(2, shape, 1)}
    prepare_tfds(tmp_path, "mnist", "3.0.1", splits, shape)
    with pytest.raises(ValueError, match="image 0 of mnist is 20×28"):
        data.load(SPECS["mnist"], "test", tmp_path)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "digits"])
def test_what_is_not_prepared_is_said_in_one_sentence(tmp_path, name):
    for attempt in (data.check_prepared, lambda spec, root: data.load(spec, "test", root)):
        with pytest.raises(FileNotFoundError) as caught:
            attempt(SPECS[name], tmp_path)
        sentence = str(caught.value)
        assert f"config.dataset.name is '{name}'" in sentence and str(tmp_path) in sentence
        assert "\n" not in sentence
        if SPECS[name].tfds_name:
            command = f"python -m dfkd_jax.prepare --dataset={name} --data_dir={tmp_path}"
            assert command in sentence
        else:
            assert "tiny-imagenet-200.zip" in sentence


def test_what_is_prepared_passes_the_check(mnist):
    data.check_prepared(SPECS["digits"], mnist[0])
    data.check_prepared(SPECS["mnist"], mnist[0])
    (mnist[0] / "mnist/3.0.1/dataset_info.json").write_text("{")
    with pytest.raises(FileNotFoundError):
        data.check_prepared(SPECS["mnist"], mnist[0])


@pytest.fixture
def tiny_imagenet(tmp_path):
    """200 classes of one flat colour each, the first of them a grey file."""
    root = tmp_path / "tiny-imagenet-200"
    wnids = [f"n{k:08d}" for k in np.random.default_rng(0).permutation(10**6)[:200]]
    colours = {w: np.full((64, 64, 3), k, np.uint8) for k, w in enumerate(sorted(wnids))}
    for k, (wnid, colour) in enumerate(colours.items()):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder / f"{wnid}_0.JPEG").write_bytes(encode(colour if k else colour[..., 0], "JPEG"))
    (root / "val/images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(wnids[:5]):
        (root / f"val/images/val_{i}.JPEG").write_bytes(encode(colours[wnid], "JPEG"))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")  # not sorted, like the official one
    return tmp_path, [sorted(wnids).index(wnid) for wnid in wnids[:5]]


def test_tiny_imagenet_is_read_from_its_folder(tiny_imagenet):
    root, expected = tiny_imagenet
    data.check_prepared(SPECS["tiny_imagenet"], root)
    train, test = (
        data.load(SPECS["tiny_imagenet"], "train", root),
        data.load(SPECS["tiny_imagenet"], "test", root),
    )
    assert train.labels.tolist() == list(range(200))
    assert train.images.shape == (200, *SPECS["tiny_imagenet"].image_shape)
    assert test.labels.tolist() == expected
    for images, labels in (train, test):
        # The colour names the class: images and labels belong together.
        difference = images.mean((1, 2)) - labels[:, None]
        assert np.abs(difference).max() <= 2
    again = data.load(SPECS["tiny_imagenet"], "test", root)
    np.testing.assert_array_equal(again.images, test.images)


@pytest.mark.skipif("DFKD_DATA_DIR" not in os.environ, reason="DFKD_DATA_DIR names no data sets")
def test_the_real_mnist():
    folder = os.environ["DFKD_DATA_DIR"]
    try:
        data.check_prepared(SPECS["mnist"], folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    images, labels = data.load(SPECS["mnist"], "test", folder)
    assert images.shape == (10_000, 32, 32, 1)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # The usual constants are those of the training images.
    np.testing.assert_allclose(images[:, 2:-2, 2:-2].mean() / 255, 0.1307, atol=5e-3)
