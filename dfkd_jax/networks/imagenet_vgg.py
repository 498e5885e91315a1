"""VGG-11 to -19 with batch norm in their first form, for large images (Simonyan and Zisserman)."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import (
    adaptive_pool,
    batch_norm,
    classify,
    small_normal,
)
from dfkd_jax.networks.vgg import BLOCKS, vgg_blocks


class ImageNetVGG(nn.Module):
    """Five blocks of 3×3 convolutions, each with max pooling; 7×7 means; three dense layers.

    Batch norm and ReLU follow each convolution, which has a bias. The published dropout is left
    out. Weights start as in torchvision: convolutions from N(0, √(2/fan_out)), dense layers from
    N(0, 0.01), biases from 0.

    Attributes:
      num_classes: K.
      blocks: the channels of each convolution of each block.
      hidden: size of the two hidden dense layers, D.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    blocks: tuple[tuple[int, ...], ...] = BLOCKS[11]
    hidden: int = 4096
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images to logits and features.

        Raises:
          UserError: they are smaller than 2ⁿ×2ⁿ, n the number of blocks.
        """
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        x = vgg_blocks(x, self.blocks, range(len(self.blocks)), norm, self.dtype)
        for axis in (1, 2):
            x = adaptive_pool(x, axis, 7, jnp.mean)
        # PyTorch's dense layers take channels first; so the weights are the same arrays.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for name in ("fc1", "fc2"):
            dense = nn.Dense(self.hidden, kernel_init=small_normal, dtype=self.dtype, name=name)
            x = nn.relu(dense(x))
        return classify(x, self.num_classes, self.dtype, kernel_init=small_normal)
