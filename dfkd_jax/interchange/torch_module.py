"""A PyTorch network that Python can make, written as a `.pt2` archive; needs PyTorch.

The module that is named is imported, which runs its code: it is the user's own, named on the
command line and never in a file.
"""

import ast
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax.interchange.torch_file import read_weights
from dfkd_jax.runtime import array_files
from dfkd_jax.runtime.errors import UserError


class Facts(NamedTuple):
    """What a network says of its images; None where it does not."""

    image_size: int | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def make(name: str) -> Any:
    """The network that "package.module:factory" or "package.module:factory(3, depth=8)" gives.

    Arguments are literals: numbers, text, lists, True, False and None.

    Raises:
      UserError: PyTorch is not installed, or there is no such network; one sentence.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "--module needs PyTorch, which is not installed: pip install 'dfkd-jax[torch]'."
        ) from error
    path, _, call = name.partition(":")
    form = "allowed is package.module:factory or package.module:factory(3, depth=8)"
    try:
        parsed = ast.parse(call, mode="eval").body
        inside = parsed if isinstance(parsed, ast.Call) else None
        attribute = ast.unparse(inside.func if inside else parsed)
        positional = [ast.literal_eval(a) for a in inside.args] if inside else []
        named = {k.arg or "": ast.literal_eval(k.value) for k in inside.keywords} if inside else {}
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--module is {name!r}; {form}.") from error
    try:
        found: Any = importlib.import_module(path)
        for part in attribute.split("."):
            found = getattr(found, part)
        network = found if isinstance(found, torch.nn.Module) else found(*positional, **named)
    except Exception as error:  # the imported code may raise anything
        raise UserError(
            f"--module is {name!r}, which gives no network ({_reason(error)})."
        ) from error
    if not isinstance(network, torch.nn.Module):
        raise UserError(f"--module is {name!r}, which gives a {type(network).__name__}; {form}.")
    return network


def load(
    network: Any, weights: Path, *, key: str | None = None, prefix: str | None = None
) -> tuple[str, ...]:
    """Fill a network with the weights of a file, see `torch_file.read_weights`.

    Returns:
      The names in the file that are not the network's.

    Raises:
      UserError: they are not the network's; one sentence.
    """
    import torch

    wanted = network.state_dict()
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    read = read_weights(weights, [wanted.keys() - counters], key=key, prefix=prefix)
    found: Mapping[str, np.ndarray] = read.arrays
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    needed = {n: s for n, s in shapes.items() if n not in counters or n in found}
    wrong = array_files.differences({n: array.shape for n, array in found.items()}, needed)
    if wrong:
        raise UserError(f"{weights} has not the weights of that network: {wrong}.")
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in found.items()}
    network.load_state_dict(tensors, strict=False)
    return read.left_out


def facts(network: Any, name: str, weights: Path | None) -> Facts:
    """What timm writes into its networks, and torchvision beside the names of its files."""
    config = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        channels, size, _ = config["input_size"]
        mean, std = config.get("mean"), config.get("std")
        return Facts(size, channels, mean and tuple(mean), std and tuple(std))
    if name.startswith("torchvision.models") and weights is not None:
        from torchvision.models import get_model_weights  # it is there, as its network was made

        try:
            known = get_model_weights(name.partition(":")[2].partition("(")[0])
        except (KeyError, ValueError):
            return Facts()
        for entry in known:
            if Path(entry.url).name == weights.name:
                shown = entry.transforms()
                return Facts(shown.crop_size[0], 3, tuple(shown.mean), tuple(shown.std))
    return Facts()


def write(network: Any, image_shape: tuple[int, int, int], path: Path) -> None:
    """Write the archive of a network in evaluation, for any number of images (H, W, C).

    Raises:
      UserError: `torch.export` cannot follow it; one sentence.
    """
    import torch

    height, width, channels = image_shape
    images = torch.zeros(2, channels, height, width)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            any_number = ({0: torch.export.Dim.DYNAMIC},)
            program = torch.export.export(network.eval(), (images,), dynamic_shapes=any_number)
            torch.export.save(program, path)
    except Exception as error:  # it runs the network
        raise UserError(
            f"torch.export cannot follow the network with {height}×{width}×{channels} images "
            f"({_reason(error)})."
        ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
