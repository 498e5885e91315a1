"""Command line: `python -m dfkd_jax.convert FILE --output=DIR`: bring a trained PyTorch classifier
here as a teacher.

FILE is what `torch.export.save` writes, of any network of known operations. Or it holds weights,
and `--model=resnet34` names their network here, or `--module=package.module:factory` that of
PyTorch. DIR then is what `--config.teacher.checkpoint` takes.
"""

import argparse
import math
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dfkd_jax.data.data_table import SPECS
from dfkd_jax.interchange import pt2, torch_module
from dfkd_jax.interchange.torch_file import read_weights
from dfkd_jax.interchange.torch_layouts import WrongWeights, from_torch, torch_names
from dfkd_jax.networks.classifiers import CLASSIFIERS, create_classifier
from dfkd_jax.networks.graph import network, program
from dfkd_jax.run import teacher
from dfkd_jax.run.command_line import CONFIGURATIONS, create_parser, fail
from dfkd_jax.runtime import array_files, files
from dfkd_jax.runtime.errors import UserError


class Description(NamedTuple):
    """What a file of weights does not say of its network."""

    model: str  # a key of CLASSIFIERS, or "graph"
    num_classes: int
    image_shape: tuple[int, int, int]  # (H, W, C)
    dataset: str | None = None  # a key of SPECS
    mean: tuple[float, ...] | None = None  # per channel, of images in [0, 1]; None: not known
    std: tuple[float, ...] | None = None


def convert(
    file: str | Path,
    description: Description,
    output: str | Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
) -> str:
    """Write the teacher of a PyTorch checkpoint to a folder, whole or not at all.

    Args:
      file: see `torch_file.read_weights`.
      description: of the network in it.
      output: the folder, which must not exist or be empty.
      key: where in the file the weights are, see `torch_file.read_weights`.
      prefix: likewise.

    Returns:
      A summary to print.

    Raises:
      UserError: the file cannot be read, its weights are not those of the model, or the folder is
        not free or cannot be written; one sentence, and nothing is written.
    """
    file, output = Path(file), Path(output)
    _check_free(output)
    model, num_classes, image_shape = description[:3]
    try:
        wanted = torch_names(model, num_classes, image_shape)
    except UserError as error:
        raise UserError(f"{file} cannot be converted: {error}") from error
    found = read_weights(file, wanted, key=key, prefix=prefix)
    try:
        variables, layout = from_torch(model, num_classes, image_shape, found.arrays)
    except UserError as error:
        raise UserError(f"{file} cannot be converted: {error}") from error
    card = {**description._asdict(), "source": file.name, "layout": layout.name}
    _write(output, variables, card)
    lines = [
        f"layout         {layout.name}",
        f"arrays         {len(found.arrays)}, of them "
        f"{len(jax.tree.leaves(variables['params']))} of parameters",
        *_left_out(found.left_out),
    ]
    return "\n".join([*lines, *_summary(description, variables, output)])


def convert_program(
    found: pt2.Program, description: Description, source: str, output: str | Path
) -> str:
    """Write the teacher of a graph of operations to a folder, whole or not at all.

    Args:
      found: from `pt2.read_program`.
      description: of the network, its model "graph".
      source: the name of the file or module that it came from.
      output: the folder, which must not exist or be empty.

    Returns:
      A summary to print.

    Raises:
      UserError: an operation is not known, or the folder is not free or cannot be written; one
        sentence, and nothing is written.
    """
    output = Path(output)
    _check_free(output)
    constants = {n: found.arrays[n] for n, array in found.graph.arrays if array.constant}
    try:
        network.check(found.graph, constants, found.num_classes, found.count)
    except UserError as error:
        raise UserError(f"{source} cannot be converted: {error}") from error
    variables = network.variables(found.graph, found.arrays)
    card = {**description._asdict(), "source": source, "layout": "a graph of operations"}
    _write(output, variables, card, found.graph, constants)
    norms = len(variables.get("batch_stats", {}))
    lines = [
        f"operations     {len(found.graph.nodes)}, of them {norms} of batch norm",
        f"logits         {found.graph.output}",
        f"features       {found.graph.features or 'none'}",
        *(f"note           {note}" for note in found.notes),
    ]
    return "\n".join([*lines, *_summary(description, variables, output)])


def _left_out(names: Sequence[str]) -> list[str]:
    """A line on what stands in a file beside the network."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"left out       {', '.join(names[:3])}{more}"] if names else []


def _check_free(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output is {str(output)!r}, which exists; give a new or empty folder.")


def _summary(description: Description, variables: teacher.Variables, output: Path) -> list[str]:
    height, width, channels = description.image_shape
    if description.mean is None:
        normalization = "not known: put the teacher's own into the command below"
    else:
        normalization = f"mean {description.mean}, std {description.std}"
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return [
        f"parameters     {count:,}",
        f"images         {height}×{width}×{channels}, {description.num_classes} classes",
        f"normalisation  {normalization}",
        f"written to     {output}; train a student of it with",
        next_command(description, output),
    ]


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


def _write(
    output: Path,
    variables: teacher.Variables,
    card: dict[str, Any],
    graph: program.Graph | None = None,
    constants: Mapping[str, np.ndarray] | None = None,
) -> None:
    try:
        with files.temporary_folder(output.absolute()) as new:
            if graph is not None:
                program.write(graph, new / network.GRAPH)
            if constants:
                array_files.write(new / network.CONSTANTS, constants)
            if graph is not None:  # by which a run knows its teacher, beside the weights
                card = {**card, "graph": files.digest(sorted(new.iterdir()))}
            teacher.save_teacher(new, variables, card)
            new.replace(output)
    except files.CannotWrite as error:
        raise UserError(f"{error}.") from error


def describe(given: argparse.Namespace) -> Description:
    """The description that the flags give; --dataset fills in what they leave open.

    Raises:
      UserError: a flag is missing, or its value is not allowed or not that of --dataset.
    """
    if given.model is None:
        raise UserError(
            f"--model is missing: {given.file} holds weights alone; give the name of their "
            "network, or --module=package.module:factory of PyTorch."
        )
    try:
        create_classifier(given.model, 1)
    except UserError as error:
        raise UserError(f"--model: {error}") from error
    defaults = {"image_size": 32, "channels": 1 if given.model.startswith("lenet") else 3}
    size, channels, num_classes = _sizes(given, defaults)
    return _described(given, given.model, num_classes, (size, size, channels))


def describe_program(given: argparse.Namespace, found: pt2.Program) -> Description:
    """As `describe`, of a network that says its sizes itself.

    Raises:
      UserError: a flag's value is not that of the network, or not that of --dataset.
    """
    size, _, channels = found.graph.image_shape
    own = {"image_size": size, "channels": channels, "num_classes": found.num_classes}
    for name, value in own.items():
        flag = getattr(given, name)
        if flag not in (None, value):
            raise UserError(f"--{name} is {flag}, but that of the network is {value}.")
        setattr(given, name, value)
    _sizes(given, {})
    return _described(given, network.MODEL, found.num_classes, found.graph.image_shape)


def _sizes(given: argparse.Namespace, defaults: Mapping[str, int]) -> tuple[int, int, int]:
    """Image size, channels and classes, of the flags, of --dataset or by default."""
    spec = _spec(given)
    if spec is not None:
        height, _, depth = spec.image_shape
        defaults = {"image_size": height, "channels": depth, "num_classes": spec.num_classes}
    values = {}
    for name in ("image_size", "channels", "num_classes"):
        value = values[name] = getattr(given, name)
        if value is None:
            values[name] = defaults.get(name)
        elif value < 1:
            raise UserError(f"--{name} is {value}; allowed is 1 or more.")
        elif spec is not None and value != defaults[name]:
            raise UserError(
                f"--{name} is {value}, but that of --dataset={given.dataset} is {defaults[name]}."
            )
    if values["num_classes"] is None:
        raise UserError("--num_classes is missing; give it, or --dataset.")
    return values["image_size"], values["channels"], values["num_classes"]


def _spec(given: argparse.Namespace) -> Any:
    if given.dataset is not None and given.dataset not in SPECS:
        raise UserError(f"--dataset is {given.dataset!r}; allowed are {', '.join(SPECS)}.")
    return None if given.dataset is None else SPECS[given.dataset]


def _described(
    given: argparse.Namespace, model: str, num_classes: int, image_shape: tuple[int, int, int]
) -> Description:
    spec, channels = _spec(given), image_shape[2]
    mean, std = _numbers("--mean", given.mean, channels), _numbers("--std", given.std, channels)
    if (mean is None) != (std is None):
        raise UserError("--mean and --std belong together; give both or none.")
    if std is not None and min(std) <= 0:
        raise UserError(f"--std is {given.std!r}; allowed are numbers above 0.")
    if mean is None and spec is not None:
        mean, std = spec.mean, spec.std
    return Description(model, num_classes, image_shape, given.dataset, mean, std)


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
    parser.add_argument("file", metavar="FILE", nargs="?", help=".pt2, .safetensors, .pt or .pth")
    parser.add_argument("--model", help=", ".join(sorted(CLASSIFIERS)))
    parser.add_argument(
        "--module", help="package.module:factory of PyTorch, or package.module:factory(depth=8)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--num_classes", type=int)
    parser.add_argument("--image_size", type=int, help="height and width; 32 by default")
    parser.add_argument("--channels", type=int, help="3 by default, 1 for LeNet-5")
    parser.add_argument("--mean", help="what the teacher's images were normalised with, as")
    parser.add_argument("--std", help="0.49,0.48,0.45: per channel, of images in [0, 1]")
    names = ", ".join(SPECS)
    parser.add_argument("--dataset", help=f"gives the five before, if one of {names}")
    parser.add_argument("--key", help="of weights: the dictionary in the file, as state_dict")
    parser.add_argument("--prefix", help="of weights: what stands before their names, as model.")
    parser.add_argument("--features", help="of .pt2 or --module: the node or module of them")
    parser.add_argument("--logits", help="of .pt2 or --module: the output that they are")
    return parser


def _converted(given: argparse.Namespace) -> str:
    """Do what the flags ask for; what to print."""
    if given.module is not None:
        if given.model is not None:
            raise UserError("--model and --module are two networks; give one.")
        return _of_module(given)
    if given.file is None:
        raise UserError("FILE is missing; give one, or --module=package.module:factory.")
    if pt2.is_archive(Path(given.file)):
        if given.model is not None:
            raise UserError(
                f"--model is {given.model!r}, but {given.file} holds its network; leave it out."
            )
        found = pt2.read_program(given.file, given.features, given.logits)
        description = describe_program(given, found)
        return convert_program(found, description, Path(given.file).name, given.output)
    for flag in ("features", "logits"):
        if getattr(given, flag) is not None:
            raise UserError(f"--{flag} is for a .pt2 file or --module; {given.file} is neither.")
    where = {"key": given.key, "prefix": given.prefix}
    return convert(given.file, describe(given), given.output, **where)


def _of_module(given: argparse.Namespace) -> str:
    """Convert a network that PyTorch makes, with the weights of FILE if there is one."""
    made = torch_module.make(given.module)
    weights = None if given.file is None else Path(given.file)
    if weights is not None:
        torch_module.load(made, weights, key=given.key, prefix=given.prefix)
    facts = torch_module.facts(made, given.module, weights)
    spec = _spec(given)
    size, _, channels = (None, None, 3) if spec is None else spec.image_shape
    size = given.image_size or size or facts.image_size
    if size is None:
        raise UserError("--image_size is missing; the network does not say it.")
    shape = (size, size, given.channels or facts.channels or channels)
    if facts.mean is not None and facts.std is not None and given.mean is None:
        given.mean, given.std = (",".join(map(str, v)) for v in (facts.mean, facts.std))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.pt2"
        torch_module.write(made, shape, path)
        found = pt2.read_program(path, given.features, given.logits)
    return convert_program(found, describe_program(given, found), given.module, given.output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert what the arguments name; the exit code. Names of many wrong arrays stand below."""
    try:
        print(_converted(_parser().parse_args(arguments)))
    except (UserError, OSError) as error:
        names = error.__cause__.listing if isinstance(error.__cause__, WrongWeights) else ()
        return fail("\n  ".join([str(error), *names]), 2)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing to compute, and a run may hold the others
    sys.exit(main())
