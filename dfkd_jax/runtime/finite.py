"""Whether arrays are finite: asked of a network before it is saved, summed up or exported."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.runtime.errors import UserError


class NonFinite(UserError):
    """A loss or a parameter became infinite or NaN."""


def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point leaf of `tree` is finite, others left out; a bool scalar."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    found = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.all(jnp.stack(found)) if found else jnp.ones((), bool)


def check_variables(variables: Any, whose: str) -> None:
    """Refuse a network some of whose parameters or batch statistics are no finite numbers.

    Args:
      variables: of the network, arrays that this process can read.
      whose: how the sentence begins, such as "The teacher in DIR".

    Raises:
      NonFinite: there are some; names the first.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        if not np.isfinite(np.asarray(leaf)).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise NonFinite(
                f"{whose} holds values in {name} that are no finite numbers; its training diverged."
            )
