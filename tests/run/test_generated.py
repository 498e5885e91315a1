"""Generated images of a run's folder: from pool or generator, labelled, as files that load."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dfkd_jax import evaluate, export
from dfkd_jax.data import splits
from dfkd_jax.data.data_specs import spec as spec_of
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import generated, train
from dfkd_jax.run.generated import Generated
from dfkd_jax.run.teacher import load_teacher
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import SMALL_NET, tiny_config

pytestmark = pytest.mark.slow

RUN = {"epochs": 2, "iterations_per_epoch": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with a pool and one without, of one teacher."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("fast", "mad"):
        config = tiny_config(method, **RUN)
        if method == "mad":
            config.teacher.checkpoint = str(folder / "fast" / "teacher")
        train.run(config, folder / method, Console(quiet=True))
    return folder


def teachers_labels(folder, images):
    module = create_classifier(SMALL_NET, 10)
    variables = load_teacher(folder / "fast" / "teacher", module, (8, 8, 1))
    spec = spec_of(tiny_config())
    inputs = splits.normalize(jnp.asarray(images), spec.mean, spec.std)
    scores = jax.nn.softmax(module.apply(variables, inputs, train=False)[0])
    return np.argmax(scores, -1), np.max(scores, -1)


def test_a_pools_images_come_oldest_first(runs):
    """Five rounds of 8 (two in the warm-up iteration, then three) in a pool of 24."""
    found = generated.generated_images(runs / "fast")
    assert found.images.shape == (24, 8, 8, 1) and found.images.dtype == np.uint8
    labels, confidences = teachers_labels(runs, found.images)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.confidences, confidences, rtol=1e-4)
    newest = generated.generated_images(runs / "fast", 10)
    np.testing.assert_array_equal(newest.images, found.images[-10:])


def test_a_generator_makes_as_many_as_wanted(runs):
    found = generated.generated_images(runs / "mad", 20)
    assert found.images.shape == (20, 8, 8, 1)
    assert len(np.unique(found.images, axis=0)) > 10
    np.testing.assert_array_equal(found.labels, teachers_labels(runs, found.images)[0])
    again = generated.generated_images(runs / "mad", 20)
    np.testing.assert_array_equal(found.images, again.images)


def test_class_folders_are_read_as_a_data_set(runs, tmp_path, capsys):
    output = tmp_path / "images"
    arguments = [str(runs / "fast"), "--format=images", f"--output={output}"]
    assert export.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(output / "labels.csv")
    config = tiny_config(
        **{"dataset.name": "folder", "dataset.data_dir": str(output)},
        **{"dataset.image_size": 8, "dataset.channels": 1, "dataset.mean": (0.3,)},
        **{"dataset.std": (0.4,)},
    )
    spec = spec_of(config)
    assert spec.num_classes == 10 and spec.image_shape == (8, 8, 1)
    found = generated.generated_images(runs / "fast")
    rows = list(csv.DictReader((output / "labels.csv").read_text().splitlines()))
    assert len(rows) == 24
    for index, row in enumerate(rows):
        with Image.open(output / row["file"]) as image:
            np.testing.assert_array_equal(np.asarray(image)[..., None], found.images[index])
        assert int(row["class"]) == found.labels[index] == int(row["file"].split("/")[1])
        assert abs(float(row["confidence"]) - found.confidences[index]) < 1e-3
        assert row["file"].startswith("test/" if index % 10 == 0 else "train/")
    train_split, test_split = (splits.loader(config, spec)(s) for s in ("train", "test"))
    assert len(train_split.labels) == 21 and len(test_split.labels) == 3
    assert sorted(train_split.labels.tolist() + test_split.labels.tolist()) == sorted(
        found.labels.tolist()
    )
    # A second time nothing is written over.
    assert export.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err


def test_colours_and_many_classes_have_names_that_sort(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 4, 4, 3), np.uint8)
    labels = np.array([0, 5, 99, 10, 2, 2, 7, 1, 0, 64, 11, 3])
    generated.write_images(Generated(images, labels, np.ones(12), 100), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out/train").iterdir())
    assert names == [f"{i:02d}" for i in range(100)]
    with Image.open(tmp_path / "out/train/99/02.png") as image:
        np.testing.assert_array_equal(np.asarray(image), images[2])


def test_what_cannot_be_exported_is_one_sentence(runs, tmp_path, capsys):
    for arguments, words in (
        ([str(tmp_path), "--format=images"], "holds no config.json"),
        ([str(runs / "fast"), "--format=images", "--count=0"], "'0' is not a number of 1 or more"),
        (
            [str(runs / "fast"), "--format=safetensors", "--count=5"],
            "--count is 5 but --format is safetensors; allowed is images.",
        ),
    ):
        try:
            code = export.main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        assert code == 2 and words in capsys.readouterr().err


def test_a_second_network_judges_the_images(runs):
    """The run's own teacher agrees with itself; an untrained network hardly."""
    teacher = runs / "fast" / "teacher"
    found = evaluate.judged(runs / "fast", teacher, tiny_config())
    assert found == {"judge": teacher, "judge_agreement": 100.0, "judged_images": 24}
    student = evaluate.judged(runs / "fast", runs / "mad", tiny_config())
    assert 0 <= student["judge_agreement"] <= 100
    with pytest.raises(UserError, match="allowed is the folder of a run or a teacher"):
        evaluate.judged(runs / "fast", runs / "nothing", tiny_config())
