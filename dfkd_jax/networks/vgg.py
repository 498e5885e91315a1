"""VGG-8 to -19 for small images: batch norm, and one dense layer (Simonyan and Zisserman)."""

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

BLOCKS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: ((64,), (128,), (256,), (512,), (512,)),
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}
"""By depth: the channels of each convolution of each block."""


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
        """Map images to logits and features."""
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        pooled = (0, 1, 2, 3) if x.shape[1] == 64 else (0, 1, 2)
        for block, widths in enumerate(self.blocks):
            for index, width in enumerate(widths):
                x = Conv(
                    width,
                    (3, 3),
                    padding=1,
                    kernel_init=he_fan_out,
                    dtype=self.dtype,
                    name=f"block{block}_conv{index}",
                )(x)
                x = nn.relu(norm(name=f"block{block}_bn{index}")(x))
            if block in pooled:
                x = max_pool2(x)
        x = global_average_pool(x)
        return classify(x, self.num_classes, self.dtype, kernel_init=small_normal)
