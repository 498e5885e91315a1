from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dfkd_jax.networks import generator
from dfkd_jax.networks.convolution import convolution, upsampled_convolution
from dfkd_jax.networks.generator import Generator, base_size
from dfkd_jax.networks.pixel_generator import NormalizedPixelGenerator, PixelGenerator

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default
LATENT = 6
SMALL = Generator((8, 8, 3), channels=(8, 4))


def latents(dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=(16, LATENT)), dtype)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(SMALL.init)(KEY, latents())


def advance(module, variables, z, calls):
    """Return the variables after `calls` training calls."""

    def step(_, variables):
        _, updates = module.apply(variables, z, mutable=["batch_stats"])
        return {**variables, **updates}

    return jax.jit(lambda variables: jax.lax.fori_loop(0, calls, step, variables))(variables)


LARGE = pytest.param((128, 128, 1), 8, 4, marks=pytest.mark.slow)


@pytest.mark.parametrize("make", [Generator, PixelGenerator])
def test_large_images_start_at_a_sixteenth(make):
    """Or the dense layer of images of 224×224 would have a hundred million parameters."""
    module = make((224, 224, 3))
    images, shapes = jax.eval_shape(module.init_with_output, KEY, jnp.ones((2, 1000)))
    assert images.shape == (2, 224, 224, 3)
    dense = shapes["params"].pop("fc")["kernel"]
    assert dense.shape == (1000, 14 * 14 * 128)
    kernels = [p["kernel"].shape for name, p in shapes["params"].items() if "conv" in name]
    expected = [(128, 128), (128, 64), (64, 64), (64, 3)]
    assert sorted(kernels) == sorted((3, 3, *channels) for channels in expected)


@pytest.mark.parametrize(
    "image_shape, base, upsamplings",
    [((8, 8, 1), 2, 2), ((28, 28, 1), 7, 2), ((32, 32, 3), 8, 2), ((64, 64, 3), 8, 3), LARGE],
)
@pytest.mark.parametrize("spectral_norm", [True, False])
def test_shape_and_output_statistics(image_shape, base, upsamplings, spectral_norm):
    assert base_size(image_shape) == base == image_shape[0] // 2**upsamplings
    module = Generator(image_shape, channels=(8, 4), spectral_norm=spectral_norm)
    variables = jax.jit(module.init)(KEY, latents())
    assert variables["params"]["fc"]["kernel"].shape == (LATENT, base * base * 8)
    # Larger weights: the last batch norm then sees variances far above its eps.
    variables = {**variables, "params": jax.tree.map(lambda leaf: 5 * leaf, variables["params"])}
    images = jax.jit(lambda v, z: module.apply(v, z, update_stats=False))(variables, latents())
    assert images.shape == (16, *image_shape)
    np.testing.assert_allclose(np.mean(images, (0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(np.var(images, (0, 1, 2)), 1, atol=2e-2)


def test_parameters_of_the_full_size_generator():
    module = Generator((32, 32, 3))
    shapes = jax.eval_shape(module.init, KEY, jnp.ones((2, 1000)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    dense = 1000 * 8192 + 8192
    convolutions = (9 * 128 + 1) * 128 + (9 * 128 + 1) * 64 + (9 * 64 + 1) * 3
    assert count == dense + convolutions + 2 * (128 + 128 + 64)


def test_initialisation(variables):
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = path[-1].key
        if name == "kernel":
            assert -0.08 <= leaf.min() < 0 < leaf.max() <= 0.08
            np.testing.assert_allclose(leaf.std(), 0.08 / np.sqrt(3), rtol=0.15)
        else:
            np.testing.assert_array_equal(leaf, 1.0 if name == "scale" else 0.0)
    assert "bn4" not in variables["params"]


def test_batch_norm_epsilons():
    seen = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm):
            seen[context.module.name] = (context.module.epsilon, context.module.axis_name)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(SMALL.clone(axis_name="devices").init, KEY, latents())
    epsilons = {"bn1": 1e-5, "bn2": 0.8, "bn3": 0.8, "bn4": 1e-5}
    assert seen == {name: (epsilon, "devices") for name, epsilon in epsilons.items()}


@pytest.mark.slow
def test_spectral_norm_makes_the_top_singular_value_one(variables, monkeypatch):
    variables = advance(SMALL, variables, latents(), 100)
    kernels = []

    def recording(function):
        def record(lhs, rhs, *args, **kwargs):
            kernels.append(rhs)
            return function(lhs, rhs, *args, **kwargs)

        return partial(nn.Conv, conv_general_dilated=record)

    monkeypatch.setattr(generator, "Conv", recording(convolution))
    monkeypatch.setattr(generator, "UpsampleConv", recording(upsampled_convolution))
    SMALL.apply(variables, latents(), update_stats=False)
    assert len(kernels) == 3
    for index, kernel in enumerate(kernels, start=1):
        assert kernel.shape[:2] == (3, 3)
        matrix = np.reshape(kernel, (-1, kernel.shape[-1]))
        np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False)[0], 1, rtol=1e-3)
        raw = variables["params"][f"conv{index}"]["kernel"].reshape(matrix.shape)
        assert np.linalg.svd(raw, compute_uv=False)[0] < 0.95


@pytest.mark.parametrize("train", [True, False])
def test_calls_without_update_change_nothing(variables, train):
    z = latents()

    @jax.jit
    def calls(v):
        return (
            SMALL.apply(v, z, train, update_stats=False),
            SMALL.apply(v, z, train, update_stats=False, mutable=["batch_stats"]),
            SMALL.apply(v, z, train, mutable=["batch_stats"])[0],
        )

    first, (second, updates), updating = calls(variables)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, updating)
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updates), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_updates_store_every_statistic(variables):
    _, updates = jax.jit(lambda v, z: SMALL.apply(v, z, mutable=["batch_stats"]))(
        variables, latents()
    )
    assert set(updates) == {"batch_stats"}
    before, after = (jax.tree.leaves(tree["batch_stats"]) for tree in (variables, updates))
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_train_mode_uses_the_batch_and_eval_mode_does_not(variables):
    z = latents()
    variables = advance(SMALL, variables, z, 5)
    images = jax.jit(
        lambda v: [
            SMALL.apply(v, part, train, update_stats=False)
            for train in (True, False)
            for part in (z, z[:4])
        ]
    )(variables)
    assert not np.allclose(images[0][:4], images[1], atol=1e-2)
    np.testing.assert_allclose(images[2][:4], images[3], atol=1e-5)


def test_statistics_are_global_over_the_axis(variables):
    z = latents()
    module = SMALL.clone(axis_name="devices")
    parts = z.reshape(2, -1, LATENT)

    def update(module):
        return lambda z: module.apply(variables, z, mutable=["batch_stats"])

    def freeze(z):
        return module.apply(variables, z, update_stats=False)

    whole, stats = jax.jit(update(SMALL))(z)
    images, part_stats = jax.jit(jax.vmap(update(module), axis_name="devices"))(parts)
    frozen = jax.jit(jax.vmap(freeze, axis_name="devices"))(parts)
    np.testing.assert_allclose(images.reshape(whole.shape), whole, atol=1e-4)
    np.testing.assert_allclose(frozen, images, atol=1e-6)
    for part, full in zip(jax.tree.leaves(part_stats), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(part, np.stack([full, full]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spectral_norm", [pytest.param(True, marks=pytest.mark.slow), False])
def test_gradient_in_float64_against_finite_differences(spectral_norm):
    with jax.enable_x64(True):
        z = latents(dtype=jnp.float64)
        module = SMALL.clone(spectral_norm=spectral_norm)
        variables = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64), jax.jit(module.init)(KEY, z)
        )
        if spectral_norm:
            # The gradient treats `u` as constant, which is exact where power iteration converged.
            variables = advance(module, variables, z, 150)

        def objective(params):
            images, updates = module.apply(
                {**variables, "params": params}, z, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.sin(images)), (images, updates)

        gradient, auxiliary = jax.jit(jax.grad(objective, has_aux=True))(variables["params"])
        assert {leaf.dtype for leaf in jax.tree.leaves(auxiliary)} == {jnp.dtype(jnp.float64)}
        frozen = module.apply(variables, z, update_stats=False)
        np.testing.assert_allclose(frozen, auxiliary[0], rtol=0, atol=1e-12)

        rng = np.random.default_rng(1)
        direction = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)),
            variables["params"],
        )
        value = jax.jit(
            lambda t: objective(
                jax.tree.map(lambda p, d: p + t * d, variables["params"], direction)
            )[0]
        )
        step = 1e-6
        difference = (value(step) - value(-step)) / (2 * step)
        products = jax.tree.map(jnp.vdot, gradient, direction)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), difference, rtol=1e-5)


def test_half_precision_returns_float32():
    module = SMALL.clone(dtype=jnp.bfloat16)
    variables = jax.eval_shape(module.init, KEY, latents())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    images = jax.eval_shape(
        lambda v, z: module.apply(v, z, update_stats=False), variables, latents()
    )
    assert images.dtype == jnp.float32


@pytest.mark.slow
def test_works_inside_another_module(variables):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, z):
            return SMALL.clone(name="generator", parent=self)(z, update_stats=False)

    nested = {collection: {"generator": tree} for collection, tree in variables.items()}
    np.testing.assert_array_equal(
        Outer().apply(nested, latents()), SMALL.apply(variables, latents(), update_stats=False)
    )


@pytest.mark.parametrize(
    "image_shape", [(32, 28, 3), (30, 30, 3), (68, 68, 3), (136, 136, 1), (0, 0, 1)]
)
def test_impossible_sizes(image_shape):
    with pytest.raises(ValueError) as error:
        Generator(image_shape).init(KEY, latents())
    height, width, _ = image_shape
    assert str(error.value) == (
        "The generator makes square images whose side is a multiple of 4 (of 8 from 64 on, of 16 "
        f"from 128 on), not {height}×{width}."
    )


def test_pixels_are_normalised_for_the_networks():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    pixels = PixelGenerator((8, 8, 3), (8, 4))
    module = NormalizedPixelGenerator(pixels, mean, std)
    variables = jax.jit(module.init)(KEY, latents())
    run = jax.jit(partial(module.apply, mutable=["batch_stats"]))
    images, _ = run(variables, latents())
    inner = {name: tree["pixels"] for name, tree in variables.items()}
    plain, _ = jax.jit(partial(pixels.apply, mutable=["batch_stats"]))(inner, latents())
    assert 0 <= plain.min() and plain.max() <= 1 and np.std(plain) > 0.01
    np.testing.assert_allclose(images, (plain - np.array(mean)) / np.array(std), atol=1e-5)
