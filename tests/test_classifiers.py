from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dfkd_jax.classifiers import CLASSIFIERS, CNN, create_classifier
from dfkd_jax.lenet import LeNet5
from dfkd_jax.resnet import ResNet
from dfkd_jax.wide_resnet import WideResNet

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default

# Of every family one that is cheap to run, with the image shape it gets.
SMALL = {
    "cnn": (CNN(5, (4, 6, 8, 7)), (8, 8, 1)),
    "lenet5": (LeNet5(5, (3, 4, 6, 7)), (32, 32, 1)),
    "resnet18": (ResNet(5, blocks=(1, 1, 1, 1), width=4), (8, 8, 3)),
    "wrn16_1": (WideResNet(5, depth=10), (8, 8, 3)),
}
WITH_BATCH_NORM = [name for name in SMALL if name != "lenet5"]


@pytest.fixture(autouse=True)
def compile_fast():
    """These tests compile far more than they compute."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def abstract_variables(module, image_shape):
    return jax.eval_shape(module.init, KEY, jnp.ones((2, *image_shape)))


def parameter_count(name, num_classes, image_shape):
    variables = abstract_variables(create_classifier(name, num_classes), image_shape)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@cache
def initialised(name):
    """Return a small classifier, its variables and six images."""
    module, image_shape = SMALL[name]
    x = jax.random.normal(KEY, (6, *image_shape))
    return module, jax.jit(module.init)(KEY, x), x


@pytest.fixture(params=SMALL)
def small(request):
    return initialised(request.param)


@partial(jax.jit, static_argnums=0)
def train(module, variables, x):
    return module.apply(variables, x, train=True, mutable=True)


def dense(size_in, size_out):
    return size_in * size_out + size_out


def conv(size, channels_in, channels_out):
    return size * size * channels_in * channels_out


def resnet_count(blocks, num_classes):
    total = conv(3, 3, 64) + 2 * 64
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for _ in range(count):
            total += conv(3, channels, width) + conv(3, width, width) + 4 * width
            if channels != width:
                total += conv(1, channels, width) + 2 * width
            channels = width
    return total + dense(512, num_classes)


def wide_resnet_count(depth, factor, num_classes):
    total = conv(3, 3, 16)
    channels = 16
    for stage in range(3):
        width = 16 * factor * 2**stage
        for _ in range((depth - 4) // 6):
            total += conv(3, channels, width) + conv(3, width, width) + 2 * channels + 2 * width
            if channels != width:
                total += conv(1, channels, width)
            channels = width
    return total + 2 * channels + dense(channels, num_classes)


@pytest.mark.parametrize(
    "name, num_classes, published, formula",
    [
        ("resnet18", 10, 11_173_962, resnet_count((2, 2, 2, 2), 10)),
        ("resnet34", 10, 21_282_122, resnet_count((3, 4, 6, 3), 10)),
        ("wrn16_1", 10, 175_066, wide_resnet_count(16, 1, 10)),
        ("wrn16_2", 10, 691_674, wide_resnet_count(16, 2, 10)),
        ("wrn40_1", 10, 563_930, wide_resnet_count(40, 1, 10)),
        ("wrn40_2", 10, 2_243_546, wide_resnet_count(40, 2, 10)),
        ("wrn40_2", 100, 2_255_156, wide_resnet_count(40, 2, 100)),
    ],
)
def test_parameter_counts(name, num_classes, published, formula):
    assert parameter_count(name, num_classes, (32, 32, 3)) == formula == published


def test_parameter_counts_of_lenet():
    full = 25 * 6 + 6 + 25 * 6 * 16 + 16 + 25 * 16 * 120 + 120 + dense(120, 84) + dense(84, 10)
    half = 25 * 3 + 3 + 25 * 3 * 8 + 8 + 25 * 8 * 60 + 60 + dense(60, 42) + dense(42, 10)
    assert full == 61_706
    for image_shape in ((32, 32, 1), (28, 28, 1)):
        assert parameter_count("lenet5", 10, image_shape) == full
        assert parameter_count("lenet5_half", 10, image_shape) == half


FEATURE_SIZES = {
    "cnn": 64,
    "cnn_half": 32,
    "lenet5": 84,
    "lenet5_half": 42,
    "resnet18": 512,
    "resnet34": 512,
    "wrn16_1": 64,
    "wrn16_2": 128,
    "wrn40_1": 64,
    "wrn40_2": 128,
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shapes(name):
    module = create_classifier(name, 7)
    x = jnp.ones((3, 32, 32, 3))
    variables = abstract_variables(module, (32, 32, 3))
    logits, features = jax.eval_shape(module.apply, variables, x)
    assert logits.shape == (3, 7)
    assert features.shape == (3, FEATURE_SIZES[name])
    assert logits.dtype == features.dtype == jnp.float32


@pytest.mark.parametrize(
    "name, size", [("lenet5", 28), ("resnet18", 64), ("wrn16_1", 64), ("cnn", 8), ("cnn", 28)]
)
def test_other_image_sizes(name, size):
    module = create_classifier(name, 7)
    variables = abstract_variables(module, (size, size, 1))
    logits, _ = jax.eval_shape(module.apply, variables, jnp.ones((3, size, size, 1)))
    assert logits.shape == (3, 7)


def test_logits_are_the_last_dense_layer_of_the_features(small):
    module, variables, x = small
    logits, features = jax.jit(module.apply)(variables, x)
    last = variables["params"]["fc"]
    np.testing.assert_allclose(logits, features @ last["kernel"] + last["bias"], atol=1e-5)


def test_eval_mode_treats_every_image_alone(small):
    module, variables, x = small

    @jax.jit
    def evaluate(variables):
        (together, _), updates = module.apply(variables, x, train=False, mutable=True)
        return together, module.apply(variables, x[:1])[0], updates

    together, alone, updates = evaluate(variables)
    np.testing.assert_allclose(alone, together[:1], rtol=1e-4, atol=1e-5)
    jax.tree.map(
        np.testing.assert_array_equal,
        updates.get("batch_stats", {}),
        variables.get("batch_stats", {}),
    )


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_train_mode_uses_the_batch_and_changes_batch_statistics_only(name):
    module, variables, x = initialised(name)
    (logits, _), updates = train(module, variables, x)
    jax.tree.map(np.testing.assert_array_equal, updates["params"], variables["params"])
    before, after = (jax.tree.leaves(tree["batch_stats"]) for tree in (variables, updates))
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    (others, _), _ = train(module, variables, x[:4])
    assert not np.allclose(others, logits[:4], atol=1e-3)


def test_lenet_has_no_batch_statistics():
    module, image_shape = SMALL["lenet5"]
    assert set(abstract_variables(module, image_shape)) == {"params"}
    with pytest.raises(ValueError, match="takes 32×32 or 28×28 images, not 8×8"):
        abstract_variables(module, (8, 8, 1))


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_batch_norm_layers_can_be_intercepted(name):
    """A mask that hides images makes them count for nothing in the batch statistics."""
    module, variables, x = initialised(name)
    mask = (jnp.arange(6) < 4).reshape(6, 1, 1, 1)

    def with_mask(call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            kwargs = {**kwargs, "mask": mask}
        return call(*args, **kwargs)

    with nn.intercept_methods(with_mask):
        (logits, _), updates = jax.jit(partial(train.__wrapped__, module))(variables, x)
    (expected, _), stats = train(module, variables, x[:4])
    np.testing.assert_allclose(logits[:4], expected, rtol=1e-3, atol=1e-4)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_float64_all_the_way(name):
    module, image_shape = SMALL[name]
    with jax.enable_x64(True):
        x = jax.random.normal(KEY, (2, *image_shape), jnp.float64)
        variables = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, jnp.float64),
            jax.eval_shape(module.init, KEY, x),
        )
        jaxpr = jax.make_jaxpr(partial(train, module))(variables, x)
        assert "f32" not in str(jaxpr)
        assert {value.dtype for value in jaxpr.out_avals} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_half_precision_computes_in_half_and_returns_float32(name):
    module = create_classifier(name, 7, dtype=jnp.bfloat16)
    variables = abstract_variables(module, (32, 32, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    jaxpr = jax.make_jaxpr(module.apply)(variables, jnp.ones((2, 32, 32, 3)))
    assert "bf16" in str(jaxpr)
    assert {value.dtype for value in jaxpr.out_avals} == {jnp.dtype(jnp.float32)}


def test_initial_logits_have_a_sensible_scale(small):
    module, variables, x = small
    (logits, _), _ = train(module, variables, x)
    assert 1e-2 < np.std(logits) < 5


def test_resnet_pads_strided_convolutions_on_both_sides():
    module, _ = SMALL["resnet18"]
    seen = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv):
            seen[context.module.path] = (context.module.strides, context.module.padding)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        abstract_variables(module, (8, 8, 3))
    assert seen["layer2_0", "conv1"] == (2, 1)
    assert seen["layer2_0", "shortcut_conv"] == (2, 0)


def test_axis_name_reaches_every_batch_norm():
    names = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm):
            names.append(context.module.axis_name)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        for name in ("cnn", "resnet18", "wrn16_1"):
            module = create_classifier(name, 3, axis_name="devices")
            abstract_variables(module, (8, 8, 3))
    assert len(names) == 3 + 20 + 13
    assert set(names) == {"devices"}


def test_unknown_names():
    with pytest.raises(ValueError) as error:
        create_classifier("resnet19", 10)
    assert str(error.value) == (
        "Unknown classifier 'resnet19'; the classifiers are cnn, cnn_half, lenet5, lenet5_half, "
        "resnet18, resnet34, wrn16_1, wrn16_2, wrn40_1, wrn40_2."
    )
    with pytest.raises(ValueError, match="6n \\+ 4 with n ≥ 1, not 17"):
        abstract_variables(WideResNet(10, depth=17), (8, 8, 3))
