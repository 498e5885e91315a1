"""Top-1 accuracy of a classifier in evaluation mode."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.data.splits import Split, normalize
from dfkd_jax.networks.given import AnyClassifier
from dfkd_jax.runtime.devices import Devices


class Batches(NamedTuple):
    """Labelled images on the device, in equal batches."""

    batches: list[tuple[jax.Array, jax.Array]]  # uint8 (B, H, W, C) and int32 (B,)
    count: int  # of images, without those that fill the last batch up


class Accuracy(NamedTuple):
    """Top-1 accuracy of one classifier on the same images again and again.

    Called with variables it gives percent in [0, 100], or None where there are no images. To read
    it together with other measures, `percent(device_get(correct(variables)))` is the same.
    """

    correct: Callable[[Any], jax.Array | None]  # variables ↦ how many are right, () on the device
    count: int  # of images

    def __call__(self, variables: Any) -> float | None:
        """Percent of the images whose label is the arg max of the logits."""
        return self.percent(jax.device_get(self.correct(variables)))

    def percent(self, correct: Any) -> float | None:
        """What `correct` gave, as percent."""
        return None if correct is None else 100.0 * int(correct) / self.count


def put_batches(
    split: Split | None, batch_size: int = 500, devices: Devices | None = None
) -> Batches | None:
    """Put a split on the device, once for all classifiers that are tested on it.

    The last batch is filled up with examples of label −1, which no class matches. Over several
    devices, and processes, each gets its share of every batch. None gives None.
    """
    if split is None:
        return None
    count, shares = len(split.labels), devices.count if devices else 1
    batch_size = -(-min(batch_size, count) // shares) * shares
    put = partial(devices.put, layout=0) if devices else jax.device_put
    missing = -count % batch_size
    images = np.concatenate([split.images, np.repeat(split.images[:1], missing, axis=0)])
    labels = np.concatenate([split.labels, np.full(missing, -1, split.labels.dtype)])
    batches = [
        put((images[i : i + batch_size], labels[i : i + batch_size]))
        for i in range(0, len(labels), batch_size)
    ]
    return Batches(batches, count)


def create_accuracy(model: AnyClassifier, images: Batches | None, spec: DatasetSpec) -> Accuracy:
    """The accuracy of `model`, in evaluation mode, on images that `put_batches` has placed."""
    if images is None:
        return Accuracy(lambda variables: None, 0)

    @jax.jit
    def correct(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        inputs = normalize(images, spec.mean, spec.std)
        logits, _ = model.apply(variables, inputs, train=False)
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    total = jax.jit(sum)
    return Accuracy(
        lambda variables: total([correct(variables, *batch) for batch in images.batches]),
        images.count,
    )
