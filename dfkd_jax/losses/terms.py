"""Losses of the student and of the generator.

Notation: T and S the logits of teacher and student, p = softmax(T), p̄ its mean over the global
batch, f_T the teacher's penultimate features. `axis` is that over which the batch is split, if it
is; terms that are not linear in batch means take global means.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from dfkd_jax.runtime.arrays import AnyArray
from dfkd_jax.runtime.axis import ONE, Axis


def absolute(x: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """|x| with derivative sign(x), which is 0 at 0, as in PyTorch; JAX's own is 1 there.

    Where student and teacher agree there is nothing to descend: a derivative of 1 would push every
    logit of such an image the same way.
    """
    return jnp.multiply(x, jnp.sign(x))


# Distances d(S, T) per example. L_acq and L_ret are their batch means.


def l1_distance(
    student: Float[AnyArray, "B K"], teacher: Float[AnyArray, "B K"], temperature: float = 1.0
) -> Float[Array, "B"]:
    """Mean over classes of |S − T|, on logits, without temperature (paper, equation 2)."""
    del temperature
    chex.assert_equal_shape([student, teacher])
    return jnp.mean(absolute(student - teacher), axis=-1)


def kl_distance(
    student: Float[AnyArray, "B K"], teacher: Float[AnyArray, "B K"], temperature: float = 1.0
) -> Float[Array, "B"]:
    """τ² KL(softmax(T/τ) ‖ softmax(S/τ)) (Hinton et al., 2015)."""
    chex.assert_equal_shape([student, teacher])
    log_p = jax.nn.log_softmax(teacher / temperature)
    log_q = jax.nn.log_softmax(student / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def mse_distance(
    student: Float[AnyArray, "B K"], teacher: Float[AnyArray, "B K"], temperature: float = 1.0
) -> Float[Array, "B"]:
    """Mean over classes of (S − T)², on logits, without temperature."""
    del temperature
    chex.assert_equal_shape([student, teacher])
    return jnp.mean((student - teacher) ** 2, axis=-1)


DISTANCES: dict[str, Callable] = {"l1": l1_distance, "kl": kl_distance, "mse": mse_distance}


# Adversarial terms of the generator, to be minimised by it: low where teacher and student differ.
# Whether a term also sends its gradient through the teacher's logits is part of the method.


def js_adversarial(
    teacher: Float[AnyArray, "B K"],
    student: Float[AnyArray, "B K"],
    temperature: float,
    axis: Axis = ONE,
) -> Float[Array, ""]:
    """1 − clip(JS, 0, 1) as the authors' code has it.

    With P = softmax(T/τ), Q = softmax(S/τ), M = (P + Q)/2, each then clipped to [0.01, 0.99],
    JS = ½ mean(M (log M − log P)) + ½ mean(M (log M − log Q)), the mean over batch and classes.
    Dividing by the class count makes the term weak; it is kept as published. The teacher's logits
    carry no gradient, as in all four agents of the code: the generator looks for images on which
    the student's answer moves away, and leaves the teacher's answer to the other terms.
    """
    return adi_adversarial(lax.stop_gradient(teacher), student, temperature, axis)


def adi_adversarial(
    teacher: Float[AnyArray, "B K"],
    student: Float[AnyArray, "B K"],
    temperature: float,
    axis: Axis = ONE,
) -> Float[Array, ""]:
    """`js_adversarial` with the gradient through both networks.

    Source: R_compete of Adaptive DeepInversion (Yin et al., CVPR 2020, equation 8), as its code
    clips it.
    """
    p = jax.nn.softmax(teacher / temperature)
    q = jax.nn.softmax(student / temperature)
    m = (p + q) / 2
    p, q, m = (jnp.clip(x, 0.01, 0.99) for x in (p, q, m))
    pointwise = m * (jnp.log(m) - (jnp.log(p) + jnp.log(q)) / 2)
    return 1 - jnp.clip(axis.batch_mean(jnp.mean(pointwise, axis=-1)), 0, 1)


def l1_adversarial(
    teacher: Float[AnyArray, "B K"],
    student: Float[AnyArray, "B K"],
    temperature: float,
    axis: Axis = ONE,
) -> Float[Array, ""]:
    """−mean |T − S|, with the gradient through both networks (DFAD: Fang et al., 2019)."""
    return -axis.batch_mean(l1_distance(student, teacher, temperature))


def kl_adversarial(
    teacher: Float[AnyArray, "B K"],
    student: Float[AnyArray, "B K"],
    temperature: float,
    axis: Axis = ONE,
) -> Float[Array, ""]:
    """−τ² KL(softmax(T/τ) ‖ softmax(S/τ)), with the gradient through both networks.

    Source: ZSKT (Micaelli and Storkey, 2019) and DFQ (Choi et al., 2020).
    """
    return -axis.batch_mean(kl_distance(student, teacher, temperature))


def decision_adversarial(
    teacher: Float[AnyArray, "B K"],
    student: Float[AnyArray, "B K"],
    temperature: float,
    axis: Axis = ONE,
) -> Float[Array, ""]:
    """−mean 1[argmax T = argmax S] τ² KL(softmax(T/τ) ‖ softmax(S/τ)), through both networks.

    The decision adversary pushes images towards the student's decision boundary only while the
    student still decides as the teacher does. The mean is over all examples, those that do not
    count too. Source: CMI (Fang et al., IJCAI 2021, equation 7), Fast-Datafree and NAYER, τ = 1.
    """
    same = jnp.argmax(teacher, axis=-1) == jnp.argmax(student, axis=-1)
    return -axis.batch_mean(jnp.where(same, kl_distance(student, teacher, temperature), 0.0))


ADVERSARIAL: dict[str, Callable] = {
    "js": js_adversarial,
    "adi": adi_adversarial,
    "l1": l1_adversarial,
    "kl": kl_adversarial,
    "decision": decision_adversarial,
}


# The generator's other terms.


def one_hot_loss(teacher: Float[AnyArray, "B K"], axis: Axis = ONE) -> Float[Array, ""]:
    """CE(T, argmax T): the teacher should be sure of what it sees (Chen et al., 2019)."""
    return -axis.batch_mean(jnp.max(jax.nn.log_softmax(teacher), axis=-1))


LOGARITHMS: dict[str, Callable] = {"log10": jnp.log10, "ln": jnp.log}


def information_entropy_loss(
    teacher: Float[AnyArray, "B K"], axis: Axis = ONE, *, logarithm: str = "log10"
) -> Float[Array, ""]:
    """Class balance Σ_c p̄_c log p̄_c: classes should come equally often; −log K at best.

    Args:
      teacher: T.
      axis: over which the batch is split.
      logarithm: log10 in the code of DAFL, PRE-DFKD and LRA; ln, 2.3 times as strong, in DFQ and in
        the baselines of CMI and Fast-Datafree.
    """
    mean = axis.batch_mean(jax.nn.softmax(teacher))
    mean = jnp.maximum(mean, jnp.finfo(mean.dtype).tiny)  # 0 log 0 = 0, with gradient 0
    return jnp.sum(mean * LOGARITHMS[logarithm](mean))


def activation_loss(features: Float[AnyArray, "B D"], axis: Axis = ONE) -> Float[Array, ""]:
    """−mean |f_T|: real images excite the teacher's features (Chen et al., 2019)."""
    return -axis.batch_mean(jnp.mean(absolute(features), axis=-1))


def target_loss(
    teacher: Float[AnyArray, "B K"], targets: Int[Array, "B"], axis: Axis = ONE
) -> Float[Array, ""]:
    """CE(T, y): the teacher should see the classes that were chosen (Yin et al., 2020)."""
    log_p = jax.nn.log_softmax(teacher)
    return -axis.batch_mean(jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0])


def total_variation(images: Float[AnyArray, "B H W C"], axis: Axis = ONE) -> Float[Array, ""]:
    """Σ_d ‖x − x shifted by d‖₂ for d to the right, down and along both diagonals.

    Each norm is over the whole batch, not squared, so the term grows with √B. Source: R_TV of
    DeepInversion (Yin et al., 2020, equation 3).
    """
    differences = (
        images[:, :, :-1] - images[:, :, 1:],
        images[:, :-1] - images[:, 1:],
        images[:, :-1, :-1] - images[:, 1:, 1:],
        images[:, 1:, :-1] - images[:, :-1, 1:],
    )
    return sum((_batch_norm_of(x, axis) for x in differences), jnp.zeros(()))


def image_norm(images: Float[AnyArray, "B H W C"], axis: Axis = ONE) -> Float[Array, ""]:
    """‖x‖₂ over the whole batch, R_l2 of DeepInversion (Yin et al., 2020, equation 3)."""
    return _batch_norm_of(images, axis)


def _batch_norm_of(x: AnyArray, axis: Axis) -> jax.Array:
    """‖x‖₂ over all devices, differentiable at 0."""
    return jnp.sqrt(axis.mean(jnp.sum(x**2)) * axis.size + 1e-12)


class LayerStatistics(NamedTuple):
    """Statistics per channel of the input of one batch-norm layer of the teacher."""

    batch_mean: Float[Array, "C"]
    batch_variance: Float[Array, "C"]  # biased
    running_mean: Float[Array, "C"]
    running_variance: Float[Array, "C"]
    inputs: Float[Array, "B *size C"] | None = None  # the input itself, a device's share


Moments = list[tuple[Float[Array, "C"], Float[Array, "C"]]]
"""Means and variances of the input of each batch-norm layer."""


def moments(layers: list[LayerStatistics]) -> Moments:
    """Those of the batch."""
    return [(layer.batch_mean, layer.batch_variance) for layer in layers]


def mixed(
    layers: list[LayerStatistics], memory: Moments, momentum: float | Float[Array, ""]
) -> list[LayerStatistics]:
    """The layers with batch statistics (1 − m) · batch + m · memory.

    So one batch need not match the running statistics alone, only together with those before it.
    Source: Fast-Datafree and NAYER, m = 0.9.

    Args:
      layers: of this batch.
      memory: of earlier batches; no gradient passes through it.
      momentum: m in [0, 1]; 0 leaves the layers as they are.
    """

    def mix(now: jax.Array, before: jax.Array) -> jax.Array:
        return (1 - momentum) * now + momentum * lax.stop_gradient(before)

    return [
        layer._replace(
            batch_mean=mix(layer.batch_mean, mean), batch_variance=mix(layer.batch_variance, var)
        )
        for layer, (mean, var) in zip(layers, memory, strict=True)
    ]


def batch_norm_loss(layers: list[LayerStatistics]) -> Float[Array, ""]:
    """Σ_layers ‖μ − μ̂‖₂ + ‖σ² − σ̂²‖₂ against the running statistics (Yin et al., 2020)."""

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(x**2) + 1e-12)  # differentiable at 0

    return jnp.asarray(
        sum(
            norm(layer.batch_mean - layer.running_mean)
            + norm(layer.batch_variance - layer.running_variance)
            for layer in layers
        )
    )


class GeneratorLossWeights(NamedTuple):
    """Weight of each term; a term of weight 0 is not computed."""

    one_hot: float = 1.0
    information_entropy: float = 5.0
    activation: float = 0.1
    adversarial: float = 1.0
    batch_norm: float = 0.0
    target: float = 0.0


NEEDS = {"activation": "features", "batch_norm": "statistics"}
"""What a term needs of the teacher beside its logits."""


def generator_loss(
    teacher: Float[AnyArray, "B K"],
    features: Float[AnyArray, "B D"] | None,
    student: Float[AnyArray, "B K"],
    layers: list[LayerStatistics],
    weights: GeneratorLossWeights,
    *,
    targets: Int[Array, "B"] | None = None,
    adversarial_form: str = "js",
    adversarial_temperature: float = 3.0,
    entropy_logarithm: str = "log10",
    axis: Axis = ONE,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """oh · one_hot + ie · information_entropy + a · activation + adversarial + bn · batch_norm.

    And CE to chosen targets, where it has a weight.

    Args:
      teacher: T. features: f_T, used if a is not 0; None where it gives none. student: S.
      layers: the teacher's batch-norm statistics on this batch; used if bn is not 0.
      weights: of the terms.
      targets: y, the classes that the images were made for; used if `weights.target` is not 0.
      adversarial_form: a key of `ADVERSARIAL`; adversarial_temperature: its τ.
      entropy_logarithm: a key of `LOGARITHMS`, of the information entropy.
      axis: over which the batch is split.

    Returns:
      The weighted sum, and each term that has a weight, without it.
    """
    chex.assert_equal_shape([teacher, student])
    terms = {
        "one_hot": lambda: one_hot_loss(teacher, axis),
        "information_entropy": lambda: information_entropy_loss(
            teacher, axis, logarithm=entropy_logarithm
        ),
        "activation": lambda: activation_loss(cast(jax.Array, features), axis),
        "adversarial": lambda: ADVERSARIAL[adversarial_form](
            teacher, student, adversarial_temperature, axis
        ),
        "batch_norm": lambda: batch_norm_loss(layers),
        "target": lambda: target_loss(teacher, cast(jax.Array, targets), axis),
    }
    weighted = {name: w for name, w in weights._asdict().items() if w != 0}
    values = {name: terms[name]() for name in weighted}
    total = jnp.zeros((), jnp.asarray(teacher).dtype)
    return sum((w * values[name] for name, w in weighted.items()), total), values
