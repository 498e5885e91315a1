"""The generator of NAYER: label embeddings, a noisy layer, then a generator of pixels."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dfkd_jax.networks.layers import batch_norm
from dfkd_jax.networks.pixel_generator import PixelGenerator


class LabelGenerator(nn.Module):
    """Embeddings of classes to pixels in [0, 1]; the noise is in the weights of the first layer.

        e (B, D) → BN → noisy layer of the image's group, D → width → `PixelGenerator`

    Image i belongs to group ⌊i / K⌋ and uses the noisy layer of that group.

    Attributes:
      body: the rest, from the noisy layer's output on.
      classes: K, images of a group.
    """

    body: PixelGenerator
    classes: int

    @nn.compact
    def __call__(
        self,
        embeddings: Float[Array, "B D"],
        noisy: dict[str, Any],
        first: Int[Array, ""] | int = 0,
    ) -> Float[Array, "B H W C"]:
        """Map embeddings to pixels.

        Args:
          embeddings: of one device's share of the batch.
          noisy: "kernel" (groups, D, width) and "bias" (groups, width).
          first: the global index of the first of them.
        """
        norm = batch_norm(self.body.axis_name, use_running_average=False)
        x = norm(name="bn0")(embeddings)
        return self.body(grouped_dense(x, noisy["kernel"], noisy["bias"], self.classes, first))


def grouped_dense(
    x: Float[Array, "B D"],
    kernel: Float[Array, "groups D W"],
    bias: Float[Array, "groups W"],
    size: int,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "B W"]:
    """Row i of the whole batch times the kernel of group ⌊i / size⌋, plus its bias.

    Args:
      x: one device's share of the rows.
      kernel: of every group. bias: likewise.
      size: rows of a group.
      first: the global index of the share's first row.
    """
    count, groups = x.shape[0], kernel.shape[0]
    # A share may begin and end within a group: its rows are laid into whole groups.
    touched = min(groups, -(-count // size) + 1)
    group = first // size
    offset = first - group * size
    rows = jnp.zeros(((touched + 1) * size, x.shape[1]), x.dtype)
    rows = jax.lax.dynamic_update_slice_in_dim(rows, x, offset, 0)[: touched * size]
    which = jnp.minimum(group + jnp.arange(touched), groups - 1)
    blocks = rows.reshape(touched, size, -1)
    out = jnp.einsum("gnd,gdw->gnw", blocks, kernel[which]) + bias[which][:, None]
    return jax.lax.dynamic_slice_in_dim(out.reshape(touched * size, -1), offset, count, 0)
