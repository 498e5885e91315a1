"""SVHN (cropped digits), ResNet-34 → ResNet-18."""

from dfkd_jax.configs import cifar100


def get_config(method: str = "lra-mb"):
    """As for CIFAR-100, with half the epochs; house numbers must not be flipped."""
    config = cifar100.get_config(method)
    config.dataset.name = "svhn"
    config.epochs = 200
    config.teacher.epochs = 60
    config.teacher.augment = False
    return config
