"""The table of methods, and methods that are found elsewhere."""

import sys

import pytest

from configs import digits
from dfkd_jax.configs import default
from dfkd_jax.methods import table
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime.errors import UserError

BARE = """
from dfkd_jax.methods.no_replay import create
"""
WITH_FIELDS = """
from dfkd_jax.methods.adversarial_family import FIELDS as COMMON, create
from dfkd_jax.runtime.fields import Field, at_least

FIELDS = {**COMMON, "own.depth": Field(3, at_least(1), "of what is its own")}
PRESETS = {"own_method": {"loss.distance": "kl", "generator.learning_rate": 0.25}}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that Python finds, until the test ends."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text, name="own_method"):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield write
    sys.modules.pop("own_method", None)


def test_a_method_elsewhere_has_its_fields_and_its_settings_win(module):
    config = digits.get_config(module(WITH_FIELDS))
    assert (config.method, config.own.depth) == ("own_method", 3)
    assert config.loss.distance == "kl"
    assert config.generator.learning_rate == 0.25  # digits says 0.001
    assert config.generator.latent_dim == 64  # as digits says
    setup = parse(config)
    assert setup.method.plan.student_steps == config.student.steps
    config.own.depth = 0
    with pytest.raises(UserError, match=r"^config\.own\.depth is 0; allowed is 1 or more\.$"):
        parse(config)


def test_settings_of_fields_that_a_method_does_not_have_are_left_out(module):
    config = digits.get_config(module("def create(*args): ..."))
    assert "generator" in config and "learning_rate" not in config.generator
    assert config.batch_size == 128 and config.replay.entry_size == 64
    assert {*default.fields("own_method")} == {*default.FIELDS}


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "'own_method', a module without a function create(config, spec, axis)"),
        ("raise OSError('no disk')", "'own_method'; allowed are lra-mb"),
    ],
)
def test_a_module_that_is_no_method_is_one_sentence(module, text, words):
    with pytest.raises(UserError) as caught:
        digits.get_config(module(text))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_package.method", "lra", "lra mb", ""])
def test_a_name_that_is_nowhere_is_one_sentence(name):
    with pytest.raises(UserError, match=r"allowed are lra-mb, .*, and 'package\.module'"):
        digits.get_config(name)


def test_a_name_of_an_earlier_version_finds_the_method_under_todays():
    old, new = digits.get_config("adversarial"), digits.get_config("no-replay")
    assert old.method == "no-replay" and old.to_dict() == new.to_dict()


def test_every_method_says_its_source_and_stands_in_the_table_once():
    names = [name for module in set(table.METHODS.values()) for name in module.PRESETS]
    assert sorted(names) == sorted(table.METHODS)
    for module in set(table.METHODS.values()):
        assert module.__doc__ and callable(module.create) and module.FIELDS


def test_warm_up_that_leaves_nothing_to_learn_is_refused(module):
    text = BARE.replace("import create", "import create as made") + (
        "def create(*given):\n"
        "    method = made(*given)\n"
        "    return method._replace(plan=method.plan._replace(warm_up=200))\n"
    )
    config = digits.get_config(module(text))
    config.update_from_flattened_dict({"replay.kind": "none", "objective": "acquisition"})
    config.update_from_flattened_dict(_generator_fields())
    with pytest.raises(UserError, match=r"is 200; the method 'own_method' needs more than the 200"):
        parse(config)


def test_a_plan_of_other_student_steps_than_the_configurations_is_refused(module):
    """The replay scheme and the learning rate go by config.student.steps."""
    text = BARE.replace("import create", "import FIELDS, create as made") + (
        "def create(*given):\n"
        "    method = made(*given)\n"
        "    return method._replace(plan=method.plan._replace(student_steps=3))\n"
    )
    with pytest.raises(UserError, match=r"'own_method' plans 3 student steps .* is 10; allowed is"):
        parse(digits.get_config(module(text)))


def _generator_fields():
    from dfkd_jax.methods.adversarial_family import FIELDS
    from dfkd_jax.runtime.fields import declare

    made = declare(FIELDS)
    return {name: made[name.split(".")[0]][name.split(".")[1]] for name in FIELDS}
