"""CIFAR-10, the small CNN → its half (61,290 and 15,802 parameters), for a small machine."""

from dfkd_jax.configs.cifar10_cnn import get_config

__all__ = ["get_config"]
