"""The generated images of a run's folder, labelled by its teacher, as files in class folders."""

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dfkd_jax.data.splits import denormalize
from dfkd_jax.distillation import steps
from dfkd_jax.run import checkpoint, student, teacher
from dfkd_jax.run.setup import Setup, create_parts, parse
from dfkd_jax.runtime import files
from dfkd_jax.runtime.draw import stream
from dfkd_jax.runtime.errors import UserError

COUNT = 10_000
"""Images drawn of a generator where nobody says how many."""

TABLE = "labels.csv"
TESTED = 10
"""Every tenth image goes to the test split, to measure a classifier on."""


class Generated(NamedTuple):
    """Images of a run and what its teacher says of them."""

    images: np.ndarray  # uint8 (N, H, W, C)
    labels: np.ndarray  # int (N,), the teacher's arg max
    confidences: np.ndarray  # float (N,), its probability of that class
    num_classes: int


def generated_images(folder: Path, count: int | None = None, batch_size: int = 256) -> Generated:
    """The images of the newest whole checkpoint of a run.

    With a pool those in it, the oldest first, or the newest `count` of them. Without one as many as
    wanted of a generator, or the last round of a method that keeps none.

    Args:
      folder: of a run; nothing is changed in it.
      count: how many at most; None: the whole pool, or `COUNT`.
      batch_size: images that the teacher sees at once.

    Raises:
      UserError: it is no run's folder, has no whole checkpoint, or its teacher is gone.
      DamagedCheckpoint: the checkpoint is not that of such a run.
    """
    setup, variables = _setup_and_teacher(folder)
    parts = create_parts(setup)
    shapes = jax.eval_shape(lambda: steps.init(parts, jax.random.key(0)))
    pool = setup.config.replay.kind == "pool"
    part = "replay" if pool else "synthesizer"
    read = checkpoint.read_newest(folder / "checkpoints", {part: getattr(shapes, part)})
    if read is None:
        raise UserError(f"{folder} has no whole checkpoint; one epoch must be finished.")
    state = read[0][part]
    images = _of_pool(state, count) if pool else _drawn(setup, parts, state, count or COUNT)
    if not len(images):
        raise UserError(f"The pool of the run in {folder} is still empty.")
    return Generated(
        images, *_labelled(setup, variables, images, batch_size), setup.spec.num_classes
    )


def _setup_and_teacher(folder: Path) -> tuple[Setup, dict[str, Any]]:
    config = student.read_config(folder)
    _, directory = student.teacher_of(folder, config)
    if directory is None:
        raise UserError(
            f"The teacher of the run in {folder} is no longer where it was; its images get their "
            "labels from it."
        )
    config.teacher.checkpoint = str(directory)
    setup = parse(config, reads_data=False)
    return setup, teacher.load_teacher(directory, setup.models.teacher, setup.spec.image_shape)


def _of_pool(pool: Any, count: int | None) -> np.ndarray:
    """The images of a pool, the oldest first."""
    capacity, size = pool.images.shape[0], int(pool.size)
    order = (int(pool.next) - size + np.arange(size)) % capacity
    images = np.asarray(pool.images)[order].reshape(-1, *pool.images.shape[2:])
    return images if count is None else images[-count:]


def _drawn(setup: Setup, parts: steps.Parts, state: Any, count: int) -> np.ndarray:
    """New images of a generator, as many as wanted."""
    synthesizer, spec = parts.method.synthesizer, setup.spec

    @jax.jit
    def draw(state: Any, key: jax.Array) -> jax.Array:
        images = (synthesizer.made or synthesizer.sample)(state, key).images
        return jnp.round(denormalize(images, spec.mean, spec.std) * 255).astype(jnp.uint8)

    key = jax.random.key(setup.config.seed)
    batches = 1 if synthesizer.made else -(-count // setup.config.batch_size)
    made = [np.asarray(draw(state, stream(key, "export", i))) for i in range(batches)]
    return np.concatenate(made)[:count]


def _labelled(
    setup: Setup, variables: dict[str, Any], images: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and confidences of the teacher."""
    mean, std = (np.asarray(x, np.float32) for x in (setup.spec.mean, setup.spec.std))

    @jax.jit
    def probabilities(images: jax.Array) -> jax.Array:
        inputs = (images.astype(jnp.float32) / 255 - mean) / std
        return jax.nn.softmax(setup.models.teacher.apply(variables, inputs, train=False)[0])

    filled = np.concatenate([images, images[: -len(images) % batch_size]])  # one shape to compile
    filled = np.concatenate([filled, np.repeat(images[:1], -len(filled) % batch_size, axis=0)])
    parts = [
        np.asarray(probabilities(filled[i : i + batch_size]))
        for i in range(0, len(filled), batch_size)
    ]
    found = np.concatenate(parts)[: len(images)]
    return found.argmax(axis=1), found.max(axis=1)


def write_images(found: Generated, output: Path) -> Path:
    """Write `train/CLASS/NUMBER.png`, `test/CLASS/NUMBER.png` and a table, all of them or none.

    So `config.dataset.name=folder` reads them. CLASS is the teacher's, from 0, with leading zeros;
    each class has a folder, also one without images. Every tenth image is in the test split. The
    table has the columns file, class and confidence.

    Args:
      found: what to write.
      output: the folder; it must not exist.

    Returns:
      The table's path.

    Raises:
      UserError: the folder exists.
      OSError: it cannot be written.
    """
    if output.exists():
        raise UserError(f"{output} is there already; allowed is a folder that is yet to be made.")
    digits, width = len(str(found.num_classes - 1)), len(str(len(found.images) - 1))
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["file", "class", "confidence"])
    with files.temporary_folder(output) as new:
        for split in ("train", "test"):
            for label in range(found.num_classes):
                (new / split / f"{label:0{digits}d}").mkdir(parents=True)
        for index, (image, label, confidence) in enumerate(
            zip(found.images, found.labels, found.confidences, strict=True)
        ):
            split = "train" if index % TESTED else "test"
            name = f"{split}/{label:0{digits}d}/{index:0{width}d}.png"
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(new / name)
            rows.writerow([name, int(label), f"{confidence:.4f}"])
        (new / TABLE).write_text(table.getvalue())
        new.rename(output)
    return output / TABLE
