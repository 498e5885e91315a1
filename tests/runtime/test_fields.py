"""Fields: declared once, with their default, and held against their rule."""

import ml_collections
import pytest

from dfkd_jax.configs import default
from dfkd_jax.methods.table import METHODS
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import (
    Default,
    Field,
    at_least,
    below,
    check,
    declare,
    get,
    more_than,
    one_of,
    or_none,
)

FIELDS = {
    "size": Field(8, at_least(2, ", as pairs"), ""),
    "part.half": Field(Default(lambda config: config.get_oneway_ref("size") // 2), at_least(1), ""),
    "part.rate": Field(0.5, more_than(0), ""),
    "part.final": Field(float, or_none(at_least(0)), ""),
    "part.kind": Field("a", one_of({"a": 1, "b": 2}), ""),
    "seed": Field(0, below(8, "2³"), ""),
    "anything": Field(True, None, ""),
}


def test_a_declared_configuration_has_the_defaults_and_follows_them():
    config = declare(FIELDS)
    assert config.to_dict() == {
        "size": 8,
        "part": {"half": 4, "rate": 0.5, "final": None, "kind": "a"},
        "seed": 0,
        "anything": True,
    }
    config.size = 20
    assert config.part.half == 10
    config.part.half = 3
    assert (config.size, config.part.half) == (20, 3)
    check(config, FIELDS)
    assert declare(FIELDS).part.half == 4  # tables share nothing with what was made of them


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("size", 1, "config.size is 1; allowed is 2 or more, as pairs."),
        ("part.rate", 0.0, "config.part.rate is 0.0; allowed is more than 0."),
        ("part.rate", float("nan"), "config.part.rate is nan; allowed is more than 0."),
        ("part.final", -1.0, "config.part.final is -1.0; allowed is None or 0 or more."),
        ("part.kind", "c", "config.part.kind is 'c'; allowed are a, b."),
        ("seed", 8, "config.seed is 8; allowed is 0 or more and less than 2³."),
        ("seed", -1, "config.seed is -1; allowed is 0 or more and less than 2³."),
    ],
)
def test_what_is_not_allowed_is_one_sentence(name, value, sentence):
    config = declare(FIELDS)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError) as caught:
        check(config, FIELDS)
    assert str(caught.value) == sentence


def test_a_field_that_is_missing_is_named():
    config = ml_collections.ConfigDict({"size": 4})
    with pytest.raises(UserError, match=r"^The configuration has no field 'part\.half'\.$"):
        check(config, {name: FIELDS[name] for name in ("size", "part.half")})


def test_every_field_of_every_method_says_what_it_is_and_allows_its_default():
    for method in METHODS:
        fields = default.fields(method)
        config = default.get_config(method)
        assert all(field.meaning for field in fields.values())
        check(config, fields)
        flat = {path for path in _paths(config)}
        assert flat == {*fields, "method"}  # nothing is set that nobody declares


def _paths(config, prefix=""):
    for key in config:
        value = get(config, key)
        if isinstance(value, ml_collections.ConfigDict):
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_a_data_sets_settings_are_of_fields_that_some_method_has():
    config = default.get_config()
    with pytest.raises(KeyError, match=r"no method has a field 'replay\.capacty'|No method has"):
        default.set_fields(config, {"replay.capacty": 3}, "digits")
