"""The published PyTorch networks, written anew from their layout: same names, same arithmetic.

Each returns logits and the features that our network of the same kind returns, and starts as its
source does; of torchvision's ResNet only the layout is taken. `randomize` gives them weights and
running statistics that leave nothing at its initial value. `CNN`, `Generator` and `Encoder` have
our names and sizes, and `load` gives them our variables in double precision.
"""

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import nn
from torch.nn import functional as F


def conv(channels_in, channels_out, size, stride=1, bias=False, groups=1):
    options = {"stride": stride, "padding": size // 2, "bias": bias, "groups": groups}
    return nn.Conv2d(channels_in, channels_out, size, **options)


def start_by_fan_out(network, linear_std=None):
    """Convolutions from N(0, √(2/fan_out)), biases from 0, and dense kernels from N(0, linear_std).

    Without `linear_std` dense kernels keep PyTorch's default.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[:, 0].numel()
            nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
        if isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0, linear_std)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class ResidualBlock(nn.Module):
    """Basic (two 3×3) or bottleneck (1×1, 3×3, 1×1), the shortcut under the name given."""

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

    def forward(self, x):
        shortcut = x if self.name is None else getattr(self, self.name)(x)
        for index in range(1, self.count + 1):
            x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x))
            x = F.relu(x + shortcut if index == self.count else x)
        return x


class ResNet(nn.Module):
    """DAFL's with `shortcut` and `linear`; torchvision's with `downsample` and `fc`."""

    def __init__(
        self, blocks, num_classes, bottleneck=False, torchvision=False, stem_bias=False, channels=3
    ):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, 64, 3, bias=stem_bias), nn.BatchNorm2d(64)
        channels, self.last = 64, "fc" if torchvision else "linear"
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                width, stride = 64 * 2**stage, 2 if stage and not index else 1
                shortcut = "downsample" if torchvision else "shortcut"
                layers.append(ResidualBlock(channels, width, stride, bottleneck, shortcut))
                channels = 4 * width if bottleneck else width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.add_module(self.last, nn.Linear(channels, num_classes))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features = x.mean((2, 3))
        return getattr(self, self.last)(features), features


class ThinBlock(nn.Module):
    """Two 3×3 convolutions; the shortcut has every second pixel and zeros around channels."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.stride, self.zeros = stride, (width - channels) // 2

    def forward(self, x):
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.zeros, self.zeros))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ThinResNet(nn.Module):
    """He et al.'s networks for CIFAR, 6n + 2 layers."""

    def __init__(self, depth, num_classes):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 3), nn.BatchNorm2d(16)
        channels = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            blocks = []
            for index in range((depth - 2) // 6):
                blocks.append(ThinBlock(channels, width, 2 if index == 0 and stage > 1 else 1))
                channels = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return self.linear(x), x


class Lra64(nn.Module):
    """LRA's network for 64×64 images: torchvision's inside, its stem with a bias."""

    def __init__(self, num_classes):
        super().__init__()
        self.resnet = ResNet((3, 4, 6, 3), num_classes, torchvision=True, stem_bias=True)

    def forward(self, x):
        return self.resnet(x)


class WideBlock(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.convShortcut = None if channels == width else conv(channels, width, 1, stride)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideStage(nn.Module):
    def __init__(self, count, channels, width, stride):
        super().__init__()
        first = WideBlock(channels, width, stride)
        self.layer = nn.Sequential(first, *(WideBlock(width, width, 1) for _ in range(count - 1)))

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    def __init__(self, depth, factor, num_classes):
        super().__init__()
        count = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = WideStage(count, 16, 16 * factor, 1)
        self.block2 = WideStage(count, 16 * factor, 32 * factor, 2)
        self.block3 = WideStage(count, 32 * factor, 64 * factor, 2)
        self.bn1, self.fc = nn.BatchNorm2d(64 * factor), nn.Linear(64 * factor, num_classes)
        start_by_fan_out(self)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        features = F.relu(self.bn1(x)).mean((2, 3))
        return self.fc(features), features


class LeNet5(nn.Module):
    def __init__(self, num_classes, widths=(6, 16, 120, 84)):
        super().__init__()
        first, second, third, hidden = widths
        self.conv1, self.conv2 = nn.Conv2d(1, first, 5), nn.Conv2d(first, second, 5)
        self.conv3 = nn.Conv2d(second, third, 5)
        self.fc1, self.fc2 = nn.Linear(third, hidden), nn.Linear(hidden, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        features = F.relu(self.fc1(F.relu(self.conv3(x)).flatten(1)))
        return self.fc2(features), features


def conv_bn_relu6(channels_in, channels_out, size, stride=1, groups=1):
    layer = conv(channels_in, channels_out, size, stride, groups=groups)
    return nn.Sequential(layer, nn.BatchNorm2d(channels_out), nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, channels, width, stride, expansion):
        super().__init__()
        inner = expansion * channels
        widen = [conv_bn_relu6(channels, inner, 1)] if expansion != 1 else []
        filters = conv_bn_relu6(inner, inner, 3, stride, groups=inner)
        self.conv = nn.Sequential(*widen, filters, conv(inner, width, 1), nn.BatchNorm2d(width))
        self.same = stride == 1 and channels == width

    def forward(self, x):
        return x + self.conv(x) if self.same else self.conv(x)


class MobileNetV2(nn.Module):
    STAGES = (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(self, num_classes, stem_stride=1):
        super().__init__()
        layers, channels = [conv_bn_relu6(3, 32, 3, stem_stride)], 32
        for expansion, width, count, stride in self.STAGES:
            for index in range(count):
                s = 1 if index else stride
                layers.append(InvertedResidual(channels, width, s, expansion))
                channels = width
        self.features = nn.Sequential(*layers, conv_bn_relu6(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        start_by_fan_out(self, linear_std=0.01)

    def forward(self, x):
        features = self.features(x).mean((2, 3))
        return self.classifier(features), features


class Fire(nn.Module):
    def __init__(self, channels, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()

        def pool():
            return nn.MaxPool2d(3, 2, ceil_mode=True)

        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool()),
            *(Fire(64, 16, 64), Fire(128, 16, 64), pool()),
            *(Fire(128, 32, 128), Fire(256, 32, 128), pool()),
            *(Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)),
        )
        last = nn.Conv2d(512, num_classes, 1)
        self.classifier = nn.Sequential(nn.Dropout(), last, nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                bound = (6 / module.weight[0].numel()) ** 0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        nn.init.normal_(last.weight, 0, 0.01)

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x).flatten(1), x.mean((2, 3))


class VGG11(nn.Module):
    BLOCKS = ((64,), (128,), (256, 256), (512, 512), (512, 512))

    def __init__(self, num_classes):
        super().__init__()
        channels = 3
        for block, widths in enumerate(self.BLOCKS):
            layers = []
            for width in widths:
                layers += [conv(channels, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            self.add_module(f"block{block}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(512, num_classes)
        start_by_fan_out(self, linear_std=0.01)

    def forward(self, x):
        height = x.shape[2]
        for block in range(5):
            x = F.relu(getattr(self, f"block{block}")(x))
            if block < 3 or (block == 3 and height == 64):
                x = F.max_pool2d(x, 2)
        features = x.mean((2, 3))
        return self.classifier(features), features


class CNN(nn.Module):
    """This project's own network."""

    def __init__(self, num_classes, widths, channels=1):
        super().__init__()
        *convolutions, hidden = widths
        for index, width in enumerate(convolutions, start=1):
            self.add_module(f"conv{index}", conv(channels, width, 3, 1 if index == 1 else 2))
            self.add_module(f"bn{index}", nn.BatchNorm2d(width))
            channels = width
        self.fc1, self.fc = nn.Linear(channels, hidden), nn.Linear(hidden, num_classes)

    def forward(self, x):
        for index in (1, 2, 3):
            x = getattr(self, f"conv{index}")(x)
            x = F.relu(getattr(self, f"bn{index}")(x))
        features = F.relu(self.fc1(x.mean((2, 3))))
        return self.fc(features), features


def start_uniformly(network, bound=0.08):
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """LRA's and PRE-DFKD's for images of less than 64×64, any widths.

    The dense layer's outputs are in our order, (height, width, channels).
    """

    def __init__(self, image_shape, latent_dim, channels, spectral_norm=True):
        super().__init__()
        self.size, (wide, narrow) = image_shape[0] // 4, channels
        normalise = nn.utils.spectral_norm if spectral_norm else lambda layer: layer
        self.fc, self.bn1 = nn.Linear(latent_dim, self.size**2 * wide), nn.BatchNorm2d(wide)
        self.conv1 = normalise(conv(wide, wide, 3, bias=True))
        self.conv2 = normalise(conv(wide, narrow, 3, bias=True))
        self.conv3 = normalise(conv(narrow, image_shape[2], 3, bias=True))
        # The second argument of both is eps.
        self.bn2, self.bn3 = nn.BatchNorm2d(wide, 0.8), nn.BatchNorm2d(narrow, 0.8)
        self.bn4 = nn.BatchNorm2d(image_shape[2], affine=False)
        start_uniformly(self)

    def forward(self, z):
        x = self.fc(z).reshape(len(z), self.size, self.size, -1).permute(0, 3, 1, 2)
        x = F.interpolate(self.bn1(x), scale_factor=2)
        x = F.leaky_relu(self.bn2(self.conv1(x)), 0.2)
        x = F.interpolate(x, scale_factor=2)
        x = F.leaky_relu(self.bn3(self.conv2(x)), 0.2)
        return self.bn4(torch.tanh(self.conv3(x)))


class Encoder(nn.Module):
    """LRA's and PRE-DFKD's, any widths; what enters the heads is in our order."""

    def __init__(self, image_shape, latent_dim, channels):
        super().__init__()
        height, width, colours = image_shape
        narrow, wide = channels
        self.conv1, self.bn1 = conv(colours, narrow, 3, bias=True), nn.BatchNorm2d(narrow, 0.8)
        self.conv2, self.bn2 = conv(narrow, wide, 3, bias=True), nn.BatchNorm2d(wide, 0.8)
        self.conv3, self.bn3 = conv(wide, wide, 3, 2, bias=True), nn.BatchNorm2d(wide)
        features = height // 8 * (width // 8) * wide
        self.mean = nn.Linear(features, latent_dim)
        self.log_variance = nn.Linear(features, latent_dim)
        start_uniformly(self)

    def forward(self, x):
        x = F.leaky_relu(self.bn1(self.conv1(F.normalize(x, p=2, dim=2))), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        x = self.bn3(self.conv3(F.interpolate(x, scale_factor=0.5)))
        x = F.interpolate(x, scale_factor=0.5).permute(0, 2, 3, 1).flatten(1)
        return self.mean(x), self.log_variance(x)


_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def tensors(network):
    """Parameters and buffers by name; of a weight with spectral norm the one that is trained."""
    named = dict(network.named_parameters()) | dict(network.named_buffers())
    return {name.replace("weight_orig", "weight"): tensor for name, tensor in named.items()}


def twin_name(path):
    """Name of the tensor that the variable at `path` of our networks is."""
    _, *module, leaf = path
    if leaf.endswith("/u"):  # Flax's spectral norm: (conv1_sn, "conv1/kernel/u")
        return leaf.replace("/kernel/u", ".weight_u")
    return ".".join([*module, _LEAVES.get(leaf, leaf)])


def in_our_order(tensor):
    """As an array of ours: (out, in, h, w) as (h, w, in, out), (out, in) as (in, out)."""
    array = tensor.detach().numpy()
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, range(array.ndim)))


def load(network, variables):
    """Give a twin with our names our variables, in double precision; in training mode."""
    network.double().train()
    named = tensors(network)
    given = {twin_name(p): np.asarray(a) for p, a in flatten_dict(dict(variables)).items()}
    given = {name: array for name, array in given.items() if not name.endswith("sigma")}
    ours = {n for n in named if not n.endswith(("num_batches_tracked", "weight_v"))}
    assert given.keys() == ours, given.keys() ^ ours
    for name, array in given.items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim))
        array = array.reshape(-1) if name.endswith("weight_u") else array.transpose(axes)
        named[name].data.copy_(torch.from_numpy(array.copy()))
    return network


def randomize(network, gain=1.0, seed=0):
    """Random weights, biases and running statistics; in evaluation mode.

    A ReLU halves the mean square, so without batch norm a gain of √2 keeps the outputs' size.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, mean, std):
        tensor.data.normal_(mean, std, generator=generator)

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                normal(tensor, 0, 0.1)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            normal(module.weight, 0, gain * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                normal(module.bias, 0, 0.1)
    return network.eval()


def numpy_state_dict(network):
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
