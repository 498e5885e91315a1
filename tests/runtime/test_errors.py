"""Only a user's mistakes are shortened to a sentence: everything else keeps type and traceback."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

from dfkd_jax.comparison.child_process import in_child
from dfkd_jax.methods import adversarial_family
from dfkd_jax.run import epochs, setup, teacher, train
from dfkd_jax.runtime import devices, errors
from dfkd_jax.synthesis import adversarial
from tests.helpers.tiny import TINY, tiny_config

QUIET = Console(quiet=True)
PACKAGE = Path(errors.__file__).parents[1]
# A defect of the program, in the place that a run passes first, second, ...
PLACES = {
    "the steps": (setup, "create_parts"),
    "the replay": (adversarial_family, "create_replay"),
    "the algorithm": (epochs, "create_algorithm"),
    "the training of the teacher": (teacher, "create_training"),
    "the check of the configuration": (adversarial, "create_generator"),
}


def broken(*args, **kwargs):
    raise ValueError("a defect\nof two lines")


def test_a_users_mistake_is_also_what_python_calls_it():
    missing = errors.DataMissing("nothing here")
    assert isinstance(missing, errors.UserError | ValueError)
    assert isinstance(missing, FileNotFoundError) and str(missing) == "nothing here"


@pytest.mark.parametrize("place", PLACES)
def test_a_defect_comes_out_of_a_run_as_itself(tmp_path, monkeypatch, place):
    monkeypatch.setattr(*PLACES[place], broken)
    with pytest.raises(ValueError, match=r"^a defect\nof two lines$") as caught:
        train.run(tiny_config(), tmp_path, QUIET)
    assert type(caught.value) is ValueError


def test_a_defect_in_what_runs_per_device_is_not_put_down_to_the_student(tmp_path, monkeypatch):
    create = setup.create_parts

    def broken_per_device(given, *axis):
        return broken() if axis else create(given)

    monkeypatch.setattr(setup, "create_parts", broken_per_device)
    with pytest.raises(ValueError, match=r"^a defect") as caught:
        train.run(tiny_config(**{"parallel.devices": 2}), tmp_path, QUIET)
    assert type(caught.value) is ValueError


COMMAND = """
import sys
import jax
from dfkd_jax.run import setup
def broken(*args, **kwargs):
    raise {error}
setup.create_parts = broken
from absl import app
from dfkd_jax.run import command_line
from dfkd_jax import main
app.run(main.main, flags_parser=command_line.parse_flags)
"""


def command_with(error, workdir):
    fields = [f"--config.{name}={value}" for name, value in TINY.items()]
    program = COMMAND.format(error=error)
    command = [sys.executable, "-c", program, "--config=configs/digits.py", *fields]
    return subprocess.run(
        [*command, f"--workdir={workdir}"], cwd=PACKAGE.parent, capture_output=True, text=True
    )


def test_no_other_error_of_a_device_is_taken_for_full_memory():
    said = "INTERNAL: another task died, as the service was NOT_INITIALIZED"
    assert devices.full_memory(jax.errors.JaxRuntimeError(said)) is None


def test_full_memory_is_one_sentence(tmp_path):
    said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17.5GiB.\\nand so on"
    done = command_with(f"jax.errors.JaxRuntimeError('{said}')", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("dfkd_jax: The device's memory is full (RESOURCE_EXHAUSTED: Out")
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.45" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_command_shows_the_traceback_of_a_defect(tmp_path):
    done = command_with('ValueError("a defect")', tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in create_algorithm" in done.stderr
    assert done.stderr.rstrip().endswith("ValueError: a defect")


def defective_child():
    raise ValueError("a defect")


def mistaken_child():
    raise errors.UserError("a mistake of the user.")


@pytest.mark.slow
def test_a_child_process_tells_them_apart_too(tmp_path):
    for function, shortened in ((defective_child, False), (mistaken_child, True)):
        log = tmp_path / f"{function.__name__}.txt"
        outcome = in_child(function, (), log, lambda: None)
        assert not outcome.finished
        assert ("Traceback" in log.read_text()) is not shortened
        expected = (
            "a mistake of the user."
            if shortened
            else f"ValueError: a defect (the traceback is in {log})"
        )
        assert outcome.sentence == expected


def test_a_run_computes_with_the_matrix_products_that_were_asked_for(monkeypatch, tmp_path):
    def create(*args, **kwargs):
        raise RuntimeError(str(jax.config.jax_default_matmul_precision))

    monkeypatch.setattr(epochs, "create_algorithm", create)
    for precision in ("float32", "bfloat16"):
        with pytest.raises(RuntimeError, match=precision):
            train.run(tiny_config(matmul_precision=precision), tmp_path / precision)
    assert jax.config.jax_default_matmul_precision is None


def test_no_command_shortens_every_value_error():
    """Besides `UserError` a command may shorten what the disk or a checkpoint is to blame for."""
    allowed = {"UserError", "DamagedCheckpoint", "SaveFailed", "OSError", "CannotWrite"}
    commands = [path for path in PACKAGE.glob("*.py") if "def main(" in path.read_text()]
    assert len(commands) > 5
    for path in commands:
        caught = re.findall(
            r"except ([^\n:]+?)(?: as \w+)?:\n +(?:return|code =) fail", path.read_text()
        )
        for names in caught:
            unknown = set(re.findall(r"\w+", names)) - allowed - {"LostProcess"}
            unknown -= {"jax", "errors", "JaxRuntimeError", "files"}
            assert not unknown, (path.name, names)


# Modules that refuse nothing but what a user gives.
OF_USERS = [
    "run/setup",
    "methods/table",
    "run/distill",
    "networks/given",
    "data/data_specs",
    "networks/own_module",
    "networks/classifiers",
    "run/exported",
    "runtime/devices",
    "interchange/torch_file",
    "interchange/torch_layouts",
    "runtime/processes",
    "data/folder_data",
    "data/tfds_data",
    "data/tiny_imagenet",
    "data/decoded_cache",
    "run/teacher",
    "run/student",
    "run/resume",
    "runtime/folder_lock",
]


@pytest.mark.parametrize("module", OF_USERS)
def test_where_only_a_user_can_be_wrong_the_error_says_so(module):
    """Another type would come out with a traceback, as nobody shortens it."""
    raised = re.findall(r"raise (\w+)\(", (PACKAGE / f"{module}.py").read_text())
    assert not {"ValueError", "FileNotFoundError"} & set(raised)
