"""CIFAR-100, ResNet-34 → ResNet-18: the paper's main table, every method at one batch size."""

from dfkd_jax.configs import default
from dfkd_jax.configs.default import set_fields


def get_config(method: str = "lra-mb"):
    """The paper's setting for LRA, and the same batch and number of steps for every other method.

    The authors' code trains joint replay on twice the batch in half the steps: see
    `configs/cifar100_authors.py`.
    """
    return set_fields(default.get_config(method), {}, "cifar100")
