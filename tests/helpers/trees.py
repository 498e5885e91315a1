"""Trees of arrays: in another precision, and compared bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np


def cast(tree, dtype):
    """Floating-point leaves in another precision."""

    def leaf(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def same_bits(a, b):
    """Whether two trees have the same structure and the same bytes."""

    def data(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(map(data, jax.tree.leaves(a)), map(data, jax.tree.leaves(b)), strict=True)
    )
