"""The meta-gradient against closed forms, finite differences and its own Taylor expansion."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation import meta
from dfkd_jax.networks.classifiers import create_classifier
from tests.helpers.tiny import SMALL_NET
from tests.helpers.trees import cast

pytestmark = pytest.mark.usefixtures("x64")
EXACT = ("exact", "exact_hvp", "finite_difference")


def quadratics(seed=0, n=5):
    """L_acq = ½ θᵀAθ − bᵀθ and L_ret = ½ θᵀCθ − dᵀθ with their matrices, and θ."""
    rng = np.random.default_rng(seed)
    a, c = (m @ m.T / n for m in rng.normal(size=(2, n, n)))
    b, d, theta = rng.normal(size=(3, n))

    def quadratic(matrix, vector):
        return lambda p: 0.5 * p["w"] @ matrix @ p["w"] - vector @ p["w"]

    return (a, b, c, d), theta, quadratic(a, b), quadratic(c, d)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("variant", meta.VARIANTS)
def test_quadratics_in_closed_form(variant, decay, steps):
    (a, b, c, d), theta, acquisition, retention = quadratics()
    alpha = 0.2
    inner, jacobian = theta, np.eye(5)
    for _ in range(steps):
        inner = inner - alpha * (a @ inner - b + decay * inner)
        jacobian = jacobian @ ((1 - alpha * decay) * np.eye(5) - alpha * a)
    identity = (1 - alpha * decay) ** steps * np.eye(5)
    v = c @ inner - d
    expected = (a @ theta - b) + {
        "none": c @ theta - d,
        "detached": np.zeros(5),
        "first_order": identity @ v,
    }.get(variant, jacobian @ v)

    gradient, metrics = meta.meta_gradient(
        acquisition,
        retention,
        {"w": jnp.asarray(theta)},
        inner_lr=alpha,
        variant=variant,
        inner_weight_decay=decay,
        inner_steps=steps,
    )

    tolerance = 1e-8 if variant == "finite_difference" else 1e-13
    np.testing.assert_allclose(gradient["w"], expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(metrics["acquisition_loss"], 0.5 * theta @ a @ theta - b @ theta)
    at = theta if variant == "none" else inner
    np.testing.assert_allclose(metrics["retention_loss"], 0.5 * at @ c @ at - d @ at)
    g_acq, g_ret = a @ theta - b, c @ theta - d
    cosine = g_acq @ g_ret / np.linalg.norm(g_acq) / np.linalg.norm(g_ret)
    np.testing.assert_allclose(metrics["gradient_alignment"], cosine)


@pytest.mark.parametrize("variant", meta.VARIANTS)
def test_an_outer_loss_replaces_the_acquisition_loss_outside_of_the_inner_step(variant):
    _, theta, acquisition, retention = quadratics()
    params = {"w": jnp.asarray(theta)}
    options = {"inner_lr": 0.2, "variant": variant}

    def outer(p):
        return jnp.sum(jnp.sin(p["w"]))

    plain, _ = meta.meta_gradient(acquisition, retention, params, **options)
    changed, metrics = meta.meta_gradient(
        acquisition, retention, params, outer_loss=outer, **options
    )
    difference = jax.grad(outer)(params)["w"] - jax.grad(acquisition)(params)["w"]
    np.testing.assert_allclose(changed["w"] - plain["w"], difference, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(metrics["acquisition_loss"], acquisition(params))
    np.testing.assert_allclose(metrics["outer_loss"], outer(params))


@pytest.fixture(scope="module")
def network():
    """Losses of a real student with batch norm, in double precision: (L_acq, L_ret, θ)."""
    with jax.enable_x64(True):
        student = create_classifier(SMALL_NET, 10)
        x, x_m = jax.random.normal(jax.random.key(0), (2, 12, 8, 8, 1), jnp.float64)
        t, t_m = 3 * jax.random.normal(jax.random.key(1), (2, 12, 10), jnp.float64)
        variables = cast(student.init(jax.random.key(2), x[:2], train=True), jnp.float64)

        def loss_on(images, logits):
            def loss(params):
                variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
                (out, _), updated = student.apply(
                    variables_, images, train=True, mutable=["batch_stats"]
                )
                return jnp.mean(jnp.abs(out - logits)), updated["batch_stats"]

            return loss

        yield loss_on(x, t), loss_on(x_m, t_m[:12]), variables["params"]


def gradient_of(network, variant, **options):
    acquisition, retention, params = network
    options = {"inner_lr": 0.05, "has_aux": True, **options}
    compute = jax.jit(
        lambda p: meta.meta_gradient(acquisition, retention, p, variant=variant, **options)
    )
    return compute(params)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def relative(a, b):
    a, b = flat(a), flat(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("decay, steps", [(0.0, 1), (0.1, 2)])
def test_exact_is_the_derivative_of_the_objective_by_finite_differences(network, decay, steps):
    acquisition, retention, params = network
    alpha = 0.05

    @jax.jit
    def objective(p):
        inner = p
        for _ in range(steps):
            gradient = jax.grad(lambda q: acquisition(q)[0])(inner)
            inner = jax.tree.map(lambda x, g: x - alpha * (g + decay * x), inner, gradient)
        return acquisition(p)[0] + retention(inner)[0]

    gradient, _ = gradient_of(network, "exact", inner_weight_decay=decay, inner_steps=steps)
    for seed in range(4):
        keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
        keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
        direction = jax.tree.map(lambda k, p: jax.random.normal(k, p.shape, p.dtype), keys, params)
        h = 1e-7
        above, below = (
            objective(jax.tree.map(lambda p, u, s=s: p + s * u, params, direction)) for s in (h, -h)
        )
        numeric = (above - below) / (2 * h)
        np.testing.assert_allclose(meta.dot(gradient, direction), numeric, rtol=2e-6)


@pytest.mark.parametrize("options", [{}, {"inner_weight_decay": 0.1, "inner_steps": 3}])
def test_exact_equals_forward_over_reverse(network, options):
    by_grad, _ = gradient_of(network, "exact", **options)
    by_hvp, _ = gradient_of(network, "exact_hvp", **options)
    assert relative(by_hvp, by_grad) < 1e-10


@pytest.mark.parametrize("variant", ["exact", "exact_hvp"])
def test_computing_inner_steps_again_gives_the_same(network, variant):
    options = {"inner_weight_decay": 0.1, "inner_steps": 3}
    stored, measured = gradient_of(network, variant, **options)
    again, measured_again = gradient_of(network, variant, remat=True, **options)
    assert relative(again, stored) < 1e-12
    chex.assert_trees_all_close(measured_again, measured, rtol=1e-12)


@pytest.mark.parametrize("variant", ["exact", "exact_hvp"])
def test_computing_inner_steps_again_takes_less_memory(variant):
    images = jax.random.normal(jax.random.key(0), (512, 64))
    params = [jax.random.normal(jax.random.key(i), (64, 64)) / 8 for i in range(4)]

    def loss(params):
        x = images
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    def memory(remat):
        compute = partial(
            meta.meta_gradient, loss, loss, inner_lr=0.1, variant=variant, inner_steps=6
        )
        compiled = jax.jit(partial(compute, remat=remat)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # On a CPU XLA drops the barriers early and shares half of it again, so that a quarter is saved.
    assert memory(True) < 0.85 * memory(False)


def test_finite_difference_is_close_to_exact(network):
    exact, _ = gradient_of(network, "exact")
    numeric, _ = gradient_of(network, "finite_difference")
    assert relative(numeric, exact) < 1e-5


@pytest.mark.slow
def test_first_order_differs_from_exact_by_alpha_h_v(network):
    acquisition, retention, params = network
    alpha = 0.05
    exact, _ = gradient_of(network, "exact", inner_lr=alpha)
    first, _ = gradient_of(network, "first_order", inner_lr=alpha)

    def gradient(p):
        return jax.grad(lambda q: acquisition(q)[0])(p)

    inner = jax.tree.map(lambda p, g: p - alpha * g, params, gradient(params))
    v = jax.grad(lambda q: retention(q)[0])(inner)
    hv = jax.jvp(gradient, (params,), (v,))[1]
    expected = flat(jax.tree.map(lambda x: alpha * x, hv))
    assert np.linalg.norm(expected) > 1e-3 * np.linalg.norm(flat(exact))
    np.testing.assert_allclose(flat(first) - flat(exact), expected, rtol=1e-8, atol=1e-12)


def test_the_meta_term_reaches_every_parameter(network):
    """And nothing of it does where the inner model is detached, as in the authors' code."""
    acquisition, _, params = network
    alone = jax.grad(lambda p: acquisition(p)[0])(params)
    for variant in ("first_order", *EXACT):
        gradient, _ = gradient_of(network, variant)
        reached = jax.tree.map(lambda a, b: bool(jnp.max(jnp.abs(a - b)) > 1e-8), gradient, alone)
        assert all(jax.tree.leaves(reached)), (variant, reached)
    detached, _ = gradient_of(network, "detached")
    np.testing.assert_allclose(flat(detached), flat(alone), rtol=1e-9, atol=1e-15)


def test_taylor_expansion_holds_to_second_order():
    """∇_θ L_ret(θ') = ∇L_ret − α ∇(∇L_ret · ∇L_acq) + O(α²), on a smooth network."""
    x, x_m = jax.random.normal(jax.random.key(0), (2, 16, 6), jnp.float64)
    t, t_m = jax.random.normal(jax.random.key(1), (2, 16, 3), jnp.float64)
    w1 = jax.random.normal(jax.random.key(2), (6, 8), jnp.float64)
    w2 = jax.random.normal(jax.random.key(3), (8, 3), jnp.float64)
    params = (w1, w2)

    def loss_on(inputs, targets):
        return lambda p: jnp.mean((jnp.tanh(inputs @ p[0]) @ p[1] - targets) ** 2)

    acquisition, retention = loss_on(x, t), loss_on(x_m, t_m)

    def matching(p):
        return meta.dot(jax.grad(retention)(p), jax.grad(acquisition)(p))

    def error(alpha):
        gradient, _ = meta.meta_gradient(
            acquisition, retention, params, inner_lr=alpha, variant="exact"
        )
        term = flat(gradient) - flat(jax.grad(acquisition)(params))
        expansion = flat(jax.grad(retention)(params)) - alpha * flat(jax.grad(matching)(params))
        return np.linalg.norm(term - expansion)

    for alpha in (4e-3, 2e-3, 1e-3):
        assert error(alpha) / error(alpha / 2) == pytest.approx(4, rel=0.05)


def test_auxiliary_data_comes_from_theta_and_from_the_retention_pass(network):
    acquisition, retention, params = network
    for variant in meta.VARIANTS:
        _, metrics = gradient_of(network, variant, inner_lr=0.0)
        expected = acquisition(params)[1], retention(params)[1]
        got = metrics["acquisition_aux"], metrics["retention_aux"]
        for a, b in zip(expected, got, strict=True):
            np.testing.assert_allclose(flat(a), flat(b), rtol=1e-12)


def test_alignment_is_one_for_equal_losses_and_zero_for_a_vanishing_gradient():
    _, theta, acquisition, _ = quadratics()
    params = {"w": jnp.asarray(theta)}
    options = {"inner_lr": 0.1, "variant": "exact"}
    _, metrics = meta.meta_gradient(acquisition, acquisition, params, **options)
    np.testing.assert_allclose(metrics["gradient_alignment"], 1)
    _, metrics = meta.meta_gradient(acquisition, lambda p: 0 * p["w"][0], params, **options)
    assert metrics["gradient_alignment"] == 0
    _, metrics = meta.meta_gradient(
        acquisition, acquisition, params, measure_alignment=False, **options
    )
    assert "gradient_alignment" not in metrics


@pytest.mark.parametrize("variant", meta.VARIANTS)
def test_the_retention_term_is_linear_in_its_weight(variant):
    _, theta, acquisition, retention = quadratics()
    params = {"w": jnp.asarray(theta)}
    options = {"inner_lr": 0.2, "variant": variant, "inner_weight_decay": 0.1, "inner_steps": 2}
    none, once, third = (
        meta.meta_gradient(acquisition, retention, params, retention_weight=w, **options)[0]["w"]
        for w in (0.0, 1.0, 0.3)
    )
    np.testing.assert_allclose(none, jax.grad(acquisition)(params)["w"], rtol=1e-12)
    np.testing.assert_allclose(third, none + 0.3 * (once - none), rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("variant", meta.VARIANTS)
def test_the_gradient_has_the_dtypes_of_the_parameters(variant, dtype):
    """Leaf by leaf, also where α is an array of another precision."""
    params = {"a": jnp.ones(3, dtype), "b": jnp.ones(2, jnp.float32)}

    def loss(p):
        return jnp.sum(jnp.sin(p["a"])) + jnp.sum(p["a"][:2] * p["b"] ** 2)

    for alpha in (0.1, jnp.float32(0.1), jnp.float64(0.1)):
        gradient, metrics = meta.meta_gradient(loss, loss, params, inner_lr=alpha, variant=variant)
        assert jax.tree.map(lambda x: x.dtype, gradient) == jax.tree.map(lambda x: x.dtype, params)
        assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in gradient.values())
        np.testing.assert_allclose(metrics["gradient_alignment"], 1, rtol=1e-2)


def test_a_finite_difference_in_half_precision_is_taken_in_single():
    """Of bfloat16 values three digits are left: the difference of two would be their rounding."""
    _, theta, acquisition, retention = quadratics()
    params = {"w": jnp.asarray(theta, jnp.bfloat16)}
    exact, numeric = (
        meta.meta_gradient(acquisition, retention, params, inner_lr=0.2, variant=variant)[0]["w"]
        for variant in ("exact", "finite_difference")
    )
    assert relative(np.float64(numeric), np.float64(exact)) < 0.03


def test_the_cosine_is_nan_of_nan_and_never_beyond_one():
    ones = {"w": jnp.ones(3)}
    assert np.isnan(meta.cosine(ones, {"w": jnp.full(3, jnp.nan)}))
    assert np.isnan(meta.cosine({"w": jnp.array([1.0, jnp.nan, 0.0])}, ones))
    assert meta.cosine(ones, {"w": jnp.zeros(3)}) == 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        vector = {"w": jnp.asarray(rng.normal(size=7), jnp.float32)}
        scaled = {"w": jnp.float32(rng.uniform(0.1, 10)) * vector["w"]}
        assert meta.cosine(vector, scaled) <= 1
        assert meta.cosine(vector, {"w": -scaled["w"]}) >= -1


def test_unknown_variant_and_no_inner_step_are_refused():
    _, theta, acquisition, retention = quadratics()
    with pytest.raises(ValueError, match=r"variant is 'magic'; allowed are none, detached"):
        meta.meta_gradient(acquisition, retention, theta, inner_lr=0.1, variant="magic")
    with pytest.raises(ValueError, match="inner_steps is 0; allowed is 1 or more"):
        meta.meta_gradient(
            acquisition, retention, theta, inner_lr=0.1, variant="exact", inner_steps=0
        )
