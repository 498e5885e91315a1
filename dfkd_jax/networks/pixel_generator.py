"""The generator of CMI, Fast-Datafree and NAYER: features to pixels in [0, 1]."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.generator import LEAKY_SLOPE, base_size, inner_widths
from dfkd_jax.networks.layers import Conv, UpsampleConv, at_least_float32, batch_norm

_normal = nn.initializers.normal(0.02)


def _around_one(key: jax.Array, shape: Sequence[int], dtype: Any = float) -> jax.Array:
    return 1 + _normal(key, shape, dtype)


class PixelGenerator(nn.Module):
    """Dense layer, then upsampling ×2 and 3×3 convolutions up to the image size.

        x (B, D) → dense → (B, h, h, c₀), BN
        → upsample, conv c₀→c₀, BN, LeakyReLU(0.2)
        → upsample, conv c₀→c₁, BN, LeakyReLU(0.2)
        → [from 128×128 on: the last line once more, c₁→c₁]
        → [from 64×64 on: upsample] → conv c₁→C, sigmoid

    Kernels start from N(0, 0.02²), scales of batch norms from N(1, 0.02²), biases from 0. The inner
    convolutions have no bias.

    Attributes:
      image_shape: (H, W, C) of the images.
      channels: (c₀, c₁).
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    image_shape: tuple[int, int, int]
    channels: tuple[int, int] = (128, 64)
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B H W C"]:
        """Map features to pixels in [0, 1], at least float32; batch norm is in training mode.

        Raises:
          UserError: `image_shape` is not one the generator can make.
        """

        def norm(name: str) -> Callable[[jax.Array], jax.Array]:
            layer = batch_norm(
                self.axis_name,
                use_running_average=False,
                scale_init=_around_one,
                dtype=self.dtype,
            )
            return layer(name=name)

        size = base_size(self.image_shape)
        wide = self.channels[0]
        widths, last_doubles = inner_widths(self.image_shape, self.channels)
        options: dict[str, Any] = {"padding": 1, "kernel_init": _normal, "dtype": self.dtype}
        x = nn.Dense(size * size * wide, kernel_init=_normal, dtype=self.dtype, name="fc")(x)
        x = norm("bn1")(x.reshape(x.shape[0], size, size, wide))
        for index, width in enumerate(widths, start=1):
            conv = UpsampleConv(width, (3, 3), use_bias=False, name=f"conv{index}", **options)
            x = nn.leaky_relu(norm(f"bn{index + 1}")(conv(x)), LEAKY_SLOPE)
        last = UpsampleConv if last_doubles else Conv
        x = last(self.image_shape[2], (3, 3), name=f"conv{len(widths) + 1}", **options)(x)
        return at_least_float32(nn.sigmoid(x))


class NormalizedPixelGenerator(nn.Module):
    """`PixelGenerator` as an adversarial generator: (images − mean) / std of its pixels.

    Attributes:
      pixels: makes images in [0, 1].
      mean: per channel. std: per channel.
    """

    pixels: PixelGenerator
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, z: Float[Array, "B Z"], train: bool = True, update_stats: bool = True
    ) -> Float[Array, "B H W C"]:
        """Map z to normalised images.

        Batch norm is in training mode whatever `train` says, and nothing reads the statistics that
        `update_stats` is about.
        """
        del train, update_stats
        pixels = self.pixels(z)
        return (pixels - jnp.asarray(self.mean, pixels.dtype)) / jnp.asarray(self.std, pixels.dtype)
