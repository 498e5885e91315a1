"""MNIST for the tutorial, as PyTorch tensors; the padding is dfkd_jax's."""

import torch

from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import SPECS

MEAN, STD = 0.1307, 0.3081


def load(split):
    """Normalised images (N, 1, 32, 32) and labels."""
    images, labels = data.load(SPECS["mnist"], split)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (images - MEAN) / STD, torch.from_numpy(labels).long()


@torch.no_grad()
def accuracy(network, split="test"):
    """Top-1, percent."""
    network.eval()
    images, labels = load(split)
    predicted = torch.cat([network(x).argmax(1) for x in images.split(500)])
    return 100.0 * (predicted == labels).float().mean().item()
