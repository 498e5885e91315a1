"""The user's side of the tutorial: two networks in PyTorch, as DFKD codes write them."""

import torch.nn.functional as F
from torch import nn


class LeNet5(nn.Module):
    """LeNet-5 for 32×32 images, or its half."""

    def __init__(self, num_classes=10, half=False):
        super().__init__()
        a, b, c, d = (3, 8, 60, 42) if half else (6, 16, 120, 84)
        self.conv1 = nn.Conv2d(1, a, kernel_size=5)
        self.conv2 = nn.Conv2d(a, b, kernel_size=5)
        self.conv3 = nn.Conv2d(b, c, kernel_size=5)
        self.fc1 = nn.Linear(c, d)
        self.fc2 = nn.Linear(d, num_classes)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        x = self.conv3(x).relu().flatten(1)
        return self.fc2(self.fc1(x).relu())


class Block(nn.Module):
    """A pre-activation residual block."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = None
        if channels != width:
            self.convShortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x):
        out = self.bn1(x).relu()
        shortcut = self.convShortcut(out) if self.convShortcut is not None else x
        return self.conv2(self.bn2(self.conv1(out)).relu()) + shortcut


class Stage(nn.Module):
    """Blocks of one width."""

    def __init__(self, count, channels, width, stride):
        super().__init__()
        blocks = [Block(channels, width, stride)]
        blocks += [Block(width, width, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-factor of CMI and Fast-Datafree, for grey images."""

    def __init__(self, depth=16, factor=1, num_classes=10, channels=1):
        super().__init__()
        count, width = (depth - 4) // 6, 16 * factor
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = Stage(count, 16, width, 1)
        self.block2 = Stage(count, width, 2 * width, 2)
        self.block3 = Stage(count, 2 * width, 4 * width, 2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.bn1(x).relu().mean((2, 3)))


NETWORKS = {
    "lenet5": LeNet5,
    "lenet5_half": lambda: LeNet5(half=True),
    "wrn16_1": WideResNet,
    "wrn16_2": lambda: WideResNet(factor=2),
}
