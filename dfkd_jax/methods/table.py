"""The methods by name.

A method is a module, here or in any package, that defines

    FIELDS     its own fields of the configuration, with defaults and ranges
               (`dfkd_jax.runtime.fields`); those that every method has are in
               `dfkd_jax.configs.default`
    create(config, spec, axis) -> Method
               its parts put together, for one device's share of the batch
    PRESETS    name ↦ the fields that make the method what it is; they win over what the
               configuration of a data set says
    SETTINGS   configuration, such as "cifar100", ↦ the method's own values there, of fields that
               the configuration sets for all methods; "default" stands for those not named

A module elsewhere needs `create` alone. Its name is then that of the module:
`--config=configs/digits.py:my_package.my_method`.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import ml_collections

from dfkd_jax.methods import (
    cmi,
    dafl,
    deepinversion,
    dfad,
    dfq,
    fast,
    lra,
    mad,
    mb_dfkd,
    nayer,
    no_replay,
    pre_dfkd,
    zskt,
)
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import Fields

METHODS: dict[str, ModuleType] = {
    name: module
    for module in (
        *(lra, mb_dfkd, pre_dfkd, no_replay, dafl, dfad, zskt, dfq, mad),
        *(deepinversion, cmi, fast, nayer),
    )
    for name in module.PRESETS
}
"""Name ↦ the module of the method."""

RENAMED = {"adversarial": "no-replay"}
"""Names of earlier versions, which still find the method, and today's."""


def find(name: str) -> ModuleType:
    """The module of a method.

    Args:
      name: a key of `METHODS`, or "package.module" of a method of one's own.

    Raises:
      UserError: there is none, or it is no method; one sentence.
    """
    name = today(name)
    if name in METHODS:
        return METHODS[name]
    try:
        module = importlib.import_module(name)
    except Exception as error:  # the imported code may raise anything
        allowed = f"{', '.join(METHODS)}, and 'package.module' of one's own"
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else ""
        raise UserError(
            f"The method is {name!r}; allowed are {allowed}"
            + (f" ({reason})." if "." in name else ".")
        ) from error
    if not callable(getattr(module, "create", None)):
        raise UserError(
            f"The method is {name!r}, a module without a function "
            "create(config, spec, axis); docs/own_method.md has an example."
        )
    return module


def today(name: str) -> str:
    """Today's name of a method that may be given by one of an earlier version."""
    return RENAMED.get(name, name)


def fields_of(name: str) -> Fields:
    """The method's own fields; see `find`."""
    return getattr(find(name), "FIELDS", {})


def preset(name: str) -> Mapping[str, Any]:
    """The fields that make the method what it is; see `find`."""
    return getattr(find(name), "PRESETS", {}).get(today(name), {})


def settings(name: str, configuration: str) -> Mapping[str, Any]:
    """The method's own values in a configuration; see `find`."""
    every = getattr(find(name), "SETTINGS", {})
    return every.get(configuration, every.get("default", {}))


def apply_method(config: ml_collections.ConfigDict, method: str) -> ml_collections.ConfigDict:
    """Set the fields that make a method what it is, and `config.method` to its name.

    Raises:
      UserError: see `find`.
    """
    config.method = today(method)
    config.update_from_flattened_dict(preset(method))
    return config
