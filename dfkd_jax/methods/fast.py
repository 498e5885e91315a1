"""Fast-Datafree: a common start of the generator makes a batch a matter of a few steps.

Source: FastMeta (Fang et al., AAAI 2022). A round copies the common generator G, takes k steps of
Adam from there on the copy and on new z, on

    bn · BN(momentum 0.9) + oh · CE(T(x̂), y) + adv · decision adversary (0 in warm-up),

and then moves G itself by one step of an Adam that goes on over the rounds, of rate k · rate, on

    maml      Σ_i ∇L(θ_i), the gradients at each of the copy's steps: first-order MAML
    reptile   67 (θ − θ_k)

`fast` takes 10 steps, `fast-5` and `fast-2` fewer at other rates. The values are those of the
source for ResNet-34 → ResNet-18 on CIFAR; for WRN it has CE 0.4 and adversary 1.1, for VGG 1.0. z
is not learned over the rounds. The source renews the first layer of G once, 120 epochs after the
warm-up, where a switch says so: `fast.renewal`, in rounds, of which an epoch has one there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.roles import Method
from dfkd_jax.methods import inversion_family
from dfkd_jax.methods.inversion_family import adam
from dfkd_jax.networks.training import Network, descend
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.draw import stream
from dfkd_jax.runtime.fields import Field, at_least, one_of, or_none
from dfkd_jax.synthesis import inversion, latents

META = ("maml", "reptile")
REPTILE_SCALE = 67.0
FIRST = ("fc", "bn1")  # the layers that a renewal draws anew

FIELDS = {
    **inversion.FIELDS,
    **inversion_family.GENERATOR,
    **inversion_family.LATENTS,
    "fast.meta": Field("maml", one_of(META), "how the common generator moves after a round"),
    "fast.renewal": Field(
        int, or_none(at_least(0)), "rounds after warm-up until its first layer is drawn anew"
    ),
}


def _steps(count: int, rate: float, latent_rate: float) -> dict[str, Any]:
    return {
        "synthesis.steps": count,
        "synthesis.learning_rate": rate,
        "synthesis.latent_learning_rate": latent_rate,
    }


_TERMS = {**inversion_family.WITH_POOL, "loss.adversarial_form": "decision"}
PRESETS = {
    "fast": _TERMS,
    "fast-5": {**_TERMS, **_steps(5, 3e-3, 0.01)},
    "fast-2": {**_TERMS, **_steps(2, 5e-3, 0.015)},
}

_SHEET = {
    **inversion_family.RECIPE,
    **_steps(10, 2e-3, 0.01),
    "epochs": 220,
    "batch_size": 256,
    "pool.batch_size": 256,
    "pool.capacity": 61_440,
    "generator.latent_dim": 256,
    "generator.channels": (128, 64),
    "synthesis.warm_up": 20,
    "loss.batch_norm": 10.0,
    "loss.batch_norm_momentum": 0.9,
    "loss.target": 0.5,
    "loss.adversarial": 1.33,
    "loss.adversarial_temperature": 1.0,
}
SETTINGS = {
    "default": _SHEET,
    "digits": {
        **_SHEET,
        **inversion_family.DIGITS,
        "synthesis.warm_up": 5,
        "synthesis.warm_up_rounds": 8,
        "synthesis.rounds": 2,
    },
}


class Meta(struct.PyTreeNode):
    """What Fast keeps over rounds."""

    common: Network  # G, with its own Adam
    gradient: Any  # Σ of the gradients at the copy's steps of this round
    fresh: Any  # the first layers that a renewal sets
    rounds: jax.Array  # finished so far


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Method:
    """The method of a configuration, see `dfkd_jax.methods.table`."""
    rate, latent_dim = config.synthesis.learning_rate, config.generator.latent_dim
    generator = inversion_family.create_generator(config, spec, axis)
    meta_optimizer = adam(rate * config.synthesis.steps)
    warming = config.synthesis.warm_up * config.synthesis.warm_up_rounds
    renewal = None if config.fast.renewal is None else warming + config.fast.renewal

    def init(key: jax.Array) -> Meta:
        params = latents.initial(generator, latent_dim, stream(key, "common"))
        fresh = latents.initial(generator, latent_dim, stream(key, "renewal"))
        return Meta(
            Network(params, {}, meta_optimizer.init(params)),
            jax.tree.map(jnp.zeros_like, params),
            {name: fresh[name] for name in FIRST} if renewal is not None else {},
            jnp.zeros((), jnp.int32),
        )

    def finish(kept: Meta, params: Any) -> Meta:
        common = kept.common
        gradient = meta_gradient(config.fast.meta, common.params, kept.gradient, params)
        common = descend(common, gradient, {}, meta_optimizer)
        rounds = kept.rounds + 1
        if renewal is not None:
            due = rounds == renewal
            old = {name: common.params[name] for name in FIRST}
            new = jax.tree.map(lambda a, b: jnp.where(due, a, b), kept.fresh, old)
            common = common.replace(params={**common.params, **new})
        gradient = jax.tree.map(jnp.zeros_like, kept.gradient)
        return kept.replace(common=common, gradient=gradient, rounds=rounds)

    source = latents.create(
        generator,
        spec,
        config.batch_size,
        latent_dim,
        parameters=lambda kept, key: kept.common.params,
        generator_optimizer=adam(rate),
        latent_optimizer=adam(config.synthesis.latent_learning_rate),
        axis=axis,
    )
    source = source._replace(init=init, learn=learn, finish=finish)
    return inversion_family.compose(config, spec, source, axis)


def learn(kept: Meta, gradient: Any) -> Meta:
    """Add the gradient at one of the copy's steps."""
    return kept.replace(gradient=optax.tree.add(kept.gradient, gradient))


def meta_gradient(kind: str, common: Any, gradients: Any, adapted: Any) -> Any:
    """What moves the common generator after a round.

    Args:
      kind: of `META`.
      common: θ, from where the round began.
      gradients: Σ_i ∇L(θ_i) over its steps.
      adapted: θ_k, where it ended.
    """
    if kind == "maml":
        return gradients
    return jax.tree.map(lambda a, b: REPTILE_SCALE * (a - b), common, adapted)
