"""What docs/teachers.md shows is run."""

import re
import shlex

import pytest

from dfkd_jax.convert import main
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "teachers.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
]


def test_a_pytorch_network_is_saved_and_converted(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from tests.helpers.torch_graphs import Thin

    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in PYTHON if "torch.export" in block]
    exec(block, {"torch": torch, "model": Thin()})
    (command,) = [c for c in COMMANDS if "convert teacher.pt2" in c]
    assert main(shlex.split(command)[3:]) == 0
    assert {p.name for p in (tmp_path / "teachers/mine").iterdir()} == {
        *("graph.json", "teacher.json", "weights.safetensors"),
    }


@pytest.mark.parametrize(
    "word",
    [
        "save_teacher",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("@ weights", "equinox", "haiku")),
    ],
)
def test_an_example_runs(word, tmp_path, monkeypatch):
    if word in ("equinox", "haiku"):
        pytest.importorskip(word)
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in PYTHON if word in block]
    found = {}
    exec(block, found)
    if word == "save_teacher":
        assert found["logits"].shape == (2, 10) and found["features"].shape == (2, 32)
    else:
        assert len(found["result"].history) == 1


def test_every_flag_of_its_commands_is_known():
    from dfkd_jax.convert import _parser

    known = {flag for action in _parser()._actions for flag in action.option_strings}
    for command in COMMANDS:
        if "dfkd_jax.convert" in command:
            flags = {word.partition("=")[0] for word in shlex.split(command) if word[:2] == "--"}
            assert flags <= known
