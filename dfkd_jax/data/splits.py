"""Labelled images: to train and test teachers, and to test students. No student trains on them.

Whole splits are held in memory as uint8. Each kind of source is a module with three functions:

    find(spec, data_dir) -> folder            checked to hold the data set
    files(folder, split) -> paths             those whose change is a change of the split
    read(folder, split) -> (size, examples)   still encoded; `decoded_cache` decodes and keeps them
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.typing import DTypeLike

from dfkd_jax.data import decoded_cache, folder_data, tfds_data, tiny_imagenet
from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.runtime.errors import UserError

_SOURCES = {"folder": folder_data, "tiny_imagenet": tiny_imagenet}  # of the others: tfds_data
_DIGITS = Path(__file__).with_name("digits.npz")


class Split(NamedTuple):
    """Images, uint8 (N, H, W, C) in 0..255, and labels, int32 (N,)."""

    images: np.ndarray
    labels: np.ndarray


def check_prepared(
    spec: DatasetSpec, data_dir: str | os.PathLike | None = None, *, train: bool = True
) -> None:
    """Return if the data set is there; reads no images.

    Args:
      spec: of the data set.
      data_dir: of `folder`, the folder; of others the folder of prepared data sets, None for
        `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`.
      train: whether `folder` must have a training split.

    Raises:
      UserError: train and test images of `folder` have different classes.
      DataMissing: it is not prepared; says how to prepare it.
    """
    if spec.name not in ("digits", "none"):
        _SOURCES.get(spec.name, tfds_data).find(spec, data_dir)
    if spec.name == "folder" and train:
        folder_data.class_names(data_dir, "train")


def load(
    spec: DatasetSpec,
    split: str,
    data_dir: str | os.PathLike | None = None,
    validation_size: int = 0,
) -> Split:
    """Read one split whole.

    Args:
      spec: of the data set.
      split: "train" or "test".
      data_dir: see `check_prepared`.
      validation_size: more than 0 splits the training images: "test" is so many of them, a fixed
        random choice, and "train" the others. The data set's own test split is not read.

    Returns:
      N images of `spec.image_shape`, and their labels, in the source's order.

    Raises:
      ValueError: no split of that name; the files hold something else, or nothing; one of them is
        no image; `validation_size` leaves nothing to train on.
      DataMissing: the data set is not prepared; says how to prepare it.
    """
    if split not in ("train", "test"):
        raise ValueError(f"the split is {split!r} but must be 'train' or 'test'.")
    if validation_size:
        images, labels = load(spec, "train", data_dir)
        if validation_size >= labels.size:
            raise UserError(
                f"config.dataset.validation_size is {validation_size}; allowed is less than the "
                f"{labels.size} training images of {spec.name}."
            )
        held_out = np.zeros(labels.size, bool)
        # RandomState, as its stream is frozen across NumPy versions.
        held_out[np.random.RandomState(0).permutation(labels.size)[:validation_size]] = True
        chosen = held_out if split == "test" else ~held_out
        return Split(images[chosen], labels[chosen])
    if spec.name == "digits":
        return _load_digits(split)
    source = _SOURCES.get(spec.name, tfds_data)
    folder = source.find(spec, data_dir)
    height, width, channels = spec.image_shape
    row = decoded_cache.row_type((height - 2 * spec.pad, width - 2 * spec.pad, channels))

    def decoded() -> np.ndarray:
        size, examples = source.read(folder, split)
        if not size:
            raise UserError(f"The {split} split of {spec.name} in {folder} holds no images.")
        resize = spec.name == "folder"
        return decoded_cache.decode(examples, size, row, spec.num_classes, resize=resize)

    name = f"{spec.name}-{folder.name}-{split}"
    rows = decoded_cache.kept(name, folder, source.files(folder, split), row, decoded)
    sides = (spec.pad, spec.pad)
    # `pad` also copies the images out of the rows, to be contiguous.
    images = np.pad(rows["image"], ((0, 0), sides, sides, (0, 0)))
    return Split(images, np.ascontiguousarray(rows["label"]))


def loader(config: ml_collections.ConfigDict, spec: DatasetSpec) -> Callable[[str], Split]:
    """`load` of the data set of `config`: split ↦ its images."""
    dataset = config.dataset
    return partial(
        load, spec, data_dir=dataset.data_dir, validation_size=dataset.get("validation_size", 0)
    )


def tested_split(dataset: Mapping[str, Any] | ml_collections.ConfigDict) -> str:
    """What accuracies are measured on by `config.dataset`: "test" or "validation" images."""
    return "validation" if dataset.get("validation_size", 0) else "test"


def tested_on(config: ml_collections.ConfigDict) -> str:
    """The name of the data set, with a word where validation images are the test images."""
    name = config.dataset.name
    return name if tested_split(config.dataset) == "test" else f"{name} validation"


def normalize(
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """(images / 255 − mean) / std.

    Args:
      images: uint8 (..., C) in 0..255.
      mean: C means of the images in [0, 1].
      std: C standard deviations of the same.
      dtype: of the result.

    Returns:
      An array of the same shape.

    Raises:
      ValueError: the images are not uint8, so perhaps already normalised.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images to normalise must be uint8, not {images.dtype}.")
    scaled = jnp.asarray(images, dtype) / 255.0
    return (scaled - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Normalised images, float (..., C), back to [0, 1]; what lies outside is clipped."""
    return jnp.clip(images * jnp.asarray(std) + jnp.asarray(mean), 0.0, 1.0)


def augmented(keys: jax.Array, images: jax.Array, flip: bool, pad: int = 4) -> jax.Array:
    """Random crops of the zero-padded images and, with `flip`, random mirror images.

    Args:
      keys: (B,), one an image.
      images: (B, H, W, C), any dtype.
      flip: whether a mirrored image keeps its label.
      pad: pixels on each side.
    """
    _, height, width, channels = images.shape

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        image = jax.lax.dynamic_slice(padded, (top, left, 0), (height, width, channels))
        mirror = jax.random.bernoulli(flip_key) if flip else False
        return jnp.where(mirror, image[:, ::-1], image)

    return jax.vmap(one)(keys, images)


def _load_digits(split: str) -> Split:
    """The embedded images: a third of each class are test images.

    They are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak,
    UCI Machine Learning Repository 1998, CC BY 4.0), 8×8 counts of black pixels in 0..16.
    """
    with np.load(_DIGITS, allow_pickle=False) as file:
        images = np.rint(file["images"][..., None] * (255 / 16)).astype(np.uint8)
        labels = file["labels"].astype(np.int32)
    # A third of each class, in the frozen stream too.
    shuffle = np.random.RandomState(0).permutation
    test = np.zeros(labels.size, bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        test[shuffle(members)[: round(members.size / 3)]] = True
    chosen = test if split == "test" else ~test
    return Split(images[chosen], labels[chosen])
