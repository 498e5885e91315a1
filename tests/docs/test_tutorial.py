"""The tutorial: its PyTorch networks are those that the converter knows, its commands run."""

import importlib.util
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dfkd_jax import convert, evaluate, export
from dfkd_jax.interchange.torch_layouts import from_torch
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import command_line, train
from tests.helpers.paths import ROOT
from tests.helpers.prepared import prepare_tfds, random_split

NETWORKS = ROOT / "docs" / "tutorial" / "networks.py"
SHAPE = (32, 32, 1)


@pytest.mark.parametrize("name", ["lenet5", "lenet5_half", "wrn16_1"])
def test_a_network_of_the_tutorial_converts_with_its_logits(name):
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("tutorial_networks", NETWORKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    network = module.NETWORKS[name]().eval()
    state_dict = {key: value.numpy() for key, value in network.state_dict().items()}
    variables, _ = from_torch(name, 10, SHAPE, state_dict)
    images = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits, _ = jax.jit(create_classifier(name, 10).apply)(variables, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


TINY = {"epochs": "1", "batch_size": "8", "iterations_per_epoch": "1", "student.steps": "1"}
TINY |= {"generator.latent_dim": "4", "generator.channels": "(8, 4)", "replay.entry_size": "4"}
TINY |= {"parallel.devices": "1", "replay.push_period": "1"}


def blocks(language):
    """The fenced blocks of the tutorial in a language, "" for output; each a list of lines."""
    text = (NETWORKS.parent / "README.md").read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block.splitlines() for kind, block in found if kind == language]


def configured(arguments, fields):
    """(the configuration of a command line, its other flags), with fields set after it."""
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    filename = flags.pop("config")
    own = {f.removeprefix("config."): v for f, v in flags.items() if f.startswith("config.")}
    others = {flag: value for flag, value in flags.items() if not flag.startswith("config.")}
    return command_line.with_overrides(filename, {}, own | fields), others


def run_tiny(command):
    """What a command of the tutorial does, in this process and with few and small steps."""
    python, first, *arguments = shlex.split(command)
    assert python == "python"
    if first != "-m":
        if first == "train_teacher.py":
            arguments[-1] = "1"  # its epochs
        sys.argv[:] = [first, *arguments]
        return runpy.run_path(first)
    module, *arguments = arguments
    if module == "dfkd_jax.main":
        config, flags = configured(arguments, TINY)
        return train.run(config, flags["workdir"])
    if module == "dfkd_jax.evaluate":
        config, _ = configured(arguments[1:], {})
        return evaluate.evaluate(Path(arguments[0]), config, 20)
    command = {"dfkd_jax.convert": convert.main, "dfkd_jax.export": export.main}[module]
    assert command(arguments) == 0


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run_in_their_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    folder = tmp_path / "docs" / "tutorial"
    shutil.copytree(NETWORKS.parent, folder)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shape = (28, 28, 1)
    splits = {"train": random_split(128, shape, 0), "test": random_split(20, shape, 1)}
    prepare_tfds(tmp_path / "data", "mnist", "3.0.1", splits, shape)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    install, *rest = blocks("bash")
    assert install == ["pip install -e '../..[torch,export]'"]
    # One run is enough; it is most of the time that this test takes.
    commands = [c for block in rest for c in block if "train_" in c or "wrn16_1" not in c]
    found = {command: run_tiny(command) for command in commands}

    # What is printed of the first conversion, but for the path of the configuration, which is here.
    printed, shown = capsys.readouterr().out, blocks("")
    assert "\n".join(shown[1][:-1]) in printed
    # A file and the network in PyTorch have the same accuracy; so had those that are shown.
    (accuracy,) = (f["accuracy"] for c, f in found.items() if "stablehlo --config" in c)
    in_pytorch = re.findall(r"lenet5_half in PyTorch: test accuracy ([\d.]+) %", printed)
    assert in_pytorch == [f"{accuracy:.2f}"]
