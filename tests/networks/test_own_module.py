"""Flax modules of one's own as teacher and student: what is imported, refused, and run."""

import importlib.util
import re
import sys

import flax.linen as nn
import jax.numpy as jnp
import pytest
from rich.console import Console

from dfkd_jax import export
from dfkd_jax.data import data_specs
from dfkd_jax.interchange import torch_layouts
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.networks.own_module import check_axis
from dfkd_jax.run import train
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from tests.helpers.networks import Normed, Plain
from tests.helpers.paths import ROOT
from tests.helpers.tiny import tiny_config

README = ROOT / "README.md"
SHAPE = (8, 8, 1)


class Typed(Plain):
    axis_name: str | None = None
    dtype: object = None


class OnlyLogits(Plain):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class WithoutTrain(Plain):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x), x


class Counting(Plain):
    @nn.compact
    def __call__(self, x, train=False):
        self.variable("counts", "calls", lambda: jnp.zeros(()))
        features = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes)(features), features


class TooManyClasses(Plain):
    @nn.compact
    def __call__(self, x, train=False):
        features = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes + 1)(features), features


class NoClasses(nn.Module):
    pass


def no_module(num_classes):
    return num_classes


def own(name):
    return f"{__name__}:{name}"


def test_fields_are_set_where_the_module_has_them():
    assert create_classifier(own("Plain"), 7, axis_name="data") == Plain(7)
    module = create_classifier(own("Typed"), 7, axis_name="data", dtype=jnp.bfloat16)
    assert (module.num_classes, module.axis_name, module.dtype) == (7, "data", jnp.bfloat16)


@pytest.mark.parametrize(
    "name, words",
    [
        ("no_such_module:Net", ["cannot be imported", "no_such_module"]),
        (":Net", ["cannot be imported"]),
        (own("Missing"), ["cannot be imported", "Missing"]),
        (own("NoClasses"), ["num_classes=10"]),
        (own("no_module"), ["gives a int", "flax.linen.Module"]),
        (own("OnlyLogits"), ["shapes [(2, 10)]", "features (2, D)"]),
        (own("TooManyClasses"), ["(2, 11)", "logits (2, 10)"]),
        (own("WithoutTrain"), ["cannot be called as (x, train)", "train"]),
        (own("Counting"), ["counts", "params and batch_stats"]),
    ],
)
def test_what_cannot_be_a_classifier_is_refused_in_one_sentence(name, words):
    with pytest.raises(UserError) as error:
        parse(tiny_config(**{"student.model": name}))
    sentence = str(error.value)
    assert sentence.startswith(f"config.student.model: {name!r} ") and "\n" not in sentence
    assert all(word in sentence for word in words), sentence


def test_a_module_without_dtype_computes_in_float32_only():
    with pytest.raises(UserError, match=r"no field dtype.*bfloat16"):
        parse(tiny_config(**{"student.model": own("Plain"), "compute_dtype": "bfloat16"}))


def test_batch_norm_without_axis_name_is_for_one_device():
    check_axis(Plain(10), "Plain", SHAPE)
    check_axis(create_classifier("cnn", 10), "cnn", SHAPE)
    with pytest.raises(ValueError, match="no field axis_name"):
        check_axis(Normed(10), "Normed", SHAPE)


def test_a_run_on_two_devices_refuses_it_before_anything_is_trained(tmp_path):
    fields = {"student.model": own("Normed"), "parallel.devices": 2}
    with pytest.raises(UserError, match=r"config\.student\.model: .*no field axis_name"):
        train.run(tiny_config(**fields), tmp_path, Console(quiet=True))
    assert not (tmp_path / "teacher").exists()


def test_no_pytorch_names_are_known_of_it():
    with pytest.raises(ValueError, match="no PyTorch names"):
        torch_layouts.from_torch(own("Plain"), 10, SHAPE, {})


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The folder of the README's example, where Python finds it."""
    (source,) = re.findall(r"```python\n((?:(?!```).)*class MyNet.*?)```", README.read_text(), re.S)
    (tmp_path / "my_nets.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_nets", None)


@pytest.mark.slow
def test_the_example_of_the_readme_runs(example):
    names = {"teacher.model": "my_nets:MyNet", "student.model": "my_nets:MySmallNet"}
    (command,) = re.findall(r"python -m dfkd_jax\.main .*my_nets.*", README.read_text())
    assert all(f"--config.{field}={value}" in command for field, value in names.items())
    fields = {**names, "epochs": 1, "teacher.epochs": 1}
    summary = train.run(tiny_config(**fields), example / "run", Console(quiet=True))
    assert summary["student"] == "my_nets:MySmallNet" and summary["final_accuracy"] > 0
    card = files.read_json(example / "run" / "teacher" / data_specs.CARD)
    assert card["model"] == "my_nets:MyNet"

    # What it has learned can be taken elsewhere in every format.
    for format in export.FORMATS:
        if format == "pytorch":
            continue
        if format != "onnx" or importlib.util.find_spec("jax2onnx"):
            assert export.export(example / "run", format, example / format).is_file()

    # The card of such a teacher is checked like any other's.
    given = {**fields, "teacher.checkpoint": str(example / "run" / "teacher")}
    parse(tiny_config(**given))
    with pytest.raises(UserError, match="a teacher with model 'my_nets:MyNet'"):
        parse(tiny_config(**{**given, "teacher.model": "my_nets:MySmallNet"}))
    assert create_classifier("my_nets:MyNet", 10, axis_name="data").axis_name == "data"
