"""CIFAR-10, ResNet-34 → ResNet-18."""

from dfkd_jax.configs.cifar10 import get_config

__all__ = ["get_config"]
