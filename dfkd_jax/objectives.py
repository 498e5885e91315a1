"""The student's objectives: what it descends on a fresh batch x̂ and a replayed batch x̂_m.

    acquisition       L_acq(θ)
    joint             L_acq(θ) + λ L_ret(θ)                  the paper's joint replay, two passes
    concatenated      mean of d over [x̂; x̂_m] in one pass    the authors' joint replay
    lra               L_acq(θ) + λ L_ret(θ')                 the paper's method
    lra_concatenated  mean of d over [x̂; x̂_m] + λ L_ret(θ')  the authors' code for it

with θ' = θ − α ∇L_acq(θ) and L_acq, L_ret the means of d(S, T) over x̂ and over x̂_m. In the one pass
retention is weighted m : B, and batch norm sees both batches together. It is what MB-DFKD computes
in the authors' code, and also their "Ours-1": its inner model is detached, so L_ret(θ') sends no
gradient to the student (`lra_concatenated` with the variant "detached").
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections

from dfkd_jax.axis import ONE, Axis
from dfkd_jax.meta import cosine, meta_gradient

OBJECTIVES = {
    "acquisition": "L_acq(θ)",
    "joint": "L_acq(θ) + λ L_ret(θ), a pass for each batch",
    "concatenated": "mean of d over [x̂; x̂_m] in one pass, as the authors' code has joint replay",
    "lra": "L_acq(θ) + λ L_ret(θ')",
    "lra_concatenated": "mean of d over [x̂; x̂_m] + λ L_ret(θ'), as the authors' code has it",
}
WITH_INNER_STEP = ("lra", "lra_concatenated")
"""The objectives for which config.meta says how θ' is reached and differentiated."""


class StudentLosses(NamedTuple):
    """The losses as functions of θ; auxiliary data are the batch statistics of their pass."""

    acquisition: Callable[[Any], tuple[jax.Array, Any]]  # θ ↦ (L_acq, statistics)
    retention: Callable[[Any], tuple[jax.Array, Any]]  # θ ↦ (L_ret, statistics)
    concatenated: Callable[[Any], tuple[jax.Array, tuple]]  # θ ↦ (mean, (L_acq, L_ret, statistics))


def objective_gradient(
    config: ml_collections.ConfigDict,
    losses: StudentLosses,
    params: Any,
    axis: Axis = ONE,
) -> tuple[Any, dict[str, Any]]:
    """The gradient of `config.objective` at θ, and what was measured on the way.

    Args:
      config: of the run: objective, retention_weight (λ) and meta.
      losses: means over this device's share of the batch.
      params: θ.
      axis: over which the batches are split.

    Returns:
      The gradient, the mean over the devices, and a dict of `acquisition_loss` and `retention_loss`
      (without λ; of "concatenated" those of its one pass), `acquisition_aux`, the statistics that
      the student keeps, and `gradient_alignment` if config.meta.measure_alignment.
    """

    if config.objective == "acquisition":
        (value, statistics), gradient = jax.value_and_grad(losses.acquisition, has_aux=True)(params)
        metrics = {"acquisition_loss": axis.mean(value), "acquisition_aux": statistics}
        return axis.mean(gradient), metrics
    if config.objective == "concatenated":
        (_, (acquisition, retention, statistics)), gradient = jax.value_and_grad(
            losses.concatenated, has_aux=True
        )(params)
        metrics = {
            "acquisition_loss": axis.mean(acquisition),
            "retention_loss": axis.mean(retention),
            "acquisition_aux": statistics,
        }
        if config.meta.measure_alignment:
            both = (jax.grad(f, has_aux=True)(params)[0] for f in losses[:2])
            metrics["gradient_alignment"] = cosine(*map(axis.mean, both))
        return axis.mean(gradient), metrics

    def joint(params: Any) -> tuple[jax.Array, Any]:
        value, (_, _, statistics) = losses.concatenated(params)
        return value, statistics

    return meta_gradient(
        losses.acquisition,
        losses.retention,
        params,
        inner_lr=config.meta.inner_lr,
        variant=config.meta.variant if config.objective in WITH_INNER_STEP else "none",
        retention_weight=config.retention_weight,
        outer_loss=joint if config.objective == "lra_concatenated" else None,
        inner_weight_decay=config.meta.inner_weight_decay,
        inner_steps=config.meta.inner_steps,
        has_aux=True,
        measure_alignment=config.meta.measure_alignment,
        axis=axis,
    )
