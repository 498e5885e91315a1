"""DeepInversion and its adaptive form (Yin et al., CVPR 2020): the pixels themselves are optimised.

Every round starts from noise and takes steps of Adam (β 0.9 and 0.999) on

    CE(T(x̂), y) + bn · BN + tv · TV + l2 ‖x̂‖₂ + c · (1 − JS(T, S)),   classes y equally often.

The last term is the competition of Adaptive DeepInversion, `deepinversion-adaptive`, with the
student as it is by then. All images are rolled by up to two pixels, and flipped or not, anew in
every step. The values are those of the source's script for CIFAR-10. The source leaves open how
the student learns: here from the pool, with the recipe of `inversion_family`. The first images are
made in a warm-up, as the competition needs a student that knows something.
"""

import math

import jax
import jax.numpy as jnp
import ml_collections
import optax

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.roles import Method
from dfkd_jax.methods import inversion_family
from dfkd_jax.runtime import draw
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.fields import Field, more_than
from dfkd_jax.synthesis import inversion
from dfkd_jax.synthesis.inversion import Source, Start

FIELDS = {
    **inversion.FIELDS,
    "synthesis.learning_rate": Field(0.05, more_than(0), "of Adam on the pixels"),
}

_TERMS = {
    **inversion_family.WITH_POOL,
    "loss.adversarial": 0.0,
    "loss.adversarial_form": "adi",
    "loss.adversarial_temperature": 3.0,
}
PRESETS = {
    "deepinversion": _TERMS,
    "deepinversion-adaptive": {**_TERMS, "loss.adversarial": 1.0},
}

_SHEET = {
    **inversion_family.RECIPE,
    "epochs": 220,
    "batch_size": 256,
    "pool.batch_size": 256,
    "pool.capacity": 102_400,
    "synthesis.augment": "jitter",
    "synthesis.learning_rate": 0.05,
    "synthesis.steps": 2000,
    "synthesis.warm_up": 20,
    "synthesis.warm_up_rounds": 9,
    "loss.batch_norm": 10.0,
    "loss.batch_norm_momentum": 0.0,
    "loss.target": 1.0,
    "loss.total_variation": 2.5e-5,
    "loss.image_norm": 0.0,
}
SETTINGS = {
    "default": _SHEET,
    "digits": {
        **_SHEET,
        **inversion_family.DIGITS,
        "synthesis.steps": 60,
        "synthesis.warm_up": 5,
        "synthesis.warm_up_rounds": 4,
    },
}


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Method:
    """The method of a configuration, see `dfkd_jax.methods.table`."""
    count = config.batch_size // axis.size

    def start(kept: tuple, key: jax.Array, rounds: jax.Array) -> Start:
        del kept, rounds
        first = axis.first(count)
        noise = draw.normal(key, first, count, math.prod(spec.image_shape))
        pixels = noise.reshape(count, *spec.image_shape)
        targets = (first + jnp.arange(count)) % spec.num_classes
        return Start({}, {"pixels": pixels}, targets.astype(jnp.int32))

    source = Source(
        init=lambda key: (),
        start=start,
        render=lambda generator, inputs, targets: inputs["pixels"],
        input_shapes={"pixels": spec.image_shape},
        generator_optimizer=optax.identity(),
        input_optimizer=optax.adam(config.synthesis.learning_rate),
    )
    return inversion_family.compose(config, spec, source, axis)
