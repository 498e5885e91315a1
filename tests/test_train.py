"""Runs in this process: several seeds at once, the teacher, and what training one uses."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dfkd_jax import data, results, teacher
from dfkd_jax.classifiers import create_classifier
from dfkd_jax.config import UserError
from dfkd_jax.data_table import SPECS
from dfkd_jax.evaluate import create_accuracy
from dfkd_jax.train import run, run_seeds
from tests.conftest import tiny_config

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Two seeds, one after the other, with the teacher of the first."""
    root = tmp_path_factory.mktemp("alone")
    for seed in (1, 2):
        config = tiny_config(seed=seed)
        config.teacher.checkpoint = None if seed == 1 else str(root / "1" / "teacher")
        run(config, root / str(seed), QUIET)
    return root


def shared_teacher(alone, **fields):
    return tiny_config(**{"teacher.checkpoint": str(alone / "1" / "teacher"), **fields})


def assert_close(a, b):
    for x, y in zip(*(results.read_metrics(d / "metrics.jsonl") for d in (a, b)), strict=True):
        coarse = {key for key in x if key.endswith("_agreement")}  # percent of a few images
        for key in x.keys() - coarse - {"seconds", "student_accuracy"}:
            np.testing.assert_allclose(x[key], y[key], rtol=2e-2, atol=2e-3, err_msg=key)
        assert abs(x["student_accuracy"] - y["student_accuracy"]) < 1.0


@pytest.mark.slow
def test_seeds_trained_at_once_give_the_curves_of_each_alone(alone, tmp_path):
    config = shared_teacher(alone)
    workdirs = [tmp_path / "1", tmp_path / "2"]
    summaries = run_seeds(config, workdirs, [1, 2], QUIET)
    assert [summary["seed"] for summary in summaries] == [1, 2]
    for seed in ("1", "2"):
        assert_close(alone / seed, tmp_path / seed)
    before = results.read_metrics(tmp_path / "2" / "metrics.jsonl")

    # One of them lost its last epoch: both go on from the last common one.
    shutil.rmtree(tmp_path / "1" / "checkpoints" / "3")
    run_seeds(config, workdirs, [1, 2], QUIET)
    after = results.read_metrics(tmp_path / "2" / "metrics.jsonl")
    for x, y in zip(before, after, strict=True):
        assert {**x, "seconds": 0} == {**y, "seconds": 0}


@pytest.mark.slow
def test_early_agreement_starts_with_the_first_epoch_and_is_a_percentage(alone):
    for record in results.read_metrics(alone / "1" / "metrics.jsonl"):
        assert 0 <= record["early_agreement"] <= 100


@pytest.mark.slow
def test_a_teacher_whose_weights_are_of_another_network_is_refused(alone, tmp_path):
    shutil.copytree(alone / "1" / "teacher", tmp_path / "teacher")
    card = results.read_json(tmp_path / "teacher" / teacher.CARD)
    results.write_json(tmp_path / "teacher" / teacher.CARD, {**card, "model": "cnn"})
    config = tiny_config(
        **{"teacher.model": "cnn", "teacher.checkpoint": str(tmp_path / "teacher")}
    )
    with pytest.raises(UserError, match=r"cannot be read as config\.teacher\.model"):
        run(config, tmp_path / "run", QUIET)


@pytest.mark.parametrize("name, shape", [("lenet5", (32, 32, 1)), ("cnn_half", (8, 8, 1))])
def test_a_saved_teacher_is_loaded_as_it_was(tmp_path, name, shape):
    """With batch norm and without, whose statistics are an empty collection while training."""
    model = create_classifier(name, 10)
    variables = model.init(jax.random.key(0), jnp.zeros((2, *shape)), train=False)
    assert not teacher.is_teacher(tmp_path)
    teacher.save_teacher(tmp_path, {"batch_stats": {}, **variables}, {"model": name})
    assert teacher.is_teacher(tmp_path)
    loaded = teacher.load_teacher(tmp_path, model, shape)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_augmentation_shifts_and_mirrors_whole_images():
    images = jnp.arange(1, 65, dtype=jnp.uint8).reshape(1, 8, 8, 1).repeat(200, axis=0)
    moved = np.asarray(teacher.augment(jax.random.key(0), images, flip=True, pad=2))
    original = np.asarray(images[0, :, :, 0])
    allowed = set()
    for top in range(5):
        for left in range(5):
            crop = np.pad(original, 2)[top : top + 8, left : left + 8]
            allowed |= {crop.tobytes(), np.ascontiguousarray(crop[:, ::-1]).tobytes()}
    seen = {np.ascontiguousarray(image[:, :, 0]).tobytes() for image in moved}
    assert seen <= allowed and len(seen) > 40  # of 50
    unmirrored = np.asarray(teacher.augment(jax.random.key(0), images, flip=False, pad=0))
    np.testing.assert_array_equal(unmirrored, images)


def test_accuracy_counts_every_example_once():
    spec = SPECS["digits"]
    split = data.load(spec, "test")
    model = create_classifier("cnn_half", 10)
    images = data.normalize(split.images, spec.mean, spec.std)
    variables = model.init(jax.random.key(0), images[:2], train=False)
    logits, _ = model.apply(variables, images, train=False)
    expected = 100 * np.mean(np.argmax(logits, -1) == split.labels)
    for batch_size in (7, 100, len(split.labels), 10_000):
        accuracy = create_accuracy(model, split, spec, batch_size)
        assert accuracy(variables) == pytest.approx(expected)


def test_every_training_image_is_used_once_an_epoch():
    spec = SPECS["digits"]
    split = data.load(spec, "train")
    config = tiny_config().teacher
    model = create_classifier("cnn_half", 10)
    training = teacher.create_training(config, model, split, spec)
    state = training.epoch(training.init(0))
    assert int(state.step) == training.steps_per_epoch == len(split.labels) // config.batch_size
    first = np.asarray(state.order)
    np.testing.assert_array_equal(np.sort(first), np.arange(len(split.labels)))
    again = training.epoch(state)
    assert not np.array_equal(first, again.order)
