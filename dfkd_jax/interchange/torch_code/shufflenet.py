"""ShuffleNetV2 for small images under RepDistiller's names, in PyTorch."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(channels, width, size=1, stride=1, groups=1):
    return nn.Conv2d(channels, width, size, stride, size // 2, groups=groups, bias=False)


def shuffle(left, right):
    """The channels of both, one of each by turns."""
    return torch.stack([left, right], 2).flatten(1, 2)


class ShuffleBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv(half, half, 3, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(half, half), nn.BatchNorm2d(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, x = x.chunk(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn3(self.conv3(self.bn2(self.conv2(x)))))
        return shuffle(kept, x)


class DownBlock(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(channels, channels, 3, 2, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(channels, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv(half, half, 3, 2, half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv(half, half), nn.BatchNorm2d(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(x)))))
        return shuffle(left, x)


class ShuffleNetV2(nn.Module):
    def __init__(self, num_classes, widths=(116, 232, 464), blocks=(3, 7, 3), channels=3):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, 24), nn.BatchNorm2d(24)
        channels = 24
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            layers = [DownBlock(channels, width), *(ShuffleBlock(width) for _ in range(count))]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
            channels = width
        self.conv2, self.bn2 = conv(channels, 1024), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = getattr(self, f"layer{stage}")(x)
        return F.relu(self.bn2(self.conv2(x))).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embed(x))
