"""The student's objectives: what it descends on a fresh batch x̂ and a replayed batch x̂_m.

    acquisition       L_acq(θ)
    joint             L_acq(θ) + λ L_ret(θ)                  the paper's joint replay, two passes
    concatenated      mean of d over [x̂; x̂_m] in one pass    the authors' joint replay
    lra               L_acq(θ) + λ L_ret(θ')                 the paper's method
    lra_concatenated  mean of d over [x̂; x̂_m] + λ L_ret(θ')  the authors' code for it
    retention         L_ret(θ)                               of methods with a pool

with θ' = θ − α ∇L_acq(θ) and L_acq, L_ret the means of d(S, T) over x̂ and over x̂_m. In the one pass
retention is weighted m : B, and batch norm sees both batches together. It is what MB-DFKD computes
in the authors' code, and also their "Ours-1": its inner model is detached, so L_ret(θ') sends no
gradient to the student (`lra_concatenated` with the variant "detached").
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections
from jaxtyping import Array, Float

from dfkd_jax.distillation.meta import VARIANTS, cosine, meta_gradient
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Field, at_least, one_of
from dfkd_jax.runtime.metrics import Metrics, measured

OBJECTIVES = {
    "acquisition": "L_acq(θ)",
    "joint": "L_acq(θ) + λ L_ret(θ), a pass for each batch",
    "concatenated": "mean of d over [x̂; x̂_m] in one pass, as the authors' code has joint replay",
    "lra": "L_acq(θ) + λ L_ret(θ')",
    "lra_concatenated": "mean of d over [x̂; x̂_m] + λ L_ret(θ'), as the authors' code has it",
    "retention": "L_ret(θ) on what is recalled alone, as methods with a pool distil",
}
WITH_INNER_STEP = ("lra", "lra_concatenated")
"""The objectives for which config.meta says how θ' is reached and differentiated."""
WITHOUT_WEIGHT = ("acquisition", "concatenated", "retention")
INNER_VARIANTS = [variant for variant in VARIANTS if variant != "none"]

FIELDS = {
    "objective": Field("lra", one_of(OBJECTIVES), "what the student descends"),
    "retention_weight": Field(
        1.0, at_least(0), "λ of L_ret; of the objectives joint, lra and lra_concatenated"
    ),
    "meta.variant": Field(
        "exact", one_of(INNER_VARIANTS), "how the gradient of L_ret(θ') is taken, of lra objectives"
    ),
    "meta.inner_lr": Field(0.9, at_least(0), "α"),
    "meta.inner_weight_decay": Field(
        0.0, at_least(0), "of the inner step; the authors' code has 5e-4"
    ),
    "meta.inner_steps": Field(1, at_least(1), "gradient steps from θ to θ'"),
    "meta.remat": Field(
        False,
        None,
        "exact and exact_hvp compute an inner step again to differentiate it, instead of storing "
        "it: the same numbers in more time; for GPUs and TPUs, as on a CPU XLA shares most of it "
        "again",
    ),
    "meta.measure_alignment": Field(
        True,
        None,
        "measure the cosine of ∇L_ret and ∇L_acq at θ: one more backward pass a step, or, of the "
        "objective retention, two an epoch",
    ),
}


class StudentLosses(NamedTuple):
    """The losses as functions of θ; auxiliary data are the batch statistics of their pass."""

    acquisition: Callable[[Any], tuple[jax.Array, Any]]  # θ ↦ (L_acq, statistics)
    retention: Callable[[Any], tuple[jax.Array, Any]]  # θ ↦ (L_ret, statistics)
    concatenated: Callable[[Any], tuple[jax.Array, tuple]]  # θ ↦ (mean, (L_acq, L_ret, statistics))
    replayed: Float[Array, ""]  # 0 while there is nothing to replay, else 1


class Descent(NamedTuple):
    """The gradient at θ, the batch statistics that the student keeps, and what was measured."""

    gradient: Any
    statistics: Any
    metrics: Metrics


class Objective(NamedTuple):
    """What the student descends.

    Attributes:
      descent: (losses, θ) -> Descent.
      acquires: whether it looks at the fresh batch, which is not made otherwise.
      aligns_later: whether the alignment is measured after each epoch, as `alignment` has it, and
        not by the steps.
    """

    descent: Callable[[StudentLosses, Any], Descent]
    acquires: bool = True
    aligns_later: bool = False


def create_objective(config: ml_collections.ConfigDict, axis: Axis = ONE) -> Objective:
    """The objective that `config.objective` names, with its weight λ and inner step.

    Every one but "retention" measures `acquisition_loss`. Those that replay measure
    `retention_loss` (without λ; of "concatenated" both are of its one pass) and `replayed_share`,
    the share of the steps that had something to replay, in [0, 1]; those that do both measure, with
    config.meta.measure_alignment, `gradient_alignment`. "retention" leaves that to the end of an
    epoch, as its steps know one gradient only.

    Args:
      config: of the run: objective, retention_weight and meta.
      axis: over which the batches are split. Losses are means over one device's share.

    Raises:
      UserError: fields that do not go together; one sentence.
    """
    if config.objective in WITHOUT_WEIGHT and config.retention_weight != 1:
        raise UserError(
            f"config.retention_weight is {config.retention_weight} but config.objective is "
            f"{config.objective!r}, which has no such weight; allowed is 1.0."
        )
    if config.meta.variant == "finite_difference" and config.compute_dtype != "float32":
        raise UserError(
            f"config.meta.variant is 'finite_difference' but config.compute_dtype is "
            f"{config.compute_dtype!r}, whose differences are rounding alone; allowed is 'float32'."
        )
    if config.objective == "acquisition":
        return Objective(partial(acquisition, axis=axis))
    if config.objective == "retention":
        later = config.meta.measure_alignment
        return Objective(partial(retention, axis=axis), acquires=False, aligns_later=later)
    if config.objective == "concatenated":
        measure_alignment = config.meta.measure_alignment
        return Objective(partial(concatenated, axis=axis, measure_alignment=measure_alignment))
    descent = partial(
        with_retention,
        one_pass=config.objective == "lra_concatenated",
        axis=axis,
        inner_lr=config.meta.inner_lr,
        variant=config.meta.variant if config.objective in WITH_INNER_STEP else "none",
        retention_weight=config.retention_weight,
        inner_weight_decay=config.meta.inner_weight_decay,
        inner_steps=config.meta.inner_steps,
        remat=config.meta.remat,
        measure_alignment=config.meta.measure_alignment,
    )
    return Objective(descent)


def acquisition(losses: StudentLosses, params: Any, *, axis: Axis = ONE) -> Descent:
    """∇L_acq(θ)."""
    (value, statistics), gradient = jax.value_and_grad(losses.acquisition, has_aux=True)(params)
    metrics = {"acquisition_loss": measured(axis.mean(value))}
    return Descent(axis.mean(gradient), statistics, metrics)


def retention(losses: StudentLosses, params: Any, *, axis: Axis = ONE) -> Descent:
    """∇L_ret(θ)."""
    (value, statistics), gradient = jax.value_and_grad(losses.retention, has_aux=True)(params)
    metrics = {
        "retention_loss": measured(axis.mean(value), losses.replayed),
        "replayed_share": measured(losses.replayed),
    }
    return Descent(axis.mean(gradient), statistics, metrics)


def concatenated(
    losses: StudentLosses, params: Any, *, axis: Axis = ONE, measure_alignment: bool = True
) -> Descent:
    """∇ of the mean of d over [x̂; x̂_m] in one pass."""
    (_, (acquired, retained, statistics)), gradient = jax.value_and_grad(
        losses.concatenated, has_aux=True
    )(params)
    aligned = None
    if measure_alignment:
        aligned = alignment(losses, params, axis=axis)
    metrics = _of_both(losses, axis.mean(acquired), axis.mean(retained), aligned)
    return Descent(axis.mean(gradient), statistics, metrics)


def alignment(losses: StudentLosses, params: Any, *, axis: Axis = ONE) -> Float[Array, ""]:
    """The cosine of ∇L_acq(θ) and ∇L_ret(θ), in [−1, 1]."""
    both = (losses.acquisition, losses.retention)
    return cosine(*(axis.mean(jax.grad(f, has_aux=True)(params)[0]) for f in both))


def with_retention(
    losses: StudentLosses, params: Any, *, one_pass: bool = False, axis: Axis = ONE, **options: Any
) -> Descent:
    """∇[L_out(θ) + λ L_ret(θ')], L_out being L_acq or, with `one_pass`, the concatenated loss.

    Args:
      losses: on the two batches.
      params: θ.
      one_pass: see above.
      axis: over which the batches are split.
      **options: of `meta_gradient`; with its variant "none" θ' is θ.
    """

    def joint(params: Any) -> tuple[jax.Array, Any]:
        value, (_, _, statistics) = losses.concatenated(params)
        return value, statistics

    gradient, found = meta_gradient(
        losses.acquisition,
        losses.retention,
        params,
        outer_loss=joint if one_pass else None,
        has_aux=True,
        axis=axis,
        **options,
    )
    metrics = _of_both(
        losses,
        found["acquisition_loss"],
        found["retention_loss"],
        found.get("gradient_alignment"),
    )
    return Descent(gradient, found["acquisition_aux"], metrics)


def _of_both(
    losses: StudentLosses,
    acquired: Float[Array, ""],
    retained: Float[Array, ""],
    aligned: Float[Array, ""] | None,
) -> Metrics:
    """What is measured of both batches; that of the replayed one counts where there is one."""
    metrics = {
        "acquisition_loss": measured(acquired),
        "retention_loss": measured(retained, losses.replayed),
        "replayed_share": measured(losses.replayed),
    }
    if aligned is not None:
        metrics["gradient_alignment"] = measured(aligned, losses.replayed)
    return metrics
