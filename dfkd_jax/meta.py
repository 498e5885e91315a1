"""The meta-gradient: learn to retain (meta-test) while acquiring (meta-train).

Notation: θ the parameters, α the inner learning rate, λ the inner weight decay,

    θ' = θ − α (∇L_acq(θ) + λ θ)                        inner step
    J(θ) = L_acq(θ) + L_ret(θ')                         objective
    ∇J(θ) = ∇L_acq(θ) + (1 − αλ) v − α H v,             v = ∇L_ret(θ'), H = ∇²L_acq(θ)

Expanded in α (λ = 0), with the implicit gradient matching of the paper in the second term:

    ∇_θ L_ret(θ') = ∇L_ret(θ) − α ∇(∇L_ret(θ) · ∇L_acq(θ)) + O(α²).

Source: Patel, Mopuri and Qiu, "Learning to Retain while Acquiring", CVPR 2023, equations 5 to 9.
Nothing here knows of networks, generators or memories: losses are functions of a pytree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Params = Any
Loss = Callable[[Params], Any]

VARIANTS = {
    "none": "∇[L_acq(θ) + L_ret(θ)]: joint replay, no inner step",
    "detached": "∇L_acq(θ) alone: L_ret(θ') is measured but sends no gradient to θ",
    "first_order": "∇L_acq(θ) + ∇L_ret(θ') with ∂θ'/∂θ taken without the Hessian",
    "exact": "∇[L_acq(θ) + L_ret(θ')] by jax.grad through the inner step",
    "exact_hvp": "the same value, the Hessian-vector product by forward over reverse",
    "finite_difference": "the same value, the Hessian-vector product by central differences",
}


def meta_gradient(
    acquisition_loss: Loss,
    retention_loss: Loss,
    params: Params,
    *,
    inner_lr: float,
    variant: str,
    outer_loss: Loss | None = None,
    inner_weight_decay: float = 0.0,
    inner_steps: int = 1,
    has_aux: bool = False,
    measure_alignment: bool = True,
    axis_name: str | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Gradient of L_acq(θ) + L_ret(θ') with θ' reached by gradient descent on L_acq.

    Args:
      acquisition_loss: θ ↦ L_acq(θ), a scalar; with `has_aux`, θ ↦ (L_acq(θ), aux).
      retention_loss: θ ↦ L_ret(θ), likewise.
      params: θ, any pytree of floating-point arrays.
      inner_lr: α ≥ 0.
      variant: one of `VARIANTS`.
      outer_loss: replaces L_acq outside of the inner step, L_out(θ) + L_ret(θ'), as the authors'
        code does with the joint loss on the concatenated batch. By default L_acq itself, whose
        forward and backward pass at θ then serve the inner step and the objective at once.
      inner_weight_decay: λ ≥ 0, as in SGD with weight decay.
      inner_steps: how many inner steps lead from θ to θ'.
      has_aux: the losses also return auxiliary data (batch statistics).
      measure_alignment: also compute ∇L_ret(θ) for the cosine; without it the metric is left out.
      axis_name: the mapped axis over which the losses' batches are split. Gradients and
        losses are averaged over it, the inner gradient before the inner step: θ' is then that of
        the global batch.

    Returns:
      The gradient, like `params`, and a dict of `acquisition_loss` L_acq(θ) (L_out(θ) if given),
      `retention_loss` (L_ret where the variant takes it: θ for "none", else θ') and
      `gradient_alignment`, the cosine of ∇L_ret(θ) and ∇L_acq(θ), in [-1, 1] and 0 where one of
      them vanishes. With `has_aux` also `acquisition_aux`, from θ, and `retention_aux`.

    Raises:
      ValueError: unknown variant, or fewer than one inner step.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; allowed are {', '.join(VARIANTS)}.")
    if inner_steps < 1:
        raise ValueError(f"inner_steps is {inner_steps}; allowed is 1 or more.")

    def mean(tree: Params) -> Params:
        return tree if axis_name is None else lax.pmean(tree, axis_name)

    def with_aux(loss: Loss) -> Loss:
        return loss if has_aux else lambda p: (loss(p), ())

    losses = _Losses(
        acquisition=with_aux(acquisition_loss),
        retention=with_aux(retention_loss),
        outer=None if outer_loss is None else with_aux(outer_loss),
        mean=mean,
    )
    inner = _Inner(lr=inner_lr, weight_decay=inner_weight_decay, steps=inner_steps)
    compute = {
        "none": _joint,
        "detached": _detached,
        "first_order": _first_order,
        "exact": _exact,
        "exact_hvp": _exact_hvp,
        "finite_difference": _finite_difference,
    }[variant]
    result = compute(losses, params, inner)

    metrics = {
        "acquisition_loss": mean(result.outer[0]),
        "retention_loss": mean(result.retention[0]),
    }
    if measure_alignment:
        retention_gradient = result.retention_gradient
        if retention_gradient is None:
            retention_gradient, _ = losses.gradient(losses.retention, params)
        metrics["gradient_alignment"] = cosine(retention_gradient, result.acquisition_gradient)
    if has_aux:
        metrics["acquisition_aux"] = result.outer[1]
        metrics["retention_aux"] = result.retention[1]
    return result.gradient, metrics


def inner_step(params: Params, gradient: Params, lr: float, weight_decay: float = 0.0) -> Params:
    """θ' = θ − α (g + λ θ), leaf by leaf."""
    return jax.tree.map(lambda p, g: p - lr * (g + weight_decay * p), params, gradient)


def dot(a: Params, b: Params) -> jax.Array:
    """Σ a·b over all leaves."""
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def cosine(a: Params, b: Params) -> jax.Array:
    """a·b / (‖a‖ ‖b‖) over all leaves, 0 where a norm is 0."""
    norms = jnp.sqrt(dot(a, a)) * jnp.sqrt(dot(b, b))
    return jnp.where(norms > 0, dot(a, b) / jnp.where(norms > 0, norms, 1), 0)


class _Inner(NamedTuple):
    lr: float
    weight_decay: float
    steps: int

    def step(self, params: Params, gradient: Params) -> Params:
        return inner_step(params, gradient, self.lr, self.weight_decay)


class _Losses(NamedTuple):
    """The losses in (value, aux) form, and the mean over devices of what they give."""

    acquisition: Loss
    retention: Loss
    outer: Loss | None
    mean: Callable[[Params], Params]

    def gradient(self, loss: Loss, params: Params) -> tuple[Params, tuple[jax.Array, Any]]:
        value, gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return self.mean(gradient), value

    def outer_gradient(
        self, params: Params, acquisition: tuple[Params, tuple[jax.Array, Any]]
    ) -> tuple[Params, tuple[jax.Array, Any]]:
        """∇L_out(θ), or what is already known of L_acq where that is the outer loss."""
        return acquisition if self.outer is None else self.gradient(self.outer, params)


class _Result(NamedTuple):
    gradient: Params
    outer: tuple[jax.Array, Any]  # value and aux at θ
    retention: tuple[jax.Array, Any]  # value and aux where it was taken
    acquisition_gradient: Params  # at θ
    retention_gradient: Params | None = None  # at θ, if the variant needed it


def _add(a: Params, b: Params, scale: Any = 1.0) -> Params:
    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def _joint(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    del inner
    acquisition = losses.gradient(losses.acquisition, params)
    outer_gradient, outer = losses.outer_gradient(params, acquisition)
    retention_gradient, retention = losses.gradient(losses.retention, params)
    gradient = _add(outer_gradient, retention_gradient)
    return _Result(gradient, outer, retention, acquisition[0], retention_gradient)


def _exact(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    def objective(params: Params) -> tuple[jax.Array, tuple]:
        (acquisition, gradient) = jax.value_and_grad(losses.acquisition, has_aux=True)(params)
        first_gradient = gradient = losses.mean(gradient)
        adapted = inner.step(params, gradient)
        for _ in range(inner.steps - 1):
            gradient, _ = losses.gradient(losses.acquisition, adapted)
            adapted = inner.step(adapted, gradient)
        outer = acquisition if losses.outer is None else losses.outer(params)
        retention = losses.retention(adapted)
        return outer[0] + retention[0], (outer, retention, first_gradient)

    gradient, aux = jax.grad(objective, has_aux=True)(params)
    return _Result(losses.mean(gradient), *aux)


def _first_order(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    acquisition, adapted = _descend(losses, params, inner)
    retention_gradient, retention = losses.gradient(losses.retention, adapted)
    outer_gradient, outer = losses.outer_gradient(params, acquisition)
    # ∂θ'/∂θ without the Hessian is (1 − αλ) I for every inner step.
    shrink = (1 - inner.lr * inner.weight_decay) ** inner.steps
    gradient = _add(outer_gradient, retention_gradient, shrink)
    return _Result(gradient, outer, retention, acquisition[0])


def _detached(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    acquisition, adapted = _descend(losses, params, inner)
    outer_gradient, outer = losses.outer_gradient(params, acquisition)
    return _Result(outer_gradient, outer, losses.retention(adapted), acquisition[0])


def _descend(losses: _Losses, params: Params, inner: _Inner) -> tuple[tuple, Params]:
    """(∇L_acq(θ), (L_acq(θ), aux)) and θ'."""
    acquisition = losses.gradient(losses.acquisition, params)
    adapted = inner.step(params, acquisition[0])
    for _ in range(inner.steps - 1):
        gradient, _ = losses.gradient(losses.acquisition, adapted)
        adapted = inner.step(adapted, gradient)
    return acquisition, adapted


def _exact_hvp(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    # One linearisation of θ ↦ ∇L_acq(θ) gives the inner gradient and, later, its product with v.
    products = []
    adapted = params
    acquisition = None
    for _ in range(inner.steps):
        gradient, product, value = jax.linearize(
            lambda p: losses.gradient(losses.acquisition, p), adapted, has_aux=True
        )
        acquisition = (gradient, value) if acquisition is None else acquisition
        products.append(product)
        adapted = inner.step(adapted, gradient)
    return _pull_back(losses, params, inner, acquisition, adapted, products)


def _finite_difference(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    products = []
    adapted = params
    acquisition = None
    for _ in range(inner.steps):
        gradient, value = losses.gradient(losses.acquisition, adapted)
        acquisition = (gradient, value) if acquisition is None else acquisition
        products.append(_central_difference(losses, adapted))
        adapted = inner.step(adapted, gradient)
    return _pull_back(losses, params, inner, acquisition, adapted, products)


def _central_difference(losses: _Losses, point: Params) -> Callable[[Params], Params]:
    """v ↦ [∇L_acq(θ + εv) − ∇L_acq(θ − εv)] / 2ε, ε at the optimum of a central difference."""

    def product(v: Params) -> Params:
        norm = jnp.sqrt(dot(v, v))
        relative = jnp.finfo(norm.dtype).eps ** (1 / 3)
        scale = relative * (1 + jnp.sqrt(dot(point, point)))
        epsilon = scale / jnp.where(norm > 0, norm, 1)
        above, _ = losses.gradient(losses.acquisition, _add(point, v, epsilon))
        below, _ = losses.gradient(losses.acquisition, _add(point, v, -epsilon))
        return jax.tree.map(lambda a, b: (a - b) / (2 * epsilon), above, below)

    return product


def _pull_back(
    losses: _Losses,
    params: Params,
    inner: _Inner,
    acquisition: tuple,
    adapted: Params,
    products: list[Callable[[Params], Params]],
) -> _Result:
    """Carry v = ∇L_ret(θ') back through the inner steps: v ← (1 − αλ) v − α H v."""
    v, retention = losses.gradient(losses.retention, adapted)
    shrink = 1 - inner.lr * inner.weight_decay
    for product in reversed(products):
        v = jax.tree.map(lambda x, hx: shrink * x - inner.lr * hx, v, product(v))
    outer_gradient, outer = losses.outer_gradient(params, acquisition)
    return _Result(_add(outer_gradient, v), outer, retention, acquisition[0])
