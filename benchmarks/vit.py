"""A vision transformer as a user's own network: what `benchmarks.scaling` counts beside ResNets.

Dosovitskiy et al., "An Image Is Worth 16x16 Words", ICLR 2021, with the mean over the patches in
the place of the class token.
"""

from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike


class ViT(nn.Module):
    """Patches, positions, blocks of attention and MLP, the mean over patches, a dense layer.

    Attributes:
      num_classes: K.
      patch: side of a patch, which divides that of the images.
      width: of the tokens. depth: blocks. heads: of the attention.
      dtype: dtype of the computation; None follows input and parameters.
    """

    num_classes: int
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Images (B, H, W, C) to logits (B, K) and features (B, width)."""
        del train
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, side, padding="VALID", dtype=self.dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:]).astype(x.dtype)
        for i in range(self.depth):
            y = nn.LayerNorm(dtype=self.dtype, name=f"norm{i}a")(x)
            x = x + nn.MultiHeadDotProductAttention(
                self.heads, dtype=self.dtype, name=f"attention{i}"
            )(y)
            y = nn.LayerNorm(dtype=self.dtype, name=f"norm{i}b")(x)
            y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype, name=f"wide{i}")(y))
            x = x + nn.Dense(self.width, dtype=self.dtype, name=f"narrow{i}")(y)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x).mean(axis=1).astype("float32")
        return nn.Dense(self.num_classes, name="head")(x), x


ViTB16 = ViT
ViTS16 = partial(ViT, width=384, heads=6)
