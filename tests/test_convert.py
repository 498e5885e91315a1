"""`python -m dfkd_jax.convert`: a PyTorch file becomes a teacher, or one sentence and nothing."""

import errno
import shlex
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import digits
from dfkd_jax.convert import main
from dfkd_jax.data import data_specs
from dfkd_jax.interchange.torch_layouts import to_torch
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import command_line, teacher
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime import files


@cache
def variables():
    """Of a teacher for digits."""
    images = jnp.zeros((2, 8, 8, 1))
    return jax.device_get(
        jax.jit(create_classifier("cnn_half", 10).init)(jax.random.key(0), images)
    )


def state_dict():
    return to_torch("cnn_half", variables())


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def refusal(capsys, tmp_path, *arguments):
    """The one sentence, without names below; nothing new may be in the folder."""
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments, f"--output={tmp_path / 'made' / 'teacher'}") == 2
    assert sorted(tmp_path.rglob("*")) == before
    out, error = capsys.readouterr()
    sentence, *names = error.splitlines()
    assert out == "" and sentence.startswith("dfkd_jax: ")
    assert all(name.startswith("  m") for name in names)
    return sentence.removeprefix("dfkd_jax: ")


def test_a_converted_teacher_is_what_a_run_takes(tmp_path, capsys):
    file, output = tmp_path / "best.safetensors", tmp_path / "made" / "teacher"
    save_file({f"module.{name}": a for name, a in state_dict().items()}, file)
    assert run(file, "--model=cnn_half", "--dataset=digits", f"--output={output}") == 0
    card = files.read_json(output / data_specs.CARD)
    assert card.pop("layout").startswith("the CNN of this project")
    assert card.pop("digest") == teacher.digest(variables())
    assert card == {
        "model": "cnn_half",
        "num_classes": 10,
        "image_shape": [8, 8, 1],
        "dataset": "digits",
        "mean": [0.3053],
        "std": [0.376],
        "source": "best.safetensors",
    }
    assert sorted(path.name for path in output.parent.iterdir()) == ["teacher"]
    printed = capsys.readouterr().out
    count = sum(leaf.size for leaf in jax.tree.leaves(variables()["params"]))
    assert f"{count:,}" in printed and "8×8×1, 10 classes" in printed
    assert "--config=digits --config.teacher.model=cnn_half" in printed

    config = digits.get_config()
    config.teacher.model, config.teacher.checkpoint = "cnn_half", str(output)
    parse(config)
    model = create_classifier("cnn_half", 10)
    assert_equal(teacher.load_teacher(output, model, (8, 8, 1)), variables())


def test_a_network_without_batch_norm(tmp_path):
    module = create_classifier("lenet5", 10)
    params = jax.jit(module.init)(jax.random.key(1), jnp.zeros((2, 32, 32, 1)))
    file, output = tmp_path / "lenet.safetensors", tmp_path / "teacher"
    save_file(to_torch("lenet5", params), file)
    assert run(file, "--model=lenet5", "--num_classes=10", f"--output={output}") == 0
    card = files.read_json(output / data_specs.CARD)
    assert (card["image_shape"], card["mean"], card["std"]) == ([32, 32, 1], None, None)
    assert_equal(teacher.load_teacher(output, module, (32, 32, 1)), params)


def test_the_normalisation_given_is_that_of_the_card(tmp_path):
    file, output = tmp_path / "net.safetensors", tmp_path / "teacher"
    output.mkdir()  # an empty folder is free
    save_file(state_dict(), file)
    flags = ["--model=cnn_half", "--dataset=digits", "--mean=0.5", "--std=0.25"]
    assert run(file, *flags, f"--output={output}") == 0
    card = files.read_json(output / data_specs.CARD)
    assert (card["mean"], card["std"], card["dataset"]) == ([0.5], [0.25], "digits")
    config = digits.get_config()
    config.teacher.model, config.teacher.checkpoint = "cnn_half", str(output)
    parse(config)
    assert data_specs.spec(config).mean == (0.5,)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--model is missing"]),
        (["--model=cnn_half"], ["--num_classes is missing"]),
        (["--model=cnn_half", "--num_classes=ten"], ["--num_classes", "'ten'"]),
        (["--model=cnn_half", "--num_classes=0"], ["--num_classes is 0", "1 or more"]),
        (["--model=vgg99", "--num_classes=10"], ["--model", "'vgg99'", "resnet50"]),
        (["--model=cnn_half", "--dataset=imagenet"], ["--dataset is 'imagenet'", "digits"]),
        (["--model=cnn_half", "--dataset=digits", "--num_classes=9"], ["is 9", "digits is 10"]),
        (["--model=cnn_half", "--dataset=digits", "--mean=0.5"], ["--mean and --std"]),
        (["--model=cnn_half", "--num_classes=10", "--mean=1,2", "--std=1,2"], ["'1,2'", "3 num"]),
        (["--model=cnn_half", "--dataset=digits", "--mean=x", "--std=1"], ["--mean is 'x'"]),
        (["--model=cnn_half", "--dataset=digits", "--mean=0", "--std=0"], ["--std is '0'"]),
        (["--model=cnn_half", "--dataset=digits", "--colour=1"], ["--colour"]),
        (["--model=cnn", "--dataset=digits"], ["not those of a cnn", "fc.weight (10, 32)"]),
        (["--model=cnn_half", "--num_classes=9", "--channels=1"], ["9 classes", "fc.bias (10,)"]),
        (["--model=lenet5", "--num_classes=10", "--image_size=8"], ["LeNet-5", "not 8×8"]),
    ],
)
def test_bad_flags_are_one_sentence(flags, words, tmp_path, capsys):
    file = tmp_path / "net.safetensors"
    save_file(state_dict(), file)
    sentence = refusal(capsys, tmp_path, file, *flags)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    "flags, start",
    [
        (["--dataset=digits"], "--config=digits"),
        (["--num_classes=10", "--image_size=8", "--channels=1", "--mean=0.5", "--std=0.2"], None),
        (["--num_classes=10", "--image_size=8", "--channels=1"], None),
        (["--dataset=fashion_mnist"], "--config=default"),
    ],
)
def test_the_command_printed_is_one_that_runs(flags, start, tmp_path, capsys):
    file, output = tmp_path / "net.safetensors", tmp_path / "it's a teacher"
    save_file(state_dict(), file)
    assert run(file, "--model=cnn_half", *flags, f"--output={output}") == 0
    python, m, module, first, *others = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert [python, m, module] == ["python", "-m", "dfkd_jax.main"]
    assert first == (start or "--config=default")
    assert others.pop() == "--workdir=runs/it's a teacher"
    fields = dict(flag.removeprefix("--config.").split("=", 1) for flag in others)
    config = command_line.with_overrides(first.removeprefix("--config="), {}, fields)
    parse(config, reads_data=False)
    assert config.teacher.checkpoint == str(output)
    spec = data_specs.spec(config)
    if start is None:
        unknown = "--mean=0.5" not in flags
        assert (spec.name, spec.mean, spec.std) == (
            ("none", (0.0,), (1.0,)) if unknown else ("none", (0.5,), (0.2,))
        )
    else:
        assert f"--dataset={spec.name}" in flags


def test_the_names_beyond_those_of_the_sentence_are_below_it(tmp_path, capsys):
    file = tmp_path / "net.safetensors"
    save_file(state_dict(), file)
    flags = ["--model=resnet18", "--num_classes=10", f"--output={tmp_path / 'teacher'}"]
    assert run(file, *flags) == 2
    sentence, *names = capsys.readouterr().err.splitlines()
    assert sentence.endswith(".") and "most names are missing" in sentence
    assert "  missing: layer4.1.bn2.running_var" in names and "  unknown: fc1.bias" in names
    assert sum(name.startswith("  missing: ") for name in names) == 20 + 4 * 20 + 2 - 7


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    file = tmp_path / "net.safetensors"
    save_file(state_dict(), file)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for output in (tmp_path / "used", file):
        flags = ["--model=cnn_half", "--dataset=digits", f"--output={output}"]
        assert run(file, *flags) == 2
        assert f"--output is {str(output)!r}, which exists" in capsys.readouterr().err
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"
    assert run(file, *flags[:2], f"--output={file / 'teacher'}") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_failing_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    file = tmp_path / "net.safetensors"
    save_file(state_dict(), file)
    (tmp_path / "made").mkdir()

    def fail_halfway(directory, variables, card):
        (directory / teacher.WEIGHTS).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher, "save_teacher", fail_halfway)
    sentence = refusal(capsys, tmp_path, file, "--model=cnn_half", "--dataset=digits")
    assert sentence.endswith("No space left on device.")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.pt", None, "none.pt cannot be read: No such file or directory."),
        ("text.safetensors", b"no checkpoint at all", "text.safetensors is damaged or no"),
        ("half.pth", b"PK\x03\x04 and no more", "half.pth is damaged: its archive"),
    ],
)
def test_bad_files_are_one_sentence(name, content, words, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    sentence = refusal(capsys, tmp_path, tmp_path / name, "--model=cnn_half", "--dataset=digits")
    assert words in sentence


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value, tmp_path, capsys):
    arrays = state_dict()
    assert arrays["bn1.num_batches_tracked"].dtype == np.int64  # a counter may be anything
    arrays["bn1.num_batches_tracked"] += 2**62
    for name in ("fc.weight", "bn2.running_var"):
        arrays[name] = arrays[name].copy()
        arrays[name].flat[-1] = value
    save_file(arrays, tmp_path / "net.safetensors")
    flags = ["--model=cnn_half", "--dataset=digits"]
    sentence = refusal(capsys, tmp_path, tmp_path / "net.safetensors", *flags)
    assert "net.safetensors cannot be converted: not all values are finite" in sentence
    assert "fc.weight" in sentence and "bn2.running_var" in sentence


def test_a_pytorch_teacher_gives_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_twins

    network = torch_twins.randomize(torch_twins.twin("wrn16_1", 10))
    file, output = tmp_path / "wrn.pt", tmp_path / "teacher"
    torch.save({"state_dict": network.to(torch.bfloat16).state_dict()}, file)
    assert run(file, "--model=wrn16_1", "--dataset=cifar10", f"--output={output}") == 0
    model = create_classifier("wrn16_1", 10)
    loaded = teacher.load_teacher(output, model, (32, 32, 3))
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network.float()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(jax.jit(model.apply)(loaded, x)[0], expected.numpy(), atol=1e-4)
