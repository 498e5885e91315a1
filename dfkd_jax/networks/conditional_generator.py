"""A generator that is told which class to make: G(z + e_y), with learned embeddings e."""

from flax import linen as nn
from jaxtyping import Array, Float, Int

from dfkd_jax.networks.generator import Generator


class ConditionalGenerator(nn.Module):
    """The embedding of the class is added to z (B, Z), as in MAD (Do et al., NeurIPS 2022).

    Attributes:
      generator: G.
      classes: K.
    """

    generator: Generator
    classes: int

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "B Z"],
        targets: Int[Array, "B"],
        train: bool = True,
        update_stats: bool = True,
    ) -> Float[Array, "B H W C"]:
        """Map latent vectors and classes to images; see `Generator`."""
        embed = nn.Embed(self.classes, z.shape[-1], embedding_init=nn.initializers.normal(1.0))
        z = z + embed(targets).astype(z.dtype)
        return self.generator(z, train, update_stats)
