"""`python -m dfkd_jax.convert` of any PyTorch network: a graph of operations becomes a teacher."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dfkd_jax import evaluate
from dfkd_jax.convert import main
from dfkd_jax.data import data_specs
from dfkd_jax.networks.graph.network import CONSTANTS, GRAPH, GraphNetwork
from dfkd_jax.run import student, teacher
from dfkd_jax.run.setup import parse
from dfkd_jax.run.train import run
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import tiny_config

torch = pytest.importorskip("torch")
from tests.helpers import torch_graphs  # noqa: E402  it needs PyTorch

QUIET = Console(quiet=True)
THIN = "tests.helpers.torch_graphs:Thin(channels=1)"
MIXED = "tests.helpers.torch_graphs:Mixed"


def command(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return torch_graphs.randomize(torch_graphs.Thin(channels=1))


@pytest.fixture(scope="module")
def converted(network, tmp_path_factory):
    """The folder of a teacher for digits."""
    folder = tmp_path_factory.mktemp("converted")
    path = torch_graphs.save(network, folder / "thin.pt2", (1, 8, 8))
    assert command(path, "--dataset=digits", f"--output={folder / 'teacher'}") == 0
    return folder / "teacher"


def config_of(folder, method="mb-dfkd", **fields):
    fields = {"teacher.model": "graph", "teacher.checkpoint": str(folder), **fields}
    return tiny_config(method, **fields)


def refusal(capsys, tmp_path, *arguments):
    """The one sentence; nothing new may be in the folder."""
    before = sorted(tmp_path.rglob("*"))
    assert command(*arguments, f"--output={tmp_path / 'made' / 'teacher'}") == 2
    assert sorted(tmp_path.rglob("*")) == before
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("dfkd_jax: ") and error.count("\n") == 1
    return error


def images(count, channels=1):
    return np.random.default_rng(0).normal(size=(count, 8, 8, channels)).astype(np.float32)


def test_the_teacher_gives_the_logits_of_pytorch(network, converted):
    setup = parse(config_of(converted))
    assert isinstance(setup.models.teacher, GraphNetwork)
    variables = teacher.load_teacher(converted, setup.models.teacher, (8, 8, 1))
    x = images(3)
    logits, features = jax.jit(setup.models.teacher.apply)(variables, jnp.asarray(x))
    with torch.no_grad():
        expected = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert features.shape == (3, 8)
    card = files.read_json(converted / data_specs.CARD)
    assert (card["model"], card["source"], card["num_classes"]) == ("graph", "thin.pt2", 10)
    assert card["mean"] == [0.3053]


def test_a_graph_with_other_features_is_another_teacher(network, converted, tmp_path):
    path = torch_graphs.save(network, tmp_path / "thin.pt2", (1, 8, 8))
    (other, same), run = (tmp_path / "other", tmp_path / "same"), tmp_path / "run"
    assert command(path, "--dataset=digits", f"--output={same}") == 0
    assert command(path, "--dataset=digits", "--features=linear", f"--output={other}") == 0
    card, same_card, other_card = map(data_specs.card_in, (converted, same, other))
    assert card["digest"] == same_card["digest"] == other_card["digest"]
    student.keep_teacher_card(run, str(converted), card)
    assert student.is_teacher_of(run, str(converted), str(same), same_card)
    assert not student.is_teacher_of(run, str(converted), str(other), other_card)


def test_what_it_says(network, tmp_path, capsys):
    path = torch_graphs.save(network, tmp_path / "thin.pt2", (1, 8, 8))
    assert command(path, f"--output={tmp_path / 'teacher'}") == 0
    out = capsys.readouterr().out
    assert re.search(r"operations +\d+, of them 5 of batch norm", out)
    assert re.search(r"features +\w+\n", out) and "images         8×8×1, 10 classes" in out
    assert "normalisation  not known" in out
    assert "--config=default --config.teacher.model=graph --config.teacher.checkpoint=" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, fields",
    [
        ("nayer", {"loop": "scan", "parallel.devices": 2}),
        ("lra-mb", {"loss.batch_norm": 1.0}),
    ],
)
def test_a_run_distils_it_without_pytorch(converted, tmp_path, method, fields, monkeypatch):
    """Methods that need its batch norms or features, both loops, two devices, the meta-gradient."""
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    config = config_of(converted, method, epochs=2, **fields)
    summary = run(config, tmp_path, QUIET)
    assert np.isfinite(summary["final_accuracy"])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and records[-1]["generator_batch_norm"] > 0
    run(config_of(converted, method, epochs=2, **fields), tmp_path, QUIET)  # it is finished


def test_it_computes_in_half_precision_if_asked_to(converted):
    setup = parse(config_of(converted, compute_dtype="bfloat16", **{
        "teacher.model": "graph", "student.model": "cnn_half"}))  # fmt: skip
    network = setup.models.teacher
    variables = teacher.load_teacher(converted, network, (8, 8, 1))
    text = jax.jit(network.apply).lower(variables, jnp.zeros((2, 8, 8, 1))).as_text()
    assert "bf16" in text
    whole = jax.jit(parse(config_of(converted)).models.teacher.apply)(variables, images(4))[0]
    half = jax.jit(network.apply)(variables, images(4))[0]
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, whole, atol=0.05)


def test_it_is_evaluated(converted):
    config = config_of(converted)
    found = evaluate.evaluate(converted, config, 200)
    assert found["images"] == 599 and found["teacher_agreement"] == 100.0


def test_a_student_cannot_be_a_graph(converted):
    words = r"config\.student\.model: 'graph' is the network of a converted teacher"
    with pytest.raises(UserError, match=words):
        parse(config_of(converted, **{"student.model": "graph"}))


def test_a_damaged_graph_is_one_sentence(converted, tmp_path):
    unknown = (converted / GRAPH).read_text().replace("conv2d.default", "evil.default")
    for name, text in ((GRAPH, "{"), (GRAPH, '{"format": "dfkd_jax.graph/9"}'), (GRAPH, unknown)):
        folder = tmp_path / str(len(text))
        folder.mkdir()
        for path in converted.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_text(text)
        with pytest.raises(
            UserError,
            match=r"damaged|reads|evil\.default. .* is not known",
        ):
            parse(config_of(folder))


def test_a_module_with_its_weights(network, tmp_path):
    """Wrapped as training libraries do."""
    weights = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "net.pth")
    output = tmp_path / "teacher"
    flags = [f"--module={THIN}", "--dataset=digits", f"--output={output}"]
    assert command(tmp_path / "net.pth", *flags) == 0
    setup = parse(config_of(output))
    variables = teacher.load_teacher(output, setup.models.teacher, (8, 8, 1))
    x = images(3)
    with torch.no_grad():
        expected = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    logits = jax.jit(setup.models.teacher.apply)(variables, jnp.asarray(x))[0]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_tables_of_whole_numbers_are_kept(tmp_path, capsys):
    flags = [f"--module={MIXED}", "--image_size=8", "--logits=linear", "--mean=0.5,0.5,0.5"]
    assert command(*flags, "--std=1,1,1", f"--output={tmp_path / 'teacher'}") == 0
    assert (tmp_path / "teacher" / CONSTANTS).is_file()
    config = config_of(tmp_path / "teacher", **{"dataset.name": "none"})
    assert parse(config).models.teacher.apply is not None


def test_what_timm_writes_into_its_networks_is_read(tmp_path):
    module = "tests.helpers.torch_graphs:as_of_timm"
    assert command(f"--module={module}", f"--output={tmp_path / 'teacher'}") == 0
    card = files.read_json(tmp_path / "teacher" / data_specs.CARD)
    assert card["image_shape"] == [16, 16, 3]
    assert (card["mean"], card["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model=resnet18"], "holds its network"),
        (["--num_classes=11"], "--num_classes is 11, but that of the network is 10"),
        (["--image_size=32"], "--image_size is 32, but that of the network is 8"),
        (["--dataset=cifar10"], "but that of --dataset=cifar10 is"),
        (["--features=nowhere"], "--features is 'nowhere'"),
        (["--logits=nowhere"], "--logits is 'nowhere'"),
        (["--mean=0.5"], "--mean and --std belong together"),
    ],
)
def test_flags_that_contradict_the_network(network, flags, words, tmp_path, capsys):
    path = torch_graphs.save(network, tmp_path / "thin.pt2", (1, 8, 8))
    assert words in refusal(capsys, tmp_path, path, *flags)


@pytest.mark.parametrize(
    "module, words",
    [
        ("no_such_package:net", "ModuleNotFoundError"),
        ("tests.helpers.torch_graphs:nothing", "AttributeError"),
        ("tests.helpers.torch_graphs:Thin(", "allowed is package.module:factory"),
        ("tests.helpers.torch_graphs:Thin(open('x'))", "allowed is package.module:factory"),
        ("tests.helpers.torch_graphs:Thin(depth=3)", "TypeError"),
        ("tests.helpers.torch_graphs:randomize.__doc__.strip", "gives a str"),
        (f"{THIN}", "torch.export cannot follow"),
        (MIXED, "gives 2 tensors of shape"),
    ],
)
def test_a_module_that_is_no_network(module, words, tmp_path, capsys):
    flags = [f"--module={module}", "--image_size=8", "--channels=3"]
    assert words in refusal(capsys, tmp_path, *flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "FILE is missing"),
        ([f"--module={MIXED}", "--model=resnet18"], "are two networks"),
        ([f"--module={MIXED}"], "--image_size is missing"),
    ],
)
def test_what_is_missing_is_said(flags, words, tmp_path, capsys):
    assert words in refusal(capsys, tmp_path, *flags)


def test_weights_of_another_module_are_named(network, tmp_path, capsys):
    tensors = dict(network.state_dict())
    tensors["extra"] = tensors.pop("linear.bias")
    torch.save(tensors, tmp_path / "net.pth")
    flags = [f"--module={THIN}", "--dataset=digits"]
    error = refusal(capsys, tmp_path, tmp_path / "net.pth", *flags)
    assert "missing are linear.bias; unknown are extra" in error


def test_weights_alone_need_a_name(network, tmp_path, capsys):
    torch.save(network.state_dict(), tmp_path / "net.pth")
    assert "--model is missing" in refusal(capsys, tmp_path, tmp_path / "net.pth")
    error = refusal(capsys, tmp_path, tmp_path / "net.pth", "--model=resnet18", "--features=x")
    assert "--features is for a .pt2 file" in error


def test_a_network_that_is_not_finite_is_refused(tmp_path, capsys):
    broken = torch_graphs.Thin(channels=1).eval()
    with torch.no_grad():
        broken.linear.bias[3] = float("nan")
    path = torch_graphs.save(broken, tmp_path / "net.pt2", (1, 8, 8))
    assert "no finite numbers" in refusal(capsys, tmp_path, path, "--dataset=digits")
