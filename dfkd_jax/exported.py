"""Reading exported students: a file ↦ (logits of images in [0, 1], (H, W, C, K))."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax.traverse_util import unflatten_dict

from dfkd_jax.classifiers import create_classifier
from dfkd_jax.student import Student, logits_of, shape_of
from dfkd_jax.torch_file import read_state_dict
from dfkd_jax.torch_layouts import from_torch

Read = tuple[Callable[[np.ndarray], Any], tuple[int, ...]]


def read_safetensors(path: Path) -> Read:
    """The weights of `export.to_safetensors`, in the network that its metadata names.

    Raises:
      ValueError: it is damaged, or was not written by `export`; one sentence.
    """
    arrays = read_state_dict(path)  # which refuses what is no such file
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    fields = ("model", "names", "num_classes", "image_shape", "mean", "std")
    missing = [field for field in fields if field not in metadata]
    if missing:
        raise ValueError(
            f"{path} has no metadata {', '.join(missing)}; allowed is what dfkd_jax.export writes."
        )
    card = {f: metadata[f] if f in fields[:2] else json.loads(metadata[f]) for f in fields}
    module = create_classifier(card["model"], card["num_classes"])
    if card["names"] == "flax":
        variables = unflatten_dict(arrays, sep=".")
    else:
        shape = tuple(card["image_shape"])
        variables, _ = from_torch(card["model"], card["num_classes"], shape, arrays)
    return jax.jit(logits_of(Student(module, variables, card))), shape_of(card)


def read_stablehlo(path: Path) -> Read:
    """The function of `export.to_stablehlo`.

    Raises:
      ValueError: it is damaged, or flatbuffers is not installed; one sentence.
    """
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
        (images,), (logits,) = exported.in_avals, exported.out_avals
    except Exception as error:  # damage shows in as many ways as there are fields
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error
    return jax.jit(exported.call), (*images.shape[1:], logits.shape[1])


def read_onnx(path: Path) -> Read:
    """The graph of `export.to_onnx`, run by ONNX Runtime.

    Raises:
      ValueError: it is damaged, or ONNX Runtime is not installed; one sentence.
    """
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (argument,), (result,) = session.get_inputs(), session.get_outputs()
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{path} cannot be read: {reason}.") from error
    return (
        lambda images: session.run(None, {argument.name: images})[0],
        (*argument.shape[1:], result.shape[1]),
    )
