"""CIFAR-100, ResNet-34 → ResNet-18: the paper's main table, every method at one batch size."""

from dfkd_jax.configs.cifar100 import get_config

__all__ = ["get_config"]
