"""MNIST padded to 32×32, LeNet-5 → LeNet-5-Half."""

from dfkd_jax.configs.mnist import get_config

__all__ = ["get_config"]
