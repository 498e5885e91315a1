"""CIFAR-100, ResNet-34 → ResNet-18: the paper's main table."""

from configs import default


def get_config(method: str = "lra-mb"):
    """The paper's setting; joint replay trains on twice the batch in half the iterations."""
    config = default.get_config(method)
    config.dataset.name = "cifar100"
    if method in ("mb-dfkd", "pre-dfkd"):
        config.batch_size = 1024
    return config
