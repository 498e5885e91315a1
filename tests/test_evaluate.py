"""The evaluation of a classifier: its measures against numbers made by hand, and the command."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load, save

from configs import digits
from dfkd_jax import evaluate, export
from dfkd_jax.data import data_specs
from dfkd_jax.data import splits as data
from dfkd_jax.data.data_specs import teacher_card
from dfkd_jax.data.data_table import SPECS
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import checkpoint, teacher
from dfkd_jax.run.resume import check_or_write_config
from dfkd_jax.run.student import load_student
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from tests.helpers import earlier
from tests.helpers.paths import ROOT
from tests.helpers.students import expected, random_student
from tests.helpers.tiny import tiny_config

DIGITS = SPECS["digits"]
FACTS = {"dataset.name": "none", "dataset.image_size": 8, "dataset.channels": 1}
FACTS |= {"dataset.num_classes": 10, "dataset.mean": (0.4,), "dataset.std": (0.3,)}


def test_confusion_matrix_and_accuracy_of_the_classes():
    matrix = evaluate.confusion_matrix(np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 2, 2]), 3)
    np.testing.assert_array_equal(matrix, [[3, 0, 1], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(evaluate.class_accuracies(matrix), [75, 0, np.nan])


def test_calibration_error_by_hand():
    # Two bins: 0.6 and 0.8 are in (0.5, 1], with confidence 0.7 and one of two right.
    probabilities = np.array([[0.6, 0.4, 0], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3], [0.3, 0.3, 0.4]])
    labels = np.array([0, 2, 0, 2])  # the last two, of confidence 0.4, are both right
    error = evaluate.calibration_error(probabilities, labels, bins=2)
    assert error == pytest.approx(0.5 * abs(0.5 - 0.7) + 0.5 * abs(1.0 - 0.4))
    sure = np.eye(3)
    assert evaluate.calibration_error(sure, np.array([0, 1, 2])) == 0
    assert evaluate.calibration_error(sure, np.array([1, 2, 0])) == 1


@pytest.fixture(scope="module")
def split():
    return data.load(DIGITS, "test")


def varied(student, images):
    """The student with logits of mean 0, so that it calls the images by many classes."""
    bias = student.variables["params"]["fc"]["bias"]
    bias -= expected(student, images).mean(axis=0)
    return student


@pytest.fixture(scope="module")
def pair(split):
    """A student, another network as its teacher, and the class of each test image by either."""
    images = split.images.astype(np.float32) / 255
    student = varied(random_student("cnn_half", DIGITS.image_shape), images)
    other = varied(random_student("cnn", DIGITS.image_shape, seed=2), images)
    called = [expected(network, images).argmax(1) for network in (student, other)]
    assert all(len(np.unique(classes)) > 5 for classes in called)
    return student, other, *called


def make_run(root, student, other):
    """A run without data, started where its teacher, whose card has no mean, is `teachers/one`."""
    card = {**other.card, "mean": None, "std": None, "accuracy": 50.0}
    teacher.save_teacher(root / "teachers" / "one", other.variables, card)
    models = {"teacher.model": "cnn", "student.model": "cnn_half"}
    config = tiny_config(**FACTS, **models, **{"teacher.checkpoint": "teachers/one"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        check_or_write_config(config, teacher_card(config), root / "run")
    with checkpoint.open_checkpoints(root / "run" / "checkpoints") as manager:
        checkpoint.save(manager, 1, {"student": student.variables}, [{"epoch": 1}])
    return root / "run"


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"), *pair[:2])


def assert_measured(found, pair, split):
    """All that is measured, computed anew."""
    _, _, predicted, theirs = pair
    matrix = [[0] * 10 for _ in range(10)]
    for label, call in zip(split.labels, predicted, strict=True):
        matrix[label][call] += 1
    np.testing.assert_array_equal(found["confusion_matrix"], matrix)
    assert found["accuracy"] == pytest.approx(100 * np.mean(predicted == split.labels))
    agreement = 100 * np.mean(predicted == theirs)
    assert 1 < agreement < 99
    assert found["teacher_agreement"] == pytest.approx(agreement)
    for label in range(10):
        share = np.mean(predicted[split.labels == label] == label)
        assert found["class_accuracy"][label] == pytest.approx(100 * share)
    assert found["images"] == 599 and found["milliseconds_per_image"] > 0


@pytest.mark.parametrize("form", ["safetensors", "stablehlo", "onnx"])
def test_an_exported_student_against_the_teacher_given(form, pair, split, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("jax2onnx")
    file = tmp_path / f"student.{form}"
    file.write_bytes(export.FORMATS[form][f"student.{form}"](pair[0]))
    teacher.save_teacher(tmp_path / "teacher", pair[1].variables, pair[1].card)
    config = digits.get_config()
    assert evaluate.evaluate(file, config, 200)["teacher_agreement"] is None
    config.teacher.checkpoint = str(tmp_path / "teacher")
    assert_measured(evaluate.evaluate(file, config, 200), pair, split)


def test_a_teacher_is_evaluated_too(pair, split, tmp_path):
    teacher.save_teacher(tmp_path / "teacher", pair[1].variables, pair[1].card)
    found = evaluate.evaluate(tmp_path / "teacher", digits.get_config(), 200)
    assert found["accuracy"] == pytest.approx(100 * np.mean(pair[3] == split.labels))
    assert found["teacher_agreement"] is None and found["batch_size"] == 200


@pytest.mark.slow
def test_the_command_measures_a_run_from_another_folder(run, pair, split, tmp_path):
    """With the run's own teacher, named relative to where it started, and the run's mean."""
    flags = ["--config=configs/digits.py", f"--output={tmp_path / 'found.json'}"]
    process = subprocess.run(
        [sys.executable, "-m", "dfkd_jax.evaluate", str(run), *flags],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    found = files.read_json(tmp_path / "found.json")
    assert_measured(found, pair, split)
    assert (found["target"], found["dataset"]) == (str(run), "digits")
    found["confusion_matrix"] = np.array(found["confusion_matrix"])
    assert process.stdout == evaluate.table(found) + "\n"


def test_a_teacher_that_is_gone_or_another_one_is_not_compared_with(pair, tmp_path):
    run, config = make_run(tmp_path, *pair[:2]), digits.get_config()
    one, moved = tmp_path / "teachers" / "one", tmp_path / "moved"
    one.rename(moved)
    card = load_student(run).card
    assert card["mean"] == [0.4] and card["teacher"]["accuracy"] == 50
    assert evaluate.evaluate(run, config, 200)["teacher_agreement"] is None
    teacher.save_teacher(one, pair[0].variables, pair[0].card)
    assert evaluate.evaluate(run, config, 200)["teacher_agreement"] is None
    config.teacher.checkpoint = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone', which holds no teacher\.json"):
        evaluate.evaluate(run, config, 200)


def refusal(path, config=None):
    """The one sentence, which names the file."""
    with pytest.raises((UserError, ValueError)) as caught:
        evaluate.evaluate(path, config or digits.get_config(), 200)
    sentence = str(caught.value)
    assert str(path) in sentence and sentence.endswith(".") and "\n" not in sentence
    return sentence


def test_another_size_of_images_or_number_of_classes_is_refused(pair, tmp_path):
    file, config = tmp_path / "student.safetensors", digits.get_config()
    large = random_student("cnn_half", (16, 16, 1))
    file.write_bytes(export.to_safetensors(large))
    words = ("(16, 16, 1, 10)", "'digits' of --config has (8, 8, 1, 10)")
    assert all(word in refusal(file) for word in words)
    teacher.save_teacher(tmp_path / "teacher", large.variables, large.card)
    file.write_bytes(export.to_safetensors(pair[0]))
    config.teacher.checkpoint = str(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"teacher takes images.*\(16, 16, 1, 10\)"):
        evaluate.evaluate(file, config, 200)


RAN = []


def attack(num_classes):
    """What a crafted file would like to be called."""
    RAN.append(num_classes)
    return create_classifier("cnn_half", num_classes)


def test_a_file_does_not_choose_what_is_imported(pair, split, tmp_path):
    name = f"{__name__}:attack"
    card = {**pair[0].card, "model": name}
    file = tmp_path / "student.safetensors"
    file.write_bytes(export.to_safetensors(pair[0]._replace(card=card)))
    teacher.save_teacher(tmp_path / "teacher", pair[0].variables, card)
    for path, field in ((file, "student"), (tmp_path / "teacher", "teacher")):
        sentence = refusal(path)
        assert f"{name!r} to import" in sentence and f"config.{field}.model" in sentence
        assert not RAN
        config = digits.get_config()
        config[field].model = name
        found = evaluate.evaluate(path, config, 200)
        assert found["accuracy"] == pytest.approx(100 * np.mean(pair[2] == split.labels))
        assert RAN.pop() == 10 and not RAN


def test_a_runs_folder_has_imported_what_its_configuration_names(pair, split, tmp_path):
    """Its student and its teacher, by `evaluate` and by `export`; no other teacher."""
    name = f"{__name__}:attack"
    card = {**pair[0].card, "model": name}
    teacher.save_teacher(tmp_path / "teacher", pair[0].variables, card)
    fields = {"teacher.model": name, "student.model": name}
    config = tiny_config(**FACTS, **fields, **{"teacher.checkpoint": str(tmp_path / "teacher")})
    check_or_write_config(config, teacher_card(config), tmp_path / "run")
    with checkpoint.open_checkpoints(tmp_path / "run" / "checkpoints") as manager:
        checkpoint.save(manager, 1, {"student": pair[0].variables}, [{"epoch": 1}])
    found = evaluate.evaluate(tmp_path / "run", digits.get_config(), 200)
    assert found["accuracy"] == pytest.approx(100 * np.mean(pair[2] == split.labels))
    assert found["teacher_agreement"] == 100 and RAN == [10, 10]
    export.export(tmp_path / "run", "safetensors", tmp_path / "export")
    assert RAN == [10, 10, 10]
    RAN.clear()
    teacher.save_teacher(tmp_path / "other", pair[0].variables, card)
    config = digits.get_config()
    config.teacher.checkpoint = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"other names .* to import.*config\.teacher\.model"):
        evaluate.evaluate(tmp_path / "run", config, 200)
    assert RAN == [10]
    RAN.clear()


def test_logits_that_are_not_finite_are_no_answer(pair, tmp_path):
    """NaN would be class 0."""
    broken = random_student("cnn_half", DIGITS.image_shape)
    broken.variables["params"]["fc"]["bias"][3] = np.inf
    file, config = tmp_path / "student.stablehlo", digits.get_config()
    file.write_bytes(export.to_stablehlo(broken))
    assert "NaN or infinite logits for 599 of 599 images" in refusal(file)
    file.write_bytes(export.to_stablehlo(pair[0]))
    earlier.save_weights(tmp_path / "teacher", broken.variables)
    files.write_json(tmp_path / "teacher" / data_specs.CARD, broken.card)
    config.teacher.checkpoint = str(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"The teacher in .* holds values in params\.fc\.bias that"):
        evaluate.evaluate(file, config, 200)


def test_weights_that_are_not_finite_are_named(pair, tmp_path):
    name = "tests.helpers.networks:Normed"
    own = random_student(name, DIGITS.image_shape)
    config = digits.get_config()
    config.student.model = name
    own.variables["batch_stats"]["BatchNorm_0"]["var"][0] = np.nan
    network = random_student("cnn_half", DIGITS.image_shape)
    network.variables["params"]["fc"]["bias"][3] = np.inf
    for student, words in (
        (own, "holds values in batch_stats.BatchNorm_0.var that are no finite numbers"),
        (network, "not all values are finite floating-point numbers in fc.bias."),
    ):
        file = tmp_path / "student.safetensors"
        file.write_bytes(export.to_safetensors(student))
        sentence = refusal(file, config)
        assert words in sentence


@pytest.mark.parametrize(
    "damage, words",
    [
        ({"num_classes": '"x"'}, ["num_classes '\"x\"'", "1 or more"]),
        ({"num_classes": "9"}, ["not those of a cnn_half for 9 classes", "fc.weight (10, 32)"]),
        ({"image_shape": "null"}, ["image_shape 'null'", "three numbers"]),
        ({"image_shape": "[8, 8, 3]"}, ["has 1 numbers as metadata mean", "allowed are 3"]),
        ({"mean": "[0.4"}, ["mean '[0.4'", "a list of numbers"]),
        ({"mean": "[1" + 400 * "0" + "]"}, ["mean '[10"]),
        ({"mean": "[NaN]"}, ["mean '[NaN]'"]),
        ({"std": "[0]"}, ["std '[0]'", "above 0"]),
        ({"names": "tensorflow"}, ["names 'tensorflow'", "torch or flax"]),
        ({"names": None, "std": None}, ["has no metadata names, std"]),
        ({"model": "cnn_third"}, ["Unknown classifier 'cnn_third'"]),
        ({"model": "lenet5", "names": "flax"}, ["LeNet-5 takes 32×32 or 28×28 images"]),
        ({"names": "flax"}, ["of another shape are batch_stats.bn1.mean, "]),
        ({"conv1.weight": None}, ["missing are conv1.weight"]),
        ({"conv1.weight": np.ones((16, 1, 5, 5), np.float32)}, ["conv1.weight (16, 1, 5, 5)"]),
    ],
)
def test_a_damaged_export_is_one_sentence(damage, words, pair, tmp_path):
    file = tmp_path / "student.safetensors"
    content = export.to_safetensors(pair[0])
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    arrays = load(content)
    for key, value in damage.items():
        part = arrays if key in arrays else metadata
        part[key] = value
        if value is None:
            del part[key]
    file.write_bytes(save(arrays, metadata))
    sentence = refusal(file)
    assert all(word in sentence for word in words), sentence


def test_a_misshapen_array_of_ones_own_module_is_named(tmp_path):
    name = "tests.helpers.networks:Normed"
    student = random_student(name, DIGITS.image_shape)
    student.variables["params"]["Dense_0"]["kernel"] = np.zeros((3, 10), np.float32)
    file, config = tmp_path / "student.safetensors", digits.get_config()
    file.write_bytes(export.to_safetensors(student))
    config.student.model = name
    assert "of another shape are params.Dense_0.kernel." in refusal(file, config)


@pytest.mark.parametrize("form", ["safetensors", "stablehlo", "onnx"])
def test_what_is_no_export_is_one_sentence(form, tmp_path):
    file = tmp_path / f"student.{form}"
    file.write_bytes(b"no export at all")
    refusal(file)


def test_a_file_of_pytorch_under_the_name_of_an_export_is_one_sentence(pair, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = load(export.to_safetensors(pair[0]))
    file = tmp_path / "student.safetensors"
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
    assert "is no safetensors file" in refusal(file)


def test_the_table_shows_what_was_measured():
    found = {
        "accuracy": 75.0,
        "images": 4,
        "dataset": "digits",
        "teacher_agreement": 50.0,
        "calibration_error": 0.125,
        "milliseconds_per_image": 0.5,
        "batch_size": 2,
        "confusion_matrix": np.array([[2, 1], [0, 1]]),
        "class_accuracy": np.array([66.667, 100.0]),
    }
    lines = [" ".join(line.split()) for line in evaluate.table(found).splitlines()]
    assert lines == [
        "accuracy 75.00 % of 4 images of digits",
        "teacher agrees 50.00 %",
        "calibration error 0.1250 (15 bins)",
        "time per image 0.5000 ms in batches of 2",
        "class accuracy % called (row: true class, column: predicted)",
        "0 66.67 2 1",
        "1 100.00 0 1",
    ]
    for nothing in (None, np.nan):  # of a class without images, read from a file or not
        found["class_accuracy"] = [nothing, 100.0]
        lines = evaluate.table(found).splitlines()
        assert [line.split()[:2] for line in lines[-2:]] == [["0", "–"], ["1", "100.00"]]
        assert len(lines[-2]) == len(lines[-1])
    many = found | {"confusion_matrix": np.eye(30, dtype=int), "class_accuracy": np.ones(30)}
    lines = evaluate.table(many | {"teacher_agreement": None}).splitlines()
    assert len(lines) == 5 + 20 + 1 and "no teacher known" in lines[1] and "file" in lines[-1]


def test_the_command_refuses_what_is_no_target(tmp_path):
    command = [sys.executable, "-m", "dfkd_jax.evaluate", str(tmp_path / "none.pt")]
    process = subprocess.run(
        [*command, "--config=configs/digits.py"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2 and "TARGET is" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
