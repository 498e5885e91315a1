"""Runs in this process, the teacher, and what training one uses."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dfkd_jax.data import data_specs
from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import SPECS
from dfkd_jax.distillation import steps
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import checkpoint, teacher
from dfkd_jax.run.accuracy import create_accuracy, put_batches
from dfkd_jax.run.setup import create_algorithm, parse
from dfkd_jax.run.train import run
from dfkd_jax.runtime import array_files, files
from dfkd_jax.runtime.draw import stream
from dfkd_jax.runtime.errors import UserError
from tests.helpers import earlier
from tests.helpers.devices import SPEC, on
from tests.helpers.tiny import SMALL_NET, tiny_config
from tests.helpers.trees import same_bits

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with its teacher."""
    workdir = tmp_path_factory.mktemp("finished")
    run(tiny_config(), workdir, QUIET)
    return workdir


@pytest.mark.slow
def test_early_agreement_is_on_images_kept_from_the_end_of_the_first_epoch(
    finished, tmp_path, open_checkpoints
):
    algorithm = create_algorithm(parse(tiny_config()), on(1))
    teacher_model, student_model = algorithm.parts.teacher, algorithm.parts.student
    variables = teacher.load_teacher(finished / "teacher", teacher_model, SPEC.image_shape)
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    manager = open_checkpoints(tmp_path / "checkpoints")
    fresh = algorithm.init(1)
    last, history = checkpoint.restore_latest(manager, fresh, pytest.fail)
    manager.delete(3)
    before, _ = checkpoint.restore_latest(manager, fresh, pytest.fail)
    assert len(history) == 3 and same_bits(last.early, before.early)
    for state, record in ((last, history[2]), (before, history[1])):
        own = {"params": state.student.params, "batch_stats": state.student.batch_stats}
        answers, _ = student_model.apply(own, state.early.images, train=False)
        wanted, _ = teacher_model.apply(variables, state.early.images, train=False)
        same = np.argmax(np.asarray(answers), -1) == np.argmax(np.asarray(wanted), -1)
        assert record["early_agreement"] == pytest.approx(100 * np.mean(same))
        np.testing.assert_allclose(state.early.logits, wanted, rtol=1e-3, atol=1e-4)

    first, _ = algorithm.epoch(fresh, variables)
    made = steps.generated(algorithm.parts, first, stream(first.key, "early"))
    np.testing.assert_allclose(last.early.images, made, rtol=1e-3, atol=1e-4)
    others = steps.generated(algorithm.parts, last, stream(first.key, "early"))
    assert np.abs(others - made).max() > 0.01


@pytest.mark.slow
def test_a_teacher_whose_weights_are_of_another_network_is_refused(finished, tmp_path):
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    card = files.read_json(tmp_path / "teacher" / data_specs.CARD)
    files.write_json(tmp_path / "teacher" / data_specs.CARD, {**card, "model": "cnn"})
    config = tiny_config(
        **{"teacher.model": "cnn", "teacher.checkpoint": str(tmp_path / "teacher")}
    )
    with pytest.raises(UserError, match=r"cannot be read as config\.teacher\.model"):
        run(config, tmp_path / "run", QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", [("lenet5", (32, 32, 1)), ("cnn_half", (8, 8, 1))])
def test_a_saved_teacher_is_loaded_as_it_was(tmp_path, name, shape):
    """With batch norm and without, whose statistics are an empty collection while training."""
    model = create_classifier(name, 10)
    variables = model.init(jax.random.key(0), jnp.zeros((2, *shape)), train=False)
    assert not data_specs.is_teacher(tmp_path)
    teacher.save_teacher(tmp_path, {"batch_stats": {}, **variables}, {"model": name})
    assert data_specs.is_teacher(tmp_path)
    loaded = teacher.load_teacher(tmp_path, model, shape)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_a_teacher_of_an_earlier_version_is_loaded(tmp_path):
    model = create_classifier(SMALL_NET, 10)
    variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), train=False)
    earlier.save_weights(tmp_path, variables)
    loaded = teacher.load_teacher(tmp_path, model, (8, 8, 1))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: a.pop("params/Dense_0/bias"), "missing are params/Dense_0/bias"),
        (lambda a: a.update({"params/new": np.zeros(1)}), "unknown are params/new"),
        (
            lambda a: a.update({"params/Dense_0/bias": np.zeros(3)}),
            r"misshapen are params/Dense_0/bias \(3",
        ),
    ],
)
def test_arrays_of_another_network_are_named(change, words, tmp_path):
    model = create_classifier(SMALL_NET, 10)
    variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), train=False)
    teacher.save_teacher(tmp_path, variables, {})
    arrays = array_files.read(tmp_path / teacher.WEIGHTS)
    change(arrays)
    array_files.write(tmp_path / teacher.WEIGHTS, arrays)
    with pytest.raises(UserError, match=words):
        teacher.load_teacher(tmp_path, model, (8, 8, 1))


@pytest.mark.slow
def test_accuracy_counts_every_example_once():
    spec = SPECS["digits"]
    split = data.load(spec, "test")
    model = create_classifier("cnn_half", 10)
    images = data.normalize(split.images, spec.mean, spec.std)
    variables = model.init(jax.random.key(0), images[:2], train=False)
    logits, _ = model.apply(variables, images, train=False)
    expected = 100 * np.mean(np.argmax(logits, -1) == split.labels)
    for batch_size in (7, 100, len(split.labels), 10_000):
        accuracy = create_accuracy(model, put_batches(split, batch_size), spec)
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
