"""ResNet-18 and ResNet-34 in their form for small images (He et al., CVPR 2016)."""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from dfkd_jax.layers import Conv, batch_norm, classify, global_average_pool, he_fan_out


class BasicBlock(nn.Module):
    """y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), all convolutions without bias.

    The shortcut is the identity, or a 1×1 convolution and batch norm where the shape changes.

    Attributes:
      width: output channels.
      stride: of the first convolution and the shortcut.
      norm: makes a batch norm layer.
      dtype: dtype of the computation.
    """

    width: int
    stride: int
    norm: Callable[..., nn.BatchNorm]
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, width)."""

        def conv(size: int, stride: int, name: str) -> nn.Module:
            # Explicit padding: "SAME" pads stride-2 convolutions on one side only, PyTorch on both.
            return Conv(
                self.width,
                (size, size),
                strides=stride,
                padding=size // 2,
                use_bias=False,
                kernel_init=he_fan_out,
                dtype=self.dtype,
                name=name,
            )

        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.width:
            shortcut = conv(1, self.stride, "shortcut_conv")(x)
            shortcut = self.norm(name="shortcut_bn")(shortcut)
        x = nn.relu(self.norm(name="bn1")(conv(3, self.stride, "conv1")(x)))
        x = self.norm(name="bn2")(conv(3, 1, "conv2")(x))
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """A 3×3 stem, four stages of basic blocks with strides 1, 2, 2, 2, average pool, dense.

    Attributes:
      num_classes: K.
      blocks: number of blocks of each stage.
      width: channels of the first stage; each later stage has twice as many.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map images (B, H, W, C) to logits (B, K) and features (B, 8·width)."""
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        x = Conv(
            self.width,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=he_fan_out,
            dtype=self.dtype,
            name="conv1",
        )(x)
        x = nn.relu(norm(name="bn1")(x))
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                x = BasicBlock(
                    width=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    norm=norm,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{index}",
                )(x)
        return classify(global_average_pool(x), self.num_classes, self.dtype)
