"""The encoder of generative replay: images to the Gaussian that their latent vector comes from."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks.generator import HIDDEN_EPSILON, LEAKY_SLOPE, symmetric_uniform
from dfkd_jax.networks.layers import Conv, at_least_float32, batch_norm


def normalize_height(images: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Divide every column of pixels by its L2 norm over the height, (B, H, W, C) → same.

    x / max(‖x‖₂, ε): a column of zeros stays zero, and its gradient is finite.
    """
    square = jnp.sum(images**2, axis=1, keepdims=True)
    return images * lax.rsqrt(jnp.maximum(square, epsilon**2))


def downsample2(x: jax.Array) -> jax.Array:
    """Keep every second pixel (nearest neighbour), (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, C)."""
    return x[:, ::2, ::2]


class Encoder(nn.Module):
    """Convolutions down to an eighth of the image size, then a mean and a log-variance.

        x (B, H, W, C) → L2-normalised over the height
        → conv C→c₁, BN(eps 0.8), LeakyReLU(0.2)
        → conv c₁→c₀, BN(eps 0.8), LeakyReLU(0.2) → downsample
        → conv c₀→c₀ with stride 2, BN → downsample → flatten
        → dense → μ (B, Z), dense → log σ² (B, Z)

    All convolutions are 3×3. Weights start from U(−0.08, 0.08) and biases from 0, as in PRE-DFKD
    and LRA. An odd side is rounded up when it is halved, so every image size works.

    Attributes:
      latent_dim: Z.
      channels: (c₁, c₀), those of the generator in reverse.
      axis_name: axis over which batch statistics are averaged; None on one device.
      dtype: dtype of the computation; None follows input and parameters.
    """

    latent_dim: int
    channels: tuple[int, int] = (64, 128)
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W C"], train: bool = True
    ) -> tuple[Float[Array, "B Z"], Float[Array, "B Z"]]:
        """Return μ and log σ², at least float32.

        Args:
          images: in the space of normalised data.
          train: whether batch norm uses the statistics of the batch (and stores the running ones,
            which needs `mutable=["batch_stats"]`) or the running ones.
        """

        def norm(name: str, **options: Any) -> nn.Module:
            options = {"use_running_average": not train, "dtype": self.dtype} | options
            return batch_norm(self.axis_name, **options)(name=name)

        def conv(width: int, stride: int, name: str) -> nn.Module:
            return Conv(
                width,
                (3, 3),
                strides=stride,
                padding=1,
                kernel_init=symmetric_uniform,
                dtype=self.dtype,
                name=name,
            )

        def head(name: str) -> jax.Array:
            dense = nn.Dense(
                self.latent_dim, kernel_init=symmetric_uniform, dtype=self.dtype, name=name
            )
            return at_least_float32(dense(x))

        narrow, wide = self.channels
        x = normalize_height(images)
        for index, width in enumerate((narrow, wide), start=1):
            x = conv(width, 1, f"conv{index}")(x)
            x = norm(f"bn{index}", epsilon=HIDDEN_EPSILON)(x)
            x = nn.leaky_relu(x, LEAKY_SLOPE)
        x = conv(wide, 2, "conv3")(downsample2(x))
        x = downsample2(norm("bn3")(x))  # The last batch norm keeps the default eps, 1e-5.
        x = x.reshape(x.shape[0], -1)
        return head("mean"), head("log_variance")
