"""The classifiers by name: teachers and students.

Every classifier is a module with attributes `num_classes`, `axis_name` and `dtype`, and
`module.apply(variables, x, train=...)` returns logits (B, K) and features (B, D), the input of its
last dense layer (`SqueezeNet` has none and says what its are). With `train=True` batch norm uses
the statistics of the batch and updates the running ones (`mutable=["batch_stats"]`); with
`train=False` it uses the running ones.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks import lenet
from dfkd_jax.networks.graph.network import MODEL as GRAPH
from dfkd_jax.networks.graph.network import read_network
from dfkd_jax.networks.imagenet_resnet import ImageNetResNet
from dfkd_jax.networks.imagenet_vgg import ImageNetVGG
from dfkd_jax.networks.layers import (
    Conv,
    batch_norm,
    classify,
    global_average_pool,
    he_fan_in,
    he_fan_out,
)
from dfkd_jax.networks.lenet import LeNet5
from dfkd_jax.networks.mobilenet import MobileNetV2
from dfkd_jax.networks.own_module import create_own, is_own
from dfkd_jax.networks.resnet import ResNet
from dfkd_jax.networks.resnet_x4 import ResNetX4
from dfkd_jax.networks.shufflenet import ShuffleNetV2
from dfkd_jax.networks.squeezenet import SqueezeNet
from dfkd_jax.networks.thin_resnet import ThinResNet
from dfkd_jax.networks.vgg import BLOCKS, VGG
from dfkd_jax.networks.wide_resnet import WideResNet
from dfkd_jax.runtime.errors import UserError


class CNN(nn.Module):
    """Three 3×3 convolutions with batch norm and a hidden dense layer, for 8×8 digits.

    A network of this project. Convolutions start from N(0, √(2/fan_out)), the hidden layer from
    N(0, √(2/fan_in)), the last one from U(−1/√fan_in, 1/√fan_in), biases from 0.

    Attributes:
      num_classes: K.
      widths: channels of the three convolutions and size of the features.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    widths: tuple[int, int, int, int] = (32, 64, 64, 64)
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images of any size to logits and features."""
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        *channels, features = self.widths
        for index, width in enumerate(channels, start=1):
            x = Conv(
                width,
                (3, 3),
                strides=1 if index == 1 else 2,
                padding=1,
                use_bias=False,
                kernel_init=he_fan_out,
                dtype=self.dtype,
                name=f"conv{index}",
            )(x)
            x = nn.relu(norm(name=f"bn{index}")(x))
        x = global_average_pool(x)
        x = nn.Dense(features, kernel_init=he_fan_in, dtype=self.dtype, name="fc1")(x)
        return classify(nn.relu(x), self.num_classes, self.dtype)


# Sides of the images that a network takes, where not any will do.
IMAGE_SIZES = {"lenet5": lenet.SIZES, "lenet5_half": lenet.SIZES}
# The smallest side, where poolings would leave nothing of smaller images.
LEAST_SIZES = {
    "squeezenet": 17,
    **{f"vgg{depth}": 8 for depth in BLOCKS},
    **{f"imagenet_vgg{depth}": 32 for depth in BLOCKS if depth > 8},
}

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    "cnn_half": partial(CNN, widths=(16, 32, 32, 32)),
    "lenet5": LeNet5,
    "lenet5_half": partial(LeNet5, widths=(3, 8, 60, 42)),
    "imagenet_resnet18": partial(ImageNetResNet, blocks=(2, 2, 2, 2)),
    "imagenet_resnet34": partial(ImageNetResNet, blocks=(3, 4, 6, 3)),
    "imagenet_resnet50": partial(ImageNetResNet, blocks=(3, 4, 6, 3), bottleneck=True),
    "imagenet_vgg11": partial(ImageNetVGG, blocks=BLOCKS[11]),
    "imagenet_vgg13": partial(ImageNetVGG, blocks=BLOCKS[13]),
    "imagenet_vgg16": partial(ImageNetVGG, blocks=BLOCKS[16]),
    "imagenet_vgg19": partial(ImageNetVGG, blocks=BLOCKS[19]),
    "mobilenetv2": MobileNetV2,
    "mobilenetv2_stride2": partial(MobileNetV2, stem_stride=2),
    "resnet8x4": partial(ResNetX4, depth=8),
    "resnet32x4": partial(ResNetX4, depth=32),
    "resnet18": partial(ResNet, blocks=(2, 2, 2, 2)),
    "resnet20": partial(ThinResNet, depth=20),
    "resnet32": partial(ThinResNet, depth=32),
    "resnet44": partial(ThinResNet, depth=44),
    "resnet56": partial(ThinResNet, depth=56),
    "resnet110": partial(ThinResNet, depth=110),
    "resnet34": partial(ResNet, blocks=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
    "shufflenetv2": ShuffleNetV2,
    "squeezenet": SqueezeNet,
    "vgg8": partial(VGG, blocks=BLOCKS[8]),
    "vgg11": partial(VGG, blocks=BLOCKS[11]),
    "vgg13": partial(VGG, blocks=BLOCKS[13]),
    "vgg16": partial(VGG, blocks=BLOCKS[16]),
    "vgg19": partial(VGG, blocks=BLOCKS[19]),
    "wrn16_1": partial(WideResNet, depth=16, widen_factor=1),
    "wrn16_2": partial(WideResNet, depth=16, widen_factor=2),
    "wrn40_1": partial(WideResNet, depth=40, widen_factor=1),
    "wrn40_2": partial(WideResNet, depth=40, widen_factor=2),
}
"""What makes each classifier; the keys are the names a configuration may use."""


def classifier_in(
    folder: str | os.PathLike, name: str, num_classes: int, *, dtype: DTypeLike | None = None
) -> nn.Module:
    """The classifier called `name` whose weights lie in a folder.

    Args:
      folder: of a teacher; where `name` is "graph", its network lies there too.
      name: as of `create_classifier`, or "graph".
      num_classes: K.
      dtype: of the computation.

    Raises:
      UserError: see `create_classifier` and `graph.network.read_network`.
    """
    if name == GRAPH:
        return read_network(Path(folder), num_classes, dtype=dtype)
    return create_classifier(name, num_classes, dtype=dtype)


def create_classifier(
    name: str,
    num_classes: int,
    *,
    axis_name: str | None = None,
    dtype: DTypeLike | None = None,
) -> nn.Module:
    """Return the classifier called `name`.

    Args:
      name: a key of `CLASSIFIERS`, or "package.module:attribute" of any Flax module that is made
        with `num_classes` and called as (x, train) -> (logits, features).
      num_classes: K, the number of logits.
      axis_name: `pmap` axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.

    Raises:
      UserError: no classifier has that name, or see `own_module.create_own`.
    """
    if name == GRAPH:
        raise UserError(
            f"{GRAPH!r} is the network of a converted teacher and has no weights to start from; "
            f"allowed are {', '.join(sorted(CLASSIFIERS))} and 'package.module:attribute'."
        )
    if is_own(name):
        return create_own(name, num_classes, axis_name=axis_name, dtype=dtype)
    if name not in CLASSIFIERS:
        allowed = ", ".join(sorted(CLASSIFIERS))
        raise UserError(
            f"Unknown classifier {name!r}; the classifiers are {allowed}, "
            "and 'package.module:attribute' of one's own."
        )
    return CLASSIFIERS[name](num_classes=num_classes, axis_name=axis_name, dtype=dtype)
