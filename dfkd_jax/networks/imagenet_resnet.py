"""ResNet-18, -34 and -50 in their first form, for large images (He et al., CVPR 2016)."""

import functools

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import (
    batch_norm,
    classify,
    global_average_pool,
    he_fan_out,
    max_pool3,
    padded_conv,
    uniform_bias,
)
from dfkd_jax.networks.resnet import BasicBlock, Bottleneck, residual_stages


class ImageNetResNet(nn.Module):
    """A 7×7 stem of stride 2, max pooling, four stages of strides 1, 2, 2, 2, average pool, dense.

    Weights start as in torchvision: convolutions from N(0, √(2/fan_out)), the dense layer from
    U(−1/√fan_in, 1/√fan_in).

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
        """Map images of any size to logits and features, D = 8·width or 32·width."""
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        x = padded_conv(self.width, 7, 2, self.dtype, "conv1", kernel_init=he_fan_out)(x)
        x = max_pool3(nn.relu(norm(name="bn1")(x)), padding=1)
        kind = Bottleneck if self.bottleneck else BasicBlock
        block = functools.partial(kind, norm=norm, kernel_init=he_fan_out, dtype=self.dtype)
        x = global_average_pool(residual_stages(x, block, self.blocks, self.width))
        return classify(x, self.num_classes, self.dtype, bias_init=uniform_bias(x.shape[-1]))
