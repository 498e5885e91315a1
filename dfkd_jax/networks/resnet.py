"""ResNet-18, -34 and -50 in their form for small images (He et al., CVPR 2016)."""

import functools
from collections.abc import Callable, Sequence

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import (
    batch_norm,
    classify,
    global_average_pool,
    padded_conv,
    uniform_bias,
    uniform_fan_in,
)

EXPANSION = 4  # output channels of a bottleneck per channel inside


class BasicBlock(nn.Module):
    """y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), all convolutions without bias.

    The shortcut is the identity, or a 1×1 convolution and batch norm where the shape changes.

    Attributes:
      width: output channels.
      stride: of the first convolution and the shortcut.
      norm: makes a batch norm layer.
      kernel_init: how the convolutions start.
      dtype: dtype of the computation.
    """

    width: int
    stride: int
    norm: Callable[..., nn.BatchNorm]
    kernel_init: Callable[..., jax.Array] = uniform_fan_in
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, width)."""
        conv = functools.partial(padded_conv, kernel_init=self.kernel_init)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.width:
            shortcut = conv(self.width, 1, self.stride, self.dtype, "shortcut_conv")(x)
            shortcut = self.norm(name="shortcut_bn")(shortcut)
        x = conv(self.width, 3, self.stride, self.dtype, "conv1")(x)
        x = nn.relu(self.norm(name="bn1")(x))
        x = self.norm(name="bn2")(conv(self.width, 3, 1, self.dtype, "conv2")(x))
        return nn.relu(x + shortcut)


class Bottleneck(nn.Module):
    """The block of ResNet-50: 1×1, 3×3 and 1×1 convolutions, the last four times as wide.

    As in `BasicBlock` batch norm follows every convolution, ReLU all but the last, and the shortcut
    is added before the last ReLU. The stride is that of the 3×3 convolution, as in PyTorch.

    Attributes:
      width: channels of the first two convolutions; the output has four times as many.
      stride: of the 3×3 convolution and the shortcut.
      norm: makes a batch norm layer.
      kernel_init: how the convolutions start.
      dtype: dtype of the computation.
    """

    width: int
    stride: int
    norm: Callable[..., nn.BatchNorm]
    kernel_init: Callable[..., jax.Array] = uniform_fan_in
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, 4·width)."""
        conv = functools.partial(padded_conv, kernel_init=self.kernel_init)
        wide = EXPANSION * self.width
        shortcut = x
        if self.stride != 1 or x.shape[-1] != wide:
            shortcut = conv(wide, 1, self.stride, self.dtype, "shortcut_conv")(x)
            shortcut = self.norm(name="shortcut_bn")(shortcut)
        x = nn.relu(self.norm(name="bn1")(conv(self.width, 1, 1, self.dtype, "conv1")(x)))
        x = conv(self.width, 3, self.stride, self.dtype, "conv2")(x)
        x = nn.relu(self.norm(name="bn2")(x))
        x = self.norm(name="bn3")(conv(wide, 1, 1, self.dtype, "conv3")(x))
        return nn.relu(x + shortcut)


def residual_stages(
    x: jax.Array, block: Callable[..., nn.Module], blocks: Sequence[int], width: int
) -> jax.Array:
    """Apply stages of residual blocks as layers of the module whose `__call__` is running.

    Args:
      x: (B, H, W, C).
      block: makes a block of `width` and `stride` with a name.
      blocks: number of blocks of each stage; each stage but the first halves height and width.
      width: of the first stage; each later one has twice as many channels.
    """
    for stage, count in enumerate(blocks):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            name = f"layer{stage + 1}_{index}"
            x = block(width=width * 2**stage, stride=stride, name=name)(x)
    return x


class ResNet(nn.Module):
    """A 3×3 stem, four stages of blocks with strides 1, 2, 2, 2, average pool, dense.

    All weights and the bias start as PyTorch's default has them, U(−1/√fan_in, 1/√fan_in), as in
    DAFL, DFAD, CMI, PRE-DFKD and LRA, whose network sets none of them. torchvision's sets its
    convolutions to He's N(0, √(2/fan_out)), 2.45 times as wide where the channels stay the same;
    of it LRA makes its teacher for 64×64 images.

    Attributes:
      num_classes: K.
      blocks: number of blocks of each stage.
      width: channels of the first stage; each later stage has twice as many.
      bottleneck: whether the blocks are `Bottleneck`s, else `BasicBlock`s.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    bottleneck: bool = False
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images to logits and features, D = 8·width or 32·width."""
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        block = Bottleneck if self.bottleneck else BasicBlock
        stem = padded_conv(self.width, 3, 1, self.dtype, "conv1", kernel_init=uniform_fan_in)
        x = nn.relu(norm(name="bn1")(stem(x)))
        block = functools.partial(block, norm=norm, dtype=self.dtype)
        x = residual_stages(x, block, self.blocks, self.width)
        x = global_average_pool(x)
        return classify(x, self.num_classes, self.dtype, bias_init=uniform_bias(x.shape[-1]))
