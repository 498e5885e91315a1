import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dfkd_jax.networks import convolution, layers, winograd

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default
NHWC = ("NHWC", "HWIO", "NHWC")

CASES = [
    # image (B, H, W, C_in), kernel (kh, kw, C_in, C_out), strides, padding
    ((2, 6, 5, 3), (3, 3, 3, 4), (1, 1), "SAME"),
    ((2, 6, 5, 3), (3, 3, 3, 4), (2, 2), "SAME"),
    ((2, 7, 6, 2), (3, 3, 2, 4), (1, 1), "VALID"),
    ((2, 7, 6, 2), (3, 2, 2, 4), (2, 1), "VALID"),
    ((2, 8, 8, 2), (3, 3, 2, 3), (2, 2), ((1, 1), (1, 1))),
    ((2, 5, 7, 2), (5, 5, 2, 3), (1, 1), ((2, 2), (0, 3))),
    ((2, 6, 6, 3), (1, 1, 3, 4), (1, 1), "VALID"),
    ((2, 7, 7, 3), (1, 1, 3, 4), (2, 2), ((0, 0), (0, 0))),
    ((2, 5, 5, 3), (5, 5, 3, 4), (1, 1), "VALID"),  # one window covers the image
    ((2, 3, 3, 3), (5, 5, 3, 4), (2, 2), ((1, 1), (1, 1))),  # the same after padding
    ((2, 6, 6, 1), (5, 5, 1, 2), (1, 1), ((-1, 0), (1, 1))),  # negative padding crops
]


def normal(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), float)


def xla(image, kernel, strides, padding):
    return lax.conv_general_dilated(image, kernel, strides, padding, dimension_numbers=NHWC)


def uses_xla(image, kernel, *args, **kwargs):
    """Whether the derivative with respect to the image is XLA's convolution."""
    _, derivative = jax.linearize(
        lambda image: convolution.convolution(image, kernel, *args, **kwargs), image
    )
    return "conv_general_dilated" in str(jax.make_jaxpr(derivative)(image))


@pytest.mark.parametrize("image_shape, kernel_shape, strides, padding", CASES)
def test_matrix_products_equal_xla_up_to_second_derivatives(
    image_shape, kernel_shape, strides, padding
):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        point, direction = (
            (jnp.asarray(rng.normal(size=image_shape)), jnp.asarray(rng.normal(size=kernel_shape)))
            for _ in range(2)
        )

        def derivatives(conv):
            def objective(pair):
                return jnp.sum(jnp.sin(conv(*pair, strides, padding)))

            def slope(pair):
                products = jax.tree.map(jnp.vdot, jax.grad(objective)(pair), direction)
                return sum(jax.tree.leaves(products))

            return (
                conv(*point, strides, padding),
                jax.grad(objective)(point),
                jax.grad(slope)(point),
            )

        patches, rows, chosen, theirs = jax.jit(
            lambda: (
                derivatives(convolution.patches_convolution),
                derivatives(convolution.rows_convolution),
                derivatives(functools.partial(convolution.convolution, dimension_numbers=NHWC)),
                derivatives(xla),
            )
        )()
        for ours in (patches, rows, chosen):
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                assert a.dtype == jnp.float64
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size, stride, padding", [(3, 1, "SAME"), (3, 2, ((1, 1), (1, 1)))])
def test_depthwise_equals_xla_up_to_second_derivatives(size, stride, padding, x64):
    image, kernel = normal((2, 6, 7, 5)), normal((size, size, 1, 5))
    options = dict(dimension_numbers=NHWC, feature_group_count=5)
    found = []
    for conv in (convolution.convolution, lax.conv_general_dilated):

        def objective(pair, conv=conv):
            return jnp.sum(jnp.sin(conv(*pair, (stride, stride), padding, **options)))

        point = (image, kernel)
        gradient = jax.grad(objective)
        derivatives = jax.jit(lambda point, g=gradient: jax.jvp(g, (point,), (point,)))
        assert ("feature_group_count=5" in str(jax.make_jaxpr(objective)(point))) == (
            conv is lax.conv_general_dilated
        )
        found.append((objective(point), *derivatives(point)))
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_depthwise_sums_in_single_precision():
    image, kernel = normal((1, 8, 8, 4)), normal((3, 3, 1, 4))
    halves = (image.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    found = convolution.depthwise_convolution(*halves, (1, 1), "SAME")
    exact = convolution.depthwise_convolution(*(h.astype(float) for h in halves), (1, 1), "SAME")
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_depthwise_refuses_a_kernel_of_several_inputs():
    with pytest.raises(ValueError, match="feature_group_count"):
        convolution.convolution(
            normal((1, 6, 6, 4)),
            normal((3, 3, 2, 4)),
            (1, 1),
            "SAME",
            dimension_numbers=NHWC,
            feature_group_count=4,
        )


@pytest.mark.parametrize("block_bytes, blocks", [(2**20, 1), (5_000, 3), (1, 6)])
def test_winograd_equals_xla_up_to_second_derivatives(block_bytes, blocks, monkeypatch):
    image_shape = (6, 4, 6, 3)
    monkeypatch.setattr(winograd, "_BLOCK_BYTES", block_bytes)
    assert winograd._blocks(image_shape, 2, 8) == blocks
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        point, direction = (
            (jnp.asarray(rng.normal(size=image_shape)), jnp.asarray(rng.normal(size=(3, 3, 3, 2))))
            for _ in range(2)
        )

        def derivatives(conv):
            gradient = jax.grad(lambda pair: jnp.sum(jnp.sin(conv(*pair))))

            def slope(pair):
                products = jax.tree.map(jnp.vdot, gradient(pair), direction)
                return sum(jax.tree.leaves(products))

            return (
                conv(*point),
                jax.jvp(gradient, (point,), (direction,)),
                jax.grad(slope)(point),
            )

        ours, theirs = jax.jit(
            lambda: (
                derivatives(winograd.winograd_convolution),
                derivatives(lambda x, k: xla(x, k, (1, 1), "SAME")),
            )
        )()
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "image_shape, kernel_shape, strides, padding, fits",
    [
        ((2, 8, 8, 3), (3, 3, 3, 3), (1, 1), "SAME", True),
        ((2, 8, 8, 3), (3, 3, 3, 3), (1, 1), [(1, 1), (1, 1)], True),
        ((2, 8, 7, 3), (3, 3, 3, 3), (1, 1), "SAME", False),
        ((2, 8, 8, 3), (3, 3, 3, 3), (2, 2), "SAME", False),
        ((2, 8, 8, 3), (3, 3, 3, 3), (1, 1), "VALID", False),
        ((2, 8, 8, 3), (1, 1, 3, 3), (1, 1), "SAME", False),
    ],
)
def test_what_winograd_fits(image_shape, kernel_shape, strides, padding, fits):
    assert winograd.fits(image_shape, kernel_shape, strides, padding) == fits


def test_winograd_multiplies_less_than_half(monkeypatch):
    image, kernel = jnp.ones((2, 8, 8, 64)), jnp.ones((3, 3, 64, 64))
    compiled = jax.jit(
        lambda x, k: convolution.convolution(x, k, (1, 1), "SAME", dimension_numbers=NHWC)
    ).lower(image, kernel)
    products = 2 * 9 * 2 * 8 * 8 * 64 * 64
    kernel_transform = 4 * 16 * 9 * 64 * 64
    flops = compiled.compile().cost_analysis()["flops"]
    assert flops - kernel_transform < products / 2


def test_upsampling_with_convolution_equals_the_two_up_to_second_derivatives():
    image_shape, kernel_shape, padding = (2, 3, 4, 3), (3, 3, 3, 2), ((1, 1), (1, 1))
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        point, direction = (
            (jnp.asarray(rng.normal(size=image_shape)), jnp.asarray(rng.normal(size=kernel_shape)))
            for _ in range(2)
        )

        def fused(image, kernel):
            return convolution.upsampled_convolution(
                image, kernel, (1, 1), padding, dimension_numbers=NHWC
            )

        def apart(image, kernel):
            return xla(layers.upsample2(image), kernel, (1, 1), padding)

        def derivatives(conv):
            def objective(pair):
                return jnp.sum(jnp.sin(conv(*pair)))

            def gradient(pair):
                return jax.grad(objective)(pair)

            return conv(*point), jax.jvp(gradient, (point,), (direction,))

        ours, theirs = jax.jit(lambda: (derivatives(fused), derivatives(apart)))()
        assert ours[0].shape == (2, 6, 8, 2)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_upsampling_with_convolution_is_one_convolution_of_the_small_image(monkeypatch):
    """2.25 times fewer products on every backend; the enlarged input does not exist."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    layer = layers.UpsampleConv(4, (3, 3), padding=1)
    image = jnp.ones((2, 8, 8, 3))
    variables = layer.init(KEY, image)
    plain = layers.Conv(4, (3, 3), padding=1).init(KEY, image)
    jax.tree.map(np.testing.assert_array_equal, variables, plain)
    jaxpr = jax.make_jaxpr(layer.apply)(variables, image).jaxpr
    (conv,) = [e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert [v.aval.shape for v in conv.invars] == [(2, 8, 8, 3), (2, 2, 3, 16)]


@pytest.mark.parametrize("size, strides, pad", [((5, 5), 1, 1), ((3, 3), 2, 1), ((3, 3), 1, 0)])
def test_upsampling_with_another_convolution_is_refused(size, strides, pad):
    layer = layers.UpsampleConv(4, size, strides=strides, padding=pad)
    with pytest.raises(ValueError, match="has a 3×3 kernel, stride 1 and padding 1, not"):
        layer.init(KEY, jnp.ones((1, 8, 8, 3)))


def test_matrix_products_refuse_other_channels():
    for form in (convolution.patches_convolution, convolution.rows_convolution):
        with pytest.raises(ValueError, match="takes 2 channels, the image has 3"):
            form(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 2, 1)), (1, 1), "SAME")


def test_one_by_one_convolution_is_one_matrix_product():
    image, kernel = jnp.ones((2, 40, 40, 8)), jnp.ones((1, 1, 8, 4))
    jaxpr = str(
        jax.make_jaxpr(
            lambda x, k: convolution.convolution(x, k, (1, 1), "VALID", dimension_numbers=NHWC)
        )(image, kernel)
    )
    assert "conv_general_dilated" not in jaxpr
    assert jaxpr.count("dot_general") == 1
    assert "concatenate" not in jaxpr


def test_backend_and_shape_choose_the_convolution(monkeypatch):
    small, large = jnp.ones((1, 8, 8, 32)), jnp.ones((1, 32, 32, 32))
    kernel = jnp.ones((3, 3, 32, 32))
    call = dict(dimension_numbers=NHWC)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not uses_xla(small, kernel, (1, 1), "SAME", **call)
    assert uses_xla(large, kernel, (1, 1), "SAME", **call)
    value = jax.make_jaxpr(lambda x, k: convolution.convolution(x, k, (1, 1), "SAME", **call))
    assert "dot_general" not in str(value(small, kernel))  # the value alone is XLA's everywhere
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert uses_xla(small, kernel, (1, 1), "SAME", **call)


@pytest.mark.parametrize(
    "image_shape, kernel_shape, options",
    [
        ((2, 6, 6, 4), (3, 3, 4, 4), dict(rhs_dilation=(2, 2), dimension_numbers=NHWC)),
        ((2, 6, 6, 4), (3, 3, 4, 4), dict(lhs_dilation=(2, 2), dimension_numbers=NHWC)),
        ((2, 6, 6, 4), (3, 3, 2, 4), dict(feature_group_count=2, dimension_numbers=NHWC)),
        ((2, 4, 6, 6), (4, 4, 3, 3), {}),  # NCHW × OIHW, the default layout of lax
        ((2, 6, 4), (3, 4, 4), dict(dimension_numbers=("NWC", "WIO", "NWC"))),
    ],
)
def test_what_patches_do_not_cover_goes_to_xla(image_shape, kernel_shape, options):
    image = normal(image_shape)
    kernel = normal(kernel_shape)
    strides = (1,) * (image.ndim - 2)
    padding = ((1, 1),) * len(strides)
    assert uses_xla(image, kernel, strides, padding, **options)
    np.testing.assert_array_equal(
        convolution.convolution(image, kernel, strides, padding, **options),
        lax.conv_general_dilated(image, kernel, strides, padding, **options),
    )
