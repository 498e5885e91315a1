"""Command line: `python -m dfkd_jax.convert teacher.pt --model=resnet34 --num_classes=100
--output=DIR`: bring a trained PyTorch classifier here as a teacher.

DIR then is what `--config.teacher.checkpoint` takes. The network is not run.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dfkd_jax.data.data_table import SPECS
from dfkd_jax.interchange.torch_file import read_state_dict
from dfkd_jax.interchange.torch_layouts import WrongWeights, from_torch
from dfkd_jax.networks.classifiers import CLASSIFIERS, create_classifier
from dfkd_jax.run import teacher
from dfkd_jax.run.command_line import CONFIGURATIONS, create_parser, fail
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError


class Description(NamedTuple):
    """What a file of weights does not say of its network."""

    model: str  # a key of CLASSIFIERS
    num_classes: int
    image_shape: tuple[int, int, int]  # (H, W, C)
    dataset: str | None = None  # a key of SPECS
    mean: tuple[float, ...] | None = None  # per channel, of images in [0, 1]; None: not known
    std: tuple[float, ...] | None = None


def convert(file: str | Path, description: Description, output: str | Path) -> str:
    """Write the teacher of a PyTorch checkpoint to a folder, whole or not at all.

    Args:
      file: see `torch_file.read_state_dict`.
      description: of the network in it.
      output: the folder, which must not exist or be empty.

    Returns:
      A summary to print.

    Raises:
      UserError: the file cannot be read, its weights are not those of the model, or the folder is
        not free or cannot be written; one sentence, and nothing is written.
    """
    file, output = Path(file), Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output is {str(output)!r}, which exists; give a new or empty folder.")
    model, num_classes, image_shape = description[:3]
    state_dict = read_state_dict(file)
    try:
        variables, layout = from_torch(model, num_classes, image_shape, state_dict)
    except UserError as error:
        raise UserError(f"{file} cannot be converted: {error}") from error
    card = {**description._asdict(), "source": file.name, "layout": layout.name}
    _write(output, variables, card)
    leaves = jax.tree.leaves(variables["params"])
    height, width, channels = image_shape
    if description.mean is None:
        normalization = "not known: put the teacher's own into the command below"
    else:
        normalization = f"mean {description.mean}, std {description.std}"
    return "\n".join(
        [
            f"layout         {layout.name}",
            f"arrays         {len(state_dict)}, of them {len(leaves)} of parameters",
            f"parameters     {sum(leaf.size for leaf in leaves):,}",
            f"images         {height}×{width}×{channels}, {num_classes} classes",
            f"normalisation  {normalization}",
            f"written to     {output}; train a student of it with",
            next_command(description, output),
        ]
    )


def next_command(description: Description, output: Path) -> str:
    """The command that distils the teacher written to `output`, for a shell in this folder.

    Its configuration is that of the data set, if there is one, else the default with what the
    teacher's card does not say. An unknown normalisation stands as that of images in [0, 1].
    """
    name, (_, _, channels) = description.dataset, description.image_shape
    fields = {"teacher.model": description.model, "teacher.checkpoint": str(output)}
    config = name
    if name is None or not (CONFIGURATIONS / f"{name}.py").is_file():
        config = "default"
        fields["dataset.name"] = name or "none"
    if name is None and description.mean is None:
        fields["dataset.mean"], fields["dataset.std"] = (
            f"{(0.0,) * channels}",
            f"{(1.0,) * channels}",
        )
    flags = [f"--config={config}"]
    flags += [f"--config.{field}={value}" for field, value in fields.items()]
    flags.append(f"--workdir={Path('runs', output.name)}")
    return " ".join(["python -m dfkd_jax.main", *map(shlex.quote, flags)])


def _write(output: Path, variables: teacher.Variables, card: dict[str, Any]) -> None:
    try:
        with files.temporary_folder(output.absolute()) as new:
            teacher.save_teacher(new, variables, card)
            new.replace(output)
    except files.CannotWrite as error:
        raise UserError(f"{error}.") from error


def describe(given: argparse.Namespace) -> Description:
    """The description that the flags give; --dataset fills in what they leave open.

    Raises:
      UserError: a flag is missing, or its value is not allowed or not that of --dataset.
    """
    name = given.dataset
    try:
        create_classifier(given.model, 1)
    except UserError as error:
        raise UserError(f"--model: {error}") from error
    if name is not None and name not in SPECS:
        raise UserError(f"--dataset is {name!r}; allowed are {', '.join(SPECS)}.")
    spec = None if name is None else SPECS[name]
    size, channels, num_classes = given.image_size, given.channels, given.num_classes
    defaults = {"--image_size": 32, "--channels": 1 if given.model.startswith("lenet") else 3}
    if spec is not None:
        height, _, depth = spec.image_shape
        defaults = {"--image_size": height, "--channels": depth, "--num_classes": spec.num_classes}
    values = {"--image_size": size, "--channels": channels, "--num_classes": num_classes}
    for flag, value in values.items():
        if value is None:
            values[flag] = defaults.get(flag)
        elif value < 1:
            raise UserError(f"{flag} is {value}; allowed is 1 or more.")
        elif spec is not None and value != defaults[flag]:
            raise UserError(f"{flag} is {value}, but that of --dataset={name} is {defaults[flag]}.")
    if values["--num_classes"] is None:
        raise UserError("--num_classes is missing; give it, or --dataset.")
    size, channels, num_classes = values.values()
    mean, std = _numbers("--mean", given.mean, channels), _numbers("--std", given.std, channels)
    if (mean is None) != (std is None):
        raise UserError("--mean and --std belong together; give both or none.")
    if std is not None and min(std) <= 0:
        raise UserError(f"--std is {given.std!r}; allowed are numbers above 0.")
    if mean is None and spec is not None:
        mean, std = spec.mean, spec.std
    return Description(given.model, num_classes, (size, size, channels), name, mean, std)


def _numbers(flag: str, text: str | None, channels: int) -> tuple[float, ...] | None:
    """The numbers of a comma-separated list, one per channel."""
    if text is None:
        return None
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) != channels or not all(map(math.isfinite, numbers)):
        raise UserError(f"{flag} is {text!r}; allowed are {channels} numbers, one per channel.")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = create_parser("convert", __doc__)
    parser.add_argument("file", metavar="FILE", help=".safetensors, .pt or .pth")
    parser.add_argument("--model", required=True, help=", ".join(sorted(CLASSIFIERS)))
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--num_classes", type=int)
    parser.add_argument("--image_size", type=int, help="height and width; 32 by default")
    parser.add_argument("--channels", type=int, help="3 by default, 1 for LeNet-5")
    parser.add_argument("--mean", help="what the teacher's images were normalised with, as")
    parser.add_argument("--std", help="0.49,0.48,0.45: per channel, of images in [0, 1]")
    names = ", ".join(SPECS)
    parser.add_argument("--dataset", help=f"gives the five before, if one of {names}")

    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert what the arguments name; the exit code. Names of many wrong arrays stand below."""
    try:
        given = _parser().parse_args(arguments)
        print(convert(given.file, describe(given), given.output))
    except (UserError, OSError) as error:
        names = error.__cause__.listing if isinstance(error.__cause__, WrongWeights) else ()
        return fail("\n  ".join([str(error), *names]), 2)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing to compute, and a run may hold the others
    sys.exit(main())
