"""LeNet-5 and its half, for 32×32 or 28×28 images."""

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import Conv, classify, max_pool2, uniform_bias, uniform_fan_in
from dfkd_jax.runtime.errors import UserError

SIZES = (32, 28)  # sides of the images


class LeNet5(nn.Module):
    """Three 5×5 convolutions and two dense layers with ReLU and max-pooling, no batch norm.

    All weights and biases start as PyTorch's default has them, U(−1/√fan_in, 1/√fan_in), as in
    DAFL, PRE-DFKD and LRA, whose networks set none of them.

    Attributes:
      num_classes: K.
      widths: channels of the three convolutions and size of the features.
      axis_name: unused, there are no batch statistics; every classifier has it.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    widths: tuple[int, int, int, int] = (6, 16, 120, 84)
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images, H = W = 32 or 28, to logits and features.

        Raises:
          UserError: the images have another size.
        """
        if x.shape[1:3] not in [(size, size) for size in SIZES]:
            raise UserError(f"LeNet-5 takes 32×32 or 28×28 images, not {x.shape[1]}×{x.shape[2]}.")
        # The original digits are 28×28 in a frame of 32×32.
        frame = 2 if x.shape[1] == 28 else 0
        first, second, third, features = self.widths

        def conv(x: jax.Array, width: int, padding: int, name: str) -> jax.Array:
            return Conv(
                width,
                (5, 5),
                padding=padding,
                kernel_init=uniform_fan_in,
                bias_init=uniform_bias(25 * x.shape[-1]),
                dtype=self.dtype,
                name=name,
            )(x)

        # ReLU after pooling: the same as before it, on a quarter of the values.
        x = nn.relu(max_pool2(conv(x, first, frame, "conv1")))
        x = nn.relu(max_pool2(conv(x, second, 0, "conv2")))
        x = nn.relu(conv(x, third, 0, "conv3"))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(
            features,
            kernel_init=uniform_fan_in,
            bias_init=uniform_bias(third),
            dtype=self.dtype,
            name="fc1",
        )(x)
        return classify(nn.relu(x), self.num_classes, self.dtype, bias_init=uniform_bias(features))
