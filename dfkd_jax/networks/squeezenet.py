"""SqueezeNet 1.1 (Iandola et al., 2016), as PRE-DFKD uses it on small images."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import (
    Conv,
    at_least_float32,
    global_average_pool,
    he_uniform,
    max_pool3,
    small_normal,
)
from dfkd_jax.runtime.errors import UserError


class Fire(nn.Module):
    """A 1×1 convolution to few channels, then 1×1 and 3×3 ones beside each other, each with ReLU.

    Attributes:
      squeeze: channels of the first convolution.
      expand: channels of each of the two others; the output has twice as many.
      dtype: dtype of the computation.
    """

    squeeze: int
    expand: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, H, W, 2·expand)."""

        def conv(width: int, size: int, name: str) -> nn.Module:
            return Conv(
                width,
                (size, size),
                padding=size // 2,
                kernel_init=he_uniform,
                dtype=self.dtype,
                name=name,
            )

        x = nn.relu(conv(self.squeeze, 1, "squeeze")(x))
        narrow = nn.relu(conv(self.expand, 1, "expand1x1")(x))
        wide = nn.relu(conv(self.expand, 3, "expand3x3")(x))
        return jnp.concatenate([narrow, wide], axis=-1)


class SqueezeNet(nn.Module):
    """A strided convolution, eight fire modules, a 1×1 convolution to the classes; no batch norm.

    The logits are means over pixels of a ReLU, so none is negative. The published dropout before
    the last convolution is left out. Weights start as in PRE-DFKD and torchvision: the last
    convolution from N(0, 0.01), the others from U(−√(6/fan_in), √(6/fan_in)), biases from 0.

    Attributes:
      num_classes: K.
      stem: channels of the first convolution.
      fires: (squeeze, expand) of each fire module; a maximum pooling is before the first, third
        and fifth.
      axis_name: unused, there are no batch statistics; every classifier has it.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    stem: int = 64
    fires: tuple[tuple[int, int], ...] = (
        *((16, 64), (16, 64), (32, 128), (32, 128)),
        *((48, 192), (48, 192), (64, 256), (64, 256)),
    )
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images to logits and features.

        The features are means over pixels of what enters the last convolution.

        Raises:
          UserError: the images are too small for the poolings.
        """
        if min(x.shape[1:3]) < 17:
            raise UserError(
                f"SqueezeNet takes images of 17×17 or more, not {x.shape[1]}×{x.shape[2]}."
            )
        x = Conv(
            self.stem,
            (3, 3),
            strides=2,
            padding="VALID",
            kernel_init=he_uniform,
            dtype=self.dtype,
            name="conv1",
        )(x)
        x = nn.relu(x)
        for index, (squeeze, expand) in enumerate(self.fires):
            if index in (0, 2, 4):
                x = max_pool3(x)
            # Numbered from 2 as in the paper, where the convolutions are 1 and 10.
            x = Fire(squeeze, expand, self.dtype, name=f"fire{index + 2}")(x)
        features = global_average_pool(x)
        x = Conv(
            self.num_classes, (1, 1), kernel_init=small_normal, dtype=self.dtype, name="conv10"
        )(x)
        return at_least_float32(global_average_pool(nn.relu(x))), at_least_float32(features)
