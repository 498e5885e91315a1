"""Data-free knowledge distillation in JAX/Flax."""

from dfkd_jax.distillation.meta import meta_gradient

__all__ = ["meta_gradient"]
