"""The classifiers have as many parameters as published, and as their layers add up to."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest

from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.networks.mobilenet import MobileNetV2
from dfkd_jax.networks.squeezenet import SqueezeNet
from dfkd_jax.networks.vgg import BLOCKS


def parameter_count(name, num_classes, image_shape):
    module = create_classifier(name, num_classes)
    images = jnp.zeros((2, *image_shape))
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def dense(size_in, size_out):
    return size_in * size_out + size_out


def conv(size, channels_in, channels_out):
    return size * size * channels_in * channels_out


def resnet_count(blocks, num_classes):
    total = conv(3, 3, 64) + 2 * 64
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for _ in range(count):
            total += conv(3, channels, width) + conv(3, width, width) + 4 * width
            if channels != width:
                total += conv(1, channels, width) + 2 * width
            channels = width
    return total + dense(512, num_classes)


def bottleneck_count(blocks, num_classes):
    total = conv(3, 3, 64) + 2 * 64
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for index in range(count):
            total += conv(1, channels, width) + conv(3, width, width) + 4 * width
            total += conv(1, width, 4 * width) + 2 * 4 * width
            if index == 0:
                total += conv(1, channels, 4 * width) + 2 * 4 * width
            channels = 4 * width
    return total + dense(2048, num_classes)


def wide_resnet_count(depth, factor, num_classes):
    total = conv(3, 3, 16)
    channels = 16
    for stage in range(3):
        width = 16 * factor * 2**stage
        for _ in range((depth - 4) // 6):
            total += conv(3, channels, width) + conv(3, width, width) + 2 * channels + 2 * width
            if channels != width:
                total += conv(1, channels, width)
            channels = width
    return total + 2 * channels + dense(channels, num_classes)


def vgg_count(channels, num_classes):
    pairs = pairwise(channels)
    return sum(conv(3, a, b) + 3 * b for a, b in pairs) + dense(channels[-1], num_classes)


def channels_of(depth):
    return (3, *(width for widths in BLOCKS[depth] for width in widths))


def imagenet_vgg_count(depth):
    body = vgg_count(channels_of(depth), 0)
    return body + dense(49 * 512, 4096) + dense(4096, 4096) + dense(4096, 1000)


def imagenet(count):
    """Of a ResNet with a 7×7 instead of a 3×3 stem."""
    return count + conv(7, 3, 64) - conv(3, 3, 64)


def x4_count(blocks, num_classes):
    total, channels = conv(3, 3, 32) + 2 * 32, 32
    for width in (64, 128, 256):
        total += conv(1, channels, width) + 2 * width
        for _ in range(blocks):
            total += conv(3, channels, width) + conv(3, width, width) + 4 * width
            channels = width
    return total + dense(256, num_classes)


def shufflenet_count(num_classes):
    total, channels = conv(1, 3, 24) + 2 * 24, 24
    for width, count in ((116, 3), (232, 7), (464, 3)):
        half = width // 2
        total += conv(3, 1, channels) + 2 * channels + conv(1, channels, half) + 2 * half
        total += conv(1, channels, half) + conv(3, 1, half) + conv(1, half, half) + 6 * half
        total += count * (2 * conv(1, half, half) + conv(3, 1, half) + 6 * half)
        channels = width
    return total + conv(1, channels, 1024) + 2 * 1024 + dense(1024, num_classes)


def squeezenet_count(num_classes):
    total, channels = conv(3, 3, 64) + 64, 64
    for squeeze, expand in SqueezeNet.fires:
        total += conv(1, channels, squeeze) + squeeze
        total += conv(1, squeeze, expand) + conv(3, squeeze, expand) + 2 * expand
        channels = 2 * expand
    return total + dense(channels, num_classes)


def thin_resnet_count(blocks, num_classes):
    """All but the first block of a stage have as many inputs as outputs."""
    total, channels = conv(3, 3, 16) + 2 * 16, 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            total += conv(3, channels, width) + conv(3, width, width) + 4 * width
            channels = width
    return total + dense(64, num_classes)


def mobilenet_count(num_classes):
    total, channels = conv(3, 3, 32) + 2 * 32, 32
    for expansion, width, count, _ in MobileNetV2.stages:
        for _ in range(count):
            inner = expansion * channels
            if expansion > 1:
                total += conv(1, channels, inner) + 2 * inner
            total += conv(3, 1, inner) + 2 * inner + conv(1, inner, width) + 2 * width
            channels = width
    return total + conv(1, channels, 1280) + 2 * 1280 + dense(1280, num_classes)


@pytest.mark.parametrize(
    "name, num_classes, published, formula",
    [
        ("resnet18", 10, 11_173_962, resnet_count((2, 2, 2, 2), 10)),
        ("resnet34", 10, 21_282_122, resnet_count((3, 4, 6, 3), 10)),
        ("resnet50", 10, 23_520_842, bottleneck_count((3, 4, 6, 3), 10)),
        ("resnet8x4", 100, 1_233_540, x4_count(1, 100)),
        ("resnet32x4", 100, 7_433_860, x4_count(5, 100)),
        ("imagenet_resnet18", 1000, 11_689_512, imagenet(resnet_count((2, 2, 2, 2), 1000))),
        ("imagenet_resnet34", 1000, 21_797_672, imagenet(resnet_count((3, 4, 6, 3), 1000))),
        ("imagenet_resnet50", 1000, 25_557_032, imagenet(bottleneck_count((3, 4, 6, 3), 1000))),
        ("resnet20", 10, 269_722, thin_resnet_count(3, 10)),
        ("resnet32", 10, 464_154, thin_resnet_count(5, 10)),
        ("resnet44", 10, 658_586, thin_resnet_count(7, 10)),
        ("resnet56", 10, 853_018, thin_resnet_count(9, 10)),
        ("resnet110", 10, 1_727_962, thin_resnet_count(18, 10)),
        ("wrn16_1", 10, 175_066, wide_resnet_count(16, 1, 10)),
        ("wrn16_2", 10, 691_674, wide_resnet_count(16, 2, 10)),
        ("wrn40_1", 10, 563_930, wide_resnet_count(40, 1, 10)),
        ("wrn40_2", 10, 2_243_546, wide_resnet_count(40, 2, 10)),
        ("wrn40_2", 100, 2_255_156, wide_resnet_count(40, 2, 100)),
        ("vgg11", 10, 9_231_114, vgg_count((3, 64, 128, 256, 256, 512, 512, 512, 512), 10)),
        ("vgg8", 100, 3_965_028, vgg_count(channels_of(8), 100)),
        ("vgg13", 100, 9_462_180, vgg_count(channels_of(13), 100)),
        ("vgg16", 10, 14_728_266, vgg_count(channels_of(16), 10)),
        ("vgg19", 10, 20_040_522, vgg_count(channels_of(19), 10)),
        ("imagenet_vgg11", 1000, 132_868_840, imagenet_vgg_count(11)),
        ("imagenet_vgg13", 1000, 133_053_736, imagenet_vgg_count(13)),
        ("imagenet_vgg16", 1000, 138_365_992, imagenet_vgg_count(16)),
        ("imagenet_vgg19", 1000, 143_678_248, imagenet_vgg_count(19)),
        ("shufflenetv2", 100, 1_355_528, shufflenet_count(100)),
        ("squeezenet", 1000, 1_235_496, squeezenet_count(1000)),
        ("mobilenetv2", 1000, 3_504_872, mobilenet_count(1000)),
        ("mobilenetv2_stride2", 1000, 3_504_872, mobilenet_count(1000)),
    ],
)
def test_parameter_counts(name, num_classes, published, formula):
    assert parameter_count(name, num_classes, (32, 32, 3)) == formula == published


def test_parameter_counts_of_lenet():
    full = 25 * 6 + 6 + 25 * 6 * 16 + 16 + 25 * 16 * 120 + 120 + dense(120, 84) + dense(84, 10)
    half = 25 * 3 + 3 + 25 * 3 * 8 + 8 + 25 * 8 * 60 + 60 + dense(60, 42) + dense(42, 10)
    assert full == 61_706
    for image_shape in ((32, 32, 1), (28, 28, 1)):
        assert parameter_count("lenet5", 10, image_shape) == full
        assert parameter_count("lenet5_half", 10, image_shape) == half
