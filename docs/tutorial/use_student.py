"""Accuracy of an exported student on CIFAR-10, in PyTorch: `python use_student.py FOLDER`."""

import sys

import torch

from dfkd_jax.data import splits
from dfkd_jax.data.data_table import SPECS

sys.path.insert(0, sys.argv[1])
from student import MEAN, STD, load

network = load()
images, labels = splits.load(SPECS["cifar10"], "test")
mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
right = 0
with torch.no_grad():
    for start in range(0, len(labels), 500):
        batch = torch.from_numpy(images[start : start + 500]).permute(0, 3, 1, 2) / 255
        predicted = network((batch - mean) / std).argmax(1).numpy()
        right += (predicted == labels[start : start + 500]).sum()
print(f"test accuracy in PyTorch: {100 * right / len(labels):.2f} %")
