"""What the methods that invert the teacher have in common.

An iteration is config.synthesis.rounds rounds of synthesis, each of which adds a batch of images to
the pool, then config.student.steps steps of the student on batches of the pool. So CMI,
Fast-Datafree and NAYER distil: KL(T ‖ S) at temperature 20, SGD, weight decay 1e-4, random crops
and flips of what the pool holds. The pool has room for all that a run makes. The methods differ in
what a round optimises, and on what loss.

Their codes take an epoch of 400 student steps; here that is one iteration, and an epoch of the
configuration is one iteration too.
"""

import ml_collections
import optax

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.objectives import create_objective
from dfkd_jax.distillation.roles import Method, Plan
from dfkd_jax.networks import generator as generator_lib
from dfkd_jax.networks.models import COMPUTE_DTYPES
from dfkd_jax.networks.pixel_generator import PixelGenerator
from dfkd_jax.replay.schemes import create_replay
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Field, Fields, more_than
from dfkd_jax.synthesis import inversion
from dfkd_jax.synthesis.inversion import Contrast, Source

WITH_POOL = {"replay.kind": "pool", "objective": "retention", "loss.distance": "kl"}

RECIPE = {
    "iterations_per_epoch": 1,
    "student.steps": 400,
    "student.learning_rate": 0.2,
    "student.final_learning_rate": 2e-4,
    "student.weight_decay": 1e-4,
    "loss.distance_temperature": 20.0,
    "synthesis.augment": "crop",
    "pool.augment": True,
}
"""What Fast-Datafree and NAYER have in common, of CIFAR-10 and CIFAR-100."""

DIGITS = {
    "epochs": 10,
    "batch_size": 128,
    "iterations_per_epoch": 5,
    "student.steps": 40,
    "student.learning_rate": 0.1,
    "student.final_learning_rate": 0.0,
    "student.weight_decay": 1e-4,
    "loss.distance_temperature": 20.0,
    "generator.latent_dim": 64,
    "generator.channels": (32, 16),
    # The digits fill their 8 × 8 pixels: cropped ones are others.
    "synthesis.augment": "none",
    "pool.augment": False,
    "pool.capacity": 16_640,
    "pool.batch_size": 128,
}
"""The same for the digits: an epoch of warm-up, then 1,800 student steps of 128 images."""

GENERATOR: Fields = {
    "generator.latent_dim": Field(256, generator_lib.FIELDS["generator.latent_dim"].rule, "of z"),
    "generator.channels": generator_lib.FIELDS["generator.channels"],
    "synthesis.learning_rate": Field(1e-3, more_than(0), "of Adam on the generator, β₁ = 0.5"),
}
LATENTS: Fields = {
    "synthesis.latent_learning_rate": Field(1e-3, more_than(0), "of Adam on z, β₁ = 0.5"),
}


def compose(
    config: ml_collections.ConfigDict,
    spec: DatasetSpec,
    source: Source,
    axis: Axis = ONE,
    contrast: Contrast | None = None,
) -> Method:
    """The method of a source."""
    synthesis = config.synthesis
    return Method(
        synthesizer=inversion.create(config, spec, source, axis, contrast),
        replay=create_replay(config, spec, axis),
        objective=create_objective(config, axis),
        plan=Plan(
            updates=synthesis.steps,
            student_steps=config.student.steps,
            rounds=synthesis.rounds,
            warm_up=synthesis.warm_up,
            warm_up_rounds=synthesis.warm_up_rounds,
        ),
    )


def create_generator(
    config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE
) -> PixelGenerator:
    """The generator of CMI, Fast-Datafree and NAYER.

    Raises:
      UserError: it cannot make such images; one sentence.
    """
    try:
        generator_lib.base_size(spec.image_shape)
    except UserError as error:
        raise UserError(f"config.dataset.image_size is {spec.image_shape[0]}: {error}") from error
    return PixelGenerator(
        spec.image_shape,
        tuple(config.generator.channels),
        axis_name=axis.name,
        dtype=COMPUTE_DTYPES[config.compute_dtype],
    )


def adam(rate: float) -> optax.GradientTransformation:
    """Adam with β₁ = 0.5 and β₂ = 0.999, as of every generator of the family."""
    return optax.adam(rate, b1=0.5)
