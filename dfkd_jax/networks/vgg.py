"""VGG-8 to -19 for small images: batch norm, and one dense layer (Simonyan and Zisserman)."""

from collections.abc import Callable, Collection, Sequence

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import (
    Conv,
    batch_norm,
    classify,
    global_average_pool,
    he_fan_out,
    max_pool2,
    small_normal,
)
from dfkd_jax.runtime.errors import UserError

BLOCKS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: ((64,), (128,), (256,), (512,), (512,)),
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}
"""By depth: the channels of each convolution of each block."""


def vgg_blocks(
    x: jax.Array,
    blocks: Sequence[Sequence[int]],
    pooled: Collection[int],
    norm: Callable[..., nn.BatchNorm],
    dtype: DTypeLike | None,
) -> jax.Array:
    """Apply 3×3 convolutions with batch norm and ReLU as layers of the module that is running.

    Args:
      x: (B, H, W, C).
      blocks: the channels of each convolution of each block.
      pooled: numbers of the blocks that 2×2 maximum pooling follows.
      norm: makes a batch norm layer.
      dtype: of the computation.

    Raises:
      UserError: the images are too small for the poolings.
    """
    least = 2 ** len(pooled)
    if min(x.shape[1:3]) < least:
        raise UserError(
            f"This VGG takes images of {least}×{least} or more, not {x.shape[1]}×{x.shape[2]}."
        )
    for block, widths in enumerate(blocks):
        for index, width in enumerate(widths):
            x = Conv(
                width,
                (3, 3),
                padding=1,
                kernel_init=he_fan_out,
                dtype=dtype,
                name=f"block{block}_conv{index}",
            )(x)
            x = nn.relu(norm(name=f"block{block}_bn{index}")(x))
        if block in pooled:
            x = max_pool2(x)
    return x


class VGG(nn.Module):
    """Five blocks of 3×3 convolutions with batch norm and ReLU, average pool, dense.

    Maximum pooling follows the first three blocks, and the fourth if the images are 64 pixels high
    (as in RepDistiller, whose VGG-11 CMI and Fast-Datafree use). Convolutions have a bias. Weights
    start as there: convolutions from N(0, √(2/fan_out)), the dense layer from N(0, 0.01), biases
    from 0.

    Attributes:
      num_classes: K.
      blocks: the channels of each convolution of each block.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    blocks: tuple[tuple[int, ...], ...] = BLOCKS[11]
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images of 8×8 or more to logits and features."""
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        pooled = range(min(len(self.blocks), 4 if x.shape[1] == 64 else 3))
        x = vgg_blocks(x, self.blocks, pooled, norm, self.dtype)
        x = global_average_pool(x)
        return classify(x, self.num_classes, self.dtype, kernel_init=small_normal)
