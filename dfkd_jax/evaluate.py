"""Top-1 accuracy of a classifier in evaluation mode."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.data import Split, normalize
from dfkd_jax.data_table import DatasetSpec
from dfkd_jax.devices import Devices

Accuracy = Callable[[Any], float | None]


def create_accuracy(
    model: nn.Module,
    split: Split | None,
    spec: DatasetSpec,
    batch_size: int = 500,
    devices: Devices | None = None,
) -> Accuracy:
    """variables -> percent of `split` whose label is the arg max of the logits, in [0, 100].

    The images go to the device once, here, in equal batches; the last is filled up with examples
    of label −1, which no class matches. Over several devices, and processes, each sees its share of
    every batch. Without a split the function gives None.
    """
    if split is None:
        return lambda variables: None
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

    @jax.jit
    def correct(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        inputs = normalize(images, spec.mean, spec.std)
        logits, _ = model.apply(variables, inputs, train=False)
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    def accuracy(variables: Any) -> float:
        counts = [correct(variables, *batch) for batch in batches]
        return 100.0 * sum(int(c) for c in counts) / count

    return accuracy


if __name__ == "__main__":  # the command has this name
    from dfkd_jax.evaluate_command import run

    run()
