"""Convert the classifiers of torchvision and timm and compare them with PyTorch.

    python -m benchmarks.zoo                      # every classifier of torchvision
    python -m benchmarks.zoo --library=timm       # a list of timm's, one of each family
    python -m benchmarks.zoo resnet18 vit_b_16

A network gets random weights and random running statistics, goes through `torch.export` and a .pt2
file, and its logits on random images are compared with PyTorch's. One line a network: how far the
logits are off, as a share of the largest; how many features and batch norms were found; seconds.
Needs PyTorch and the library.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dfkd_jax.interchange import pt2
from dfkd_jax.networks.graph.network import GraphNetwork, check, variables

CLASSES = 10
TOLERANCE = 2e-4
TIMM = (
    *("resnet18", "resnext50_32x4d", "seresnet50", "regnetx_002", "densenet121", "efficientnet_b0"),
    *("mobilenetv3_large_100", "mnasnet_100", "ghostnet_100", "convnext_atto", "convmixer_768_32"),
    *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
    *("mixer_s32_224", "poolformer_s12", "repvgg_a0", "hrnet_w18_small", "edgenext_xx_small"),
)
SIZES = {"inception_v3": 96, "maxvit_t": 224}  # others take 64×64, or say what
FIXED = ("vit_", "deit_", "swin_", "mixer_")  # take 224×224


def randomize(network: Any) -> Any:
    """Running statistics that are not those of the start, no kernel of zeros; evaluation mode."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data.normal_(0, 0.1, generator=generator)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.5 + 0.75)
    return network.eval()


def compare(make: Callable[[], Any], size: int) -> str:
    """What to say of one network.

    Args:
      make: makes it, with random weights.
      size: of its images.
    """
    import torch

    start = time.perf_counter()
    torch.manual_seed(0)
    network = randomize(make())
    example = torch.zeros(2, 3, size, size)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.pt2"
        torch.export.save(torch.export.export(network, (example,), dynamic_shapes=dynamic), file)
        found = pt2.read_program(file)
    constants = {n: found.arrays[n] for n, array in found.graph.arrays if array.constant}
    check(found.graph, constants, found.num_classes, found.count)
    ours = GraphNetwork(found.graph, constants, found.num_classes)
    weights = variables(found.graph, found.arrays)
    images = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits, features = jax.jit(ours.apply)(weights, images)
    gap = np.abs(logits - wanted).max() / np.abs(wanted).max()
    norms = len(weights.get("batch_stats", {}))
    seconds = time.perf_counter() - start
    verdict = "ok" if gap < TOLERANCE else "WRONG"
    return f"{verdict}  {gap:.0e}  {features.shape[-1]} features  {norms} norms  {seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare each network."""
    parser = argparse.ArgumentParser(description="Convert the networks of a library.")
    parser.add_argument("names", nargs="*", help="networks; all of torchvision's by default")
    parser.add_argument("--library", choices=("torchvision", "timm"), default="torchvision")
    given = parser.parse_args(arguments)
    if given.library == "timm":
        import timm

        names = given.names or TIMM

        def make(name: str) -> Any:
            return timm.create_model(name, pretrained=False, num_classes=CLASSES)
    else:
        from torchvision import models

        names = given.names or models.list_models(module=models)

        def make(name: str) -> Any:
            return models.get_model(name, weights=None, num_classes=CLASSES)

    warnings.simplefilter("ignore")
    for name in names:
        size = SIZES.get(name, 224 if name.startswith(FIXED) else 64)
        try:
            said = compare(lambda name=name: make(name), size)
        except Exception as error:  # one network must not hide what comes of the others
            said = f"ERROR  {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        print(f"{name:28}{said}", flush=True)


if __name__ == "__main__":
    main()
