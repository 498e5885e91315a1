"""The thin ResNets for CIFAR (He et al., CVPR 2016, section 4.2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import (
    batch_norm,
    classify,
    global_average_pool,
    he_fan_in,
    padded_conv,
    uniform_bias,
)


class ThinBlock(nn.Module):
    """y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), all convolutions without bias.

    The shortcut has no parameters: where the shape changes it takes every second pixel and puts as
    many channels of zeros before the old ones as behind them.

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
        shortcut = x[:, :: self.stride, :: self.stride]
        new = (self.width - x.shape[-1]) // 2
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (new, new)))
        conv1 = padded_conv(self.width, 3, self.stride, self.dtype, "conv1", kernel_init=he_fan_in)
        conv2 = padded_conv(self.width, 3, 1, self.dtype, "conv2", kernel_init=he_fan_in)
        x = nn.relu(self.norm(name="bn1")(conv1(x)))
        return nn.relu(self.norm(name="bn2")(conv2(x)) + shortcut)


class ThinResNet(nn.Module):
    """A stem of 16 channels, three stages of (depth − 2)/6 blocks, average pool, dense.

    Not the ResNet-18 to -50 of `resnet`, which have fifty times the parameters. Weights start as in
    the public checkpoints' source: from N(0, √(2/fan_in)), the last bias from U(−1/√fan_in,
    1/√fan_in).

    Attributes:
      num_classes: K.
      depth: number of layers, 6n + 2: 20, 32, 44, 56 or 110.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    depth: int = 20
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images to logits and features, D = 64.

        Raises:
          ValueError: the depth is not 6n + 2.
        """
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(f"The depth of a thin ResNet is 6n + 2 with n ≥ 1, not {self.depth}.")
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        x = padded_conv(16, 3, 1, self.dtype, "conv1", kernel_init=he_fan_in)(x)
        x = nn.relu(norm(name="bn1")(x))
        for stage in range(3):
            for index in range((self.depth - 2) // 6):
                x = ThinBlock(
                    width=16 * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    norm=norm,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{index}",
                )(x)
        x = global_average_pool(x)
        return classify(
            x,
            self.num_classes,
            self.dtype,
            kernel_init=he_fan_in,
            bias_init=uniform_bias(x.shape[-1]),
        )
