"""What a run needs to know of each data set: one table, with the normalisation of each."""

from typing import NamedTuple


class DatasetSpec(NamedTuple):
    """What the networks need to know of a data set."""

    name: str
    image_shape: tuple[int, int, int]  # (H, W, C) as `data.load` gives it, padding included
    num_classes: int
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    tfds_name: str | None = None  # None: not read through tensorflow-datasets
    pad: int = 0  # black pixels that `data.load` adds on each side
    flip: bool = False  # whether a mirrored image keeps its label


# Mean and standard deviation per channel.
_DIGITS = (0.3053,), (0.3760,)
_MNIST = (0.1307,), (0.3081,)
_FASHION = (0.2860,), (0.3530,)
_SVHN = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # for both, as the method's authors do
_TINY = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)

_TABLE = (
    DatasetSpec("digits", (8, 8, 1), 10, *_DIGITS),
    DatasetSpec("mnist", (32, 32, 1), 10, *_MNIST, "mnist", pad=2),
    DatasetSpec("fashion_mnist", (32, 32, 1), 10, *_FASHION, "fashion_mnist", pad=2, flip=True),
    DatasetSpec("svhn", (32, 32, 3), 10, *_SVHN, "svhn_cropped"),
    DatasetSpec("cifar10", (32, 32, 3), 10, *_CIFAR, "cifar10", flip=True),
    DatasetSpec("cifar100", (32, 32, 3), 100, *_CIFAR, "cifar100", flip=True),
    DatasetSpec("tiny_imagenet", (64, 64, 3), 200, *_TINY, flip=True),
)
SPECS: dict[str, DatasetSpec] = {spec.name: spec for spec in _TABLE}
