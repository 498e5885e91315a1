"""The graph of a network, and its file: operations of PyTorch in the order they are done in.

    {"format": "dfkd_jax.graph/1",
     "input": "x", "image_shape": [32, 32, 3], "output": "linear", "features": "flatten",
     "arrays": {"conv1.weight": {"shape": [16, 3, 3, 3], "order": [2, 3, 1, 0]}, ...},
     "nodes": [["conv2d", "conv2d.default", {"input": "%x", "weight": "%conv1.weight", ...}], ...]}

A node says what its result is called (several results in a list), which operation makes it, and
from what. "%name" is the result of an earlier node, the image or an array; other text begins with
"=". Names of nodes have no dots, those of arrays are PyTorch's.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError

FORMAT = "dfkd_jax.graph/1"


class Ref(NamedTuple):
    """What is called so: the result of a node, the image or an array."""

    name: str


class Node(NamedTuple):
    """One operation.

    Attributes:
      outputs: names of its results; None of one that nobody uses.
      operation: of ATen, with its overload: "conv2d.default".
      arguments: (ATen's name, value): a `Ref`, a number, text, None or a tuple of such.
      several: whether it gives a tuple, of one result perhaps.
      module: the PyTorch module that it came from, "layer1.0.conv1"; for messages.
    """

    outputs: tuple[str | None, ...]
    operation: str
    arguments: tuple[tuple[str, Any], ...]
    several: bool = False
    module: str = ""

    def refs(self) -> Iterator[str]:
        """The names that its arguments refer to."""
        yield from _refs(tuple(value for _, value in self.arguments))

    def argument(self, name: str) -> Any:
        """An argument, None where it is left out."""
        return dict(self.arguments).get(name)


class Array(NamedTuple):
    """An array of the network, and how it lies in its file.

    Attributes:
      shape: PyTorch's.
      order: its axes as they lie: (2, 3, 1, 0) of a kernel (O, I, H, W).
      constant: whether it is no floating-point number, and so no variable.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    constant: bool = False


class Graph(NamedTuple):
    """A network.

    Attributes:
      input: what its nodes call the images, (B, C, H, W) to them.
      image_shape: (H, W, C).
      output: the node that gives logits (B, K).
      features: the node that gives features (B, D), or (B, D, h, w) to be averaged; None: no such.
      arrays: by PyTorch's names.
      nodes: in order.
    """

    input: str
    image_shape: tuple[int, int, int]
    output: str
    features: str | None
    arrays: tuple[tuple[str, Array], ...]
    nodes: tuple[Node, ...]


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, tuple):
        for part in value:
            yield from _refs(part)


def write(graph: Graph, path: Path) -> None:
    """Write the file, a node a line, whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    arrays = {
        name: {
            "shape": array.shape,
            "order": array.order,
            **({"constant": True} if array.constant else {}),
        }
        for name, array in graph.arrays
    }
    head = {
        "format": FORMAT,
        "input": graph.input,
        "image_shape": graph.image_shape,
        "output": graph.output,
        "features": graph.features,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines.append(
        _block("arrays", "{}", [f"{json.dumps(n)}: {json.dumps(a)}" for n, a in arrays.items()])
    )
    lines.append(_block("nodes", "[]", [json.dumps(_listed(node)) for node in graph.nodes]))
    with files.replacing(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _block(key: str, brackets: str, rows: list[str]) -> str:
    return f'  "{key}": {brackets[0]}\n    ' + ",\n    ".join(rows) + f"\n  {brackets[1]}"


def _listed(node: Node) -> list[Any]:
    outputs = list(node.outputs) if node.several else node.outputs[0]
    arguments = {name: _written(value) for name, value in node.arguments}
    return [outputs, node.operation, arguments, *([node.module] if node.module else [])]


def _written(value: Any) -> Any:
    if isinstance(value, Ref):
        return f"%{value.name}"
    if isinstance(value, str):
        return f"={value}"
    return [_written(part) for part in value] if isinstance(value, tuple) else value


def read(path: Path) -> Graph:
    """Read the file.

    Raises:
      UserError: it is not there or damaged, or of a later version; one sentence.
    """
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise UserError(
                f"{path} has the format {found['format']!r}; this version of dfkd_jax reads "
                f"{FORMAT!r}."
            )
        return Graph(
            input=found["input"],
            image_shape=tuple(found["image_shape"]),
            output=found["output"],
            features=found["features"],
            arrays=tuple((name, _array(array)) for name, array in found["arrays"].items()),
            nodes=tuple(map(_node, found["nodes"])),
        )
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is missing or damaged ({type(error).__name__}).") from error


def _array(found: Mapping[str, Any]) -> Array:
    return Array(tuple(found["shape"]), tuple(found["order"]), found.get("constant", False))


def _node(found: list[Any]) -> Node:
    outputs, operation, arguments, *module = found
    several = isinstance(outputs, list)
    return Node(
        outputs=tuple(outputs) if several else (outputs,),
        operation=operation,
        arguments=tuple((name, _value(value)) for name, value in arguments.items()),
        several=several,
        module=module[0] if module else "",
    )


def _value(found: Any) -> Any:
    if isinstance(found, str):
        return Ref(found[1:]) if found.startswith("%") else found[1:]
    return tuple(map(_value, found)) if isinstance(found, list) else found
