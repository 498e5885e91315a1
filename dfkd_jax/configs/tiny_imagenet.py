"""Tiny-ImageNet (200 classes, 64×64), ResNet-34 → ResNet-18."""

from dfkd_jax.configs import cifar100
from dfkd_jax.configs.default import set_fields


def get_config(method: str = "lra-mb"):
    """As for CIFAR-100, on images of four times the size."""
    return set_fields(
        cifar100.get_config(method),
        {
            "dataset.name": "tiny_imagenet",
        },
        "tiny_imagenet",
    )
