"""Attention transfer: the student should look where the teacher looks.

Source: Zagoruyko and Komodakis (2017), as ZSKT (Micaelli and Storkey, NeurIPS 2019) uses it.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfkd_jax.losses.terms import LayerStatistics

Maps = Mapping[tuple[int, int], Float[Array, "B HW"]]
"""(H, W) ↦ the attention map of that size."""


def attention_maps(layers: list[LayerStatistics]) -> Maps:
    """A = mean_c f² / ‖mean_c f²‖₂, of the last batch-norm input f of each image size.

    In a pre-activation network (WRN) these are the outputs of its groups; in others they stand
    shortly before them. No layer has to be named, so any two networks with batch norm have maps.

    Args:
      layers: of a network, in the order in which they run.
    """
    inputs = [x for x in (layer.inputs for layer in layers) if x is not None]
    last = {(x.shape[1], x.shape[2]): x for x in inputs if x.ndim == 4 and x.shape[1] > 1}

    def attention(f: Float[Array, "B H W C"]) -> Float[Array, "B HW"]:
        energy = jnp.mean(f**2, axis=-1).reshape(f.shape[0], -1)
        return energy / jnp.sqrt(jnp.sum(energy**2, axis=-1, keepdims=True) + 1e-12)

    return {size: attention(f) for size, f in last.items()}


def attention_loss(teacher: Maps, student: Maps) -> Float[Array, ""]:
    """Σ over the sizes that both have of mean (A_T − A_S)².

    Args:
      teacher: its maps. student: its maps, of the same images.
    """
    shared = [size for size in teacher if size in student]
    return sum((jnp.mean((teacher[s] - student[s]) ** 2) for s in shared), jnp.zeros(()))
