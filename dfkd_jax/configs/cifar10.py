"""CIFAR-10, ResNet-34 → ResNet-18."""

from dfkd_jax.configs import cifar100


def get_config(method: str = "lra-mb"):
    """As for CIFAR-100, with half the epochs."""
    config = cifar100.get_config(method)
    config.dataset.name = "cifar10"
    config.epochs = 200
    return config
