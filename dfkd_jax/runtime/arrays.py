"""Arrays in annotations: `Float[Array, "B K"]` is of JAX, `Float[AnyArray, "B K"]` also of NumPy.

The letters are the axes: B images of a batch, m of a replayed one; H, W and C height, width and
channels of an image; K classes; D features; Z dimensions of a latent vector. Within one call the
same letter is the same size.
"""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
