"""CIFAR-10, ResNet-34 → ResNet-18."""

from dfkd_jax.configs import cifar100
from dfkd_jax.configs.default import set_fields


def get_config(method: str = "lra-mb"):
    """As for CIFAR-100, with half the epochs."""
    return set_fields(
        cifar100.get_config(method),
        {
            "dataset.name": "cifar10",
            "epochs": 200,
        },
        "cifar10",
    )
