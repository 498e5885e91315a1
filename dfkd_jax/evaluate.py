"""Command line: `python -m dfkd_jax.evaluate TARGET --config=configs/digits.py`: how good a
classifier is on the test split.

TARGET is a run's folder (its student), a teacher's, or an exported .safetensors, .stablehlo or
.onnx file. The configuration names the data set, and for an exported file the teacher to compare
with, `--config.teacher.checkpoint`.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging

from dfkd_jax.data import data_specs
from dfkd_jax.data import splits as data
from dfkd_jax.networks.classifiers import classifier_in
from dfkd_jax.networks.own_module import is_own
from dfkd_jax.run import command_line, student, teacher
from dfkd_jax.run.checkpoint import DamagedCheckpoint
from dfkd_jax.run.command_line import CONFIG, FLAG_ERRORS, fail, sentence
from dfkd_jax.run.exported import Read, read_onnx, read_safetensors, read_stablehlo
from dfkd_jax.run.generated import generated_images
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError

flags.adopt_module_key_flags(command_line)
OUTPUT = flags.DEFINE_string("output", None, "File of the result; evaluation.json beside TARGET.")
JUDGE = flags.DEFINE_string(
    "judge",
    None,
    "Folder of an independent classifier: how often it names the teacher's class on images that "
    "the run of TARGET generated.",
)
BATCH = flags.DEFINE_integer("batch_size", 100, "Images at once.", lower_bound=1)

BINS = 15
REPEATS = 10
Logits = Callable[[np.ndarray], Any]  # images in [0, 1], float32 (B, H, W, C) ↦ logits (B, K)
READERS: dict[str, Callable[[Path, ml_collections.ConfigDict], Read]] = {
    ".safetensors": lambda path, config: read_safetensors(path, config.student.model),
    ".stablehlo": lambda path, config: read_stablehlo(path),
    ".onnx": lambda path, config: read_onnx(path),
}


class Target(NamedTuple):
    """A classifier, and the teacher that it is compared with."""

    logits: Logits
    teacher: Logits | None


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of class i, a row, are called j, a column; int (K, K)."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def class_accuracies(matrix: np.ndarray) -> np.ndarray:
    """Percent of each class that is called so, (K,), from the confusion matrix; NaN without any."""
    counts = matrix.sum(axis=1)
    shares = np.divide(np.diag(matrix), counts, out=np.full(len(matrix), np.nan), where=counts > 0)
    return 100.0 * shares


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error, in [0, 1].

    Σ_b (n_b / N) |accuracy_b − confidence_b| over equal bins ((b−1)/B, b/B] of the confidence,
    which is the probability of the predicted class; both are means over the n_b images of the bin.
    (Guo et al., On Calibration of Modern Neural Networks, ICML 2017.)

    Args:
      probabilities: (N, K), rows sum to 1.
      labels: (N,).
      bins: how many.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(index, right - confidence, minlength=bins)  # n_b (accuracy_b − confidence_b)
    return float(np.abs(gap).sum() / len(labels))


def milliseconds_per_image(logits: Logits, images: np.ndarray, repeats: int = REPEATS) -> float:
    """Median over `repeats` calls on these images, after one that compiles, per image."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        np.asarray(logits(images))
        times.append(time.perf_counter() - started)
    return 1000.0 * statistics.median(times[1:]) / len(images)


def read_target(path: Path, config: ml_collections.ConfigDict, shape: tuple[int, ...]) -> Target:
    """What is to be evaluated.

    Args:
      path: of a folder or file.
      config: its teacher, if given, is the one to compare with.
      shape: (H, W, C, K) of the data set.

    Raises:
      UserError, DamagedCheckpoint: one of the two cannot be read, or takes other images
        or has other classes than the data set.
    """
    run, directory = config, None
    if config.teacher.checkpoint is not None:
        directory = Path(config.teacher.checkpoint)
        if not data_specs.is_teacher(directory):
            raise UserError(
                f"config.teacher.checkpoint is {str(directory)!r}, which holds no "
                f"{data_specs.CARD}."
            )
    if path.suffix in READERS and path.is_file():
        read = READERS[path.suffix](path, config)
    elif data_specs.is_teacher(path):
        read = _teacher(path, config)
    elif path.is_dir():
        found = student.load_student(path)
        read = jax.jit(student.logits_of(found)), student.shape_of(found.card)
        if directory is None:
            run = student.read_config(path)
            _, directory = student.teacher_of(path, run)
    else:
        raise UserError(
            f"TARGET is {str(path)!r}; allowed is the folder of a run or a teacher, or a file "
            f"ending in {', '.join(READERS)}."
        )
    theirs = None if directory is None else _teacher(directory, run)
    for place, pair in ((path, read), (directory, theirs)):
        if pair is not None and tuple(pair[1]) != tuple(shape):
            raise UserError(
                f"{place} takes images and has classes (H, W, C, K) {tuple(pair[1])}, but the data "
                f"set {config.dataset.name!r} of --config has {tuple(shape)}."
            )
    return Target(read[0], None if theirs is None else theirs[0])


def _teacher(path: Path, config: ml_collections.ConfigDict) -> Read:
    """The teacher in a folder; a configuration that goes with it says what its card leaves open."""
    card = files.read_json(path / data_specs.CARD)
    if card.get("mean") is None:  # a converted one need not say it
        spec = data_specs.spec(config, card)
        card |= {"mean": spec.mean, "std": spec.std}
    if is_own(card["model"]) and card["model"] != config.teacher.model:
        raise UserError(
            f"{path} names {card['model']!r} to import, which would run code; allowed is that of "
            f"config.teacher.model, which is {config.teacher.model!r}."
        )
    module = classifier_in(path, card["model"], card["num_classes"])
    variables = teacher.load_teacher(path, module, tuple(card["image_shape"]))
    found = student.Student(module, variables, card)
    return jax.jit(student.logits_of(found)), student.shape_of(card)


def evaluate(path: Path, config: ml_collections.ConfigDict, batch_size: int) -> dict[str, Any]:
    """Measure the classifier of `path` on the whole test split.

    Returns:
      `accuracy` and `class_accuracy` (percent), `confusion_matrix` (rows: true classes),
      `teacher_agreement` (percent of the images that both call the same; None without a teacher),
      `calibration_error` (see `calibration_error`), `milliseconds_per_image` with the `batch_size`
      that it was measured at, `images`, `dataset` and `target`.

    Raises:
      UserError, DamagedCheckpoint: see `read_target`; there is no test data, or logits are not
        finite.
      DataMissing: the data set is not prepared.
    """
    spec = data_specs.spec(config)
    if spec.name == "none":
        raise UserError("config.dataset.name is 'none'; allowed is a data set with test images.")
    target = read_target(path, config, (*spec.image_shape, spec.num_classes))
    images, labels = data.loader(config, spec)("test")
    batch_size = min(batch_size, len(labels))
    scores = _all_logits(str(path), target.logits, images, batch_size)
    predicted = scores.argmax(axis=1)
    agreement = None
    if target.teacher is not None:
        theirs = _all_logits("The teacher to compare with", target.teacher, images, batch_size)
        agreement = 100.0 * float(np.mean(theirs.argmax(axis=1) == predicted))
    matrix = confusion_matrix(labels, predicted, spec.num_classes)
    one = _scaled(images[:batch_size])
    return {
        "target": path,
        "dataset": spec.name,
        "images": len(labels),
        "accuracy": 100.0 * float(np.trace(matrix)) / len(labels),
        "class_accuracy": class_accuracies(matrix),
        "confusion_matrix": matrix,
        "teacher_agreement": agreement,
        "calibration_error": calibration_error(np.asarray(jax.nn.softmax(scores)), labels),
        "milliseconds_per_image": milliseconds_per_image(target.logits, one),
        "batch_size": batch_size,
    }


def judged(path: Path, judge: Path, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """How a second network sees the generated images of a run.

    Images that only the teacher recognises are of little use to others. The measure asks a
    classifier that took no part in making them.

    Args:
      path: the run's folder.
      judge: folder of a classifier, a run's or a teacher's, of such images and classes.
      config: names the judge's network where that is one of one's own.

    Returns:
      `judge_agreement`, percent of the images on which the judge names the teacher's class;
      `judged_images`, their number; `judge`, its folder.

    Raises:
      UserError, DamagedCheckpoint: see `read_target` and `generated.generated_images`.
    """
    found = generated_images(path)
    shape = (*found.images.shape[1:], found.num_classes)
    target = read_target(judge, config, shape)
    batch_size = min(256, len(found.images))
    scores = _all_logits(str(judge), target.logits, found.images, batch_size)
    same = scores.argmax(axis=1) == found.labels
    return {
        "judge": judge,
        "judge_agreement": 100.0 * float(np.mean(same)),
        "judged_images": len(same),
    }


def _scaled(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / np.float32(255)


def _all_logits(where: str, logits: Logits, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Batch by batch; the last is filled up, so that one shape is compiled.

    Raises:
      UserError: some are not finite; says of what, as `where` names it.
    """
    filled = np.concatenate([images, images[: -len(images) % batch_size]])
    parts = [
        np.asarray(logits(_scaled(filled[i : i + batch_size])))
        for i in range(0, len(filled), batch_size)
    ]
    scores = np.concatenate(parts)[: len(images)]
    wrong = int((~np.isfinite(scores)).any(axis=1).sum())
    if wrong:
        raise UserError(
            f"{where} gives NaN or infinite logits for {wrong} of {len(images)} images, which name "
            "no class."
        )
    return scores


def table(found: dict[str, Any]) -> str:
    """The result for people to read."""
    agreement = found["teacher_agreement"]
    rows = {
        "accuracy": f"{found['accuracy']:.2f} % of {found['images']} images of {found['dataset']}",
        "teacher agrees": "no teacher known" if agreement is None else f"{agreement:.2f} %",
        "calibration error": f"{found['calibration_error']:.4f} ({BINS} bins)",
        "time per image": f"{found['milliseconds_per_image']:.4f} ms in batches of "
        f"{found['batch_size']}",
    }
    if "judge" in found:
        rows["judge agrees"] = (
            f"{found['judge_agreement']:.2f} % of {found['judged_images']} generated images "
            f"({found['judge']})"
        )
    lines = [f"{name:18} {value}" for name, value in rows.items()]
    lines.append("class  accuracy %  called (row: true class, column: predicted)")
    for i, row in enumerate(found["confusion_matrix"].tolist()[:20]):
        called = " ".join(f"{n:5d}" for n in row[:20])
        accuracy = found["class_accuracy"][i]  # None or NaN of a class without images
        measured = accuracy is not None and math.isfinite(accuracy)
        lines.append(f"{i:5d}  {f'{accuracy:.2f}' if measured else '–':>10}  {called}")
    if len(found["class_accuracy"]) > 20:
        lines.append("… all classes are in the file")
    return "\n".join(lines)


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parse the command line; what is wrong with it becomes one sentence and exit code 2."""
    try:
        command_line.check_fields(arguments)
        rest = flags.FLAGS(command_line.with_named_config(arguments))
        if CONFIG.value is None:
            raise ValueError("--config is missing; give a name such as digits, or a file.")
        if len(rest) != 2:
            raise ValueError(f"{len(rest) - 1} TARGETs are given; allowed is one folder or file.")
        dict(CONFIG.value)  # a file that could not be read shows on first access
    except FLAG_ERRORS as error:
        sys.exit(fail(sentence(error), 2))
    return rest


def main(arguments: Sequence[str]) -> int | None:
    """Evaluate what the arguments name; the exit code."""
    logging.set_verbosity(logging.WARNING)
    path = Path(arguments[1])
    default = (path if path.is_dir() else path.parent) / "evaluation.json"
    try:
        # First, as its folder may be mistaken.
        judge = None if JUDGE.value is None else Path(JUDGE.value)
        opinion = {} if judge is None else judged(path, judge, CONFIG.value)
        found = {**evaluate(path, CONFIG.value, BATCH.value), **opinion}
        files.write_json(OUTPUT.value or default, found)
    except files.CannotWrite as error:
        return fail(f"{error}.", 2)
    except (UserError, DamagedCheckpoint, OSError) as error:
        return fail(str(error), 2)
    print(table(found))
    return None


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
