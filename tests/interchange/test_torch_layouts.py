"""PyTorch's weights here: the same logits and features, nothing lost, what is wrong named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.interchange.torch_layouts import (
    WrongWeights,
    from_torch,
    layouts,
    to_torch,
    torch_names,
)
from dfkd_jax.networks.classifiers import CLASSIFIERS, create_classifier

K = 7  # classes
S32, S64 = (32, 32, 3), (64, 64, 3)
BASIC18, BASIC34 = (2, 2, 2, 2), (3, 4, 6, 3)

TORCHVISION = ("downsample", "fc")

# Our name, which of its layouts, how the twin is made where it is not the network's own code, image
# shape, gain of random weights.
TWINS = {
    "resnet18": ("resnet18", 0, None, S32, 1),
    "resnet50": ("resnet50", 0, None, S32, 1),
    "small_torchvision18": (
        *("resnet18", 1, lambda t: t.ResNet(K, BASIC18, names=TORCHVISION)),
        *(S32, 1),
    ),
    "small_torchvision50": (
        *("resnet50", 1, lambda t: t.ResNet(K, BASIC34, bottleneck=True, names=TORCHVISION)),
        *(S32, 1),
    ),
    "lra64": ("resnet34", 2, lambda t: t.Lra64(K).resnet, S64, 1),
    "resnet8x4": ("resnet8x4", 0, None, S32, 1),
    "resnet32x4": ("resnet32x4", 0, None, S32, 1),
    "imagenet_resnet18": ("imagenet_resnet18", 0, None, (75, 64, 3), 1),
    "imagenet_resnet50": ("imagenet_resnet50", 0, None, S64, 1),
    "resnet20": ("resnet20", 0, None, S32, 1),
    "wrn16_1": ("wrn16_1", 0, None, S32, 1),
    "lenet5": ("lenet5", 0, None, (32, 32, 1), 1.5),
    "lenet5_28": ("lenet5", 0, None, (28, 28, 1), 1.5),
    "lenet5_half": ("lenet5_half", 0, None, (32, 32, 1), 1.5),
    "mobilenetv2": ("mobilenetv2", 0, None, S32, 1.2),
    "mobilenetv2_2": ("mobilenetv2_stride2", 0, None, S32, 1.2),
    "mobilenetv2_224": ("mobilenetv2_stride2", 0, None, (224, 224, 3), 1.2),
    "shufflenetv2": ("shufflenetv2", 0, None, S32, 1.2),
    "squeezenet": ("squeezenet", 0, None, S32, 1.5),
    "squeezenet64": ("squeezenet", 0, None, S64, 1.5),
    "vgg8": ("vgg8", 0, None, S32, 1),
    "vgg11": ("vgg11", 0, None, S64, 1),
    "vgg13": ("vgg13", 0, None, S32, 1),
    "vgg19": ("vgg19", 0, None, S32, 1),
    "imagenet_vgg11": ("imagenet_vgg11", 0, None, S64, 1.4),
}


def images(image_shape):
    return np.random.default_rng(0).normal(size=(2, *image_shape)).astype(np.float32)


def run_twin(network, x):
    import torch

    inputs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return network(inputs).numpy(), network.embed(inputs).numpy()


def run_ours(model, variables, x):
    return jax.jit(create_classifier(model, K).apply)(variables, x)


LARGE = {  # compile long, or have a hundred million numbers
    *("lra64", "mobilenetv2_2", "mobilenetv2_224", "resnet18", "resnet34", "resnet50", "resnet56"),
    *("resnet44", "resnet110", "resnet32x4", "small_torchvision50", "wrn40_2", "vgg16", "vgg19"),
    *("vgg13", "shufflenetv2", *(f"imagenet_resnet{d}" for d in (18, 34, 50))),
    *(f"imagenet_vgg{d}" for d in (11, 13, 16, 19)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(m, marks=[pytest.mark.slow] if m in LARGE else []) for m in TWINS],
)
def test_the_same_logits_and_features_as_in_pytorch(name):
    pytest.importorskip("torch")
    from tests.helpers import torch_twins

    model, number, make, image_shape, gain = TWINS[name]
    network = make(torch_twins) if make else torch_twins.twin(model, K, image_shape[-1])
    network = torch_twins.randomize(network, gain)
    state_dict = torch_twins.numpy_state_dict(network)
    variables, layout = from_torch(model, K, image_shape, state_dict)
    assert layout == layouts(model)[number]
    x = images(image_shape)
    expected = run_twin(network, x)
    for ours, theirs in zip(run_ours(model, variables, x), expected, strict=True):
        assert np.std(theirs) > 0.05  # or there would be nothing to compare
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)

    back = to_torch(model, variables, layout)
    if layout.folded:  # other arrays, the same network
        import torch

        network.load_state_dict({name: torch.from_numpy(a) for name, a in back.items()})
        for ours, theirs in zip(run_twin(network, x), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    else:
        assert back.keys() == state_dict.keys()
        for key, array in back.items():
            assert array.dtype == state_dict[key].dtype
            np.testing.assert_array_equal(array, state_dict[key])


@pytest.mark.parametrize("model", CLASSIFIERS)
def test_the_pytorch_code_of_every_classifier_has_its_names(model):
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_twins

    image_shape = (32, 32, 1) if model.startswith("lenet") else S32
    with torch.device("meta"):
        named = torch_twins.twin(model, K, image_shape[-1]).state_dict()
    ours = torch_names(model, K, image_shape)[0]
    assert {n for n in named if not n.endswith("num_batches_tracked")} == set(ours)


def test_the_comparison_can_fail():
    """MobileNetV2's two forms have the same parameters, and are not the same network."""
    pytest.importorskip("torch")
    from tests.helpers import torch_twins

    network = torch_twins.randomize(torch_twins.twin("mobilenetv2_stride2", K), 1.2)
    state_dict = torch_twins.numpy_state_dict(network)
    variables, _ = from_torch("mobilenetv2", K, S32, state_dict)
    logits, _ = run_ours("mobilenetv2", variables, images(S32))
    assert np.abs(logits - run_twin(network, images(S32))[0]).max() > 0.05


def random_variables(model, image_shape=S32):
    """Of the right shapes, without running the network."""
    module = create_classifier(model, K)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(m, marks=[pytest.mark.slow] if m in LARGE else [])
        for m in CLASSIFIERS
        if m not in ("imagenet_vgg13", "imagenet_vgg16", "imagenet_vgg19")  # 500 MB, as VGG-11
    ],
)
def test_every_layout_of_every_classifier_there_and_back(model):
    variables = random_variables(model)
    for layout in layouts(model):
        state_dict = to_torch(model, variables, layout)
        counters = {name for name in state_dict if name.endswith("num_batches_tracked")}
        leaves = len(jax.tree.leaves(variables)) + len(layout.folded)
        assert len(state_dict) - len(counters) == leaves
        assert len(counters) == sum(name.endswith("running_var") for name in state_dict)
        back, recognised = from_torch(model, K, S32, state_dict)
        assert recognised == layout
        jax.tree.map(np.testing.assert_array_equal, back, variables)
    default = to_torch(model, variables)
    assert default.keys() == to_torch(model, variables, layouts(model)[0]).keys()


def test_axes():
    variables = random_variables("cnn")
    state_dict = to_torch("cnn", variables)
    kernel, dense = variables["params"]["conv2"]["kernel"], variables["params"]["fc"]["kernel"]
    assert state_dict["conv2.weight"].shape == (64, 32, 3, 3)
    assert state_dict["conv2.weight"][5, 7, 1, 2] == kernel[1, 2, 7, 5]
    assert state_dict["fc.weight"].shape == (K, 64)
    assert state_dict["fc.weight"][3, 9] == dense[9, 3]


def test_a_bias_before_batch_norm_is_taken_from_the_running_mean():
    layout = layouts("resnet18")[2]
    variables = random_variables("resnet18")
    state_dict = to_torch("resnet18", variables, layout)
    bias = np.linspace(-1, 1, 64, dtype=np.float64)
    folded, _ = from_torch("resnet18", K, S32, {**state_dict, "conv1.bias": bias})
    mean = variables["batch_stats"]["bn1"]["mean"]
    np.testing.assert_allclose(folded["batch_stats"]["bn1"]["mean"], mean - bias, atol=1e-6)
    variables["batch_stats"]["bn1"]["mean"] = folded["batch_stats"]["bn1"]["mean"]
    jax.tree.map(np.testing.assert_array_equal, folded, variables)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_other_precisions_and_missing_counters_are_taken(dtype):
    variables = random_variables("cnn_half")
    state_dict = to_torch("cnn_half", variables)
    cast = {n: a.astype(dtype) for n, a in state_dict.items() if "num_batches" not in n}
    back, _ = from_torch("cnn_half", K, S32, cast)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b.astype(dtype).astype(np.float32))


def refusal(state_dict, model="cnn"):
    with pytest.raises(ValueError) as caught:
        from_torch(model, K, S32, state_dict)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_unknown_or_misshapen_is_named():
    state_dict = to_torch("cnn", random_variables("cnn"))
    state_dict["fc3\n.bias"] = state_dict.pop("fc1.bias")
    state_dict["fc.weight"] = state_dict["fc.weight"][:5]
    sentence = refusal(state_dict)
    assert sentence.startswith(
        "the weights are not those of a cnn for 7 classes and 32×32×3 images"
    )
    assert sentence.endswith(
        "missing are fc1.bias; unknown are 'fc3\\n.bias'; "
        "misshapen are fc.weight (5, 64) instead of (7, 64)."
    )
    biased = to_torch("resnet18", random_variables("resnet18"), layouts("resnet18")[2])
    biased["conv1.bias"] = np.zeros(3, np.float32)
    assert "conv1.bias (3,) instead of (64,)." in refusal(biased, "resnet18")


def test_of_many_names_all_are_listed_beside_the_sentence():
    state_dict = to_torch("cnn", random_variables("cnn"))
    with pytest.raises(WrongWeights) as caught:
        from_torch("resnet18", K, S32, state_dict)
    sentence = str(caught.value)
    assert "most names are missing, as of another architecture" in sentence
    missing, unknown = sentence.split("missing are ")[1].split("; unknown are ")
    # 20 convolutions, 20 batch norms and a dense layer; both have conv1, bn1 and fc.
    total = 20 + 4 * 20 + 2 - 7
    first, count = missing.split(" and ")
    assert (len(first.split(", ")), count) == (10, f"{total - 10} more")
    assert unknown.startswith("bn2.bias, bn2.weight, ")
    names = [line.split(": ") for line in caught.value.listing]
    kinds = [kind for kind, _ in names]
    # With bn1 its counter is known; fc.bias has the right shape.
    assert kinds == ["missing"] * total + ["unknown"] * (len(state_dict) - 8) + ["misshapen"] * 6
    assert set(first.split(", ")) < {name for _, name in names}


def test_without_a_common_name_the_first_layout_is_compared_with():
    sentence = refusal({"w": np.zeros(1, np.float32)}, "resnet18")
    assert f"(compared with {layouts('resnet18')[0].name})" in sentence


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_values_that_are_no_finite_numbers_are_refused(bad):
    state_dict = to_torch("cnn", random_variables("cnn"))
    weight = state_dict["conv2.weight"].astype(np.float64)
    weight[0, 1, 2, 0] = bad
    sentence = "not all values are finite floating-point numbers in conv2.weight."
    assert refusal({**state_dict, "conv2.weight": weight}) == sentence
    quantised = state_dict["conv2.weight"].astype(np.int8)
    assert refusal({**state_dict, "conv2.weight": quantised}) == sentence


def test_an_image_size_that_the_network_does_not_take():
    with pytest.raises(ValueError, match="LeNet-5 takes 32×32 or 28×28 images, not 16×16"):
        from_torch("lenet5", K, (16, 16, 1), {})
