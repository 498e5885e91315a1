"""The evaluation of a classifier: its measures against numbers made by hand, and the command."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import digits
from dfkd_jax import evaluate_command, export, teacher
from dfkd_jax.config import UserError
from dfkd_jax.data_table import SPECS
from tests.test_export import random_student

DIGITS = SPECS["digits"]


def test_confusion_matrix_and_accuracy_of_the_classes():
    matrix = evaluate_command.confusion_matrix(
        np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 2, 2]), 3
    )
    np.testing.assert_array_equal(matrix, [[3, 0, 1], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(evaluate_command.class_accuracies(matrix), [75, 0, np.nan])


def test_calibration_error_by_hand():
    # Two bins: 0.6 and 0.8 are in (0.5, 1], with confidence 0.7 and one of two right.
    probabilities = np.array([[0.6, 0.4, 0], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3], [0.3, 0.3, 0.4]])
    labels = np.array([0, 2, 0, 2])  # the last two, of confidence 0.4, are both right
    error = evaluate_command.calibration_error(probabilities, labels, bins=2)
    assert error == pytest.approx(0.5 * abs(0.5 - 0.7) + 0.5 * abs(1.0 - 0.4))
    sure = np.eye(3)
    assert evaluate_command.calibration_error(sure, np.array([0, 1, 2])) == 0
    assert evaluate_command.calibration_error(sure, np.array([1, 2, 0])) == 1


def test_a_teacher_and_its_export_are_the_same_and_agree(tmp_path):
    student = random_student("cnn_half", DIGITS.image_shape)
    card = {**student.card, "num_classes": 10}
    teacher.save_teacher(tmp_path / "teacher", jax.device_put(student.variables), card)
    file = tmp_path / "student.safetensors"
    file.write_bytes(export.to_safetensors(student._replace(card=card)))
    config = digits.get_config()
    config.teacher.model = "cnn_half"
    own = evaluate_command.evaluate(tmp_path / "teacher", config, 200)
    config.teacher.checkpoint = str(tmp_path / "teacher")
    config.dataset.name = "digits"
    exported = evaluate_command.evaluate(file, config, 200)
    assert own["teacher_agreement"] is None and exported["teacher_agreement"] == 100
    np.testing.assert_array_equal(own["confusion_matrix"], exported["confusion_matrix"])
    assert own["confusion_matrix"].sum() == own["images"] == 599
    right = np.trace(own["confusion_matrix"])
    assert own["accuracy"] == pytest.approx(100 * right / 599)
    assert own["milliseconds_per_image"] > 0 and own["batch_size"] == 200

    config.teacher.checkpoint = None
    card["image_shape"] = (16, 16, 1)
    file.write_bytes(export.to_safetensors(student._replace(card=card)))
    with pytest.raises(UserError, match=r"\(16, 16, 1, 10\).*'digits'.*\(8, 8, 1, 10\)"):
        evaluate_command.evaluate(file, config, 200)


def test_the_command_refuses_what_is_no_target(tmp_path):
    command = [sys.executable, "-m", "dfkd_jax.evaluate", str(tmp_path / "none.pt")]
    process = subprocess.run(
        [*command, "--config=configs/digits.py"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2 and "TARGET is" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
