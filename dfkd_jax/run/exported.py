"""Reading exported students: a file ↦ (logits of images in [0, 1], (H, W, C, K)).

A file of weights is data from anywhere, so whatever is wrong with one is a sentence that names it,
and none has code run: not even a network of one's own is imported because a file names it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from dfkd_jax.interchange.torch_file import read_state_dict
from dfkd_jax.interchange.torch_layouts import from_torch
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.networks.own_module import is_own
from dfkd_jax.run.student import Student, logits_of, shape_of
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.finite import check_variables

Read = tuple[Callable[[np.ndarray], Any], tuple[int, ...]]
LARGEST = 1e30  # of a mean or deviation; any float32 could hold it


def read_safetensors(path: Path, own: str | None = None) -> Read:
    """The weights of `export.to_safetensors`, in the network that its metadata names.

    Args:
      path: of the file.
      own: the "package.module:attribute" that may be imported if the metadata names it.

    Raises:
      UserError: it is damaged, was not written by `export`, or names another module to import; one
        sentence.
    """
    arrays = read_state_dict(path)  # which refuses what is no such file
    card = _card(path)
    model, image_shape = card["model"], tuple(card["image_shape"])
    if is_own(model) and model != own:
        raise UserError(
            f"{path} names {model!r} to import, which would run code; allowed is that of "
            f"--config.student.model, which is {own!r}."
        )
    try:
        module = create_classifier(model, card["num_classes"])
        if card["names"] == "flax":
            variables = _from_flax(module, image_shape, arrays)
        else:
            variables, _ = from_torch(model, card["num_classes"], image_shape, arrays)
    except Exception as error:  # a shape that no network takes shows in many ways
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from error
    return jax.jit(logits_of(Student(module, variables, card))), shape_of(card)


def _card(path: Path) -> dict[str, Any]:
    """What the metadata says of the network, each value of the kind that it must be."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # weights of another kind of file
        raise UserError(f"{path} is no safetensors file: {_reason(error)}.") from error
    allowed = {
        "model": (lambda v: isinstance(v, str), "the name of a classifier"),
        "names": (lambda v: v in ("torch", "flax"), "torch or flax"),
        "num_classes": (_is_count, "1 or more"),
        "image_shape": (
            lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_count, v)),
            "three numbers of 1 or more",
        ),
        "mean": (_are_numbers, "a list of numbers, one per channel"),
        "std": (lambda v: _are_numbers(v) and min(v) > 0, "a list of numbers above 0, likewise"),
    }
    missing = [field for field in allowed if field not in metadata]
    if missing:
        raise UserError(
            f"{path} has no metadata {', '.join(missing)}; allowed is what dfkd_jax.export writes."
        )
    card = {}
    for field, (holds, words) in allowed.items():
        text = metadata[field]
        try:
            card[field] = text if field in ("model", "names") else json.loads(text)
        except (ValueError, RecursionError):
            card[field] = None
        if not holds(card[field]):
            raise UserError(f"{path} has the metadata {field} {text[:100]!r}; allowed is {words}.")
    channels = card["image_shape"][2]
    if not len(card["mean"]) == len(card["std"]) == channels:
        raise UserError(
            f"{path} has {len(card['mean'])} numbers as metadata mean and {len(card['std'])} as "
            f"std; allowed are {channels}, one per channel."
        )
    return card


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(number) in (int, float) and abs(number) < LARGEST for number in value)
    )


def _from_flax(
    module: nn.Module, image_shape: tuple[int, ...], arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The variables of a module of one's own, by Flax's names joined by "."."""
    images = jnp.zeros((1, *image_shape))
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))
    flat: dict[str, Any] = flatten_dict(dict(abstract), sep=".")
    wanted = {name: leaf.shape for name, leaf in flat.items()}
    wrong = [name for name in wanted if name not in arrays or arrays[name].shape != wanted[name]]
    wrong += [name for name in arrays if name not in wanted]
    if wrong:
        raise UserError(f"missing, unknown or of another shape are {', '.join(wrong)}")
    variables = unflatten_dict(arrays, sep=".")
    check_variables(variables, "it")
    return variables


def read_stablehlo(path: Path) -> Read:
    """The function of `export.to_stablehlo`.

    Raises:
      UserError: it is damaged, takes or gives something else, or flatbuffers is not installed; one
        sentence.
    """
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
        (images,), (logits,) = exported.in_avals, exported.out_avals
        (_, *image_shape), (_, num_classes) = images.shape, logits.shape
    except Exception as error:  # damage shows in as many ways as there are fields
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from error
    return jax.jit(exported.call), (*image_shape, num_classes)


def read_onnx(path: Path) -> Read:
    """The graph of `export.to_onnx`, run by ONNX Runtime.

    Raises:
      UserError: it is damaged, takes or gives something else, or ONNX Runtime is not installed;
        one sentence.
    """
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (argument,), (result,) = session.get_inputs(), session.get_outputs()
        (_, *image_shape), (_, num_classes) = argument.shape, result.shape
    except Exception as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from error
    return (
        lambda images: session.run(None, {argument.name: images})[0],
        (*image_shape, num_classes),
    )


def _reason(error: Exception) -> str:
    """The first line of what it says, without the full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
