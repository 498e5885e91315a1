"""Random keys by name, and draws per global example.

Every random draw of a run comes from its key, the name of its use and a counter, so a resumed run
draws what the uninterrupted one would have drawn, and a new use changes no other. What is drawn
does not depend on the device count.
"""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key


def stream(key: Key[Array, ""], name: str, counter: Integer[Array, ""] | int = 0) -> Key[Array, ""]:
    """The key of the `counter`-th draw for a use: CRC-32(name) and the counter are folded in."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), counter)


def example_keys(
    key: Key[Array, ""], first_example: Integer[Array, ""] | int, count: int
) -> Key[Array, "{count}"]:
    """Keys; the i-th depends on `key` and the global index first_example + i alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first_example + jnp.arange(count))


def normal(
    key: Key[Array, ""], first_example: Integer[Array, ""] | int, count: int, dim: int
) -> Float[Array, "{count} {dim}"]:
    """z ~ N(0, I): row i is the latent of global example first_example + i.

    float32, or float64 where JAX has 64 bits enabled: the last bit of a draw depends on the program
    around it, and so may on the number of devices.
    """
    keys = example_keys(key, first_example, count)
    return jax.vmap(lambda k: jax.random.normal(k, (dim,)))(keys)
