"""PyTorch networks that are known to no layout, and their archives."""

import random
import warnings

import torch
from torch import nn
from torch.nn import functional as F


class ThinBlock(nn.Module):
    """The block of He et al.'s CIFAR networks: a shortcut without parameters."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.new = stride, outputs - inputs

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.stride > 1:
            half = self.new // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        y += x
        return F.relu(y, inplace=True)


class Thin(nn.Module):
    """A stem, blocks, average pooling, one dense layer."""

    def __init__(self, classes=10, channels=3, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = nn.Sequential(ThinBlock(width, width, 1), ThinBlock(width, 2 * width, 2))
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1))


class Mixed(nn.Module):
    """Groups, a shuffle of channels, a gate, several poolings, a buffer, two heads."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.deep = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 2, 1)
        self.excite = nn.Conv2d(2, 8, 1)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(16, classes)
        self.other = nn.Linear(16, 7)
        self.register_buffer("order", torch.tensor([3, 1, 2, 0, 7, 6, 5, 4]), persistent=False)

    def forward(self, x):
        x = F.gelu(self.norm(self.conv1(x)))
        x = x.view(x.size(0), 2, 4, x.size(2), x.size(3)).transpose(1, 2).reshape(x.shape)
        x = self.bn(self.deep(x))[:, self.order]
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.hardswish(x * gate)
        pooled = torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1)
        features = self.dropout(pooled.flatten(1))
        return self.head(features), self.other(features)


class Words(nn.Module):
    """Attention over patches, with a class token."""

    def __init__(self, classes=10, size=8):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, (size // 4) ** 2 + 1, 12))
        self.block = nn.TransformerEncoderLayer(
            12, 3, 24, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.block(x))[:, 0])


class Written(nn.Module):
    """Writes into slices of a mask and of its images' channels, and ends in a softmax."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.linear = nn.Linear(6, classes)

    def forward(self, x):
        mask = x.new_zeros(8, 8)
        mask[2:6, 1:7] = 1.0
        mask[3, :] = 0.5
        x = self.conv(x) * mask
        y = x.clone()
        y[:, 1:3].mul_(2.0)
        return torch.softmax(self.linear(y.mean((2, 3))), -1)


def randomize(network, seed=0):
    """Running statistics that are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return network.eval()


class Drawn(nn.Module):
    """Random layers on random earlier values: every seed is another network."""

    ACTIVATIONS = (F.relu, F.gelu, F.silu, F.hardswish, torch.tanh, torch.sigmoid, F.mish, F.elu)

    def __init__(self, seed, classes=10, steps=12, channels=3, size=8):
        super().__init__()
        self.draw, self.layers, self.plan = random.Random(seed), nn.ModuleList(), []
        shape = (channels, size, size)
        kinds = (self._conv, self._norm, self._pool, self._move, self._resize, self._gate)
        for kind in (self._conv, *self.draw.choices(kinds, k=steps), self._words):
            step = kind(*shape)
            earlier = self.draw.randrange(len(self.plan) + 1)
            self.plan.append((step, earlier, self.draw.choice(("add", "cat"))))
            with torch.no_grad():
                shape = tuple(self._values(torch.zeros(2, channels, size, size))[-1].shape[1:])
        self.head = nn.Linear(2 * shape[0], classes)
        del self.draw

    def _layer(self, layer):
        self.layers.append(layer)
        return layer

    def _conv(self, c, h, w):
        out = self.draw.choice((4, 6, 8))
        groups = self.draw.choice([g for g in (1, 2, c) if c % g == out % g == 0])
        size, stride = self.draw.choice((1, 3)), self.draw.choice((1, 1, 2 if h > 4 else 1))
        dilation = self.draw.choice((1, 2)) if size == 3 and min(h, w) > 4 else 1
        bias, padding = self.draw.random() < 0.5, dilation * (size // 2)
        return self._layer(nn.Conv2d(c, out, size, stride, padding, dilation, groups, bias))

    def _norm(self, c, h, w):
        kind = self.draw.choice(("batch", "group", "layer"))
        act = self.draw.choice(self.ACTIVATIONS)
        if kind == "layer":
            norm = self._layer(nn.LayerNorm(c))
            return lambda x: act(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        norm = self._layer(nn.BatchNorm2d(c) if kind == "batch" else nn.GroupNorm(2 - c % 2, c))
        return lambda x: act(norm(x))

    def _pool(self, c, h, w):
        if min(h, w) < 4:
            return lambda x: x * 0.5 + 1
        size, stride = self.draw.choice(((2, 2), (3, 1), (3, 2)))
        pool, padding = self.draw.choice((F.max_pool2d, F.avg_pool2d)), size // 2
        return lambda x: pool(x, size, stride, padding)

    def _move(self, c, h, w):
        kind = self.draw.choice(("flip", "turn", "shuffle", "roll", "pad", "cut", "swap"))
        if kind == "shuffle" and c % 2 == 0:
            return lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        if kind == "swap" and c > 1:
            return lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)
        if kind == "cut" and min(h, w) > 4:
            return lambda x: x[:, :, 1:, :-1]
        if kind == "pad" and max(h, w) < 9:
            return lambda x: F.pad(x, (1, 0, 0, 1))
        if kind == "roll":
            return lambda x: x.roll((1, -1), (2, 3))
        return (lambda x: x.flip(2)) if kind == "flip" else (lambda x: x.transpose(2, 3))

    def _resize(self, c, h, w):
        mode = self.draw.choice(("nearest", "bilinear"))
        if max(h, w) > 8:
            return lambda x: F.adaptive_avg_pool2d(x, (5, 4))
        return lambda x: F.interpolate(x, scale_factor=2, mode=mode)

    def _gate(self, c, h, w):
        layer = self._layer(nn.Conv2d(c, c, 1))
        return lambda x: x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))

    def _words(self, c, h, w):
        layer = self._layer(nn.Linear(c, 3 * c))

        def attend(x):
            q, k, v = layer(x.flatten(2).transpose(1, 2)).chunk(3, -1)
            words = F.scaled_dot_product_attention(q, k, v)
            return words.transpose(1, 2).reshape(x.shape)

        return attend

    def _values(self, x):
        values = [x]
        for step, earlier, how in self.plan:
            new, old = step(values[-1]), values[earlier]
            if how == "add" and old.shape == new.shape:
                new = new + old
            elif how == "cat" and old.shape[2:] == new.shape[2:] and new.shape[1] < 10:
                new = torch.cat([old, new], 1)
            values.append(new)
        return values

    def forward(self, x):
        pooled = F.adaptive_avg_pool2d(self._values(x)[-1], (2, 1))
        return self.head(pooled.flatten(1))


def save(network, path, shape=(3, 8, 8), any_number=True, count=2):
    """As the documentation tells a user to."""
    images = torch.zeros(count, *shape)
    dynamic = ({0: torch.export.Dim.DYNAMIC},) if any_number else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=dynamic), path)
    return path


def as_of_timm():
    """A network that says what its images are, as those of timm do."""
    network = Thin()
    network.pretrained_cfg = {
        "input_size": (3, 16, 16),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    return network
