"""Command line: `python -m dfkd_jax.export DIR --format=safetensors|pytorch|stablehlo|onnx|images`:
take the student of a run elsewhere, or its generated images.

DIR is the run's folder, finished or not; the newest whole checkpoint counts. `images` writes those
of the pool, or of the generator, into class folders by the teacher's label.
"""

import argparse
import contextlib
import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from flax.linen import pooling
from flax.traverse_util import flatten_dict

from dfkd_jax.interchange import torch_code
from dfkd_jax.interchange.torch_layouts import to_torch
from dfkd_jax.networks import convolution
from dfkd_jax.networks.own_module import is_own
from dfkd_jax.run import generated
from dfkd_jax.run.checkpoint import DamagedCheckpoint
from dfkd_jax.run.command_line import create_parser, fail
from dfkd_jax.run.student import Student, load_student, logits_of
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
OPSET = 23  # of ONNX
MAKERS = ("dfkd_jax", "jax", "flax", "jax2onnx", "onnx_opset")  # what a card names


def to_safetensors(student: Student) -> bytes:
    """The weights; everything of the card is in the metadata, what is no text as JSON.

    Names and axes are PyTorch's (`torch_layouts.to_torch`, metadata `names: torch`), of a module of
    one's own Flax's, joined by "." (`names: flax`). Normalisation is not in it.
    """
    save = _import("safetensors.numpy", "export").save
    if is_own(student.card["model"]):
        flat = flatten_dict(student.variables, sep=".")
        names, arrays = "flax", {name: np.ascontiguousarray(a) for name, a in flat.items()}
    else:
        names, arrays = "torch", to_torch(student.card["model"], student.variables)
    card = {"names": names, "input": "(images in [0, 1] - mean) / std", **student.card}
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in card.items()}
    return _sorted(save(arrays, metadata))


def _sorted(content: bytes) -> bytes:
    """A safetensors file with a sorted header: the package writes metadata in a random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    fields = json.loads(content[8:end])
    header = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # arrays are aligned
    return len(header).to_bytes(8, "little") + header + content[end:]


def to_stablehlo(student: Student) -> bytes:
    """`logits_of` as `jax.export` serialises it, for any batch size; see `PLATFORMS`."""
    _import("flatbuffers", "export")
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *student.card["image_shape"]), jnp.float32)
    function = jax.jit(logits_of(student))
    with convolution.plain():
        return bytes(jax.export.export(function, platforms=PLATFORMS)(images).serialize())


def to_onnx(student: Student) -> bytes:
    """`logits_of` as an ONNX graph for any batch size, the card in its metadata.

    The graph is run on random images before it is given out.

    Raises:
      UserError: a package is not installed; jax2onnx does not know an operation of the network, or
        made a graph that cannot be run or gives other logits.
    """
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)  # it lists what it has examples of
    convert = _import("jax2onnx", "onnx").to_onnx
    session = _import("onnxruntime", "onnx").InferenceSession
    model, image_shape = student.card["model"], student.card["image_shape"]
    images = np.random.default_rng(0).random((2, *image_shape), np.float32)
    with convolution.plain():
        wanted = np.asarray(jax.jit(logits_of(student))(images))
    try:
        with convolution.plain(), _transposition_pairs_kept():
            logits = _with_poolings(logits_of(student))
            inputs = [("b", *image_shape)]
            graph = convert(logits, inputs=inputs, model_name=model, opset=OPSET)
        card = {"input": "images (b, height, width, channels), float32 in [0, 1]", **student.card}
        for key, value in card.items():
            entry = graph.metadata_props.add()
            entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
        content = graph.SerializeToString()
        run = session(content, providers=["CPUExecutionProvider"])
        (logits,) = run.run(None, {run.get_inputs()[0].name: images})
        gap = np.abs(logits - wanted).max() / max(1, np.abs(wanted).max())
        if not gap < 1e-4:
            raise ValueError(f"the logits of its graph are off by a share of {gap:.0e}")
    except Exception as error:  # each of its operations has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"jax2onnx cannot convert {_place(error)}{model} ({reason}); --format=safetensors and "
            "stablehlo can."
        ) from error
    return content


def _place(error: Exception) -> str:
    """What an error of jax2onnx is about: "the operation qr of MyNet/Block_0 in ", or ""."""
    operation, root, layer = None, None, ""
    trace = error.__traceback__
    while trace is not None:
        names = trace.tb_frame.f_locals
        equation, module = names.get("eqn"), names.get("self")
        if isinstance(equation, jax.extend.core.JaxprEqn):  # that it converts
            operation = equation.primitive.name
            layer = str(equation.source_info.name_stack) or layer  # that of an inner one may lack
        elif isinstance(module, nn.Module):  # that it traces
            root = root or type(module).__name__
            layer = "/".join((root, *module.path))
        trace = trace.tb_next
    parts = [f"the operation {operation}" if operation else "", layer]
    words = " of ".join(part for part in parts if part)
    return f"{words} in " if words else ""


def _with_poolings(logits: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """`logits` as jax2onnx can trace it: its stand-ins for Flax's poolings take names only."""
    parameters = ("window_shape", "strides", "padding", "count_include_pad")

    def by_name(stand_in: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def pool(inputs: jax.Array, *given: Any, **named: Any) -> jax.Array:
            return stand_in(inputs, **dict(zip(parameters, given, strict=False)), **named)

        return pool

    def traced(images: jax.Array) -> jax.Array:
        places = [(m, name) for m in (nn, pooling) for name in ("avg_pool", "max_pool")]
        stand_ins = [(*place, getattr(*place)) for place in places]
        try:
            for module, name, stand_in in stand_ins:
                setattr(module, name, by_name(stand_in))
            return logits(images)
        finally:
            for module, name, stand_in in stand_ins:
                setattr(module, name, stand_in)

    return traced


@contextlib.contextmanager
def _transposition_pairs_kept() -> Iterator[None]:
    """Inside, jax2onnx does not look for pairs of transpositions that undo each other.

    Where a residual connection branches off between the two, version 0.17 takes away one too many.
    ONNX Runtime looks for them itself.
    """
    try:
        from jax2onnx.converter import ir_optimizations

        passes = ir_optimizations._OPTIMIZER_PASSES
    except (ImportError, AttributeError):  # another version; what it makes is checked
        yield
        return
    kept = tuple(one for one in passes if one.name != "remove_redundant_transpose_pairs")
    ir_optimizations._OPTIMIZER_PASSES = kept
    try:
        yield
    finally:
        ir_optimizations._OPTIMIZER_PASSES = passes


_LOADER = '''

MEAN, STD = {mean}, {std}  # per channel


def load() -> nn.Module:
    """The student in evaluation mode. It takes (images - MEAN) / STD, with images (B, C, H, W) in
    [0, 1], and gives logits (B, K)."""
    from pathlib import Path

    from safetensors.torch import load_file

    network = {call}
    network.load_state_dict(load_file(Path(__file__).with_name("student.safetensors")))
    return network.eval()
'''


def to_pytorch(student: Student) -> bytes:
    """PyTorch code of the student's network, whose `load` reads the weights beside it.

    Raises:
      UserError: the network is a module of one's own.
    """
    card = student.card
    if is_own(card["model"]):
        raise UserError(
            f"the student is {card['model']!r}, whose PyTorch code is not known; "
            "--format=safetensors, stablehlo and onnx take it elsewhere."
        )
    call = torch_code.call_of(card["model"], card["num_classes"], card["image_shape"][-1])
    loader = _LOADER.format(mean=tuple(card["mean"]), std=tuple(card["std"]), call=call)
    return (torch_code.source_of(card["model"]) + loader).encode()


IMAGES = "images"
FORMATS = {
    "safetensors": {"student.safetensors": to_safetensors},
    "pytorch": {"student.py": to_pytorch, "student.safetensors": to_safetensors},
    "stablehlo": {"student.stablehlo": to_stablehlo},
    "onnx": {"student.onnx": to_onnx},
}
"""The files of each format, that of the student first, and what makes them."""


def export(folder: Path, format: str, output: Path, date: datetime | None = None) -> Path:
    """Write the files of a format, `card.json` and `README.md` to a folder, all of them or none.

    Args:
      folder: of a run.
      format: a key of `FORMATS`.
      output: made if missing; files of these names are replaced.
      date: of the export, with a time zone; now by default. All else is the same each time.

    Returns:
      The file of the student. Its metadata, where the format has such, and the card hold what
      `load_student` says and `exported`, the date; of ONNX also `jax2onnx`, the version, and
      `onnx_opset`.

    Raises:
      UserError, DamagedCheckpoint: see `load_student`; a package is missing.
      OSError: the folder cannot be written; nothing is there that was not there before.
    """
    student = load_student(folder)
    exported = (date or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
    student.card.update(exported=exported)
    if format == "onnx":
        _import("jax2onnx", "onnx")
        student.card.update(
            jax2onnx=importlib.metadata.version("jax2onnx"),
            onnx_opset=OPSET,
        )
    contents = {name: make(student) for name, make in FORMATS[format].items()}
    with files.replacing_together(output) as new:
        for name, content in contents.items():
            with files.replacing(new / name) as file:
                file.write(content)
        files.write_json(new / "card.json", student.card)
        with files.replacing(new / "README.md") as file:
            file.write(model_card(student.card).encode())
    return output / next(iter(contents))


def model_card(card: dict[str, Any]) -> str:
    """The card in words, as Markdown."""
    height, width, channels = card["image_shape"]
    teacher = card["teacher"]
    of = f" from {teacher['source']}" if teacher["source"] else ""
    made = [f"{name} {card[name]}" for name in MAKERS if name in card]
    if "exported" in card:
        made.append(f"on {card['exported']}")
    tested = f" on {card['dataset']}"
    return f"""# {card["model"]}, distilled without data

| | |
|---|---|
| student | {card["model"]}, {card["num_classes"]} classes |
| teacher | {teacher["model"]}{of}, accuracy {_percent(teacher["accuracy"])} |
| method | {card["method"]}, seed {card["seed"]}, {card["epoch"]} epochs |
| test accuracy | {_percent(card["accuracy"], tested)} |
| names the teacher's class | {_percent(card["agreement"], " of generated images")} |
| generated images in one class | {_percent(card["class_share"])} |
| images | {height}×{width}×{channels}, normalised with mean {card["mean"]}, std {card["std"]} |
| made by | {", ".join(made)} |

`student.safetensors` holds weights only: give the network (images − mean) / std, images in [0, 1].
`student.py` is its PyTorch code; `load()` there returns the network with these weights.
`student.stablehlo` (read it with `jax.export.deserialize`) and `student.onnx` normalise themselves
and take float32 images (batch, {height}, {width}, {channels}) in [0, 1]. All give logits.
"""


def _percent(value: float | None, of: str = "") -> str:
    return "not measured" if value is None else f"{value:.2f} %{of}"


def _import(module: str, extra: str) -> Any:
    try:
        return __import__(module, fromlist=["*"])
    except ImportError as error:
        raise UserError(
            f"--format needs the package {error.name}; install it with "
            f"pip install 'dfkd-jax[{extra}]'."
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = create_parser("export", __doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="of a run")
    parser.add_argument("--format", required=True, choices=[*FORMATS, IMAGES])
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="DIR/export by default; of images DIR/export/images, which must not be there yet",
    )
    parser.add_argument(
        "--count",
        type=_positive,
        metavar="N",
        help=f"images at most; all of a pool by default, {generated.COUNT} of a generator",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what the arguments name; the exit code."""
    try:
        given = _parser().parse_args(arguments)
        if given.count and given.format != IMAGES:
            raise UserError(
                f"--count is {given.count} but --format is {given.format}; allowed is {IMAGES}."
            )
        if given.format == IMAGES:
            output = given.output or given.folder / "export" / IMAGES
            found = generated.generated_images(given.folder, given.count)
            print(generated.write_images(found, output))
            return 0
        print(export(given.folder, given.format, given.output or given.folder / "export"))
    except files.CannotWrite as error:
        return fail(f"{error}.", 2)
    except (UserError, DamagedCheckpoint, OSError) as error:
        return fail(str(error), 2)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # little to compute, and a run may hold the others
    sys.exit(main())
