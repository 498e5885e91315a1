"""NAYER: noisy layers and label embeddings (Tran et al., CVPR 2024).

The generator's input is a fixed embedding of the class that an image is for, without any z. What is
random is a linear layer: its weights are drawn from N(0, 1), its bias is 0, before every round, one
layer for each group of K images, in which each class is once. The rest of the generator goes on
over the rounds and is drawn anew every `nayer.generator_life` iterations. A round takes steps of a
new Adam on

    bn · BN(momentum 0.9) + oh · CE(T(x̂), y) + adv · decision adversary (0 in warm-up)

and the images of the step with the least loss go to the pool.

The embeddings are a table given as a file, `nayer.embeddings`. The source uses CLIP's text
embeddings of the classes' names, which know more of the world than the teacher does: with them the
method is not strictly free of data. Without a file the table has fixed random orthonormal rows.
The values are those of the source for CIFAR-10; CIFAR-100 takes 40 steps a round.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.roles import Method
from dfkd_jax.methods import inversion_family
from dfkd_jax.methods.inversion_family import adam
from dfkd_jax.networks.label_generator import LabelGenerator
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.draw import stream
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Field, at_least
from dfkd_jax.synthesis import inversion
from dfkd_jax.synthesis.inversion import Source, Start

FIELDS = {
    **inversion.FIELDS,
    "generator.channels": inversion_family.GENERATOR["generator.channels"],
    "synthesis.learning_rate": inversion_family.GENERATOR["synthesis.learning_rate"],
    "nayer.embeddings": Field(
        str, None, "a .npy file of K rows, the classes' embeddings; None: random orthonormal ones"
    ),
    "nayer.embedding_dim": Field(512, at_least(1), "of random embeddings, at least K"),
    "nayer.width": Field(1000, at_least(1), "outputs of a noisy layer"),
    "nayer.generator_life": Field(
        10, at_least(1), "iterations after which the generator is drawn anew"
    ),
}

PRESETS = {"nayer": {**inversion_family.WITH_POOL, "loss.adversarial_form": "decision"}}

_SHEET = {
    **inversion_family.RECIPE,
    "epochs": 320,
    "batch_size": 400,
    "pool.batch_size": 512,
    "pool.capacity": 320_000,
    "generator.channels": (128, 64),
    "synthesis.learning_rate": 4e-3,
    "synthesis.steps": 30,
    "synthesis.rounds": 2,
    "synthesis.warm_up": 20,
    "synthesis.warm_up_rounds": 10,
    "loss.batch_norm": 10.0,
    "loss.batch_norm_momentum": 0.9,
    "loss.target": 0.5,
    "loss.adversarial": 1.33,
    "loss.adversarial_temperature": 1.0,
}
SETTINGS = {
    "default": _SHEET,
    "cifar100": {**_SHEET, "synthesis.steps": 40},
    "tiny_imagenet": {
        **_SHEET,
        "batch_size": 200,
        "pool.batch_size": 256,
        "student.steps": 1000,
        "student.learning_rate": 0.1,
        "synthesis.steps": 60,
        "synthesis.rounds": 4,
        "synthesis.warm_up_rounds": 20,
    },
    "digits": {
        **_SHEET,
        **inversion_family.DIGITS,
        "nayer.embedding_dim": 64,
        "nayer.width": 64,
        "synthesis.warm_up": 5,
        "synthesis.warm_up_rounds": 4,
        "synthesis.rounds": 1,
    },
}


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Method:
    """The method of a configuration, see `dfkd_jax.methods.table`.

    Raises:
      UserError: the table of embeddings is not one; one sentence.
    """
    classes, width, synthesis = spec.num_classes, config.nayer.width, config.synthesis
    table = embeddings(config, classes)
    groups, count = -(-config.batch_size // classes), config.batch_size // axis.size
    body = inversion_family.create_generator(config, spec, axis)
    generator = LabelGenerator(body, classes)

    def noisy(key: jax.Array) -> dict[str, jax.Array]:
        kernel = jax.random.normal(key, (groups, table.shape[1], width))
        return {"kernel": kernel, "bias": jnp.zeros((groups, width))}

    def init(key: jax.Array) -> Any:
        shown = jnp.zeros((2, table.shape[1]))
        return generator.init(key, shown, noisy(key))["params"]

    def start(kept: Any, key: jax.Array, rounds: jax.Array) -> Start:
        new = init(stream(key, "generator"))
        due = renewed(rounds, config)
        params = jax.tree.map(lambda a, b: jnp.where(due, a, b), new, kept)
        generator_params = {"noisy": noisy(stream(key, "noisy")), "rest": params}
        return Start(generator_params, {}, targets(key))

    def targets(key: jax.Array) -> jax.Array:
        """Each class once in a group; in the last, which may not be whole, at random."""
        order = jnp.arange(config.batch_size) % classes
        whole = config.batch_size // classes * classes
        rest = jax.random.permutation(stream(key, "targets"), classes)
        order = order.at[whole:].set(rest[: config.batch_size - whole])
        return jax.lax.dynamic_slice_in_dim(order, axis.first(count), count)

    def render(params: Any, inputs: dict, targets: jax.Array) -> jax.Array:
        del inputs
        given = (jnp.asarray(table)[targets], params["noisy"], axis.first(count))
        made, _ = generator.apply({"params": params["rest"]}, *given, mutable=["batch_stats"])
        mean, std = (jnp.asarray(x, made.dtype) for x in (spec.mean, spec.std))
        return (made - mean) / std

    source = Source(
        init=init,
        start=start,
        render=render,
        input_shapes={},
        generator_optimizer=adam(synthesis.learning_rate),
        input_optimizer=optax.identity(),
        finish=lambda kept, params: params["rest"],
    )
    return inversion_family.compose(config, spec, source, axis)


def renewed(rounds: jax.Array, config: ml_collections.ConfigDict) -> jax.Array:
    """Whether the generator is drawn anew before this round, the first of an iteration.

    Args:
      rounds: before it.
      config: of the run.
    """
    synthesis, life = config.synthesis, config.nayer.generator_life
    warming = synthesis.warm_up * synthesis.warm_up_rounds
    later = rounds - warming
    first = jnp.where(
        later < 0, rounds % synthesis.warm_up_rounds == 0, later % synthesis.rounds == 0
    )
    iteration = jnp.where(
        later < 0,
        rounds // synthesis.warm_up_rounds,
        synthesis.warm_up + later // synthesis.rounds,
    )
    return first & (iteration % life == 0)


def embeddings(config: ml_collections.ConfigDict, classes: int) -> np.ndarray:
    """(K, D) float32, a row for each class.

    Raises:
      UserError: the file is not such a table, or there are too few dimensions; one sentence.
    """
    path, dim = config.nayer.embeddings, config.nayer.embedding_dim
    if path is None:
        if dim < classes:
            raise UserError(
                f"config.nayer.embedding_dim is {dim}; allowed is at least the number of classes, "
                f"{classes}, as random embeddings are orthogonal."
            )
        square = np.random.default_rng(0).normal(size=(dim, classes))
        return np.linalg.qr(square)[0].T.astype(np.float32)
    try:
        table = np.load(os.fspath(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"config.nayer.embeddings is {path!r}, which cannot be read as a .npy file of numbers "
            f"({type(error).__name__})."
        ) from error
    fits = isinstance(table, np.ndarray) and table.ndim == 2 and table.shape[0] == classes
    if not fits or table.dtype.kind not in "fiu" or not np.isfinite(table).all():
        found = getattr(table, "shape", "an archive")
        raise UserError(
            f"config.nayer.embeddings is {path!r}, a table of {found}; allowed is one of "
            f"({classes}, D) finite numbers, a row for each class."
        )
    return table.astype(np.float32)
