"""Reading what `torch.export.save` writes, a `.pt2` archive, without PyTorch and its loader.

The archive is a zip of JSON and of raw bytes. `torch.export.load` also unpickles parts of it, which
can run any code; here nothing is unpickled and no name in the file is looked up anywhere but in our
own table of operations. What the file declares is compared with its size before it is read.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dfkd_jax.interchange.pt2_archive import Archive
from dfkd_jax.networks.graph.operations import changes_its_argument
from dfkd_jax.networks.graph.program import Array, Graph, Node, Ref
from dfkd_jax.runtime.errors import UserError

# Operations whose result may share the memory of their first argument.
_VIEWS = frozenset(
    "alias as_strided chunk contiguous detach diagonal dropout expand expand_as flatten mT "
    "movedim narrow numpy_T permute positive reshape select slice split split_with_sizes squeeze "
    "swapaxes t to transpose unbind unflatten unsqueeze view view_as _unsafe_view "
    "feature_dropout alpha_dropout".split()
)
_CONVOLUTIONS = frozenset(("conv1d", "conv2d", "conv3d", "convolution"))
_DENSE = {"linear": "input", "addmm": "mat1"}  # and what each multiplies with its weights
_NOTHING = ("_assert", "sym_constrain")


class Program(NamedTuple):
    """A network and its arrays in PyTorch's layout.

    Attributes:
      graph: of the network; its `order`s say how its arrays are to lie.
      arrays: by PyTorch's names.
      num_classes: K.
      count: of images, if the graph was made for that number alone perhaps.
      notes: what was chosen where the file leaves a choice, a sentence each.
    """

    graph: Graph
    arrays: dict[str, np.ndarray]
    num_classes: int
    count: int | None
    notes: tuple[str, ...]


def is_archive(path: Path) -> bool:
    """Whether a file is a `.pt2` archive, or called so."""
    if path.suffix.lower() == ".pt2":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/archive_format") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, RuntimeError, ValueError):
        return False


def read_program(
    path: str | Path, features: str | None = None, logits: str | None = None
) -> Program:
    """The network of a `.pt2` archive.

    Args:
      path: of the file.
      features: the node or the module whose result is the features; None: what the last dense
        layer multiplies, or without one what the last convolution does.
      logits: the node that gives the logits; None: the result of shape (B, K).

    Raises:
      UserError: the file cannot be read, is damaged, or is no such network; one sentence.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            files = Archive(path, archive)
            model = files.json("models/model.json")
            arrays = {**files.tensors("weights"), **files.tensors("constants")}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged: its archive cannot be read.") from error
    except _MALFORMED as error:
        raise UserError(f"{path} is damaged: its weights are not described as they are.") from error
    try:
        return _Reader(path, model, arrays).program(features, logits)
    except UserError:
        raise
    except _MALFORMED as error:
        raise UserError(
            f"{path} is damaged, or of a version of PyTorch that is not known here "
            f"({type(error).__name__})."
        ) from error


_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError)


class _Reader:
    """A graph as the archive writes it, on the way to ours."""

    def __init__(self, path: Path, model: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self._path, self._arrays = path, arrays
        module = model["graph_module"]
        self._graph, self._signature = module["graph"], module["signature"]
        self._names: dict[str, str] = {}  # what a name of the file is called now
        self._families: dict[str, str] = {}  # a tensor whose memory it may share
        self._views: dict[str, tuple[str, Node]] = {}  # of what, and by which node
        self._stale: set[str] = set()  # changed by writing into what they share memory with
        self._input = self._inputs()

    def program(self, features: str | None, logits: str | None) -> Program:
        nodes = [node for found in self._graph["nodes"] for node in self._node(found)]
        output, num_classes = self._output(logits)
        self._check_made(nodes, output)
        notes = []
        output, note = _before_softmax(nodes, output)
        notes += note
        chosen, note = self._features(nodes, output, features)
        notes += note
        needed = _needed(nodes, [output, *([chosen] if chosen else [])])
        used = {name for node in needed for name in node.refs()}
        arrays = {name: array for name, array in self._arrays.items() if name in used}
        self._check_batch_norms(needed)
        graph = Graph(
            input=self._input,
            image_shape=self._image_shape(),
            output=output,
            features=chosen,
            arrays=tuple(
                (name, Array(array.shape, _order(needed, name, array), _is_constant(array)))
                for name, array in arrays.items()
            ),
            nodes=tuple(needed),
        )
        count = self._sizes(self._input)[0].get("as_int")
        return Program(graph, arrays, num_classes, count, tuple(notes))

    def _check_made(self, nodes: list[Node], output: str) -> None:
        """Everything that is referred to must be there before it is."""
        made = {self._input, *self._arrays}
        for node in [*nodes, Node((), "output", (("self", Ref(output)),))]:
            for name in node.refs():
                if name not in made:
                    raise UserError(
                        f"{self._path} is damaged: it reads {name[:100]!r}, which nothing makes."
                    )
            made.update(name for name in node.outputs if name is not None)

    def _inputs(self) -> str:
        images = []
        for spec in self._signature["input_specs"]:
            ((kind, facts),) = spec.items()
            if kind == "user_input":
                argument = facts["arg"]
                if "as_tensor" not in argument:
                    raise UserError(
                        f"{self._path} takes more than images; allowed is a model(images)."
                    )
                images.append(argument["as_tensor"]["name"])
            elif kind in ("parameter", "buffer", "tensor_constant"):
                self._names[facts["arg"]["name"]] = facts[f"{kind}_name"]
            else:
                raise UserError(f"{self._path} takes a {kind.replace('_', ' ')}, which is unknown.")
        if len(images) != 1:
            raise UserError(f"{self._path} takes {len(images)} tensors; allowed is one of images.")
        lacking = [name for name in self._names.values() if name not in self._arrays]
        if lacking:
            raise UserError(f"{self._path} is damaged: {lacking[0][:100]!r} is not in it.")
        return images[0]

    def _image_shape(self) -> tuple[int, int, int]:
        sizes: list[Any] = [size.get("as_int") for size in self._sizes(self._input)]
        if len(sizes) != 4 or sizes[1] not in (1, 3) or None in sizes[1:] or sizes[2] != sizes[3]:
            shown = tuple("any" if size is None else size for size in sizes)
            raise UserError(
                f"{self._path} takes a tensor of shape {shown}; allowed is (B, 1 or 3, H, H) with "
                "fixed channels and sides."
            )
        return sizes[2], sizes[3], sizes[1]

    def _sizes(self, name: str) -> list[Mapping[str, Any]]:
        return self._graph["tensor_values"][name]["sizes"]

    def _output(self, logits: str | None) -> tuple[str, int]:
        outputs = []
        for spec in self._signature["output_specs"]:
            ((kind, facts),) = spec.items()
            if kind != "user_output":
                raise UserError(
                    f"{self._path} changes its own {kind.partition('_')[0]}s, as in training; call "
                    "model.eval() before torch.export.export."
                )
            if "as_tensor" in facts["arg"]:
                outputs.append(facts["arg"]["as_tensor"]["name"])
        if logits is not None:
            if logits not in outputs:
                raise UserError(
                    f"--logits is {logits!r}; {self._path} gives {', '.join(outputs) or 'nothing'}."
                )
            outputs = [logits]
        flat = [name for name in outputs if len(self._sizes(name)) == 2]
        if len(flat) != 1:
            raise UserError(
                f"{self._path} gives {len(flat)} tensors of shape (B, K), {', '.join(outputs)}; "
                "allowed is one, which --logits=NAME chooses."
            )
        classes = self._sizes(flat[0])[1].get("as_int")
        if classes is None or classes < 2:
            raise UserError(f"{self._path} gives {classes} classes; allowed are 2 or more.")
        return self._reference({"name": flat[0]}).name, classes

    def _features(
        self, nodes: list[Node], output: str, features: str | None
    ) -> tuple[str | None, list[str]]:
        if features is not None:
            of_module = [n for n in nodes if features in n.outputs or n.module == features]
            if not of_module or of_module[-1].outputs[0] is None:
                raise UserError(
                    f"--features is {features!r}; {self._path} has no node and no module of that "
                    "name that gives a tensor."
                )
            last = of_module[-1]
            return (features if features in last.outputs else last.outputs[0]), []
        before = _needed(nodes, [output])
        searched: tuple[dict[str, str], ...] = (_DENSE, dict.fromkeys(_CONVOLUTIONS, "input"))
        for kinds in searched:
            for node in reversed(before):
                base = node.operation.partition(".")[0]
                value = node.argument(kinds[base]) if base in kinds else None
                if isinstance(value, Ref) and value.name not in self._arrays:
                    return value.name, []
        return None, ["it has no dense layer and so no features; --features=NAME chooses some"]

    def _check_batch_norms(self, nodes: list[Node]) -> None:
        for node in nodes:
            base = node.operation.partition(".")[0]
            if base == "batch_norm":
                by_batch = node.argument("training") or node.argument("running_mean") is None
                of_images = not _of_arrays_alone(nodes, node, self._arrays)
                if by_batch and of_images:
                    raise UserError(
                        f"{self._path} normalises by the statistics of each batch in "
                        f"{node.module or node.outputs[0]!r}, as in training; call model.eval() "
                        "before torch.export.export."
                    )
            if "dropout" in base and node.argument("train") and node.argument("p"):
                raise UserError(
                    f"{self._path} has dropout that is active in {node.module!r}, as in training; "
                    "call model.eval() before torch.export.export."
                )

    def _node(self, found: Mapping[str, Any]) -> Iterator[Node]:
        target: str = found["target"]
        operation = target.removeprefix("torch.ops.aten.")
        if operation.startswith(_NOTHING):
            return
        arguments = tuple((a["name"], self._value(a["arg"])) for a in found["inputs"])
        outputs, several = _outputs(found["outputs"])
        node = Node(outputs, operation, arguments, several, _module(found))
        if changes_its_argument(operation) and outputs[0] is not None:
            yield from self._written(node, outputs[0])
            return
        yield node
        if operation.partition(".")[0] in _VIEWS and isinstance(arguments[0][1], Ref):
            viewed = arguments[0][1].name
            for name in outputs:
                if name is not None:
                    self._families[name] = self._family(viewed)
                    self._views[name] = (viewed, node)

    def _family(self, name: str) -> str:
        return self._families.get(name, name)

    def _written(self, node: Node, result: str) -> Iterator[Node]:
        """A node that writes into its argument as one that does not: later readers see its result.

        What is written into a part of a tensor is put there by a node of its own. Other views of
        that tensor are stale then, and whoever reads one is refused, see `_reference`.
        """
        target = node.arguments[0][1].name
        base, _, overload = node.operation.partition(".")
        yield node._replace(operation=f"{base.removesuffix('_')}.{overload}")
        self._rename(target, result)
        family = self._family(target)
        whole, steps = self._part(target)
        if steps:
            put = f"{result}_put"
            arguments = (("self", Ref(whole)), ("value", Ref(result)), ("steps", steps))
            yield Node((put,), "put_part", arguments, module=node.module)
            self._rename(whole, put)
            self._families[put] = family
        members = {name for name, other in self._families.items() if other == family} | {family}
        self._stale |= members - {target, result, whole, f"{result}_put"}
        self._families[result] = family

    def _rename(self, name: str, now: str) -> None:
        self._names.update({n: now for n, present in self._names.items() if present == name})
        self._names[name] = now

    def _part(self, name: str) -> tuple[str, tuple[Any, ...]]:
        """What a slice of slices is a part of, and the way there: (operation, arguments) each."""
        steps: list[Any] = []
        while name in self._views:
            name, node = self._views[name]
            base = node.operation.partition(".")[0]
            if base not in ("slice", "select"):
                return name, ()
            names = ("dim", "start", "end", "step") if base == "slice" else ("dim", "index")
            steps.insert(0, (base, *map(node.argument, names)))
        return name, tuple(steps)

    def _value(self, found: Mapping[str, Any]) -> Any:
        ((kind, value),) = found.items()
        if kind in _VALUES:
            return _VALUES[kind](value)
        if kind in ("as_tensor", "as_sym_int", "as_sym_bool", "as_sym_float"):
            return self._reference(value)
        if kind in ("as_tensors", "as_sym_ints"):
            return tuple(map(self._reference, value))
        if kind == "as_optional_tensors":
            return tuple(map(self._value, value))
        if kind == "as_optional_tensor":
            return self._value(value)
        raise UserError(f"{self._path} has an argument of the kind {kind!r}, which is not known.")

    def _reference(self, found: Mapping[str, Any]) -> Any:
        name = found.get("name", found.get("as_name"))
        if name is None:
            ((_, value),) = found.items()
            return value
        name = self._names.get(str(name), str(name))
        if name in self._stale:
            raise UserError(
                f"{self._path} writes into a part of {name!r} and reads it again, which is not "
                "known here; allowed is x = f(x) instead of f(x, inplace=True)."
            )
        return Ref(name)


def _float(value: Any) -> float:
    return float(value)


_VALUES: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda value: None,
    "as_int": int,
    "as_float": _float,
    "as_bool": bool,
    "as_string": str,
    "as_ints": tuple,
    "as_floats": lambda value: tuple(map(_float, value)),
    "as_bools": tuple,
    "as_strings": tuple,
    "as_scalar_type": int,
    "as_memory_format": lambda value: None,
    "as_layout": lambda value: None,
    "as_device": lambda value: None,
}


def _outputs(found: list[Mapping[str, Any]]) -> tuple[tuple[str | None, ...], bool]:
    """The names of a node's results, and whether it gives a tuple."""
    names: list[str | None] = []
    several = len(found) > 1
    for output in found:
        ((kind, value),) = output.items()
        if kind == "as_tensors":
            several = True
            names += [part["name"] for part in value]
        elif kind == "as_none":
            names.append(None)
        else:
            names.append(value.get("name", value.get("as_name")))
    return tuple(names), several


def _module(found: Mapping[str, Any]) -> str:
    """The path of the innermost module: "key,path,class" joined by ";"."""
    stack = found.get("metadata", {}).get("nn_module_stack", "")
    parts = stack.rpartition(";")[2].split(",")
    return parts[1] if len(parts) == 3 and not parts[1].startswith("_") else ""


def _needed(nodes: list[Node], results: list[str]) -> list[Node]:
    """The nodes that these results come from."""
    wanted = set(results)
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.refs())
    return kept[::-1]


def _of_arrays_alone(nodes: list[Node], node: Node, arrays: Mapping[str, Any]) -> bool:
    """Whether a node's result does not depend on the images."""
    made = {name for other in _needed(nodes, [node.outputs[0] or ""]) for name in other.outputs}
    before = {name for other in _needed(nodes, [node.outputs[0] or ""]) for name in other.refs()}
    return all(name in arrays or name in made for name in before)


def _before_softmax(nodes: list[Node], output: str) -> tuple[str, list[str]]:
    """The logits that a network's last softmax was made of."""
    for node in nodes:
        if output in node.outputs:
            base = node.operation.partition(".")[0].lstrip("_")
            value = node.argument("self") or node.argument("input")
            over_classes = node.argument("dim") in (1, -1)
            if base in ("softmax", "log_softmax") and over_classes and isinstance(value, Ref):
                return value.name, [f"the logits are what its last {base} is made of"]
    return output, []


def _order(nodes: list[Node], name: str, array: np.ndarray) -> tuple[int, ...]:
    """How an array is to lie: kernels (H, W, I, O), weights of dense layers (I, O)."""
    for node in nodes:
        base = node.operation.partition(".")[0]
        if node.argument("weight") == Ref(name):
            if base in _CONVOLUTIONS:
                return (*range(2, array.ndim), 1, 0)
            if base == "linear":
                return (1, 0)
    return tuple(range(array.ndim))


def _is_constant(array: np.ndarray) -> bool:
    return array.dtype.kind in "iub"
