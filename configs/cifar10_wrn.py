"""CIFAR-10, WRN-16-2 → WRN-16-1, for a small machine."""

from dfkd_jax.configs.cifar10_wrn import get_config

__all__ = ["get_config"]
