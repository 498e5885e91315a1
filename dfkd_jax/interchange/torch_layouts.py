"""PyTorch state dicts and our variables: how the published networks name and lay out their arrays.

A layout is written once, as rules that turn our module names into PyTorch's, and read both ways.
PyTorch keeps convolutions as (out, in, height, width) and dense layers as (out, in), Flax as
(height, width, in, out) and (in, out). Running statistics are carried over unchanged: PyTorch's
variance is the unbiased one, and in evaluation each network normalises with what is stored.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dfkd_jax.networks.classifiers import CNN, create_classifier
from dfkd_jax.networks.imagenet_resnet import ImageNetResNet
from dfkd_jax.networks.imagenet_vgg import ImageNetVGG
from dfkd_jax.networks.lenet import LeNet5
from dfkd_jax.networks.mobilenet import MobileNetV2
from dfkd_jax.networks.resnet import ResNet
from dfkd_jax.networks.resnet_x4 import ResNetX4
from dfkd_jax.networks.shufflenet import ShuffleNetV2
from dfkd_jax.networks.squeezenet import SqueezeNet
from dfkd_jax.networks.thin_resnet import ThinResNet
from dfkd_jax.networks.vgg import BLOCKS, VGG
from dfkd_jax.networks.wide_resnet import WideResNet
from dfkd_jax.runtime.errors import UserError

StateDict = Mapping[str, np.ndarray]
Variables = dict[str, Any]


class Layout(NamedTuple):
    """How a family of PyTorch networks names its arrays.

    Attributes:
      name: for the reader.
      rules: (regular expression, replacement), applied in order to the path of one of our modules,
        its parts joined by "/"; what is "/" afterwards becomes ".".
      folded: PyTorch biases that our network has not, and the running mean they are subtracted
        from: batch norm in evaluation gives the same for conv(x) + b with mean μ and for conv(x)
        with mean μ − b.
    """

    name: str
    rules: tuple[tuple[str, str], ...]
    folded: tuple[tuple[str, tuple[str, ...]], ...] = ()


class WrongWeights(UserError):
    """A state dict of another network: a sentence, and all names if that has not all of them."""

    def __init__(self, sentence: str, listing: tuple[str, ...] = ()) -> None:
        super().__init__(sentence)
        self.listing = listing


class Leaf(NamedTuple):
    """One array: its name and shape in PyTorch, its path with us, and the axes from us to there."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    axes: tuple[int, ...]


_STAGES = (r"^layer(\d)_(\d+)/", r"layer\1.\2.")
_CIFAR_RESNET = Layout(
    "ResNet of LRA, PRE-DFKD, DAFL, DFAD, CMI and Fast-Datafree, with `shortcut` and `linear`",
    (_STAGES, ("shortcut_conv", "shortcut.0"), ("shortcut_bn", "shortcut.1"), ("^fc", "linear")),
)
_TORCHVISION_RULES = (_STAGES, ("shortcut_conv", "downsample.0"), ("shortcut_bn", "downsample.1"))
_TORCHVISION_RESNET = Layout(
    "torchvision's ResNet with a 3×3 stem of stride 1 and without max pooling", _TORCHVISION_RULES
)
_IMAGENET_RESNET = Layout("torchvision's ResNet", _TORCHVISION_RULES)
_RESNET_X4 = Layout("ResNet-x4 of RepDistiller", _TORCHVISION_RULES)
# LRA replaces the stem by a convolution that has a bias.
_LRA_64_RESNET = Layout(
    "torchvision's ResNet as LRA adapts it to 64×64 images, the stem with a bias",
    _TORCHVISION_RULES,
    (("conv1.bias", ("batch_stats", "bn1", "mean")),),
)
_THIN_RESNET = Layout(
    "thin ResNet for CIFAR, with shortcuts without parameters", (_STAGES, ("^fc", "linear"))
)
_WIDE_RESNET = Layout(
    "WideResNet of LRA, ZSKT, CMI and Fast-Datafree",
    ((r"^block(\d)_(\d+)/", r"block\1.layer.\2."), ("shortcut_conv", "convShortcut")),
)
_LENET = Layout("LeNet-5 of DAFL, DFAD, PRE-DFKD and LRA", (("^fc$", "fc2"),))
_MOBILENET = Layout(
    "torchvision's MobileNetV2, as in PRE-DFKD, CMI and Fast-Datafree",
    (
        ("^stem_conv", "features.0.0"),
        ("^stem_bn", "features.0.1"),
        # The first block does not widen, so its layers come one earlier.
        ("^block1/depthwise_conv", "features.1.conv.0.0"),
        ("^block1/depthwise_bn", "features.1.conv.0.1"),
        ("^block1/project_conv", "features.1.conv.1"),
        ("^block1/project_bn", "features.1.conv.2"),
        (r"^block(\d+)/expand_conv", r"features.\1.conv.0.0"),
        (r"^block(\d+)/expand_bn", r"features.\1.conv.0.1"),
        (r"^block(\d+)/depthwise_conv", r"features.\1.conv.1.0"),
        (r"^block(\d+)/depthwise_bn", r"features.\1.conv.1.1"),
        (r"^block(\d+)/project_conv", r"features.\1.conv.2"),
        (r"^block(\d+)/project_bn", r"features.\1.conv.3"),
        ("^head_conv", "features.18.0"),
        ("^head_bn", "features.18.1"),
        ("^fc", "classifier.1"),
    ),
)
_SQUEEZENET = Layout(
    "torchvision's SqueezeNet 1.1, as in PRE-DFKD",
    (
        ("^conv1$", "features.0"),
        ("^conv10$", "classifier.1"),
        # Numbers 2, 5 and 8 are poolings.
        *((f"^fire{i}/", f"features.{j}.") for i, j in enumerate((3, 4, 6, 7, 9, 10, 11, 12), 2)),
    ),
)
_VGG = Layout(
    "VGG with batch norm of RepDistiller, CMI and Fast-Datafree",
    (
        # Convolution, batch norm and ReLU are three numbers.
        *((rf"^(block\d)_conv{i}", rf"\1.{3 * i}") for i in range(4)),
        *((rf"^(block\d)_bn{i}", rf"\1.{3 * i + 1}") for i in range(4)),
        ("^fc", "classifier"),
    ),
)
_SHUFFLENET = Layout("ShuffleNetV2 of RepDistiller", (_STAGES, ("^fc", "linear")))


def _vgg_features(blocks: tuple[tuple[int, ...], ...]) -> Iterator[tuple[str, str]]:
    """torchvision numbers convolution, batch norm and ReLU, and a pooling after each block."""
    number = 0
    for block, widths in enumerate(blocks):
        for index in range(len(widths)):
            yield f"^block{block}_conv{index}$", f"features.{number}"
            yield f"^block{block}_bn{index}$", f"features.{number + 1}"
            number += 3
        number += 1


_IMAGENET_VGG = {
    depth: Layout(
        f"torchvision's VGG-{depth} with batch norm",
        (
            *_vgg_features(blocks),
            ("^fc1", "classifier.0"),
            ("^fc2", "classifier.3"),
            ("^fc$", "classifier.6"),
        ),
    )
    for depth, blocks in BLOCKS.items()
    if depth > 8
}
_CNN = Layout("the CNN of this project under its own names", ())

_LAYOUTS: dict[type, tuple[Layout, ...]] = {
    CNN: (_CNN,),
    LeNet5: (_LENET,),
    MobileNetV2: (_MOBILENET,),
    ResNet: (_CIFAR_RESNET, _TORCHVISION_RESNET, _LRA_64_RESNET),
    ImageNetResNet: (_IMAGENET_RESNET,),
    ResNetX4: (_RESNET_X4,),
    ShuffleNetV2: (_SHUFFLENET,),
    SqueezeNet: (_SQUEEZENET,),
    ThinResNet: (_THIN_RESNET,),
    VGG: (_VGG,),
    WideResNet: (_WIDE_RESNET,),
}

_LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
LISTED = 10  # at most so many names of a kind are in a sentence
_COUNTER = "num_batches_tracked"  # beside the running statistics; we have no use for it


def layouts(model: str) -> tuple[Layout, ...]:
    """The PyTorch layouts of a classifier, the one to write first.

    Raises:
      UserError: no classifier has that name, or no PyTorch names are known of it.
    """
    classifier = create_classifier(model, 1)
    if isinstance(classifier, ImageNetVGG):
        return (_IMAGENET_VGG[next(d for d, b in BLOCKS.items() if b == classifier.blocks)],)
    if type(classifier) not in _LAYOUTS:
        raise UserError(f"the model is {model!r}, of which no PyTorch names are known.")
    return _LAYOUTS[type(classifier)]


@functools.lru_cache(maxsize=8)
def _abstract(model: str, num_classes: int, image_shape: tuple[int, int, int]) -> Variables:
    """The shapes of a classifier's variables."""
    module = create_classifier(model, num_classes)
    return jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)
    )


def torch_names(
    model: str, num_classes: int, image_shape: tuple[int, int, int]
) -> list[tuple[str, ...]]:
    """What PyTorch calls a classifier's arrays, in each of its layouts; see `from_torch`."""
    abstract = _abstract(model, num_classes, image_shape)
    return [
        (*(leaf.name for leaf in _leaves(abstract, layout)), *(name for name, _ in layout.folded))
        for layout in layouts(model)
    ]


def from_torch(
    model: str, num_classes: int, image_shape: tuple[int, int, int], state_dict: StateDict
) -> tuple[Variables, Layout]:
    """Our variables of a PyTorch state dict.

    Args:
      model: name of the classifier.
      num_classes: K.
      image_shape: (H, W, C).
      state_dict: arrays of any floating-point type by PyTorch's names, no prefixes before them.

    Returns:
      `{"params": ..., "batch_stats": ...}` as float32, without "batch_stats" if there are none, and
      the layout that the names are of.

    Raises:
      WrongWeights: missing, unknown or misshapen arrays; one sentence with the first names of each
        kind.
      UserError: values that are no finite numbers, or images that the network does not take; one
        sentence.
    """
    known = layouts(model)
    abstract = _abstract(model, num_classes, image_shape)
    found = [(layout, _leaves(abstract, layout)) for layout in known]
    layout, leaves = min(found, key=lambda pair: sum(map(len, _differing(*pair, state_dict))))
    missing, unknown = _differing(layout, leaves, state_dict)
    shapes = {leaf.name: leaf.shape for leaf in leaves}
    shapes |= {name: shapes[name.replace("bias", "weight")][:1] for name, _ in layout.folded}
    misshapen = [
        f"{name} {np.shape(state_dict[name])} instead of {shape}"
        for name, shape in shapes.items()
        if name in state_dict and np.shape(state_dict[name]) != shape
    ]
    listed = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if any(listed.values()):
        images = "×".join(map(str, image_shape))
        network = f"a {model} for {num_classes} classes and {images} images"
        raise _mismatch(f"{network} (compared with {layout.name})", len(shapes), listed)
    wrong = [name for name in shapes if not jnp.issubdtype(state_dict[name].dtype, jnp.floating)]
    if not wrong:
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported below
            arrays = {name: np.asarray(state_dict[name], np.float32) for name in shapes}
        wrong = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        raise UserError(f"not all values are finite floating-point numbers in {_enumerate(wrong)}.")
    flat = {
        leaf.path: np.ascontiguousarray(arrays[leaf.name].transpose(np.argsort(leaf.axes)))
        for leaf in leaves
    }
    for name, path in layout.folded:
        flat[path] = flat[path] - arrays[name]
    return unflatten_dict(flat), layout


def _mismatch(network: str, count: int, listed: Mapping[str, Sequence[str]]) -> WrongWeights:
    """What to raise for names, listed by what is wrong with them; the network has `count`."""
    reasons = [f"{kind} are {_enumerate(names)}" for kind, names in listed.items() if names]
    if 2 * len(listed["missing"]) > count:
        reasons.insert(0, "most names are missing, as of another architecture")
    sentence = f"the weights are not those of {network}: {'; '.join(reasons)}."
    if max(map(len, listed.values())) <= LISTED:
        return WrongWeights(sentence)
    lines = [f"{kind}: {_shown(name)}" for kind, names in listed.items() for name in names]
    return WrongWeights(sentence, tuple(lines))


def to_torch(
    model: str, variables: Mapping[str, Any], layout: Layout | None = None
) -> dict[str, np.ndarray]:
    """The PyTorch state dict of our variables, the inverse of `from_torch`.

    Args:
      model: name of the classifier.
      variables: of that classifier.
      layout: one of `layouts(model)`; the first by default. Its folded biases are written as zero.

    Returns:
      float32 arrays by PyTorch's names, and for each batch norm `num_batches_tracked`, int64 0.
    """
    layout = layout or layouts(model)[0]
    flat: dict[tuple, Any] = flatten_dict(dict(variables))
    state_dict = {}
    for leaf in _leaves(variables, layout):
        array = np.asarray(flat[leaf.path], np.float32).transpose(leaf.axes)
        state_dict[leaf.name] = np.ascontiguousarray(array)
        if _has_counter(leaf):
            state_dict[_counter(leaf)] = np.zeros((), np.int64)
    for name, path in layout.folded:
        state_dict[name] = np.zeros(flat[path].shape, np.float32)
    return state_dict


def _leaves(variables: Mapping[str, Any], layout: Layout) -> list[Leaf]:
    """The arrays of our variables, or of their shapes, in a layout."""
    leaves = []
    flat: dict[tuple, Any] = flatten_dict(dict(variables))
    for path in sorted(flat, key=lambda path: path[0] != "params"):  # weights first in messages
        _, *module, leaf = path
        prefix = "/".join(module)
        for pattern, replacement in layout.rules:
            prefix = re.sub(pattern, replacement, prefix)
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(flat[path].shape)]
        name = f"{prefix}.{_LEAF_NAMES[leaf]}".replace("/", ".")
        leaves.append(Leaf(name, tuple(flat[path].shape[axis] for axis in axes), path, axes))
    return leaves


def _has_counter(leaf: Leaf) -> bool:
    return leaf.path[-1] == "var"


def _counter(leaf: Leaf) -> str:
    return leaf.name.replace(_LEAF_NAMES["var"], _COUNTER)


def _differing(
    layout: Layout, leaves: Sequence[Leaf], state_dict: StateDict
) -> tuple[list[str], list[str]]:
    """The layout's names that the state dict has not, and the other way round."""
    names = [leaf.name for leaf in leaves] + [name for name, _ in layout.folded]
    counters = {_counter(leaf) for leaf in leaves if _has_counter(leaf)}
    missing = [name for name in names if name not in state_dict]
    return missing, [name for name in state_dict if name not in counters.union(names)]


def _enumerate(names: Sequence[str]) -> str:
    """The first `LISTED`, and how many more."""
    shown = ", ".join(map(_shown, names[:LISTED]))
    return f"{shown} and {len(names) - LISTED} more" if len(names) > LISTED else shown


def _shown(name: str) -> str:
    """A name that a file gives may be any text."""
    return (name if name.isprintable() else repr(name))[:100]
