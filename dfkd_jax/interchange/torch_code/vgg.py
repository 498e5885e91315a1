"""VGG with batch norm for small images under RepDistiller's names, in PyTorch."""

import torch
from torch import nn
from torch.nn import functional as F


class VGG(nn.Module):
    def __init__(self, num_classes, blocks, channels=3):
        super().__init__()
        for block, widths in enumerate(blocks):
            layers = []
            for width in widths:
                layer = nn.Conv2d(channels, width, 3, padding=1)
                layers += [layer, nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            self.add_module(f"block{block}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(channels, num_classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        pooled = (0, 1, 2, 3) if x.shape[2] == 64 else (0, 1, 2)
        for block in range(5):
            x = F.relu(getattr(self, f"block{block}")(x))
            x = F.max_pool2d(x, 2) if block in pooled else x
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.embed(x))
