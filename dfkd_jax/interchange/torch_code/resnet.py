"""ResNets with a convolution in the shortcut where the shape changes, in PyTorch."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(channels, width, size, stride=1, bias=False):
    return nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=bias)


class Block(nn.Module):
    """Two 3×3 convolutions; a bottleneck has 1×1, 3×3 and 1×1."""

    def __init__(self, channels, width, stride, bottleneck, shortcut):
        super().__init__()
        out = 4 * width if bottleneck else width
        if bottleneck:
            plan = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            plan = [(channels, width, 3, stride), (width, width, 3, 1)]
        self.count = len(plan)
        for index, (c_in, c_out, size, s) in enumerate(plan, start=1):
            self.add_module(f"conv{index}", conv(c_in, c_out, size, s))
            self.add_module(f"bn{index}", nn.BatchNorm2d(c_out))
        self.name = None
        if stride != 1 or channels != out:
            self.name = shortcut
            layers = nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))
            self.add_module(shortcut, layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.name is None else getattr(self, self.name)(x)
        for index in range(1, self.count + 1):
            x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x))
            x = F.relu(x + shortcut if index == self.count else x)
        return x


class ResNet(nn.Module):
    """Codes for CIFAR call the layers `shortcut` and `linear`, torchvision `downsample` and `fc`.

    With `large_images` the stem is torchvision's, 7×7 with max pooling, else 3×3.
    """

    def __init__(
        self,
        num_classes,
        blocks=(2, 2, 2, 2),
        *,
        width=64,
        stem=64,
        bottleneck=False,
        large_images=False,
        stem_bias=False,
        names=("shortcut", "linear"),
        channels=3,
    ):
        super().__init__()
        size, stride = (7, 2) if large_images else (3, 1)
        self.conv1 = conv(channels, stem, size, stride, bias=stem_bias)
        self.bn1 = nn.BatchNorm2d(stem)
        self.large_images = large_images
        channels, self.stages, self.last = stem, len(blocks), names[1]
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                inner, stride = width * 2**stage, 2 if stage and not index else 1
                layers.append(Block(channels, inner, stride, bottleneck, names[0]))
                channels = 4 * inner if bottleneck else inner
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.add_module(self.last, nn.Linear(channels, num_classes))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.large_images:
            x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.last)(self.embed(x))
