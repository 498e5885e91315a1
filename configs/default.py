"""Every field of a run, once, with the paper's value for 32×32 images (ResNet-34 → ResNet-18)."""

from dfkd_jax.configs.default import get_config

__all__ = ["get_config"]
