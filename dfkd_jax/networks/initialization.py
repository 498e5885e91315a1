"""Another start of a network's weights than that of its source, for experiments."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dfkd_jax.networks.layers import he_fan_in, he_fan_out, uniform_fan_in
from dfkd_jax.runtime.draw import stream

INITIALIZATIONS = ("source", "he")
LAST = "fc"  # the name of the last dense layer, see `layers.classify`


def he(key: jax.Array, params: Mapping[str, Any], batch_norm: bool) -> dict[str, Any]:
    """Draw the weights of a network anew, after He et al. (2015).

    | array | starts from |
    |---|---|
    | kernel of a convolution, (h, w, in, out), with batch norm | N(0, √(2/fan_out)) |
    | the same without batch norm | N(0, √(2/fan_in)) |
    | kernel of a hidden dense layer, (in, out) | N(0, √(2/fan_in)) |
    | kernel of the dense layer named "fc" | U(−1/√fan_in, 1/√fan_in) |
    | bias | 0 |

    What is none of these stays as it is. The draw of an array depends on its path alone.

    Args:
      key: of the draws.
      params: of a Flax network, nested dicts.
      batch_norm: whether the network has batch statistics.

    Returns:
      The same tree with the same shapes and dtypes.
    """
    drawn = {}
    flat: dict[tuple, Any] = flatten_dict(params)
    for path, old in flat.items():
        leaf_key = stream(key, "/".join(path))
        kind = (path[-1], old.ndim)
        if path[-1] == "bias":
            drawn[path] = jnp.zeros_like(old)
        elif kind == ("kernel", 4):
            start = he_fan_out if batch_norm else he_fan_in
            drawn[path] = start(leaf_key, old.shape, old.dtype)
        elif kind == ("kernel", 2):
            start = uniform_fan_in if path[-2:-1] == (LAST,) else he_fan_in
            drawn[path] = start(leaf_key, old.shape, old.dtype)
        else:
            drawn[path] = old
    return unflatten_dict(drawn)
