"""The image generator: latent vectors to images."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.layers import Conv, UpsampleConv, at_least_float32, batch_norm
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Field, Rule, at_least

FIELDS = {
    "generator.latent_dim": Field(1000, at_least(1), "Z, the dimension of z"),
    "generator.channels": Field(
        (128, 64),
        Rule(lambda c: len(c) == 2 and min(c) >= 1, "are two numbers of 1 or more"),
        "of its two inner convolutions",
    ),
}
"""Of every generator of a run, that of the generative memory too."""

LEAKY_SLOPE = 0.2
HIDDEN_EPSILON = 0.8  # The reference writes BatchNorm2d(128, 0.8), whose second argument is eps.
_WEIGHT_RANGE = 0.08


def symmetric_uniform(
    key: jax.Array, shape: Sequence[int], dtype: DTypeLike, out_sharding: object = None
) -> jax.Array:
    """U(−0.08, 0.08), as every weight of the generator and of the encoder starts."""
    del out_sharding  # Part of the initializer signature.
    return jax.random.uniform(key, shape, dtype, -_WEIGHT_RANGE, _WEIGHT_RANGE)


def upsamplings(image_shape: tuple[int, int, int]) -> int:
    """How often a feature map is doubled: 2 times, 3 from 64×64 on and 4 from 128×128 on."""
    height = image_shape[0]
    return 4 if height >= 128 else 3 if height >= 64 else 2


def base_size(image_shape: tuple[int, int, int]) -> int:
    """Side of the feature map the latent is mapped to: H/4, H/8 or H/16, see `upsamplings`.

    Raises:
      UserError: the images are not square, or their side is not a multiple of 4, 8 or 16.
    """
    height, width, _ = image_shape
    factor = 2 ** upsamplings(image_shape)
    if height != width or height < 1 or height % factor:
        raise UserError(
            "The generator makes square images whose side is a multiple of 4 (of 8 from 64 on, of "
            f"16 from 128 on), not {height}×{width}."
        )
    return height // factor


def inner_widths(
    image_shape: tuple[int, int, int], channels: tuple[int, int]
) -> tuple[tuple[int, ...], bool]:
    """Channels of the convolutions that double and are normalised; whether the last one doubles.

    A fourth doubling has a convolution of its own, as wide as the one before.
    """
    count = upsamplings(image_shape)
    return (*channels, channels[1])[: 3 if count == 4 else 2], count > 2


class Generator(nn.Module):
    """Dense layer, then upsampling ×2 and 3×3 convolutions up to the image size.

        z (B, Z) → dense → (B, h, h, c₀), BN
        → upsample, conv c₀→c₀, BN(eps 0.8), LeakyReLU(0.2)
        → upsample, conv c₀→c₁, BN(eps 0.8), LeakyReLU(0.2)
        → [from 128×128 on: the last line once more, c₁→c₁]
        → [from 64×64 on: upsample] → conv c₁→C, tanh, BN without scale and bias

    The last batch norm gives every channel mean 0 and variance 1 over the batch and all pixels: the
    images are in the space of normalised data. With `spectral_norm` every convolution kernel, as a
    (9·C_in, C_out) matrix, is divided by its largest singular value, estimated by one power
    iteration per call that starts from the stored vector `u`. Weights start from U(−0.08, 0.08),
    biases from 0, and batch norms as always from scale 1 and bias 0, as in PRE-DFKD and LRA.

    Attributes:
      image_shape: (H, W, C) of the images.
      channels: (c₀, c₁).
      spectral_norm: whether convolution kernels are divided by their spectral norm.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    image_shape: tuple[int, int, int]
    channels: tuple[int, int] = (128, 64)
    spectral_norm: bool = True
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, z: Float[Array, "B Z"], train: bool = True, update_stats: bool = True
    ) -> Float[Array, "B H W C"]:
        """Map latent vectors to images, at least float32.

        Args:
          z: latent vectors.
          train: whether batch norm uses the statistics of the batch, the normal mode even when the
            generator is only sampled, or the running ones.
          update_stats: whether to store the running statistics and the vectors `u` of the spectral
            norm, which needs `mutable=["batch_stats"]` (not `mutable=True`: Flax would then store
            the divided kernels too). Without it the call changes nothing and needs no mutable
            collection.

        Raises:
          UserError: `image_shape` is not one the generator can make.
        """
        if not update_stats and not self.is_initializing():
            # Batch norm writes its running statistics in every training call, so the call runs on a
            # copy whose updates are dropped. The images do not depend on them.
            copy = self.clone(parent=None)
            images, _ = copy.apply(self.variables, z, train, mutable=["batch_stats"])
            return images

        def norm(name: str, **options: Any) -> nn.Module:
            options = {"use_running_average": not train, "dtype": self.dtype} | options
            return batch_norm(self.axis_name, **options)(name=name)

        def conv(x: jax.Array, width: int, name: str, upsample: bool) -> jax.Array:
            layer = (UpsampleConv if upsample else Conv)(
                width,
                (3, 3),
                padding=1,
                kernel_init=symmetric_uniform,
                dtype=self.dtype,
                name=name,
            )
            if not self.spectral_norm:
                return layer(x)
            normalised = nn.SpectralNorm(layer, name=f"{name}_sn")
            if not self.is_initializing():
                return normalised(x, update_stats=True)
            # While initialising, Flax stores the kernel divided by its norm, which would change how
            # far an Adam step turns it: put back the kernel that was drawn.
            layer(x)
            kernel = layer.get_variable("params", "kernel")
            x = normalised(x, update_stats=True)
            layer.put_variable("params", "kernel", kernel)
            return x

        size = base_size(self.image_shape)
        wide = self.channels[0]
        widths, last_doubles = inner_widths(self.image_shape, self.channels)
        x = nn.Dense(
            size * size * wide, kernel_init=symmetric_uniform, dtype=self.dtype, name="fc"
        )(z)
        x = x.reshape(z.shape[0], size, size, wide)
        x = norm("bn1")(x)  # The first and the last batch norm keep the default eps, 1e-5.
        for index, width in enumerate(widths, start=1):
            x = conv(x, width, f"conv{index}", upsample=True)
            x = norm(f"bn{index + 1}", epsilon=HIDDEN_EPSILON)(x)
            x = nn.leaky_relu(x, LEAKY_SLOPE)
        last = len(widths) + 1
        x = nn.tanh(conv(x, self.image_shape[2], f"conv{last}", upsample=last_doubles))
        x = norm(f"bn{last + 1}", use_scale=False, use_bias=False)(x)
        return at_least_float32(x)
