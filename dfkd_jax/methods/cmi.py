"""CMI: contrastive model inversion (Fang et al., IJCAI 2021).

Every round starts from a generator with new weights and from new z, and optimises both by Adam on

    bn · BN + CE(T(x̂), y) + adv · decision adversary + cr · contrast.

The contrast asks that an image's embedding differ from those of earlier images, which a bank on the
device keeps: see `dfkd_jax.losses.contrast`. The global view of an image is what the other terms
see, the local one a resized crop. The head's weights go on over the rounds. The values are those of
the source's run from scratch; CE has 0.5 there with the adversary, as here.

The source warms up on about 50,000 images that were made beforehand, or not at all; here not at
all. Its bank keeps 40,960 pairs of embeddings on the host.
"""

import jax
import ml_collections

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.roles import Method
from dfkd_jax.losses.contrast import Head
from dfkd_jax.methods import inversion_family
from dfkd_jax.methods.inversion_family import adam
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Field, at_least, more_than
from dfkd_jax.synthesis import inversion, latents
from dfkd_jax.synthesis.inversion import Contrast

FIELDS = {
    **inversion.FIELDS,
    **inversion_family.GENERATOR,
    **inversion_family.LATENTS,
    "loss.contrast": Field(0.8, at_least(0), "cr, embeddings unlike those of other images"),
    "contrast.temperature": Field(0.1, more_than(0), "τ of the contrast"),
    "contrast.capacity": Field(40_960, at_least(1), "pairs of embeddings in the bank"),
    "contrast.negatives": Field(4_096, at_least(1), "of them that a step sees, drawn anew"),
    "contrast.width": Field(256, at_least(1), "of the projected embeddings"),
}

PRESETS = {"cmi": {**inversion_family.WITH_POOL, "loss.adversarial_form": "decision"}}

_SHEET = {
    **inversion_family.RECIPE,
    "epochs": 200,
    "batch_size": 256,
    "pool.batch_size": 128,
    "student.learning_rate": 0.1,
    "student.final_learning_rate": 0.0,
    "generator.latent_dim": 256,
    "generator.channels": (128, 64),
    "synthesis.learning_rate": 1e-3,
    "synthesis.latent_learning_rate": 1e-3,
    "synthesis.steps": 200,
    "loss.batch_norm": 1.0,
    "loss.target": 0.5,
    "loss.adversarial": 0.5,
    "loss.adversarial_temperature": 1.0,
    "loss.contrast": 0.8,
}
SETTINGS = {
    "default": _SHEET,
    "digits": {
        **_SHEET,
        **inversion_family.DIGITS,
        "synthesis.steps": 60,
        "synthesis.warm_up": 5,
        "synthesis.warm_up_rounds": 4,
        "synthesis.learning_rate": 5e-3,
        "synthesis.latent_learning_rate": 5e-3,
        "contrast.capacity": 2_560,
        "contrast.negatives": 256,
        "contrast.width": 64,
    },
}


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Method:
    """The method of a configuration, see `dfkd_jax.methods.table`.

    Raises:
      UserError: the bank cannot take whole batches; one sentence.
    """
    rate, latent_dim = config.synthesis.learning_rate, config.generator.latent_dim
    generator = inversion_family.create_generator(config, spec, axis)

    def parameters(kept: tuple, key: jax.Array) -> dict:
        del kept
        return latents.initial(generator, latent_dim, key)

    source = latents.create(
        generator,
        spec,
        config.batch_size,
        latent_dim,
        parameters=parameters,
        generator_optimizer=adam(rate),
        latent_optimizer=adam(config.synthesis.latent_learning_rate),
        axis=axis,
    )
    return inversion_family.compose(config, spec, source, axis, _contrast(config))


def _contrast(config: ml_collections.ConfigDict) -> Contrast | None:
    if not config.loss.contrast:
        return None
    fields = config.contrast
    if fields.capacity % config.batch_size:
        raise UserError(
            f"config.contrast.capacity is {fields.capacity}; allowed are multiples of "
            f"config.batch_size, {config.batch_size}, which are added together."
        )
    return Contrast(
        config.loss.contrast,
        fields.temperature,
        fields.capacity,
        fields.negatives,
        Head(fields.width),
        adam(config.synthesis.learning_rate),
    )
