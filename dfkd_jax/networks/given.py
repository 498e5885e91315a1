"""Networks given in memory, as classifiers: (x, train) -> (logits, features).

A teacher is one of

    (module, variables)    a flax.linen module
    (apply, variables)     a function, apply(variables, x) -> logits or (logits, features)
    a flax.nnx module      with its variables in it

and a student a flax.linen module, such a module with variables to start from, or a flax.nnx module.
Modules are called with x (B, H, W, C), linen ones with `train` as well if they take it, and return
logits (B, K) alone or with features (B, D), the input of the last layer.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from dfkd_jax.runtime.errors import UserError

Variables = dict[str, Any]
TEACHERS = (
    "(module, variables) of a flax.linen module, (apply, variables) of a function, or a flax.nnx "
    "module"
)
STUDENTS = (
    "the name of a classifier, a flax.linen module, (module, variables) of one, or a flax.nnx "
    "module"
)


class Classifier:
    """A network with the methods of a linen classifier that the algorithm calls.

    Attributes:
      name: for messages and records.
      axis_name: there if batch statistics can be averaged over a mapped axis.
    """

    def __init__(
        self,
        name: str,
        init: Callable[[jax.Array, jax.Array, bool], Variables],
        call: Callable[[Variables, jax.Array, bool], tuple[Any, Variables]],
        on_axis: Callable[[str], "Classifier"] | None = None,
        masks: bool = True,
        takes_train: bool = True,
    ) -> None:
        """Wrap a network.

        Args:
          name: of it.
          init: (key, x, train) ↦ variables to start from.
          call: (variables, x, train) ↦ its output and the batch statistics after it.
          on_axis: the same network with statistics averaged over that axis.
          masks: whether examples can be left out of its batch statistics.
          takes_train: whether it knows training from evaluation.
        """
        self.masks, self.takes_train = masks, takes_train
        self.name, self._init, self._call, self._on_axis = name, init, call, on_axis
        if on_axis is not None:
            self.axis_name = None

    def init(self, key: jax.Array, x: jax.Array, train: bool = False) -> Variables:
        """Variables to start from: "params" and, if there are any, "batch_stats"."""
        return self._init(key, x, train)

    def apply(self, variables: Any, x: jax.Array, train: bool = False, mutable: Any = False) -> Any:
        """(logits, features), with `mutable` and the batch statistics after it; features or None.

        As of `flax.linen.Module.apply`.
        """
        output, statistics = self._call(variables, x, train)
        pair = output if isinstance(output, tuple) else (output, None)
        return (pair, {"batch_stats": statistics} if statistics else {}) if mutable else pair

    def init_with_output(self, key: jax.Array, x: jax.Array, train: bool = False) -> Any:
        """((logits, features), variables)."""
        variables = self.init(key, x, train)
        return self.apply(variables, x, train), variables

    def clone(self, *, axis_name: str) -> "Classifier":
        """The same with batch statistics averaged over that axis."""
        assert self._on_axis is not None
        return self._on_axis(axis_name)


AnyClassifier = nn.Module | Classifier


class Given(NamedTuple):
    """A network and its variables; None where it starts from variables of its own."""

    network: Any  # a `Classifier`, or a linen module that is one already
    variables: Any
    restore: Callable[[Variables], Any]  # trained variables in the form they were given


def teacher(given: Any) -> Given:
    """The teacher of one of the forms above.

    Raises:
      UserError: it is none of them; one sentence.
    """
    if isinstance(given, nnx.Module):
        return _nnx(given)
    if isinstance(given, tuple) and len(given) == 2 and callable(getattr(given[0], "apply", None)):
        return _linen(*given)
    if isinstance(given, tuple) and len(given) == 2 and callable(given[0]):
        apply, variables = given

        def call(variables: Any, x: jax.Array, train: bool) -> tuple[Any, Variables]:
            del train  # the function is that of evaluation
            return apply(variables, x), {}

        name = getattr(apply, "__name__", type(apply).__name__)
        return Given(Classifier(name, lambda key, x, train: variables, call), variables, _same)
    raise UserError(f"teacher is a {_described(given)}; allowed are {TEACHERS}.")


def student(given: Any) -> Given:
    """The student of one of the forms above.

    Raises:
      UserError: it is none of them, or it draws random numbers; one sentence.
    """
    if isinstance(given, nnx.Module):
        if jax.tree.leaves(nnx.state(given, nnx.RngState)):
            raise UserError(
                f"student is a {type(given).__name__} with random state, as of dropout, which a "
                "training step has no key for; allowed is one without."
            )
        return _nnx(given)
    if isinstance(given, nn.Module):
        return _linen(given, None)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], nn.Module):
        return _linen(*given)
    raise UserError(f"student is a {_described(given)}; allowed are {STUDENTS}.")


def check(network: Any, role: str, image_shape: tuple[int, int, int], wanted: int | None) -> int:
    """The number of classes of a network for such images; traced, not computed.

    Args:
      network: to look at.
      role: teacher or student, for messages; a student is called in training too.
      image_shape: (H, W, C).
      wanted: K that it must have; None if any will do.

    Raises:
      UserError: it cannot be called so, or does not give logits (B, K); one sentence.
    """

    def traced(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return jax.eval_shape(function, *arguments)
        except Exception as error:  # the network's own code may raise anything
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise UserError(
                f"{role} cannot be called with {image_shape} images "
                f"({type(error).__name__}: {reason})."
            ) from error

    def logits(variables: Variables, x: jax.Array) -> Any:
        return network.apply(variables, x, train=False)[0]

    x = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    variables = traced(lambda x: network.init(jax.random.key(0), x, train=False), x)
    if role == "student":
        if "batch_stats" in variables and not getattr(network, "takes_train", True):
            raise UserError(
                "student has batch norm but is not called with train=..., so its statistics would "
                "be the same in training and evaluation; allowed is a module that takes train."
            )
        traced(
            lambda *given: network.apply(*given, train=True, mutable=["batch_stats"]), variables, x
        )
    shape = getattr(traced(logits, variables, x), "shape", None)
    if not shape or len(shape) != 2 or shape[0] != 2 or wanted not in (None, shape[1]):
        classes = "K" if wanted is None else wanted
        raise UserError(
            f"{role} gives logits of the shape {shape} for 2 images; allowed is (2, {classes})."
        )
    return shape[1]


def has_features(network: Any, image_shape: tuple[int, int, int]) -> bool:
    """Whether a network gives features (B, D) beside its logits; traced, not computed."""

    def features() -> Any:
        x = jnp.zeros((2, *image_shape))
        return network.apply(network.init(jax.random.key(0), x, train=False), x, train=False)[1]

    return jax.eval_shape(features) is not None


def can_mask(network: Any) -> bool:
    """Whether examples can be left out of the network's batch statistics."""
    return getattr(network, "masks", True)


def _same(variables: Variables) -> Variables:
    return variables


def _described(given: Any) -> str:
    if isinstance(given, tuple):
        return f"tuple of {', '.join(type(part).__name__ for part in given)}"
    return type(given).__name__


def _linen(module: nn.Module, variables: Any) -> Given:
    takes_train = "train" in inspect.signature(type(module).__call__).parameters
    flag = (lambda train: {"train": train}) if takes_train else (lambda train: {})

    def init(key: jax.Array, x: jax.Array, train: bool) -> Variables:
        return dict(module.init(key, x, **flag(train)) if variables is None else variables)

    def call(variables: Variables, x: jax.Array, train: bool) -> tuple[Any, Variables]:
        if not train:
            return module.apply(variables, x, **flag(False)), {}
        made = module.apply(variables, x, **flag(True), mutable=["batch_stats"])
        output, updated = cast(tuple[Any, Variables], made)
        return output, updated.get("batch_stats", {})

    def on_axis(axis_name: str) -> Classifier:
        return _linen(module.clone(axis_name=axis_name), variables).network

    network = Classifier(
        type(module).__name__,
        init,
        call,
        on_axis if hasattr(module, "axis_name") else None,
        takes_train=takes_train,
    )
    return Given(network, variables, _same)


def _nnx(module: nnx.Module) -> Given:
    graph, params, statistics, rest = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    start = {"params": _flat(params), "batch_stats": _flat(statistics)}

    def call(variables: Variables, x: jax.Array, train: bool) -> tuple[Any, Variables]:
        parts = (
            _filled(state, variables.get(name, {}))
            for state, name in ((params, "params"), (statistics, "batch_stats"))
        )
        merged = nnx.merge(graph, *parts, rest)
        merged.train() if train else merged.eval()
        return merged(x), _flat(nnx.state(merged, nnx.BatchStat))

    def on_axis(axis_name: str) -> Classifier:
        copied = nnx.clone(module)
        copied.set_attributes(axis_name=axis_name, raise_if_not_found=False)
        return _nnx(copied).network

    def restore(variables: Variables) -> Any:
        parts = (
            _filled(params, variables["params"]),
            _filled(statistics, variables["batch_stats"]),
        )
        return nnx.merge_state(*parts)

    network = Classifier(
        type(module).__name__,
        lambda key, x, train: start,
        call,
        on_axis,
        masks=not start["batch_stats"],
    )
    return Given(network, start, restore)


def _flat(state: Any) -> Variables:
    """A state as arrays by their paths, which are text: checkpoints know no other keys."""
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(state))
    return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


def _filled(state: Any, arrays: Variables) -> Any:
    """A copy of the state with these arrays, as from `_flat`."""
    copied = jax.tree.map(lambda leaf: leaf, state)
    paths = traverse_util.flatten_dict(nnx.to_pure_dict(state))
    nested = {path: arrays["/".join(map(str, path))] for path in paths}
    nnx.replace_by_pure_dict(copied, traverse_util.unflatten_dict(nested))
    return copied


def as_numpy(variables: Any) -> Any:
    """Copies of the arrays on the host."""
    return jax.tree.map(np.array, variables)
