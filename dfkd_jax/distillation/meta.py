"""The meta-gradient: learn to retain (meta-test) while acquiring (meta-train).

Notation: θ the parameters, α the inner learning rate, ω the inner weight decay, λ the weight of
retention,

    θ' = θ − α (∇L_acq(θ) + ω θ)                        inner step
    J(θ) = L_acq(θ) + λ L_ret(θ')                       objective
    ∇J(θ) = ∇L_acq(θ) + λ [(1 − αω) v − α H v],         v = ∇L_ret(θ'), H = ∇²L_acq(θ)

Expanded in α (ω = 0), with the implicit gradient matching of the paper in the second term:

    ∇_θ L_ret(θ') = ∇L_ret(θ) − α ∇(∇L_ret(θ) · ∇L_acq(θ)) + O(α²).

Source: Patel, Mopuri and Qiu, "Learning to Retain while Acquiring", CVPR 2023, equations 5 to 9.
Nothing here knows of networks, generators or memories: losses are functions of a pytree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dfkd_jax.runtime.axis import ONE, Axis

Params = Any
Loss = Callable[[Params], Any]

VARIANTS = {
    "none": "∇[L_acq(θ) + λ L_ret(θ)]: joint replay, no inner step",
    "detached": "∇L_acq(θ) alone: L_ret(θ') is measured but sends no gradient to θ",
    "first_order": "∇L_acq(θ) + λ ∇L_ret(θ') with ∂θ'/∂θ taken without the Hessian",
    "exact": "∇[L_acq(θ) + λ L_ret(θ')] by jax.grad through the inner step",
    "exact_hvp": "the same value, the Hessian-vector product by forward over reverse",
    "finite_difference": "the same value, the Hessian-vector product by central differences",
}


def meta_gradient(
    acquisition_loss: Loss,
    retention_loss: Loss,
    params: Params,
    *,
    inner_lr: float | Float[Array, ""],
    variant: str,
    retention_weight: float | Float[Array, ""] = 1.0,
    outer_loss: Loss | None = None,
    inner_weight_decay: float | Float[Array, ""] = 0.0,
    inner_steps: int = 1,
    remat: bool = False,
    has_aux: bool = False,
    measure_alignment: bool = True,
    axis: Axis = ONE,
) -> tuple[Params, dict[str, Any]]:
    """Gradient of L_acq(θ) + λ L_ret(θ') with θ' reached by gradient descent on L_acq.

    "Exact" is meant up to the rounding of matrix products. On hardware whose default products are
    TF32 or bfloat16, `jax.default_matmul_precision("highest")` around the call makes them float32.

    Args:
      acquisition_loss: θ ↦ L_acq(θ), a scalar; with `has_aux`, θ ↦ (L_acq(θ), aux).
      retention_loss: θ ↦ L_ret(θ), likewise.
      params: θ, any pytree of floating-point arrays.
      inner_lr: α ≥ 0.
      variant: one of `VARIANTS`.
      retention_weight: λ ≥ 0.
      outer_loss: replaces L_acq outside of the inner step, L_out(θ) + λ L_ret(θ'), as the authors'
        code does with the joint loss on the concatenated batch. By default L_acq itself, whose
        forward and backward pass at θ then serve the inner step and the objective at once.
      inner_weight_decay: ω ≥ 0, as in SGD with weight decay.
      inner_steps: how many inner steps lead from θ to θ'.
      remat: to differentiate an inner step, compute it again instead of storing it.
      has_aux: the losses also return auxiliary data (batch statistics).
      measure_alignment: also compute ∇L_ret(θ) for the cosine; without it the metric is left out.
      axis: over which the losses' batches are split. Gradients and losses are averaged over it, the
        inner gradient before the inner step: θ' is then that of the global batch.

    Returns:
      The gradient, with the dtypes of `params`, and a dict of `acquisition_loss` L_acq(θ),
      `retention_loss` (L_ret without λ, where the variant takes it: θ for "none", else θ') and
      `gradient_alignment`, the cosine of ∇L_ret(θ) and ∇L_acq(θ); see `cosine`. With `outer_loss`
      also `outer_loss` L_out(θ). With `has_aux` also `acquisition_aux`, from θ (of L_out if it is
      given), and `retention_aux`.

    Raises:
      ValueError: unknown variant, or fewer than one inner step.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; allowed are {', '.join(VARIANTS)}.")
    if inner_steps < 1:
        raise ValueError(f"inner_steps is {inner_steps}; allowed is 1 or more.")

    def with_aux(loss: Loss) -> Loss:
        return loss if has_aux else lambda p: (loss(p), ())

    losses = _Losses(
        acquisition=with_aux(acquisition_loss),
        retention=with_aux(retention_loss),
        outer=None if outer_loss is None else with_aux(outer_loss),
        mean=axis.mean,
        retention_weight=retention_weight,
    )
    inner = _Inner(lr=inner_lr, weight_decay=inner_weight_decay, steps=inner_steps, remat=remat)
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
        "acquisition_loss": axis.mean(result.acquisition[0]),
        "retention_loss": axis.mean(result.retention[0]),
    }
    if outer_loss is not None:
        metrics["outer_loss"] = axis.mean(result.outer[0])
    if measure_alignment:
        retention_gradient = result.retention_gradient
        if retention_gradient is None:
            retention_gradient, _ = losses.gradient(losses.retention, params)
        metrics["gradient_alignment"] = cosine(retention_gradient, result.acquisition_gradient)
    if has_aux:
        metrics["acquisition_aux"] = result.outer[1]
        metrics["retention_aux"] = result.retention[1]
    return _like(result.gradient, params), metrics


def inner_step(
    params: Params,
    gradient: Params,
    lr: float | Float[Array, ""],
    weight_decay: float | Float[Array, ""] = 0.0,
) -> Params:
    """θ' = θ − α (g + ω θ), leaf by leaf, with the dtypes of θ."""
    adapted = jax.tree.map(lambda p, g: p - lr * (g + weight_decay * p), params, gradient)
    return _like(adapted, params)


def _like(tree: Params, params: Params) -> Params:
    """The same values with the dtypes of the parameters: α may be an array of higher precision."""
    return jax.tree.map(lambda x, p: x.astype(p.dtype), tree, params)


def dot(a: Params, b: Params) -> Float[Array, ""]:
    """Σ a·b over all leaves, at least float32."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.asarray(sum(jnp.vdot(_widened(x), _widened(y)) for x, y in pairs))


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cosine(a: Params, b: Params) -> Float[Array, ""]:
    """a·b / (‖a‖ ‖b‖) over all leaves, in [−1, 1]; 0 where a norm is 0, NaN where a leaf is NaN."""
    norms = jnp.sqrt(dot(a, a)) * jnp.sqrt(dot(b, b))
    value = dot(a, b) / jnp.where(norms == 0, 1, norms)
    return jnp.where(norms == 0, 0, jnp.clip(value, -1, 1))  # rounding may go beyond


class _Inner(NamedTuple):
    lr: float | Float[Array, ""]
    weight_decay: float | Float[Array, ""]
    steps: int
    remat: bool

    def step(self, params: Params, gradient: Params) -> Params:
        return inner_step(params, gradient, self.lr, self.weight_decay)


class _Losses(NamedTuple):
    """The losses in (value, aux) form, and the mean over devices of what they give."""

    acquisition: Loss
    retention: Loss
    outer: Loss | None
    mean: Callable[[Params], Params]
    retention_weight: float | Float[Array, ""]

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
    acquisition: tuple[jax.Array, Any]  # value and aux at θ
    outer: tuple[jax.Array, Any]  # likewise of L_out
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
    gradient = _add(outer_gradient, retention_gradient, losses.retention_weight)
    return _Result(gradient, acquisition[1], outer, retention, acquisition[0], retention_gradient)


def _exact(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    def descend(params: Params) -> tuple[Params, tuple]:
        gradient, acquisition = losses.gradient(losses.acquisition, params)
        return inner.step(params, gradient), (gradient, acquisition)

    descend = jax.checkpoint(descend) if inner.remat else descend

    def objective(params: Params) -> tuple[jax.Array, tuple]:
        adapted, (first_gradient, acquisition) = descend(params)
        for _ in range(inner.steps - 1):
            adapted, _ = descend(adapted)
        outer = acquisition if losses.outer is None else losses.outer(params)
        retention = losses.retention(adapted)
        value = outer[0] + losses.retention_weight * retention[0]
        return value, (acquisition, outer, retention, first_gradient)

    gradient, aux = jax.grad(objective, has_aux=True)(params)
    return _Result(losses.mean(gradient), *aux)


def _first_order(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    acquisition, adapted = _descend(losses, params, inner)
    retention_gradient, retention = losses.gradient(losses.retention, adapted)
    outer_gradient, outer = losses.outer_gradient(params, acquisition)
    # ∂θ'/∂θ without the Hessian is (1 − αω) I for every inner step.
    shrink = (1 - inner.lr * inner.weight_decay) ** inner.steps
    gradient = _add(outer_gradient, retention_gradient, losses.retention_weight * shrink)
    return _Result(gradient, acquisition[1], outer, retention, acquisition[0])


def _detached(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    acquisition, adapted = _descend(losses, params, inner)
    outer_gradient, outer = losses.outer_gradient(params, acquisition)
    retention = losses.retention(adapted)
    return _Result(outer_gradient, acquisition[1], outer, retention, acquisition[0])


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
    acquisition = ()
    for _ in range(inner.steps):
        gradient, product, value = _linearized(losses, adapted, inner.remat)
        acquisition = acquisition or (gradient, value)
        products.append(product)
        adapted = inner.step(adapted, gradient)
    return _pull_back(losses, params, inner, acquisition, adapted, products)


def _linearized(
    losses: _Losses, point: Params, remat: bool
) -> tuple[Params, Callable[[Params], Params], tuple]:
    """∇L_acq at the point, v ↦ H v there, and (L_acq, aux)."""

    def gradient(params: Params) -> tuple[Params, tuple]:
        return losses.gradient(losses.acquisition, params)

    if not remat:
        return jax.linearize(gradient, point, has_aux=True)

    def product(v: Params) -> Params:
        # The barrier lets the compiler neither share nor move what is computed again.
        again, v = lax.optimization_barrier((point, v))
        return jax.jvp(lambda params: gradient(params)[0], (again,), (v,))[1]

    value, aux = gradient(point)
    return value, product, aux


def _finite_difference(losses: _Losses, params: Params, inner: _Inner) -> _Result:
    products = []
    adapted = params
    acquisition = ()
    for _ in range(inner.steps):
        gradient, value = losses.gradient(losses.acquisition, adapted)
        acquisition = acquisition or (gradient, value)
        products.append(_central_difference(losses, adapted))
        adapted = inner.step(adapted, gradient)
    return _pull_back(losses, params, inner, acquisition, adapted, products)


def _central_difference(losses: _Losses, point: Params) -> Callable[[Params], Params]:
    """v ↦ [∇L_acq(θ + εv) − ∇L_acq(θ − εv)] / 2ε, ε at the optimum of a central difference.

    Parameters of half precision are taken in float32, and so are all matrix products: of less
    precise ones the difference would be rounding alone.
    """

    def product(v: Params) -> Params:
        start, direction = (jax.tree.map(_widened, tree) for tree in (point, v))
        norm = jnp.sqrt(dot(direction, direction))
        relative = jnp.finfo(norm.dtype).eps ** (1 / 3)
        scale = relative * (1 + jnp.sqrt(dot(start, start)))
        epsilon = scale / jnp.where(norm > 0, norm, 1)
        with jax.default_matmul_precision("highest"):
            above, _ = losses.gradient(losses.acquisition, _add(start, direction, epsilon))
            below, _ = losses.gradient(losses.acquisition, _add(start, direction, -epsilon))
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
    """Carry v = λ ∇L_ret(θ') back through the inner steps: v ← (1 − αω) v − α H v."""
    v, retention = losses.gradient(losses.retention, adapted)
    v = jax.tree.map(lambda x: losses.retention_weight * x, v)
    shrink = 1 - inner.lr * inner.weight_decay
    for product in reversed(products):
        # A tangent must have the dtypes of the parameters, whatever α is.
        v = _like(jax.tree.map(lambda x, hx: shrink * x - inner.lr * hx, v, product(v)), params)
    outer_gradient, outer = losses.outer_gradient(params, acquisition)
    return _Result(_add(outer_gradient, v), acquisition[1], outer, retention, acquisition[0])
