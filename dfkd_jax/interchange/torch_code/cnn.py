"""The CNN of dfkd_jax for 8×8 digits, in PyTorch."""

import torch
from torch import nn
from torch.nn import functional as F


class CNN(nn.Module):
    def __init__(self, num_classes, widths=(32, 64, 64, 64), channels=1):
        super().__init__()
        *convolutions, hidden = widths
        for index, width in enumerate(convolutions, start=1):
            stride = 1 if index == 1 else 2
            layer = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            self.add_module(f"conv{index}", layer)
            self.add_module(f"bn{index}", nn.BatchNorm2d(width))
            channels = width
        self.fc1, self.fc = nn.Linear(channels, hidden), nn.Linear(hidden, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        for index in (1, 2, 3):
            x = getattr(self, f"conv{index}")(x)
            x = F.relu(getattr(self, f"bn{index}")(x))
        return F.relu(self.fc1(x.mean((2, 3))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(x))
