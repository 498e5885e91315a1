"""PyTorch's operations (ATen), one small function each, with the arguments that ATen names.

A function is given `Tensor`s, numbers and lists of them, and returns a `Tensor`, or a tuple of
them. All can be differentiated any number of times.
"""

from collections.abc import Callable
from typing import Any

from dfkd_jax.networks.graph.operations import (
    convolutions,
    elementwise,
    normalizations,
    poolings,
    products,
    reductions,
    resizing,
    shapes,
)

_FAMILIES = (
    convolutions,
    elementwise,
    normalizations,
    poolings,
    products,
    reductions,
    resizing,
    shapes,
)
OPERATIONS: dict[str, Callable[..., Any]] = {
    name: function for family in _FAMILIES for name, function in family.OPERATIONS.items()
}
"""By ATen's name, with the overload where not every overload is meant ("to.dtype")."""


def find(name: str) -> Callable[..., Any] | None:
    """The function of an operation such as "conv2d.default"; None where there is none.

    An operation that changes its first argument, such as "relu_.default", is found under the name
    of the one that does not.
    """
    base, _, overload = name.partition(".")
    base = base if base.endswith("__") else base.rstrip("_")
    return OPERATIONS.get(f"{base}.{overload}", OPERATIONS.get(base))


def changes_its_argument(name: str) -> bool:
    """Whether an operation writes its result into its first argument: "relu_.default"."""
    base = name.partition(".")[0]
    return base.endswith("_") and not base.endswith("__")
