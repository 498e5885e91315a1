"""MobileNetV2 under torchvision's names, in PyTorch."""

import torch
from torch import nn


def conv_bn_relu6(channels, width, size, stride=1, groups=1):
    layer = nn.Conv2d(channels, width, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, channels, width, stride, expansion):
        super().__init__()
        inner = expansion * channels
        widen = [conv_bn_relu6(channels, inner, 1)] if expansion != 1 else []
        filters = conv_bn_relu6(inner, inner, 3, stride, groups=inner)
        narrow = nn.Conv2d(inner, width, 1, bias=False)
        self.conv = nn.Sequential(*widen, filters, narrow, nn.BatchNorm2d(width))
        self.same = stride == 1 and channels == width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.same else self.conv(x)


class MobileNetV2(nn.Module):
    """With a stem of stride 1 for small images, of stride 2 as first published."""

    STAGES = (  # expansion, channels, number of blocks, stride of the first
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(self, num_classes, stem_stride=1, channels=3):
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu6(channels, 32, 3, stem_stride)]
        channels = 32
        for expansion, width, count, stride in self.STAGES:
            for index in range(count):
                s = 1 if index else stride
                layers.append(InvertedResidual(channels, width, s, expansion))
                channels = width
        self.features = nn.Sequential(*layers, conv_bn_relu6(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.embed(x))
