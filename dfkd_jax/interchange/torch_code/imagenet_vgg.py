"""VGG with batch norm for large images under torchvision's names, in PyTorch."""

import torch
from torch import nn


class VGG(nn.Module):
    def __init__(self, num_classes, blocks, channels=3, hidden=4096):
        super().__init__()
        layers = []
        for widths in blocks:
            for width in widths:
                layer = nn.Conv2d(channels, width, 3, padding=1)
                layers += [layer, nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(49 * channels, hidden), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()),
            nn.Linear(hidden, num_classes),
        )

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier[:-1](self.avgpool(self.features(x)).flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier[-1](self.embed(x))
