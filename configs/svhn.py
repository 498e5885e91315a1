"""SVHN (cropped digits), ResNet-34 → ResNet-18."""

from dfkd_jax.configs.svhn import get_config

__all__ = ["get_config"]
