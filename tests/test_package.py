"""The package as it is installed: the entry point, and configurations by name."""

import os
import subprocess
import sys

import pytest

from dfkd_jax import dfkd
from dfkd_jax.run.command_line import CONFIGURATIONS, with_named_config
from tests.helpers.paths import ROOT


def test_every_command_is_listed_and_every_one_listed_is_there():
    with_main = {
        path.stem
        for path in (ROOT / "dfkd_jax").glob("*.py")
        if "__main__" in path.read_text() and path.stem != "dfkd"
    }
    assert set(dfkd.COMMANDS) == with_main
    assert all(name in dfkd.usage() for name in dfkd.COMMANDS)


def test_a_configuration_is_found_by_its_name_from_anywhere(tmp_path):
    """Its method and the fields after it as well; wrong fields are one sentence."""
    run = [sys.executable, "-m", "dfkd_jax.dfkd", "main", "--workdir=run", "--config=digits:dafl"]
    done = subprocess.run(
        [*run, "--config.epochs=0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # of a checkout that is not installed
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr == "dfkd_jax: config.epochs is 0; allowed is 1 or more.\n"


@pytest.mark.parametrize(
    "given, expected",
    [
        (["--config=digits"], [f"--config={CONFIGURATIONS}/digits.py"]),
        (["--config=digits:dafl"], [f"--config={CONFIGURATIONS}/digits.py:dafl"]),
        (["--config", "mnist"], ["--config", f"{CONFIGURATIONS}/mnist.py"]),
        (["--config=configs/digits.py"], ["--config=configs/digits.py"]),
        (["--config=none_of_them"], ["--config=none_of_them"]),
        (["--config.epochs=digits"], ["--config.epochs=digits"]),
    ],
)
def test_names_become_files_of_the_package(given, expected):
    assert with_named_config(given) == expected


def test_the_folder_of_configurations_has_all_of_them():
    here = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert here == {path.name for path in CONFIGURATIONS.glob("*.py")}


def test_an_unknown_command_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dfkd", "distil"])
    assert dfkd.main() == 2
    assert capsys.readouterr().err.startswith("dfkd_jax: 'distil' is no command; allowed are main,")
    monkeypatch.setattr(sys, "argv", ["dfkd"])
    assert dfkd.main() == 0
    assert "dfkd COMMAND --help" in capsys.readouterr().out
