"""Fields of a configuration: each declared once, with its default, what is allowed and its meaning.

The module that uses a field declares it in a table `FIELDS`, by its dotted name:

    FIELDS = {"replay.capacity": Field(10, at_least(1), "entries of the memory bank")}

A configuration is made of such tables, and checked against the same ones.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import ml_collections
from ml_collections.config_dict import placeholder

from dfkd_jax.runtime.errors import UserError


class Rule(NamedTuple):
    """What is allowed of a value, and the words for it, as in "allowed is 1 or more"."""

    holds: Callable[[Any], bool]
    words: str


class Default(NamedTuple):
    """A default that follows from other fields, as long as nobody sets it."""

    of: Callable[[ml_collections.ConfigDict], Any]


class Field(NamedTuple):
    """A field of a configuration.

    Attributes:
      default: its value; a `Default`; or a type, for a field that is None until it is set.
      rule: what is allowed; None where the code that uses it says so, with other facts at hand.
      meaning: what it is, for the reader of the table, with its unit.
    """

    default: Any
    rule: Rule | None
    meaning: str


Fields = Mapping[str, Field]


def at_least(least: float, why: str = "") -> Rule:
    """Numbers from `least` on."""
    return Rule(lambda value: value >= least, f"is {least} or more{why}")


def more_than(bound: float) -> Rule:
    """Numbers above `bound`."""
    return Rule(lambda value: value > bound, f"is more than {bound}")


def below(bound: int, words: str) -> Rule:
    """Whole numbers from 0 on and below `bound`, which the words name."""
    return Rule(lambda value: 0 <= value < bound, f"is 0 or more and less than {words}")


def one_of(allowed: Collection[Any]) -> Rule:
    """One of these values, or of the keys of a table."""
    return Rule(lambda value: value in allowed, f"are {', '.join(map(str, allowed))}")


def or_none(rule: Rule) -> Rule:
    """None, or what the rule allows."""
    return Rule(
        lambda value: value is None or rule.holds(value),
        rule.words.replace("is ", "is None or ", 1),
    )


def declare(fields: Fields) -> ml_collections.ConfigDict:
    """A configuration of these fields, each with its default."""
    config = ml_collections.ConfigDict()

    def place(name: str, value: Any) -> None:
        *path, last = name.split(".")
        inner = config
        for part in path:
            if part not in inner:
                inner[part] = ml_collections.ConfigDict()
            inner = inner[part]
        inner[last] = value

    derived = {name: f for name, f in fields.items() if isinstance(f.default, Default)}
    for name, field in fields.items():
        if name not in derived:
            default = field.default
            place(name, placeholder(default) if isinstance(default, type) else default)
    for name, field in derived.items():  # when what they follow from is there
        place(name, field.default.of(config))
    return config


def check(config: ml_collections.ConfigDict, fields: Fields) -> None:
    """Hold the values of a configuration against the rules of its fields.

    Raises:
      UserError: the first that is not allowed, or is not there; one sentence.
    """
    for name, field in fields.items():
        try:
            value = get(config, name)
        except (AttributeError, KeyError) as error:
            raise UserError(f"The configuration has no field {name!r}.") from error
        if field.rule is not None and not field.rule.holds(value):
            raise UserError(f"config.{name} is {value!r}; allowed {field.rule.words}.")


def get(config: Any, name: str) -> Any:
    """The value of a dotted field name."""
    for part in name.split("."):
        config = config[part]
    return config
