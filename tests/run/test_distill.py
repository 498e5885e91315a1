"""`dfkd_jax.distill`: networks in memory, with the numbers of the command line."""

import os
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import dfkd_jax
from dfkd_jax.configs import default
from dfkd_jax.data import splits
from dfkd_jax.data.data_table import SPECS
from dfkd_jax.networks import given
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import records, train
from dfkd_jax.run.distill import _configuration as configured
from dfkd_jax.run.teacher import load_teacher
from dfkd_jax.runtime.errors import UserError
from tests.helpers.networks import SmallNet
from tests.helpers.tiny import SMALL_NET, TINY, tiny_config, untrained_teacher
from tests.helpers.trees import same_bits

DIGITS = SPECS["digits"]
SHAPE = DIGITS.image_shape
FIELDS = {n: v for n, v in TINY.items() if not n.startswith("teacher.")} | {"epochs": 2}


class LogitsOnly(nn.Module):
    """Without `train`, without features."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1))))


class Nnx(nnx.Module):
    """With batch norm, returning logits and features."""

    def __init__(self, rngs, dropout=0.0):
        self.layers = nnx.List([nnx.Linear(64, 8, rngs=rngs)])
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.last = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        features = nnx.relu(self.bn(self.layers[0](x.reshape(x.shape[0], -1))))
        if self.dropout is not None:
            features = self.dropout(features)
        return self.last(features), features


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """(module, variables) and the folder of a teacher."""
    folder = untrained_teacher(tmp_path_factory.mktemp("teacher"))
    module = create_classifier(SMALL_NET, 10)
    return (module, load_teacher(folder, module, SHAPE)), folder


def without_seconds(history):
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in history]


@pytest.mark.slow
def test_the_numbers_are_those_of_the_command_line(teacher, tmp_path):
    given, folder = teacher
    config = tiny_config(epochs=2, **{"teacher.checkpoint": str(folder)})
    train.run(config, tmp_path, Console(quiet=True))
    expected = records.read_metrics(tmp_path / "metrics.jsonl")
    test = splits.load(DIGITS, "test")
    told = []
    result = dfkd_jax.distill(
        given,
        SMALL_NET,
        config="digits",
        fields=FIELDS,
        test=tuple(test),
        callback=lambda record, variables: told.append((record, variables)),
    )
    assert without_seconds(result.history) == without_seconds(expected)
    assert [record for record, _ in told] == result.history
    run = dfkd_jax.load_student(tmp_path)
    assert same_bits(jax.tree.map(np.asarray, run.variables), result.variables)
    assert same_bits(told[-1][1], result.variables)
    assert result.samples.images.shape == (8, *SHAPE)  # a whole batch


@pytest.mark.slow
@pytest.mark.parametrize("student", ["cnn_half", "linen", "nnx"])
def test_nothing_is_written_without_a_folder(teacher, tmp_path, monkeypatch, student):
    monkeypatch.chdir(tmp_path)
    networks = {"linen": LogitsOnly(), "nnx": Nnx(nnx.Rngs(0))}
    result = dfkd_jax.distill(
        teacher[0],
        networks.get(student, student),
        method="no-replay",
        config="digits",
        fields={**FIELDS, "epochs": 1, "iterations_per_epoch": 1},
    )
    assert os.listdir(tmp_path) == []
    assert len(result.history) == 1 and result.history[0]["student_accuracy"] is None


@pytest.mark.slow
def test_forms_of_a_teacher_give_the_same(teacher):
    """A linen module, a function of it, with a logits-only network in its place refused."""
    module, variables = teacher[0]

    def apply(variables, images):
        return module.apply(variables, images, train=False)

    fields = {**FIELDS, "epochs": 1, "iterations_per_epoch": 1}
    histories = [
        dfkd_jax.distill(given, SMALL_NET, config="digits", fields=fields).history
        for given in ((module, variables), (apply, variables))
    ]
    assert without_seconds(histories[0]) == without_seconds(histories[1])


@pytest.mark.slow
def test_an_nnx_student_is_updated_with_what_comes_back():
    rngs = nnx.Rngs(1)
    teacher, student = Nnx(rngs), Nnx(rngs)
    start = jax.tree.map(np.array, nnx.state(student, nnx.Param))
    result = dfkd_jax.distill(
        teacher,
        student,
        config="digits",
        fields={**FIELDS, "epochs": 1, "loss.batch_norm": 0.0},
        image_shape=SHAPE,
    )
    assert same_bits(start, jax.tree.map(np.array, nnx.state(student, nnx.Param)))  # untouched
    nnx.update(student, result.variables)
    student.eval()
    moved = jax.tree.map(np.array, nnx.state(student, nnx.Param))
    assert not same_bits(start, moved)
    assert np.any(np.asarray(student.bn.mean[...]))
    assert student(jnp.zeros((2, *SHAPE)))[0].shape == (2, 10)


@pytest.mark.slow
def test_a_folder_is_gone_on_with_and_refused_to_another_teacher(teacher, tmp_path):
    (module, variables), _ = teacher
    fields = {**FIELDS, "epochs": 2}
    call = {"config": "digits", "fields": fields, "folder": tmp_path / "run"}
    first = dfkd_jax.distill((module, variables), SMALL_NET, **call)
    again = dfkd_jax.distill((module, variables), SMALL_NET, **call)
    assert same_bits(first.variables, again.variables) and first.history == again.history
    loaded = dfkd_jax.load_student(tmp_path / "run")
    assert same_bits(jax.tree.map(np.asarray, loaded.variables), first.variables)
    other = jax.tree.map(lambda leaf: leaf + 1, variables)
    with pytest.raises(UserError, match="a run with another teacher"):
        dfkd_jax.distill((module, other), SMALL_NET, **call)


@pytest.mark.slow
def test_a_student_starts_from_its_variables(teacher):
    module, variables = teacher[0]
    fields = {**FIELDS, "epochs": 1, "student.learning_rate": 1e-9, "student.weight_decay": 0.0}
    result = dfkd_jax.distill(teacher[0], (module, variables), config="digits", fields=fields)
    for a, b in zip(
        jax.tree.leaves(result.variables["params"]),
        jax.tree.leaves(variables["params"]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


class WithoutTrain(nn.Module):
    """Batch norm that runs on the batch whatever it is asked for."""

    @nn.compact
    def __call__(self, x, training=True):
        x = nn.BatchNorm(use_running_average=not training)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(x)


class WithDropout(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1)))


def linen(module, shape=SHAPE):
    return module, module.init(jax.random.key(0), jnp.zeros((2, *shape)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"teacher": "cnn"}, "teacher is a str; allowed are (module, variables)"),
        ({"teacher": LogitsOnly()}, "teacher is a LogitsOnly; allowed are (module, variables)"),
        ({"student": 3}, "student is a int; allowed are the name of a classifier"),
        ({"student": "cnn9"}, "config.student.model: Unknown classifier 'cnn9'"),
        (
            {"teacher": linen(LogitsOnly())},
            "config.loss.activation is 0.1 but config.teacher.model",
        ),
        ({"student": Nnx(nnx.Rngs(0), dropout=0.5)}, "student is a Nnx with random state"),
        ({"student": WithoutTrain()}, "student has batch norm but is not called with train="),
        ({"student": WithDropout()}, "student cannot be called with (8, 8, 1) images"),
        ({"image_shape": (8, 8)}, "image_shape is (8, 8); allowed is (H, W, C)"),
        ({"image_shape": (8, 8, 3)}, "teacher cannot be called with (8, 8, 3) images"),
        ({"image_shape": SHAPE, "mean": (0.1, 0.2)}, "mean is (0.1, 0.2); allowed is a number"),
        ({"config": "default"}, "image_shape is None; allowed is (H, W, C)"),
        ({"config": "imagenet"}, "config is 'imagenet'; allowed are cifar10, cifar100"),
        ({"fields": {"epoch": 3}}, "fields has 'epoch'; the method 'lra-mb' has no such field"),
        ({"fields": {"epochs": 0}}, "config.epochs is 0; allowed is 1 or more"),
        ({"fields": {"epochs": "many"}}, "fields: "),
        ({"method": "lra"}, "The method is 'lra'"),
        (
            {"student": Nnx(nnx.Rngs(0)), "method": "mb-dfkd-concatenated"},
            "config.objective is 'concatenated', which leaves images out of batch norm",
        ),
        ({"test": (np.zeros((3, 8, 8, 1)), np.zeros(3))}, "test has images float64 (3, 8, 8, 1)"),
        (
            {"test": (np.zeros((3, 8, 8, 1), np.uint8), np.zeros(2))},
            "test has labels (2,) of 3 images",
        ),
    ],
)
def test_what_cannot_work_is_one_sentence(teacher, change, words):
    call = {"teacher": teacher[0], "student": SMALL_NET, "config": "digits", **change}
    call["fields"] = {**FIELDS, **call.get("fields", {})}
    with pytest.raises(UserError) as caught:
        dfkd_jax.distill(**call)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_follows_from_a_field_follows_from_what_is_set():
    """As on the command line: half the iterations of twice the batch."""
    made = configured("default", "lra-mb", {"batch_size": 1024, "replay.capacity": 3})
    assert (made.iterations_per_epoch, made.replay.entry_size) == (36, 128)
    given = default.get_config("mb-dfkd")
    made = configured(given, "lra-mb", {"batch_size": 1024})
    assert (made.method, made.iterations_per_epoch) == ("mb-dfkd", 36)
    assert (given.batch_size, given.iterations_per_epoch) == (512, 72)  # not touched


def test_the_public_names_are_there():
    assert {"distill", "meta_gradient", "Method", "load_student", "Setup"} <= set(dfkd_jax.__all__)
    assert {"Synthesizer", "Replay", "Objective", "Plan", "View"} <= set(dfkd_jax.__all__)
    assert all(hasattr(dfkd_jax, name) for name in dfkd_jax.__all__)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_network_of_ones_own_has_the_batch_statistics_of_all_devices(kind):
    network = given.student(Nnx(nnx.Rngs(3)) if kind == "nnx" else SmallNet(10)).network
    x = jax.random.normal(jax.random.key(0), (8, *SHAPE))
    variables = network.init(jax.random.key(1), x, train=False)

    def step(network, x):
        return network.apply(variables, x, train=True, mutable=["batch_stats"])

    (logits, _), updated = step(network, x)
    on_two = jax.vmap(partial(step, network.clone(axis_name="devices")), axis_name="devices")
    (shares, _), of_each = on_two(x.reshape(2, 4, *SHAPE))
    np.testing.assert_allclose(shares.reshape(logits.shape), logits, rtol=1e-4, atol=1e-5)
    for whole, parts in zip(*map(jax.tree.leaves, (updated, of_each)), strict=True):
        for part in parts:
            np.testing.assert_allclose(part, whole, rtol=1e-4, atol=1e-5)
