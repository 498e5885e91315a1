"""ShuffleNetV2 for small images (Ma et al., ECCV 2018; form of RepDistiller)."""

import functools
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
    padded_conv,
    uniform_bias,
    uniform_fan_in,
)

_conv = functools.partial(padded_conv, kernel_init=uniform_fan_in)


def shuffle(x: jax.Array) -> jax.Array:
    """Interleave both halves of the channels: (a₁ … aₙ b₁ … bₙ) → (a₁ b₁ … aₙ bₙ)."""
    *place, channels = x.shape
    return x.reshape(*place, 2, channels // 2).swapaxes(-1, -2).reshape(x.shape)


class ShuffleBlock(nn.Module):
    """Half of the channels pass; the others are filtered: 1×1, 3×3 by channel, 1×1.

    Batch norm follows each convolution, ReLU the first and the last.

    Attributes:
      norm: makes a batch norm layer.
      dtype: dtype of the computation.
    """

    norm: Callable[..., nn.BatchNorm]
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to the same shape."""
        kept, x = jnp.split(x, 2, axis=-1)
        half = x.shape[-1]
        x = nn.relu(self.norm(name="bn1")(_conv(half, 1, 1, self.dtype, "conv1")(x)))
        x = self.norm(name="bn2")(_conv(half, 3, 1, self.dtype, "conv2", groups=half)(x))
        x = nn.relu(self.norm(name="bn3")(_conv(half, 1, 1, self.dtype, "conv3")(x)))
        return shuffle(jnp.concatenate([kept, x], axis=-1))


class DownBlock(nn.Module):
    """All channels go both ways, each of stride 2: 3×3 by channel, 1×1; and as `ShuffleBlock`.

    Attributes:
      width: output channels.
      norm: makes a batch norm layer.
      dtype: dtype of the computation.
    """

    width: int
    norm: Callable[..., nn.BatchNorm]
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, width)."""
        channels, half = x.shape[-1], self.width // 2
        left = _conv(channels, 3, 2, self.dtype, "conv1", groups=channels)(x)
        left = _conv(half, 1, 1, self.dtype, "conv2")(self.norm(name="bn1")(left))
        left = nn.relu(self.norm(name="bn2")(left))
        x = nn.relu(self.norm(name="bn3")(_conv(half, 1, 1, self.dtype, "conv3")(x)))
        x = self.norm(name="bn4")(_conv(half, 3, 2, self.dtype, "conv4", groups=half)(x))
        x = nn.relu(self.norm(name="bn5")(_conv(half, 1, 1, self.dtype, "conv5")(x)))
        return shuffle(jnp.concatenate([left, x], axis=-1))


class ShuffleNetV2(nn.Module):
    """A 1×1 stem, three stages that halve the image, a 1×1 convolution, average pool, dense.

    All weights and the bias start as PyTorch's default has them, U(−1/√fan_in, 1/√fan_in), as
    RepDistiller sets none of them.

    Attributes:
      num_classes: K.
      widths: channels of each stage.
      blocks: number of `ShuffleBlock`s of each stage after its `DownBlock`.
      stem: channels of the stem.
      head: channels of the last convolution, D.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    widths: tuple[int, ...] = (116, 232, 464)
    blocks: tuple[int, ...] = (3, 7, 3)
    stem: int = 24
    head: int = 1024
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"]]:
        """Map images of any size to logits and features."""
        norm = batch_norm(self.axis_name, use_running_average=not train, dtype=self.dtype)
        x = nn.relu(norm(name="bn1")(_conv(self.stem, 1, 1, self.dtype, "conv1")(x)))
        for stage, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True), start=1):
            x = DownBlock(width, norm, self.dtype, name=f"layer{stage}_0")(x)
            for index in range(1, count + 1):
                x = ShuffleBlock(norm, self.dtype, name=f"layer{stage}_{index}")(x)
        x = nn.relu(norm(name="bn2")(_conv(self.head, 1, 1, self.dtype, "conv2")(x)))
        x = global_average_pool(x)
        return classify(x, self.num_classes, self.dtype, bias_init=uniform_bias(x.shape[-1]))
