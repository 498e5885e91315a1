"""CIFAR-100, ResNet-34 → ResNet-18 with the settings and habits of the authors' code."""

from dfkd_jax.configs.cifar100_authors import get_config

__all__ = ["get_config"]
