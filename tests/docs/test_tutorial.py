"""The tutorial: its commands run, and do what it says."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from dfkd_jax import convert, evaluate, export
from dfkd_jax.run import command_line, train
from tests.helpers.paths import ROOT
from tests.helpers.prepared import prepare_tfds, random_split

TUTORIAL = ROOT / "docs" / "tutorial"
TINY = {"epochs": "1", "batch_size": "8", "iterations_per_epoch": "1", "student.steps": "1"}
TINY |= {"generator.latent_dim": "4", "generator.channels": "(8, 4)", "pool.capacity": "16"}
TINY |= {"parallel.devices": "1", "pool.batch_size": "8"}


def blocks(language):
    """The fenced blocks of the tutorial in a language, "" for output; each a list of lines."""
    text = (TUTORIAL / "README.md").read_text()
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
    torch = pytest.importorskip("torch")
    from tests.helpers import torch_twins

    for file in TUTORIAL.glob("*.py"):
        shutil.copy(file, tmp_path)
    shape = (32, 32, 3)
    splits = {"train": random_split(8, shape, 0), "test": random_split(20, shape, 1)}
    prepare_tfds(tmp_path / "data", "cifar10", "3.0.2", splits, shape)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (install,), (download, *rest), *others = blocks("bash")
    assert install == "pip install -e '../..[torch,export]'"
    file = download.rpartition("/")[2]
    named = torch_twins.twin("resnet20", 10).state_dict().items()  # of an older PyTorch:
    named = {f"module.{name}": a for name, a in named if "num_batches" not in name}
    torch.save({"state_dict": named}, file)
    commands = [*rest, *(command for block in others for command in block)]
    found = {command: run_tiny(command) for command in commands}

    printed = capsys.readouterr().out
    assert "\n".join(blocks("")[0]) in printed  # of the conversion
    # PyTorch and the project find the same accuracy.
    (accuracy,) = (f["accuracy"] for c, f in found.items() if "evaluate runs" in c)
    assert f"test accuracy in PyTorch: {accuracy:.2f} %" in printed
    sys.modules.pop("student")
