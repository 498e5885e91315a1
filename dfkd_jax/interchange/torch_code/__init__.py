"""The PyTorch code of each classifier, which goes home with a student.

Each file stands alone, needs only PyTorch, and is never imported by this package: it is written
beside the weights. The arrays have the names of the first of `torch_layouts.layouts`; `embed`
gives the features, `forward` the logits.
"""

from pathlib import Path

from dfkd_jax.networks.vgg import BLOCKS

_TORCHVISION = "names=('downsample', 'fc')"
_X4 = f"width=64, stem=32, {_TORCHVISION}"
_IMAGENET = f"large_images=True, {_TORCHVISION}"

CODE = {
    "cnn": ("cnn", "CNN", ""),
    "cnn_half": ("cnn", "CNN", "widths=(16, 32, 32, 32)"),
    "lenet5": ("lenet", "LeNet5", ""),
    "lenet5_half": ("lenet", "LeNet5", "widths=(3, 8, 60, 42)"),
    "mobilenetv2": ("mobilenet", "MobileNetV2", ""),
    "mobilenetv2_stride2": ("mobilenet", "MobileNetV2", "stem_stride=2"),
    "resnet18": ("resnet", "ResNet", "blocks=(2, 2, 2, 2)"),
    "resnet34": ("resnet", "ResNet", "blocks=(3, 4, 6, 3)"),
    "resnet50": ("resnet", "ResNet", "blocks=(3, 4, 6, 3), bottleneck=True"),
    "resnet8x4": ("resnet", "ResNet", f"blocks=(1, 1, 1), {_X4}"),
    "resnet32x4": ("resnet", "ResNet", f"blocks=(5, 5, 5), {_X4}"),
    "imagenet_resnet18": ("resnet", "ResNet", f"blocks=(2, 2, 2, 2), {_IMAGENET}"),
    "imagenet_resnet34": ("resnet", "ResNet", f"blocks=(3, 4, 6, 3), {_IMAGENET}"),
    "imagenet_resnet50": (
        "resnet",
        "ResNet",
        f"blocks=(3, 4, 6, 3), bottleneck=True, {_IMAGENET}",
    ),
    **{f"resnet{d}": ("thin_resnet", "ThinResNet", f"depth={d}") for d in (20, 32, 44, 56, 110)},
    "shufflenetv2": ("shufflenet", "ShuffleNetV2", ""),
    "squeezenet": ("squeezenet", "SqueezeNet", ""),
    **{f"vgg{depth}": ("vgg", "VGG", f"blocks={blocks}") for depth, blocks in BLOCKS.items()},
    **{
        f"imagenet_vgg{depth}": ("imagenet_vgg", "VGG", f"blocks={blocks}")
        for depth, blocks in BLOCKS.items()
        if depth > 8
    },
    **{
        f"wrn{depth}_{factor}": (
            "wide_resnet",
            "WideResNet",
            f"depth={depth}, widen_factor={factor}",
        )
        for depth in (16, 40)
        for factor in (1, 2)
    },
}
"""By model: the file here, its class, and the arguments after the number of classes."""


def source_of(model: str) -> str:
    """The text of the file that defines a classifier's network."""
    return (Path(__file__).parent / f"{CODE[model][0]}.py").read_text()


def call_of(model: str, num_classes: int, channels: int) -> str:
    """The expression that makes it in that file."""
    _, name, arguments = CODE[model]
    return ", ".join(filter(None, (f"{name}({num_classes}", arguments, f"channels={channels})")))
