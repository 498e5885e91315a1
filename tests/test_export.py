"""Students taken elsewhere: the same logits there, and what the files say of them."""

import importlib.metadata
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load

from dfkd_jax import export
from dfkd_jax.data.data_table import SPECS
from dfkd_jax.networks import convolution
from dfkd_jax.run import checkpoint, teacher
from dfkd_jax.run.config import to_dict
from dfkd_jax.run.student import load_student
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from tests.helpers.students import expected, random_student
from tests.helpers.tiny import build, tiny_config

MEAN, STD = [0.4], [0.3]
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with two checkpoints of an untrained student, the newer one damaged."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(**{"student.model": "cnn_half"})
    _, state, variables = build(config)
    card = {"model": "cnn_half", "num_classes": 10, "image_shape": SHAPE, "accuracy": 98.5}
    teacher.save_teacher(folder / "teacher", variables, {**card, "mean": MEAN, "std": STD})
    files.write_json(folder / "config.json", to_dict(config))
    later = state.replace(student_steps=state.student_steps + 1)
    history = [{"epoch": i, "student_accuracy": 90.0 + i} for i in (1, 2)]
    with checkpoint.open_checkpoints(folder / "checkpoints") as manager:
        checkpoint.save(manager, 1, state, history[:1])
        checkpoint.save(manager, 2, later, history)
    (folder / "checkpoints" / "2" / "record" / "metadata").write_text("{}")
    student = {"params": state.student.params, "batch_stats": state.student.batch_stats}
    files.write_json(folder / "sum.json", {"sum": checksum(student)})
    return folder


def checksum(variables):
    """The sum of all absolute values."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(variables)]
    return float(sum(np.abs(leaf).sum() for leaf in leaves))


def images(shape=SHAPE, count=3):
    return np.random.default_rng(0).random((count, *shape), np.float32)


def test_the_newest_whole_checkpoint_is_read_and_nothing_changed(folder):
    before = sorted(folder.rglob("*"))
    student = load_student(folder)
    assert sorted(folder.rglob("*")) == before
    assert (student.card["epoch"], student.card["accuracy"]) == (1, 91.0)
    assert student.card["teacher"] == {"model": "cnn_half", "accuracy": 98.5, "source": None}
    assert student.card["mean"] == MEAN and student.card["method"] == "lra-mb"
    assert checksum(student.variables) == files.read_json(folder / "sum.json")["sum"]


def test_a_mean_that_only_the_configuration_says_is_that_of_the_card(tmp_path):
    """As a list, which a tuple is in config.json."""
    fields = {"dataset.mean": SPECS["digits"].mean, "student.model": "cnn_half"}
    files.write_json(tmp_path / "config.json", to_dict(tiny_config(**fields)))
    student = random_student("cnn_half", SHAPE)
    unsaid = {**student.card, "mean": None, "std": None}
    teacher.save_teacher(tmp_path / "teacher", student.variables, unsaid)
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as manager:
        checkpoint.save(manager, 1, {"student": student.variables}, [{"epoch": 1}])
    card = load_student(tmp_path).card
    assert (card["mean"], card["std"]) == (list(SPECS["digits"].mean), list(SPECS["digits"].std))


def test_safetensors_hold_the_weights_and_the_card(folder, tmp_path):
    path = export.export(folder, "safetensors", tmp_path)
    student = load_student(folder)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["names"] == "torch" and metadata["model"] == "cnn_half"
    assert json.loads(metadata["std"]) == STD and json.loads(metadata["image_shape"]) == [8, 8, 1]
    kernel = student.variables["params"]["conv1"]["kernel"]
    weight = load(path.read_bytes())["conv1.weight"]
    np.testing.assert_array_equal(weight, np.transpose(kernel, (3, 2, 0, 1)))
    written = files.read_json(tmp_path / "card.json")
    assert abs(datetime.fromisoformat(written.pop("exported")) - datetime.now(UTC)).seconds < 600
    assert written == student.card
    card = (tmp_path / "README.md").read_text()
    words = ("cnn_half, accuracy 98.50 %", "lra-mb", "91.00 % on digits")
    assert all(word in card for word in words)


DATE = datetime(2026, 1, 2, 1, 4, 5, 678, tzinfo=timezone(timedelta(hours=2)))
DAY = "2026-01-01T23:04:05+00:00"


@pytest.mark.parametrize("format", export.FORMATS)
def test_an_export_names_the_date_and_the_versions(folder, tmp_path, format):
    names = ["dfkd_jax", "jax", "flax"]
    if format == "onnx":
        onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        pytest.importorskip("jax2onnx")
        names.append("jax2onnx")
    path = export.export(folder, format, tmp_path / "first", DATE)
    card = files.read_json(tmp_path / "first" / "card.json")
    versions = {name: importlib.metadata.version(name) for name in names}
    assert {name: card[name] for name in names} == versions and card["exported"] == DAY
    readme = (tmp_path / "first" / "README.md").read_text()
    assert all(f"{name} {version}" in readme for name, version in versions.items())
    assert f"on {DAY} |" in readme
    if format in ("safetensors", "pytorch"):
        with safe_open(path.with_suffix(".safetensors"), "np") as file:
            metadata = file.metadata()
    elif format == "onnx":
        graph = onnx.load(path)
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        opset = {entry.domain: entry.version for entry in graph.opset_import}[""]
        assert int(metadata["onnx_opset"]) == card["onnx_opset"] == opset
        assert f"onnx_opset {opset}" in readme
    else:
        metadata = {**versions, "exported": DAY}  # a function has none
    assert {name: metadata[name] for name in (*names, "exported")} == {**versions, "exported": DAY}


def test_two_exports_of_one_date_are_the_same_bytes(folder, tmp_path):
    paths = [export.export(folder, "safetensors", tmp_path / name, DATE) for name in ("a", "b")]
    for name in ("student.safetensors", "card.json", "README.md"):
        first, second = (path.with_name(name).read_bytes() for path in paths)
        assert first == second


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
    "collection, leaf", [("params", "conv2/kernel"), ("batch_stats", "bn1/var")]
)
def test_a_student_of_numbers_that_are_not_finite_is_refused(
    tmp_path, capsys, value, collection, leaf
):
    student = random_student("cnn_half", SHAPE)
    teacher.save_teacher(tmp_path / "teacher", student.variables, student.card)
    layer, name = leaf.split("/")
    student.variables[collection][layer][name].flat[3] = value
    files.write_json(
        tmp_path / "config.json", to_dict(tiny_config(**{"student.model": "cnn_half"}))
    )
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as manager:
        checkpoint.save(manager, 3, {"student": student.variables}, [{"epoch": 1}] * 3)
    assert export.main([str(tmp_path), "--format=safetensors"]) == 2
    error = capsys.readouterr().err
    assert f"The student in {tmp_path} holds values in {collection}.{layer}.{name} that" in error
    assert "no finite numbers" in error and error.count("\n") == 1
    assert not (tmp_path / "export").exists()


def test_the_card_of_a_student_without_data_names_no_data_set(folder):
    card = load_student(folder).card | {"accuracy": None, "dataset": "none", "agreement": None}
    card["teacher"] |= {"accuracy": None}
    text = export.model_card(card)
    assert "| test accuracy | not measured |" in text
    assert "| names the teacher's class | not measured |" in text
    assert "| teacher | cnn_half, accuracy not measured |" in text
    assert "None" not in text and "nan" not in text


def kernels(student):
    """The number of its convolutions."""
    return sum(leaf.ndim == 4 for leaf in jax.tree.leaves(student.variables))


def assert_same_logits(found, wanted):
    assert 0.05 < np.std(wanted) < 10  # or there would be nothing to compare
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_the_pytorch_code_loads_the_weights(tmp_path):
    torch = pytest.importorskip("torch")
    student = random_student("wrn16_1", (8, 8, 3))
    for name, make in export.FORMATS["pytorch"].items():
        (tmp_path / name).write_bytes(make(student))
    code = {"__file__": str(tmp_path / "student.py")}
    exec((tmp_path / "student.py").read_text(), code)
    network = code["load"]()
    assert not network.training and code["MEAN"] == (0.4,) * 3 and code["STD"] == (0.3,) * 3
    x = images((8, 8, 3))
    normalised = (torch.from_numpy(x) - 0.4) / 0.3
    with torch.no_grad():
        logits = network(normalised.permute(0, 3, 1, 2))
    assert_same_logits(logits.numpy(), expected(student, x))


def test_a_module_of_ones_own_has_no_pytorch_code():
    with pytest.raises(UserError, match=r"Normed.* not known; --format=safetensors"):
        export.to_pytorch(random_student("tests.helpers.networks:Normed", SHAPE))


def test_a_module_of_ones_own_keeps_its_names():
    student = random_student("tests.helpers.networks:Normed", SHAPE)
    data = export.to_safetensors(student)
    assert b'"names":"flax"' in data
    np.testing.assert_array_equal(
        load(data)["params.Dense_0.kernel"], student.variables["params"]["Dense_0"]["kernel"]
    )


NETWORKS = {
    "cnn_half": SHAPE,
    "lenet5_half": (32, 32, 1),
    "wrn16_1": (16, 16, 3),
    "mobilenetv2": (32, 32, 3),
    "squeezenet": (32, 32, 3),
    "vgg11": (16, 16, 3),
    "resnet18": (8, 8, 3),
}
LARGE = ("mobilenetv2", "resnet18", "squeezenet", "vgg11")
networks = pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=[pytest.mark.slow] if m in LARGE else []) for m in NETWORKS],
)


@cache
def prepared(model):
    """(student, three images, their logits)."""
    student, x = random_student(model, NETWORKS[model]), images(NETWORKS[model])
    with convolution.plain():  # others take a minute to compile, and test_layers compares them
        return student, x, expected(student, x)


@networks
def test_stablehlo_takes_any_number_of_images_in_0_1(model):
    student, x, wanted = prepared(model)
    exported = jax.export.deserialize(bytearray(export.to_stablehlo(student)))
    assert set(exported.platforms) == set(export.PLATFORMS)
    # Written as convolutions, for one platform or each, not as this machine would compute them.
    found = exported.mlir_module().count("stablehlo.convolution")
    assert found and found % kernels(student) == 0
    assert_same_logits(exported.call(x), wanted)
    if model not in LARGE:
        assert_same_logits(exported.call(x[:1]), wanted[:1])


@networks
def test_onnx_gives_the_same_logits(model, request):
    if model == "squeezenet":  # jax2onnx 0.17.1 cannot pad a batch of any size
        request.applymarker(pytest.mark.xfail(raises=UserError))
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("jax2onnx")
    student, x, wanted = prepared(model)
    graph = export.to_onnx(student)
    session = runtime.InferenceSession(graph)
    (argument,) = session.get_inputs()
    for count in (1, 3):
        (logits,) = session.run(None, {argument.name: x[:count]})
        assert_same_logits(logits, wanted[:count])
    nodes = [node.op_type for node in onnx.load_from_string(graph).graph.node]
    assert nodes.count("Conv") == kernels(student)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == student.card["mean"] and "[0, 1]" in metadata["input"]


@pytest.mark.parametrize("fails", [True, False])
def test_what_the_onnx_converter_does_not_know_or_gets_wrong_is_one_sentence(fails, monkeypatch):
    def to_onnx(function, inputs, model_name, opset):
        if fails:
            raise NotImplementedError("no such operation\nand more")
        entries = SimpleNamespace(add=SimpleNamespace)
        return SimpleNamespace(metadata_props=entries, SerializeToString=lambda: b"")

    def session(content, providers):
        run = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="images")])
        run.run = lambda outputs, given: [np.zeros((len(given["images"]), 10), np.float32)]
        return run

    monkeypatch.setitem(sys.modules, "jax2onnx", SimpleNamespace(to_onnx=to_onnx))
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=session))
    reason = "no such operation" if fails else "the logits of its graph are off by a share of .*"
    with pytest.raises(UserError, match=rf"^jax2onnx cannot convert cnn_half \({reason}\); .*\.$"):
        export.to_onnx(random_student("cnn_half", SHAPE))


class Decomposed(nn.Module):
    """An operation that jax2onnx cannot convert."""

    @nn.compact
    def __call__(self, x):
        return jnp.linalg.qr(nn.Dense(8)(x))[0]


class Wrong(nn.Module):
    """Fails where jax2onnx traces it."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(x)


class Pooled(nn.Module):
    """Windows by position, as most write them."""

    num_classes: int
    layer: Callable = lambda: lambda x: x

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3))(x)
        x = self.layer()(nn.max_pool(x, (3, 3), (2, 2), "SAME"))
        features = nn.avg_pool(x, (2, 2), (2, 2)).mean(axis=(1, 2))
        return nn.Dense(self.num_classes)(features), features


def test_poolings_called_by_position_are_converted_to_onnx():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    student, x = random_student(f"{__name__}:Pooled", SHAPE), images()
    session = runtime.InferenceSession(export.to_onnx(student))
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    assert_same_logits(logits, expected(student, x))
    assert nn.avg_pool is nn.pooling.avg_pool and nn.max_pool is nn.pooling.max_pool


def test_what_onnx_lacks_is_named_with_its_layer():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    student = random_student(f"{__name__}:Pooled", SHAPE)
    module = Pooled(10, Decomposed)
    variables = jax.jit(module.init)(jax.random.key(0), images())
    with pytest.raises(UserError) as caught:
        export.to_onnx(student._replace(module=module, variables=variables))
    words = (
        r"jax2onnx cannot convert the operation qr of Pooled/Decomposed_0 in tests\S+ \(.*\); .*\."
    )
    assert re.fullmatch(words, str(caught.value)), str(caught.value)


def test_a_layer_that_the_onnx_converter_cannot_trace_is_named(monkeypatch):
    def to_onnx(function, inputs, model_name, opset):
        monkeypatch.setattr(nn, "relu", lambda: None)
        function(images())

    monkeypatch.setitem(sys.modules, "jax2onnx", SimpleNamespace(to_onnx=to_onnx))
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=None))
    student = random_student(f"{__name__}:Pooled", SHAPE)
    with pytest.raises(
        UserError, match=r"^jax2onnx cannot convert Pooled/Wrong_0 in tests.*<lambda>"
    ):
        export.to_onnx(student._replace(module=Pooled(10, Wrong)))


def test_what_cannot_be_exported_is_one_sentence_and_writes_nothing(folder, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = {"--format=safetensors": "holds no config.json", "--format=tflite": "'tflite'"}
    for flag, words in flags.items():
        assert export.main([str(empty), flag]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not list(empty.iterdir())
