from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dfkd_jax.networks.classifiers import CLASSIFIERS, CNN, LEAST_SIZES, create_classifier
from dfkd_jax.networks.imagenet_resnet import ImageNetResNet
from dfkd_jax.networks.imagenet_vgg import ImageNetVGG
from dfkd_jax.networks.lenet import LeNet5
from dfkd_jax.networks.mobilenet import MobileNetV2
from dfkd_jax.networks.resnet import ResNet
from dfkd_jax.networks.resnet_x4 import ResNetX4
from dfkd_jax.networks.shufflenet import ShuffleNetV2
from dfkd_jax.networks.squeezenet import SqueezeNet
from dfkd_jax.networks.thin_resnet import ThinResNet
from dfkd_jax.networks.vgg import VGG
from dfkd_jax.networks.wide_resnet import WideResNet

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default

# Of every family one that is cheap to run, with the image shape it gets.
SMALL = {
    "cnn": (CNN(5, (4, 6, 8, 7)), (8, 8, 1)),
    "lenet5": (LeNet5(5, (3, 4, 6, 7)), (32, 32, 1)),
    "mobilenetv2": (MobileNetV2(5, ((1, 4, 1, 1), (2, 6, 2, 2)), stem=4, head=8), (8, 8, 3)),
    "resnet18": (ResNet(5, blocks=(1, 1, 1, 1), width=4), (8, 8, 3)),
    "resnet50": (ResNet(5, blocks=(1,), width=4, bottleneck=True), (8, 8, 3)),
    "resnet20": (ThinResNet(5, depth=8), (8, 8, 3)),
    "squeezenet": (SqueezeNet(5, 8, ((4, 8), (4, 8), (4, 8))), (17, 17, 3)),
    "vgg11": (VGG(5, ((4,), (6,), (6, 8))), (8, 8, 3)),
    "imagenet_resnet18": (ImageNetResNet(5, blocks=(1, 1), width=4), (16, 16, 3)),
    "imagenet_vgg11": (ImageNetVGG(5, ((4,), (6, 8)), hidden=64), (8, 8, 3)),
    "resnet8x4": (ResNetX4(5, width=4), (8, 8, 3)),
    "shufflenetv2": (ShuffleNetV2(5, (8, 12), (1, 1), stem=4, head=8), (8, 8, 3)),
    "wrn16_1": (WideResNet(5, depth=10), (8, 8, 3)),
}
LARGE = {
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "resnet32x4",
    "vgg16",
    "vgg19",
    *(f"imagenet_resnet{d}" for d in (34, 50)),
    *(f"imagenet_vgg{d}" for d in (13, 16, 19)),
    "wrn40_1",
    "wrn40_2",
}  # are traced long
EVERY = [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in CLASSIFIERS]
WITH_BATCH_NORM = [name for name in SMALL if name not in ("lenet5", "squeezenet")]


def abstract_variables(module, image_shape):
    return jax.eval_shape(module.init, KEY, jnp.ones((2, *image_shape)))


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


FEATURE_SIZES = {
    "cnn": 64,
    "cnn_half": 32,
    "lenet5": 84,
    "lenet5_half": 42,
    "mobilenetv2": 1280,
    "mobilenetv2_stride2": 1280,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "squeezenet": 512,
    "resnet20": 64,
    "resnet32": 64,
    "resnet44": 64,
    "resnet56": 64,
    "resnet110": 64,
    "resnet8x4": 256,
    "resnet32x4": 256,
    "shufflenetv2": 1024,
    **dict.fromkeys(("vgg8", "vgg11", "vgg13", "vgg16", "vgg19"), 512),
    **{f"imagenet_vgg{depth}": 4096 for depth in (11, 13, 16, 19)},
    "imagenet_resnet18": 512,
    "imagenet_resnet34": 512,
    "imagenet_resnet50": 2048,
    "wrn16_1": 64,
    "wrn16_2": 128,
    "wrn40_1": 64,
    "wrn40_2": 128,
}


@pytest.mark.parametrize("name", EVERY)
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


@pytest.mark.parametrize("name", [name for name in SMALL if name != "squeezenet"])
def test_logits_are_the_last_dense_layer_of_the_features(name):
    module, variables, x = initialised(name)
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
    assert not np.allclose(others, logits[:4], atol=1e-3 * np.std(logits))


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


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_computes_in_half_and_returns_float32(name):
    module = create_classifier(name, 7, dtype=jnp.bfloat16)
    variables = abstract_variables(module, (32, 32, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    jaxpr = jax.make_jaxpr(module.apply)(variables, jnp.ones((2, 32, 32, 3)))
    assert "bf16" in str(jaxpr)
    assert {value.dtype for value in jaxpr.out_avals} == {jnp.dtype(jnp.float32)}


def test_initial_features_and_logits_have_a_sensible_scale(small):
    module, variables, x = small
    (logits, features), _ = train(module, variables, x)
    assert 1e-3 < np.std(features) < 5
    assert 1e-4 < np.std(logits) < 5  # some last layers start from N(0, 0.01)


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
        "Unknown classifier 'resnet19'; the classifiers are cnn, cnn_half, imagenet_resnet18, "
        "imagenet_resnet34, imagenet_resnet50, imagenet_vgg11, imagenet_vgg13, imagenet_vgg16, "
        "imagenet_vgg19, lenet5, lenet5_half, mobilenetv2, mobilenetv2_stride2, resnet110, "
        "resnet18, resnet20, resnet32, resnet32x4, resnet34, resnet44, resnet50, resnet56, "
        "resnet8x4, shufflenetv2, squeezenet, vgg11, vgg13, vgg16, vgg19, vgg8, "
        "wrn16_1, wrn16_2, wrn40_1, wrn40_2, and 'package.module:attribute' of one's own."
    )
    with pytest.raises(ValueError, match="6n \\+ 4 with n ≥ 1, not 17"):
        abstract_variables(WideResNet(10, depth=17), (8, 8, 3))


@pytest.mark.parametrize("name", LEAST_SIZES)
def test_the_least_size_is_where_the_network_itself_begins_to_refuse(name):
    module, least = create_classifier(name, 7), LEAST_SIZES[name]
    abstract_variables(module, (least, least, 3))
    with pytest.raises(ValueError, match=f"takes images of {least}×{least} or more"):
        abstract_variables(module, (least - 1, least - 1, 3))
