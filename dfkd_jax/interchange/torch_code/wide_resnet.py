"""WideResNets of 6n + 4 layers, in PyTorch."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(channels, width, size, stride=1):
    return nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.convShortcut = None if channels == width else conv(channels, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class Stage(nn.Module):
    def __init__(self, count, channels, width, stride):
        super().__init__()
        first = Block(channels, width, stride)
        self.layer = nn.Sequential(first, *(Block(width, width, 1) for _ in range(count - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, num_classes, depth=16, widen_factor=1, channels=3):
        super().__init__()
        count, width = (depth - 4) // 6, 16 * widen_factor
        self.conv1 = conv(channels, 16, 3)
        self.block1 = Stage(count, 16, width, 1)
        self.block2 = Stage(count, width, 2 * width, 2)
        self.block3 = Stage(count, 2 * width, 4 * width, 2)
        self.bn1, self.fc = nn.BatchNorm2d(4 * width), nn.Linear(4 * width, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(x)).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(x))
