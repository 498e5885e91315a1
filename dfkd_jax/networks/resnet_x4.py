"""ResNet-8x4 and -32x4: thin ResNets four times as wide (Tian et al., RepDistiller, ICLR 2020)."""

import functools

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import (
    batch_norm,
    classify,
    global_average_pool,
    he_fan_out,
    padded_conv,
    uniform_bias,
)
from dfkd_jax.networks.resnet import BasicBlock, residual_stages


class ResNetX4(nn.Module):
    """A stem of 32 channels, three stages of 64, 128 and 256, average pool, dense.

    Unlike in `ThinResNet` the shortcut has parameters where the shape changes. Weights start as
    in RepDistiller: convolutions from N(0, √(2/fan_out)), the dense layer from
    U(−1/√fan_in, 1/√fan_in).

    Attributes:
      num_classes: K.
      depth: number of layers, 6n + 2.
      width: channels of the first stage; the stem has half as many.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    depth: int = 8
    width: int = 64
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images of any size to logits and features, D = 4·width.

        Raises:
          ValueError: the depth is not 6n + 2.
        """
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(f"The depth of a ResNet-x4 is 6n + 2 with n ≥ 1, not {self.depth}.")
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        x = padded_conv(self.width // 2, 3, 1, self.dtype, "conv1", kernel_init=he_fan_out)(x)
        x = nn.relu(norm(name="bn1")(x))
        block = functools.partial(BasicBlock, norm=norm, kernel_init=he_fan_out, dtype=self.dtype)
        x = residual_stages(x, block, 3 * ((self.depth - 2) // 6,), self.width)
        x = global_average_pool(x)
        return classify(x, self.num_classes, self.dtype, bias_init=uniform_bias(x.shape[-1]))
