"""MobileNetV2 (Sandler et al., CVPR 2018), for small images."""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import (
    batch_norm,
    classify,
    global_average_pool,
    padded_conv,
    small_normal,
)


class InvertedResidual(nn.Module):
    """Widen by a 1×1 convolution, filter each channel by a 3×3 one, narrow by a 1×1 one.

    Batch norm follows each, ReLU6 the first two. Where the shape stays the same, x is added.

    Attributes:
      expansion: inner channels per input channel; with 1 there is no first convolution.
      width: output channels.
      stride: of the 3×3 convolution.
      norm: makes a batch norm layer.
      dtype: dtype of the computation.
    """

    expansion: int
    width: int
    stride: int
    norm: Callable[..., nn.BatchNorm]
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, width)."""
        shortcut = x
        inner = self.expansion * x.shape[-1]
        if self.expansion != 1:
            x = padded_conv(inner, 1, 1, self.dtype, "expand_conv")(x)
            x = nn.relu6(self.norm(name="expand_bn")(x))
        x = padded_conv(inner, 3, self.stride, self.dtype, "depthwise_conv", groups=inner)(x)
        x = nn.relu6(self.norm(name="depthwise_bn")(x))
        x = padded_conv(self.width, 1, 1, self.dtype, "project_conv")(x)
        x = self.norm(name="project_bn")(x)
        same = self.stride == 1 and shortcut.shape[-1] == self.width
        return x + shortcut if same else x


class MobileNetV2(nn.Module):
    """A 3×3 stem, seventeen inverted residuals, a 1×1 convolution, average pool, dense.

    The published dropout before the dense layer is left out. Weights start as in PRE-DFKD, CMI,
    Fast-Datafree and torchvision: convolutions from N(0, √(2/fan_out)), the dense layer from
    N(0, 0.01), its bias from 0.

    Attributes:
      num_classes: K.
      stages: (expansion, channels, number of blocks, stride of the first block) of each stage.
      stem: channels of the stem.
      head: channels of the last convolution, D.
      stem_stride: 1 in PRE-DFKD's form for small images, 2 in the original one, which CMI and
        Fast-Datafree use. The parameters are the same.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    stages: tuple[tuple[int, int, int, int], ...] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    stem: int = 32
    head: int = 1280
    stem_stride: int = 1
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images to logits and features."""
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        x = padded_conv(self.stem, 3, self.stem_stride, self.dtype, "stem_conv")(x)
        x = nn.relu6(norm(name="stem_bn")(x))
        number = 0
        for expansion, width, count, stride in self.stages:
            for index in range(count):
                number += 1
                x = InvertedResidual(
                    expansion=expansion,
                    width=width,
                    stride=stride if index == 0 else 1,
                    norm=norm,
                    dtype=self.dtype,
                    name=f"block{number}",
                )(x)
        x = nn.relu6(norm(name="head_bn")(padded_conv(self.head, 1, 1, self.dtype, "head_conv")(x)))
        x = global_average_pool(x)
        return classify(x, self.num_classes, self.dtype, kernel_init=small_normal)
