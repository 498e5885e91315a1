"""The module that runs a graph, and its folder.

A folder holds `graph.json` (see `program`), the weights beside it, as of every teacher, and, if the
network has tables of whole numbers, `constants.safetensors`.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfkd_jax.networks import convolution
from dfkd_jax.networks.graph import operations, program
from dfkd_jax.networks.graph.operations.normalizations import batch_norm_of_weights
from dfkd_jax.networks.graph.program import Graph, Node, Ref
from dfkd_jax.networks.graph.tensors import Tensor, channels_last, plain, reduced, stored, tensor
from dfkd_jax.networks.layers import at_least_float32
from dfkd_jax.runtime import array_files
from dfkd_jax.runtime.errors import UserError

MODEL = "graph"
"""What a configuration calls the network that its teacher's folder describes."""

GRAPH, CONSTANTS = "graph.json", "constants.safetensors"
BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")
_IN_SIZES = {  # of the arithmetic of sizes
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "truediv": lambda a, b: a / b,
    "mod": lambda a, b: a % b,
    "neg": lambda a: -a,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


class Unsupported(UserError):
    """An operation that cannot be done here; one sentence that names it and its module."""


class BatchNormLayer(NamedTuple):
    """A batch norm whose parameters and statistics are arrays of the network: its arrays' names."""

    name: str
    weight: str | None
    bias: str | None
    mean: str
    var: str


def batch_norm_of(graph: Graph, node: Node) -> BatchNormLayer | None:
    """The layer that a node is; None if it is no batch norm, or one of computed numbers."""
    if node.operation.partition(".")[0] not in BATCH_NORMS or node.argument("training"):
        return None
    arrays = dict(graph.arrays)
    names = ("weight", "bias", "running_mean", "running_var")
    given = [node.argument(name) for name in names]
    if any(g is not None and not (isinstance(g, Ref) and g.name in arrays) for g in given):
        return None
    weight, bias, mean, var = (None if g is None else g.name for g in given)
    if mean is None or var is None:
        return None
    return BatchNormLayer(mean.removesuffix(".running_mean"), weight, bias, mean, var)


def layers(graph: Graph) -> dict[int, BatchNormLayer]:
    """The batch norms of a network by the numbers of their nodes.

    One of whose arrays somebody else makes use too is done as arithmetic, and is no layer.
    """
    found = {i: batch_norm_of(graph, node) for i, node in enumerate(graph.nodes)}
    found = {i: layer for i, layer in found.items() if layer is not None}
    uses = Counter(name for node in graph.nodes for name in node.refs())
    shared = Counter(layer for layer in found.values())
    return {
        i: layer
        for i, layer in found.items()
        if all(name is None or uses[name] == shared[layer] for name in layer[1:])
    }


class GraphNetwork(nn.Module):
    """A network that came as a graph, in evaluation: (B, H, W, C) → logits (B, K), features (B, D).

    Batch norms are layers of Flax, so that what enters them can be seen; everything else is the
    operations of the graph. `train` changes nothing: a graph was made in evaluation.

    Attributes:
      graph: of the network.
      constants: tables of whole numbers, by name.
      num_classes: K.
      dtype: dtype of the computation; None follows input and parameters.
    """

    graph: Graph
    constants: Any
    num_classes: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> tuple[Float[Array, "B K"], Float[Array, "B D"] | None]:
        """Run the graph; logits and features are at least float32, features None without a node."""
        del train
        graph, made = self.graph, {}
        found = layers(graph)
        in_layers = {name for layer in found.values() for name in layer[1:]}
        values: dict[str | None, Any] = {}
        for name, array in graph.arrays:
            if array.constant:
                values[name] = tensor(jnp.asarray(self.constants[name]))
            elif name not in in_layers:
                shape = tuple(array.shape[axis] for axis in array.order)
                values[name] = tensor(self._cast(self.param(name, _zeros, shape)), array.order)
        values[graph.input] = tensor(self._cast(x), channels_last(4))
        for i, node in enumerate(graph.nodes):
            if i in found:
                layer = found[i]
                if layer.name not in made:
                    made[layer.name] = self._batch_norm(layer, node)
                value = _filled(node.argument("input"), values)
                result = _normalized(made[layer.name], value, node)
            else:
                result = _done(node, {name: _filled(v, values) for name, v in node.arguments})
            results = result if node.several else (result,)
            values.update(zip(node.outputs, results, strict=False))
        logits = plain(values[graph.output])
        if graph.features is None:
            return at_least_float32(logits), None
        features = values[graph.features]
        return at_least_float32(logits), at_least_float32(plain(_pooled(features)))

    def _cast(self, array: jax.Array) -> jax.Array:
        return array if self.dtype is None else array.astype(self.dtype)

    def _batch_norm(self, layer: BatchNormLayer, node: Node) -> nn.BatchNorm:
        return nn.BatchNorm(
            use_running_average=True,
            epsilon=node.argument("eps"),
            use_scale=layer.weight is not None,
            use_bias=layer.bias is not None,
            dtype=self.dtype,
            name=layer.name,
        )


def check_known(graph: Graph) -> None:
    """Refuse operations that are not known.

    Raises:
      Unsupported: names the first with its module, then all others.
    """
    unknown = [node for node in graph.nodes if not _is_known(node)]
    if unknown:
        names = sorted({node.operation for node in unknown} - {unknown[0].operation})
        more = f", and neither are {', '.join(names)}" if names else ""
        raise Unsupported(f"the operation {_where(unknown[0])} is not known{more}.")


def check(
    graph: Graph,
    constants: Mapping[str, np.ndarray],
    num_classes: int,
    exported: int | None = None,
) -> None:
    """Trace the network for two numbers of images, without computing.

    Args:
      graph: of the network.
      constants: tables of whole numbers, by name.
      num_classes: K.
      exported: the number of images that it was exported for, if that was fixed.

    Raises:
      Unsupported: an operation is not known or cannot be done; names it and its module.
      UserError: the network takes one number of images alone; one sentence.
    """
    check_known(graph)
    network = GraphNetwork(graph, constants, num_classes)

    def shape(count: int) -> tuple[int, ...]:
        images = jnp.zeros((count, *graph.image_shape))
        return network.init_with_output(jax.random.key(0), images)[0][0].shape

    found: list[tuple[int, ...]] = []
    reason: Exception | None = None
    try:
        with convolution.plain():  # which asks for no backend
            for count in (2, 3):
                jax.eval_shape(lambda count=count: found.append(shape(count)))
    except Unsupported as error:
        if exported is None:
            raise
        reason = error
    if found != [(2, num_classes), (3, num_classes)]:
        raise UserError(
            "it does not take any number of images; torch.export.export needs dynamic_shapes="
            "({0: torch.export.Dim.DYNAMIC},) for that."
        ) from reason


def _is_known(node: Node) -> bool:
    base, _, rest = node.operation.partition(".")
    if base == "_operator":
        return rest in _IN_SIZES
    return base == "sym_size" or base in BATCH_NORMS or operations.find(node.operation) is not None


def _zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del key  # a graph comes with weights
    return jnp.zeros(shape)


def _filled(value: Any, values: Mapping[str | None, Any]) -> Any:
    """An argument, its names replaced by values."""
    if isinstance(value, Ref):
        return values[value.name]
    return [_filled(part, values) for part in value] if isinstance(value, tuple) else value


def _done(node: Node, arguments: dict[str, Any]) -> Any:
    """The result of a node that is no layer."""
    base = node.operation.partition(".")[0]
    if base == "sym_size":
        return arguments["self"].shape[arguments["dim"]]
    if node.operation.startswith("_operator."):
        return _IN_SIZES[node.operation.partition(".")[2]](*arguments.values())
    if base in BATCH_NORMS:
        return _arithmetic_batch_norm(node, arguments)
    function = operations.find(node.operation)
    assert function is not None, node.operation  # `check` has looked
    try:
        return function(**arguments)
    except NotImplementedError as error:
        raise Unsupported(f"{_where(node)} cannot be done: {error}.") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise Unsupported(
            f"{_where(node)} cannot be done ({type(error).__name__}: {reason})."
        ) from error


def _where(node: Node) -> str:
    of = f" of the module {node.module!r}" if node.module else ""
    return f"{node.operation!r}{of}"


def _normalized(norm: nn.BatchNorm, value: Tensor, node: Node) -> Any:
    order = channels_last(value.ndim)
    result = tensor(norm(stored(value, order)), order)
    return (result, *(None for _ in node.outputs[1:])) if node.several else result


def _arithmetic_batch_norm(node: Node, arguments: dict[str, Any]) -> Any:
    value: Tensor = arguments["input"]
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (arguments.get(name) for name in names)
    eps = arguments["eps"]
    if mean is None or arguments.get("training"):
        result = batch_norm_of_weights(value, weight, bias, eps)
    else:
        shape = [1] * value.ndim
        shape[1] = -1

        def spread(vector: Tensor | None, default: float) -> Any:
            return default if vector is None else plain(vector).reshape(shape)

        scale = jax.lax.rsqrt(spread(var, 1.0) + eps) * spread(weight, 1.0)
        result = tensor((plain(value) - spread(mean, 0.0)) * scale + spread(bias, 0.0))
    return (result, *(None for _ in node.outputs[1:])) if node.several else result


def _pooled(features: Tensor) -> Tensor:
    """(B, D): means over pixels (B, D, h, w) or words (B, N, D)."""
    if features.ndim == 3:
        return reduced(jnp.mean, features, 1)
    return (
        reduced(jnp.mean, features, list(range(2, features.ndim)))
        if features.ndim > 2
        else features
    )


def variables(graph: Graph, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The network's variables of arrays in PyTorch's layout, as float32.

    Args:
      graph: of the network.
      arrays: by name; whole numbers are left out.
    """
    found = {layer.name: layer for layer in layers(graph).values()}
    params: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for name, layer in found.items():
        scale, bias, mean, var = (None if n is None else _float32(arrays[n]) for n in layer[1:])
        affine = {"scale": scale, "bias": bias}
        affine = {key: value for key, value in affine.items() if value is not None}
        if affine:
            params[name] = affine
        statistics[name] = {"mean": mean, "var": var}
    in_layers = {name for layer in found.values() for name in layer[1:]}
    for name, array in graph.arrays:
        if name not in in_layers and not array.constant:
            params[name] = np.copy(_float32(arrays[name]).transpose(array.order), order="C")
    return {"params": params, **({"batch_stats": statistics} if statistics else {})}


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as not finite
        return np.asarray(array, np.float32)


def read_network(
    folder: str | Path, num_classes: int, *, dtype: DTypeLike | None = None
) -> GraphNetwork:
    """The network of a teacher's folder.

    Args:
      folder: as `convert` writes it.
      num_classes: K.
      dtype: of the computation; None follows input and parameters.

    Raises:
      UserError: a file of it is missing or damaged; one sentence.
    """
    graph = program.read(Path(folder) / GRAPH)
    try:
        check_known(graph)
    except Unsupported as error:
        raise UserError(f"{Path(folder) / GRAPH} cannot be used: {error}") from error
    constants: dict[str, np.ndarray] = {}
    if any(array.constant for _, array in graph.arrays):
        constants = array_files.read(Path(folder) / CONSTANTS)
    return GraphNetwork(graph, constants, num_classes, dtype=dtype)
