"""WideResNet (Zagoruyko and Komodakis, BMVC 2016), for small images."""

from collections.abc import Callable

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import batch_norm, classify, global_average_pool, padded_conv


class PreActivationBlock(nn.Module):
    """y = conv(relu(bn(conv(a)))) + shortcut with a = relu(bn(x)).

    The shortcut is x, or a 1×1 convolution of a where the number of channels changes.

    Attributes:
      width: output channels.
      stride: of the first convolution and the shortcut; only 1 if the channels stay the same.
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
        shortcut = x
        x = nn.relu(self.norm(name="bn1")(x))
        if shortcut.shape[-1] != self.width:
            shortcut = padded_conv(self.width, 1, self.stride, self.dtype, "shortcut_conv")(x)
        x = padded_conv(self.width, 3, self.stride, self.dtype, "conv1")(x)
        x = nn.relu(self.norm(name="bn2")(x))
        return padded_conv(self.width, 3, 1, self.dtype, "conv2")(x) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-k: stem of 16 channels, three stages of (depth − 4)/6 blocks, average pool, dense.

    Weights start as in ZSKT, LRA, CMI and Fast-Datafree: convolutions from N(0, √(2/fan_out)), the
    dense layer from PyTorch's default, U(−1/√fan_in, 1/√fan_in), its bias from 0.

    Attributes:
      num_classes: K.
      depth: number of layers, 6n + 4.
      widen_factor: k; the stages have 16k, 32k and 64k channels.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    depth: int = 16
    widen_factor: int = 1
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images to logits and features, D = 64k.

        Raises:
          ValueError: the depth is not 6n + 4.
        """
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"The depth of a WideResNet is 6n + 4 with n ≥ 1, not {self.depth}.")
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        x = padded_conv(16, 3, 1, self.dtype, "conv1")(x)
        for stage in range(3):
            for index in range((self.depth - 4) // 6):
                x = PreActivationBlock(
                    width=16 * self.widen_factor * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    norm=norm,
                    dtype=self.dtype,
                    name=f"block{stage + 1}_{index}",
                )(x)
        x = nn.relu(norm(name="bn1")(x))
        return classify(global_average_pool(x), self.num_classes, self.dtype)
