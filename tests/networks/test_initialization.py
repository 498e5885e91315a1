"""Every network starts as its source does, and the other start that a configuration can ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import default
from dfkd_jax.interchange.torch_layouts import to_torch
from dfkd_jax.networks import initialization
from dfkd_jax.networks.classifiers import CLASSIFIERS, create_classifier
from dfkd_jax.networks.encoder import Encoder
from dfkd_jax.networks.generator import Generator
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import build, tiny_config

K = 100  # classes: so many numbers has the smallest bias of the large networks
S32, GRAY = (32, 32, 3), (32, 32, 1)

# Image shape, and how many draws are pooled: more of small networks.
TWINS = {
    "imagenet_resnet18": (S32, 4),
    "lenet5": (GRAY, 200),
    "lenet5_half": (GRAY, 200),
    "mobilenetv2": (S32, 8),
    "mobilenetv2_stride2": (S32, 2),
    "resnet18": (S32, 6),
    "resnet50": (S32, 4),
    "resnet8x4": (S32, 8),
    "resnet20": (S32, 8),
    "shufflenetv2": (S32, 8),
    "squeezenet": (S32, 4),
    "vgg11": (S32, 2),
    "wrn16_1": (S32, 8),
    "wrn16_2": (S32, 4),
}
OWN = {"cnn", "cnn_half"}  # networks of this project, without a source
OF_THE_SAME_LAYERS = {
    *("resnet32", "resnet34", "resnet44", "resnet56", "resnet110", "wrn40_1", "wrn40_2"),
    *("imagenet_resnet34", "imagenet_resnet50", "resnet32x4"),
    *("vgg8", "vgg13", "vgg16", "vgg19", *(f"imagenet_vgg{d}" for d in (11, 13, 16, 19))),
}


def test_every_classifier_with_a_source_is_compared_with_it():
    assert TWINS.keys() == CLASSIFIERS.keys() - OWN - OF_THE_SAME_LAYERS


def moments(draws):
    """Of an array, given in several draws: how many numbers, mean, deviation and largest size."""
    count = sum(draw.size for draw in draws)
    mean = sum(draw.sum(dtype=np.float64) for draw in draws) / count
    square = sum(np.square(draw, dtype=np.float64).sum() for draw in draws) / count
    return count, mean, np.sqrt(square - mean**2), max(np.abs(draw).max() for draw in draws)


def assert_same_distribution(name, ours, theirs):
    """Constants are the same; else mean, standard deviation and shape, within five sigma."""
    count, mean, deviation, largest = moments(theirs)
    our_count, our_mean, our_deviation, our_largest = moments(ours)
    assert our_count == count, name
    if deviation < 1e-6:  # ones or zeros
        assert (our_mean, our_deviation) == (mean, 0), name
        return
    # The relative error of the ratio of two sample deviations is at most 1/√n, of normal numbers.
    tolerance = 5 * count**-0.5
    assert tolerance < 0.3, name
    assert our_deviation / deviation == pytest.approx(1, abs=tolerance), name
    assert our_mean == pytest.approx(mean, abs=2**0.5 * tolerance * deviation), name
    # A uniform distribution ends at √3 standard deviations, a normal one goes on.
    assert (our_largest < 2 * our_deviation) == (largest < 2 * deviation), name


# Compile long.
LARGE = {"imagenet_resnet18", "resnet18", "resnet50", "shufflenetv2"}
LARGE |= {"mobilenetv2", "mobilenetv2_stride2"}


@pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=[pytest.mark.slow] if m in LARGE else []) for m in TWINS],
)
def test_every_array_starts_as_in_the_source(model):
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_twins

    image_shape, draws = TWINS[model]
    module = create_classifier(model, K)
    init = jax.jit(lambda key: module.init(key, jnp.zeros((1, *image_shape)), train=False))
    ours, theirs = [], []
    for seed in range(draws):
        torch.manual_seed(seed)
        theirs.append(torch_twins.numpy_state_dict(torch_twins.started(model, K, image_shape[-1])))
        ours.append(to_torch(model, init(jax.random.key(seed, impl="unsafe_rbg"))))
    assert ours[0].keys() == theirs[0].keys()
    for name in ours[0]:
        if not name.endswith("num_batches_tracked"):
            assert_same_distribution(name, *([d[name] for d in side] for side in (ours, theirs)))


SMALL, LATENT = (8, 8, 1), 5


@pytest.mark.parametrize(
    "ours, make, inputs",
    [
        (Generator(SMALL, (8, 4)), lambda t: t.Generator(SMALL, LATENT, (8, 4)), (2, LATENT)),
        (
            Generator(SMALL, (8, 4), spectral_norm=False),
            lambda t: t.Generator(SMALL, LATENT, (8, 4), spectral_norm=False),
            (2, LATENT),
        ),
        (Encoder(LATENT, (4, 8)), lambda t: t.Encoder(SMALL, LATENT, (4, 8)), (2, *SMALL)),
    ],
    ids=["generator", "memory generator", "encoder"],
)
def test_generator_and_encoder_start_as_in_the_source(ours, make, inputs):
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_twins

    init = jax.jit(lambda key: ours.init(key, jnp.zeros(inputs)))
    draws = {}
    for seed in range(40):
        torch.manual_seed(seed)
        theirs = torch_twins.tensors(make(torch_twins))
        for path, array in flatten_dict(dict(init(jax.random.key(seed)))).items():
            if not path[-1].startswith("conv"):  # vectors of the spectral norm
                pair = (np.asarray(array), theirs[torch_twins.twin_name(path)].detach().numpy())
                draws.setdefault("/".join(path), []).append(pair)
    for name, pairs in draws.items():
        assert_same_distribution(name, *zip(*pairs, strict=True))


def test_the_comparison_can_fail():
    rng = np.random.default_rng(0)
    normal, wide = rng.normal(size=(2, 4, 2000)) * [[[1]], [[1.2]]]
    uniform = rng.uniform(-(3**0.5), 3**0.5, size=(4, 2000))
    assert_same_distribution("same", normal, rng.normal(size=(4, 2000)))
    for other in (wide, uniform, normal + 0.1, np.zeros((4, 2000))):
        with pytest.raises(AssertionError):
            assert_same_distribution("other", other, normal)


# Of each kernel the kind of its distribution and its variance.
HE = {
    "lenet5": {
        "conv2/kernel": ("normal", 2 / (25 * 6)),
        "fc1/kernel": ("normal", 2 / 120),
        "fc/kernel": ("uniform", 1 / (3 * 84)),
    },
    "wrn16_2": {
        "block2_0/conv1/kernel": ("normal", 2 / (9 * 64)),
        "block2_0/shortcut_conv/kernel": ("normal", 2 / 64),
        "fc/kernel": ("uniform", 1 / (3 * 128)),
    },
    "cnn": {
        "conv2/kernel": ("normal", 2 / (9 * 64)),
        "fc1/kernel": ("normal", 2 / 64),
        "fc/kernel": ("uniform", 1 / (3 * 64)),
    },
}


@pytest.mark.parametrize("model", HE)
def test_he(model):
    module = create_classifier(model, 10)
    image_shape = GRAY if model == "lenet5" else S32
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    old = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7, leaf.dtype), shapes["params"])
    new = initialization.he(jax.random.key(1), old, "batch_stats" in shapes)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    seen = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(new):
        name = "/".join(part.key for part in path)
        seen[name] = leaf
        if name.endswith("scale"):
            np.testing.assert_array_equal(leaf, 7)  # kept
        elif name.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        else:
            assert np.all(leaf != 7), name
    for name, (kind, variance) in HE[model].items():
        leaf = seen[name]
        tolerance = 5 * leaf.size**-0.5
        assert np.std(leaf) / variance**0.5 == pytest.approx(1, abs=tolerance), name
        assert (np.abs(leaf).max() < 1.8 * np.std(leaf)) == (kind == "uniform"), name


def test_he_draws_an_array_by_its_path_alone():
    key = jax.random.key(0)
    kernel = jnp.zeros((3, 3, 2, 4))
    both = initialization.he(key, {"a": {"kernel": kernel}, "b": {"kernel": kernel}}, True)
    alone = initialization.he(key, {"b": {"kernel": kernel}}, True)
    np.testing.assert_array_equal(both["b"]["kernel"], alone["b"]["kernel"])
    assert np.all(both["a"]["kernel"] != both["b"]["kernel"])


def test_he_leaves_what_it_does_not_know():
    key = jax.random.key(0)
    kept = {"embedding": jnp.ones((2, 3)), "query": {"kernel": jnp.ones((2, 3, 4))}}
    jax.tree.map(np.testing.assert_array_equal, initialization.he(key, kept, False), kept)


def test_he_of_a_depthwise_convolution():
    """Fan-out as PyTorch counts it: all output channels, not the one of each group."""
    kernel = {"depthwise_conv": {"kernel": jnp.zeros((3, 3, 1, 960))}}
    new = initialization.he(jax.random.key(0), kernel, True)["depthwise_conv"]["kernel"]
    assert np.std(new) == pytest.approx((2 / (9 * 960)) ** 0.5, rel=0.04)


@pytest.mark.slow
def test_a_run_starts_its_student_as_the_configuration_says():
    fields = {"student.model": "lenet5_half", "dataset.name": "mnist"}
    params = {}
    for start in initialization.INITIALIZATIONS:
        _, state, teacher = build(tiny_config(**fields, **{"student.initialization": start}))
        params[start] = state.student.params
        params[start, "others"] = (state.synthesizer.params, teacher)
    assert np.all(np.asarray(params["source"]["conv1"]["bias"]) != 0)
    assert np.all(np.asarray(params["he"]["conv1"]["bias"]) == 0)
    ratio = np.std(params["he"]["conv3"]["kernel"]) / np.std(params["source"]["conv3"]["kernel"])
    assert ratio == pytest.approx(6**0.5, rel=0.05)
    jax.tree.map(np.testing.assert_array_equal, *(params[s, "others"] for s in ("source", "he")))


def test_another_initialization_is_refused():
    config = default.get_config()
    config.student.initialization = "xavier"
    with pytest.raises(UserError) as caught:
        parse(config, reads_data=False)
    assert str(caught.value) == (
        "config.student.initialization is 'xavier'; allowed are source, he."
    )
