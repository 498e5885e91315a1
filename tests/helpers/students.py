"""Students made without training, and their logits by another way than the exported one."""

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run.student import Student


def expected(student, x):
    """The logits of images in [0, 1], not by the exported function."""
    normalised = (x - np.float32(student.card["mean"])) / np.float32(student.card["std"])
    apply = jax.jit(lambda x: student.module.apply(student.variables, x, train=False)[0])
    return np.asarray(apply(normalised))


GAINS = {"lenet5_half": 1.5, "mobilenetv2": 1.2, "squeezenet": 1.5}  # else 1
"""Without batch norm a ReLU halves the mean square in each layer; √2 keeps it."""


def random_student(model, image_shape, seed=1):
    """A student whose logits are of the order of 1 and differ between images."""
    module = create_classifier(model, 10)
    channels = image_shape[-1]
    abstract = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)
    )
    draw = np.random.default_rng(seed)

    def leaf(path, shaped):
        name, shape = path[-1].key, shaped.shape
        if name in ("scale", "var"):
            values = draw.uniform(0.5, 1.5, shape)
        elif name in ("bias", "mean"):
            values = draw.normal(0, 0.1, shape)
        else:  # (height, width, in, out) or (in, out)
            fan_in = np.prod(shape[:-1])
            values = draw.normal(0, GAINS.get(model, 1) * fan_in**-0.5, shape)
        return values.astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(leaf, abstract)
    card = {"model": model, "image_shape": list(image_shape), "num_classes": 10}
    return Student(module, variables, card | {"mean": [0.4] * channels, "std": [0.3] * channels})
