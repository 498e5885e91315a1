"""Tiny-ImageNet (200 classes, 64×64), ResNet-34 → ResNet-18."""

from dfkd_jax.configs.tiny_imagenet import get_config

__all__ = ["get_config"]
