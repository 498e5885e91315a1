"""The published PyTorch networks: `twin` is the code that goes home with a student, `started` has
the start of its source too, which the code leaves out.

`randomize` gives a network weights and running statistics that leave nothing at its initial value.
`CNN`, `Generator` and `Encoder` have our names and sizes, and `load` gives them our variables in
double precision.
"""

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import nn
from torch.nn import functional as F

from dfkd_jax.interchange import torch_code
from dfkd_jax.interchange.torch_code import cnn
from dfkd_jax.interchange.torch_code.resnet import ResNet


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


def start_convolutions(network):
    """Of torchvision's ResNet, which has no bias in them, and leaves the dense layer alone."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def start_thinly(network):
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


def start_squeezed(network):
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            bound = (6 / module.weight[0].numel()) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    nn.init.normal_(network.classifier[1].weight, 0, 0.01)


def start_with_small_dense(network):
    start_by_fan_out(network, linear_std=0.01)


STARTS = {
    "imagenet_resnet": start_convolutions,
    "imagenet_vgg": start_with_small_dense,
    "mobilenetv2": start_with_small_dense,
    "resnet20": start_thinly,
    "resnet8x4": start_convolutions,
    "squeezenet": start_squeezed,
    "vgg": start_with_small_dense,
    "wrn": start_by_fan_out,
}


def twin(model, num_classes, channels=3):
    """The PyTorch network of our classifier of that name, as its code is written out."""
    namespace = {}
    exec(torch_code.source_of(model), namespace)
    return eval(torch_code.call_of(model, num_classes, channels), namespace)


def started(model, num_classes, channels=3):
    """The same, started as the source does; without an entry PyTorch's default is the source's."""
    network = twin(model, num_classes, channels)
    for prefix, start in STARTS.items():
        if model.startswith(prefix):
            start(network)
    return network


class Lra64(nn.Module):
    """LRA's network for 64×64 images: torchvision's inside, its stem with a bias."""

    def __init__(self, num_classes):
        super().__init__()
        names = ("downsample", "fc")
        self.resnet = ResNet(num_classes, (3, 4, 6, 3), stem_bias=True, names=names)

    def embed(self, x):
        return self.resnet.embed(x)

    def forward(self, x):
        return self.resnet(x)


class CNN(cnn.CNN):
    """Of any widths; returns logits and features, as ours."""

    def forward(self, x):
        features = self.embed(x)
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
