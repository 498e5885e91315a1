"""Classifiers of one's own: any Flax module, named "package.module:attribute"."""

import dataclasses
import importlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dfkd_jax.networks.given import AnyClassifier
from dfkd_jax.runtime.errors import UserError


def is_own(name: str) -> bool:
    """Whether `name` names a module to import, not one of `CLASSIFIERS`."""
    return ":" in name


def create_own(
    name: str,
    num_classes: int,
    *,
    axis_name: str | None = None,
    dtype: DTypeLike | None = None,
) -> nn.Module:
    """Import what `name` names and call it with `num_classes`.

    Args:
      name: "package.module:attribute"; the attribute is a class or a function.
      num_classes: K, given to it by that name.
      axis_name: set if the module has a field of that name.
      dtype: likewise; one that is not None needs the field.

    Raises:
      UserError: it cannot be imported, or does not take `num_classes`, or gives no Flax module, or
        cannot compute in `dtype`; one sentence with `name`.
    """
    path, _, attribute = name.partition(":")
    try:
        create = getattr(importlib.import_module(path), attribute)
    except Exception as error:  # the imported code may raise anything
        raise UserError(
            f"{name!r} cannot be imported ({_reason(error)}); allowed is 'package.module:attribute'"
            " of a module that Python finds from here."
        ) from error
    try:
        module = create(num_classes=num_classes)
    except Exception as error:
        raise UserError(
            f"{name!r} cannot be called with num_classes={num_classes} ({_reason(error)})."
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"{name!r} gives a {type(module).__name__}; allowed is a flax.linen.Module."
        )
    fields = {field.name for field in dataclasses.fields(module)}
    if dtype is not None and "dtype" not in fields:
        raise UserError(
            f"{name!r} has no field dtype, so it cannot compute in {jnp.dtype(dtype).name}; "
            "allowed is config.compute_dtype 'float32'."
        )
    given = {"axis_name": axis_name, "dtype": dtype}
    return module.clone(**{k: v for k, v in given.items() if k in fields and v is not None})


def check_call(
    module: nn.Module, name: str, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    """Trace `module(x, train)`, without computing, and look at what it gives.

    Args:
      module: to check.
      name: for messages.
      image_shape: (H, W, C).
      num_classes: K.

    Raises:
      UserError: it cannot be called so, does not give logits (B, K) and features (B, D), or has
        other variables than parameters and batch statistics; one sentence.
    """

    def call(train: bool) -> Any:
        x = jnp.zeros((2, *image_shape))
        variables = module.init(jax.random.key(0), x, train=train)
        return module.apply(variables, x, train=train, mutable=["batch_stats"])[0], variables

    try:
        outputs, variables = jax.eval_shape(lambda: call(True))
        jax.eval_shape(lambda: call(False))
    except Exception as error:
        raise UserError(
            f"{name!r} cannot be called as (x, train) with {image_shape} images ({_reason(error)})."
        ) from error
    shapes: list[Any] = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(outputs)]
    logits = (2, num_classes)
    if not (isinstance(outputs, tuple) and len(shapes) == 2 and shapes[0] == logits):
        raise UserError(
            f"{name!r} gives arrays of the shapes {shapes} for 2 images; allowed is a tuple of "
            f"logits {logits} and features (2, D)."
        )
    if len(shapes[1]) != 2:
        raise UserError(f"{name!r} gives features {shapes[1]} for 2 images; allowed is (2, D).")
    others = variables.keys() - {"params", "batch_stats"}
    if others:
        raise UserError(
            f"{name!r} has variables in {', '.join(sorted(others))}; allowed are params and "
            "batch_stats."
        )


def check_axis(module: AnyClassifier, name: str, image_shape: tuple[int, int, int]) -> None:
    """Refuse batch statistics that would be of one device's share of the batch only.

    Raises:
      UserError: the module has batch statistics and no field `axis_name`; one sentence.
    """
    if hasattr(module, "axis_name"):
        return
    variables = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((2, *image_shape)), train=True)
    )
    if "batch_stats" in variables:
        raise UserError(
            f"{name!r} has batch norm but no field axis_name, so its statistics would differ "
            "between devices; allowed is config.parallel.devices=1, or a module that gives its "
            "field axis_name to its flax.linen.BatchNorm."
        )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
