"""The fields that every run has, with the paper's values for 32×32 images (ResNet-34 → ResNet-18).

Each field is declared once, with its default, what is allowed and what it is. Those of a method
stand in its file in `dfkd_jax/methods/`, those of a part that several methods share (replay
schemes, objectives) in the file of the part.

The other files of this folder change only what differs. Each takes the method after a colon,
`--config=configs/cifar100.py:mb-dfkd`, and any field can be set on the command line,
`--config.replay.capacity=20`.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from dfkd_jax.distillation import objectives
from dfkd_jax.distillation.epoch import LOOPS
from dfkd_jax.losses.terms import DISTANCES
from dfkd_jax.methods.table import METHODS, apply_method, fields_of, settings
from dfkd_jax.networks.initialization import INITIALIZATIONS
from dfkd_jax.networks.models import COMPUTE_DTYPES
from dfkd_jax.replay import schemes
from dfkd_jax.runtime.devices import MAPPINGS
from dfkd_jax.runtime.fields import (
    Default,
    Field,
    Fields,
    at_least,
    below,
    declare,
    more_than,
    one_of,
)

MATMUL_PRECISIONS = ("default", "bfloat16", "tensorfloat32", "float32")

FIELDS: Fields = {
    "seed": Field(1, below(2**31, "2³¹"), "of the distillation: student, generator, all draws"),
    "epochs": Field(400, at_least(1), "of the distillation"),
    "batch_size": Field(
        512, at_least(2, ", for batch statistics"), "B, global: split over the devices"
    ),
    "iterations_per_epoch": Field(
        Default(lambda config: 36 * (1024 // config.get_oneway_ref("batch_size"))),
        at_least(1),
        "each of a round of the synthesizer and student.steps steps of the student",
    ),
    "loop": Field(
        "auto",
        one_of(LOOPS),
        "scan: an epoch is one compiled call; step: one call a step; auto: step on CPU, else scan",
    ),
    "compute_dtype": Field(
        "float32",
        one_of(COMPUTE_DTYPES),
        "of the layers; bfloat16 leaves parameters and losses float32",
    ),
    "checkpoint_every": Field(
        1, at_least(1), "epochs from one checkpoint to the next; the last is always saved"
    ),
    # The default of a GPU may be TF32, that of a TPU is bfloat16; then "exact" means exact up to
    # their rounding.
    "matmul_precision": Field("default", one_of(MATMUL_PRECISIONS), "of matrix products"),
    **objectives.FIELDS,
    "loss.distance": Field("l1", one_of(DISTANCES), "d(S, T) of L_acq and L_ret"),
    "loss.distance_temperature": Field(1.0, more_than(0), "τ of the kl distance"),
    "parallel.devices": Field(
        0, at_least(0), "how many share every batch; 0: all, of all processes"
    ),
    "parallel.mapping": Field("pmap", one_of(MAPPINGS), "the same numbers either way"),
    # What is wrong with a data set's facts `data_specs.spec` says, with the teacher's card at hand.
    "dataset.name": Field("cifar100", None, "a key of `data_table.SPECS`, folder or none"),
    "dataset.data_dir": Field(
        str,
        None,
        "of tensorflow-datasets, None: its default folder; of folder it holds test/CLASS and "
        "train/CLASS with images",
    ),
    "dataset.validation_size": Field(
        0,
        at_least(0),
        "more than 0: so many training images, drawn once and for all, are kept from the teacher "
        "and tested on instead of the test images, to choose hyper-parameters",
    ),
    # Only folder and none need the following; None takes it from the card of teacher.checkpoint.
    "dataset.image_size": Field(int, None, "H = W, pixels"),
    "dataset.channels": Field(int, None, "1 or 3"),
    "dataset.num_classes": Field(int, None, "K; of folder it is counted"),
    "dataset.mean": Field(tuple, None, "per channel, of images in [0, 1]"),
    "dataset.std": Field(tuple, None, "per channel; the teacher takes (images − mean) / std"),
    "dataset.flip": Field(
        bool, None, "whether a mirrored image keeps its class; of folder and none None is False"
    ),
    "teacher.model": Field(
        "resnet34", None, 'a key of `classifiers.CLASSIFIERS`, or "package.module:Net"'
    ),
    "teacher.checkpoint": Field(str, None, "a trained teacher's folder; None: WORKDIR/teacher"),
    # How to train one where there is none:
    "teacher.epochs": Field(200, at_least(1), "of its training"),
    "teacher.batch_size": Field(128, at_least(1), "of its training"),
    "teacher.learning_rate": Field(
        0.1, more_than(0), "SGD, momentum 0.9, cosine to 0 over the epochs"
    ),
    "teacher.weight_decay": Field(5e-4, at_least(0), "of its training"),
    "teacher.augment": Field(True, None, "random crops, padded by 4, and flips"),
    "teacher.seed": Field(0, below(2**31, "2³¹"), "of its training"),
    "student.model": Field("resnet18", None, "as of the teacher"),
    "student.initialization": Field(
        "source",
        one_of(INITIALIZATIONS),
        "weights start as in the network's source; he: as He et al.",
    ),
    "student.optimizer": Field("sgd", one_of(("sgd", "adam")), "of the student"),
    "student.learning_rate": Field(
        0.1, more_than(0), "of the first epoch, then a cosine, stepped once an epoch"
    ),
    "student.final_learning_rate": Field(0.0, at_least(0), "where the cosine ends"),
    "student.momentum": Field(0.9, at_least(0), "of sgd"),
    "student.weight_decay": Field(5e-4, at_least(0), "of the student"),
    "student.steps": Field(
        10, at_least(1), "kd_iter: student steps an iteration, each on a fresh batch"
    ),
    "student.checkpoint": Field(str, None, "a run's folder, or a teacher's, to start from"),
    **schemes.FIELDS,
}


def fields(method: str) -> Fields:
    """All fields of a run of this method.

    Raises:
      UserError: there is no such method; one sentence.
    """
    return {**FIELDS, **fields_of(method)}


def get_config(method: str = "lra-mb") -> ml_collections.ConfigDict:
    """The paper's setting for a method: a key of `METHODS`, or "package.module" of one's own.

    Raises:
      UserError: there is no such method; one sentence.
    """
    config = declare(fields(method))
    config.update_from_flattened_dict(settings(method, "default"))
    return apply_method(config, method)


def set_fields(
    config: ml_collections.ConfigDict, values: Mapping[str, Any], name: str
) -> ml_collections.ConfigDict:
    """Set what a data set's configuration says.

    What makes the method what it is stays, and so do its own settings there. Fields that the method
    does not have are left out.

    Args:
      config: of any method.
      values: by the dotted names of fields that some method has.
      name: of the configuration, by which a method knows its own settings.

    Raises:
      KeyError: no method has such a field.
    """
    known = {**FIELDS, **{name: f for method in METHODS for name, f in fields(method).items()}}
    own = fields(config.method)
    unknown = [name for name in values if name not in known and name not in own]
    if unknown:
        raise KeyError(f"No method has a field {unknown[0]!r}.")
    values = {**values, **settings(config.method, name)}
    config.update_from_flattened_dict({n: value for n, value in values.items() if n in own})
    return apply_method(config, config.method)
