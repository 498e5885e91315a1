"""What a run does between epochs: one transfer, checkpoints when they are due, and none lost."""

import re
import signal

import jax
import pytest
from rich.console import Console

from dfkd_jax.run import checkpoint, records, train
from dfkd_jax.run import epochs as epochs_lib
from dfkd_jax.run.setup import parse
from dfkd_jax.run.train import run
from dfkd_jax.runtime import devices
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.finite import NonFinite
from dfkd_jax.runtime.stop import Stopped
from tests.helpers.tiny import build, tiny_config, untrained_teacher
from tests.helpers.trees import same_bits

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
SMALL = {"iterations_per_epoch": 1, "student.steps": 1, "epochs": 5}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return untrained_teacher(tmp_path_factory.mktemp("teacher"))


def small(given, method="mb-dfkd", **fields):
    return tiny_config(method, **{**SMALL, "teacher.checkpoint": str(given), **fields})


def state_in(workdir, config):
    """(state, history) of the newest checkpoint, and the epochs of all."""
    _, state, _ = build(config)
    with checkpoint.open_checkpoints(workdir / "checkpoints", keep=9) as manager:
        epochs = sorted(manager.all_steps())
        return checkpoint.restore_latest(manager, state, pytest.fail), epochs


class Signalling(Console):
    """A console that sends this process a signal when it prints a line."""

    def __init__(self, pattern):
        super().__init__(quiet=True)
        self.pattern = pattern

    def print(self, *words, **kwargs):
        if re.search(self.pattern, str(words)):
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A run that saves every epoch."""
    workdir = tmp_path_factory.mktemp("whole")
    run(small(given), workdir, QUIET)
    return workdir


def without_seconds(workdir):
    found = records.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in found]


def test_checkpoints_come_when_they_are_due_and_after_the_last_epoch(given, whole, tmp_path):
    config = small(given, checkpoint_every=2)
    run(config, tmp_path, QUIET)
    (state, history), epochs = state_in(tmp_path, config)
    assert epochs == [4, 5] and len(history) == 5
    (expected, _), every = state_in(whole, config)
    assert every == [4, 5] and same_bits(state, expected)
    assert without_seconds(tmp_path) == without_seconds(whole)


def test_a_stopped_run_saves_the_epoch_and_goes_on_as_one_never_stopped(given, whole, tmp_path):
    config = small(given, checkpoint_every=4)
    with pytest.raises(Stopped, match=r"^SIGTERM came; epoch (2|3) is saved\.$") as stopped:
        run(config, tmp_path, Signalling(r"epoch 2/5 "))
    _, epochs = state_in(tmp_path, config)
    assert str(epochs[-1]) in str(stopped.value) and len(without_seconds(tmp_path)) == epochs[-1]
    run(config, tmp_path, QUIET)
    assert same_bits(state_in(tmp_path, config)[0][0], state_in(whole, config)[0][0])
    assert without_seconds(tmp_path) == without_seconds(whole)


def test_a_run_of_rounds_goes_on_as_one_never_stopped(given, tmp_path):
    """What rounds keep (generators, statistics, banks, pools) goes on too, out of the warm-up."""
    config = small(given, "fast", epochs=3)
    run(config, tmp_path / "whole", QUIET)
    with pytest.raises(Stopped, match=r"^SIGTERM came; epoch 1 is saved\.$"):
        run(config, tmp_path / "stopped", Signalling(r"epoch 1/3 "))
    run(config, tmp_path / "stopped", QUIET)
    states = [state_in(tmp_path / name, config)[0][0] for name in ("stopped", "whole")]
    assert same_bits(*states) and int(states[0].replay.size) == 3  # 2 rounds, 1 and 1: of 24 images
    assert without_seconds(tmp_path / "stopped") == without_seconds(tmp_path / "whole")


def test_a_killed_run_goes_on_after_the_last_checkpoint(given, whole, tmp_path, monkeypatch):
    config = small(given, checkpoint_every=2)

    class Killed(Exception):
        pass

    record = train.Outputs.record

    def dies(self, found):
        record(self, found)
        if found["epoch"] == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Outputs, "record", dies)
        run(config, tmp_path, QUIET)
    assert state_in(tmp_path, config)[1] == [2] and len(without_seconds(tmp_path)) == 3
    run(small(given), tmp_path, QUIET)  # with another value, which changes nothing
    assert same_bits(state_in(tmp_path, config)[0][0], state_in(whole, config)[0][0])
    assert without_seconds(tmp_path) == without_seconds(whole)


def test_the_epoch_named_as_the_last_good_one_is_the_one_that_is_saved(
    given, tmp_path, monkeypatch
):
    config = small(given, checkpoint_every=2)
    create = epochs_lib.create_algorithm

    def diverging(*args):
        algorithm = create(*args)
        epochs = []

        def epoch(state, teacher):
            epochs.append(1)
            state, metrics = algorithm.epoch(state, teacher)
            bad = len(epochs) == 4
            return state, {**metrics, "finite": metrics["finite"] & (not bad)}

        return algorithm._replace(epoch=epoch)

    monkeypatch.setattr(epochs_lib, "create_algorithm", diverging)
    with pytest.raises(NonFinite, match=r"in epoch 4; the last good checkpoint, of epoch 2, is in"):
        run(config, tmp_path, QUIET)
    assert state_in(tmp_path, config)[1] == [2]


def test_checkpoint_every_is_at_least_one():
    with pytest.raises(UserError, match=r"config\.checkpoint_every is 0; allowed is 1 or more"):
        parse(tiny_config(checkpoint_every=0))


def test_the_measures_of_an_epoch_come_back_in_one_transfer(given, tmp_path, monkeypatch):
    """Read by `device_get` once an epoch; and the test images go to the device once for all."""
    gets, puts, reads = [], [], []
    device_get, put = jax.device_get, devices.Devices.put

    def counted_get(tree):
        gets.append(tree)
        with monkeypatch.context() as patch:
            for name in implicit:
                patch.setattr(array, name, originals[name])
            return device_get(tree)

    def counted_put(self, tree, *args, **kwargs):
        puts.extend(x.shape for x in jax.tree.leaves(tree))
        return put(self, tree, *args, **kwargs)

    array = type(jax.numpy.zeros(()))
    implicit = ("__float__", "__int__", "__bool__", "__array__", "item", "tolist")
    originals = {name: getattr(array, name) for name in implicit}

    def watched(name):
        def read(self, *args, **kwargs):
            reads.append(name)
            return originals[name](self, *args, **kwargs)

        return read

    epochs = []

    def quiet(*args, **kwargs):
        epochs.append(len(gets))

    monkeypatch.setattr(jax, "device_get", counted_get)
    monkeypatch.setattr(devices.Devices, "put", counted_put)
    # What the files of a run need is not measured here.
    monkeypatch.setattr(checkpoint, "save", quiet)
    monkeypatch.setattr(train.Outputs, "figures", lambda *args: None)
    create = epochs_lib.create_algorithm

    def from_here(*args):
        algorithm = create(*args)

        def epoch(state, variables):
            for name in implicit:
                monkeypatch.setattr(array, name, watched(name))
            return algorithm.epoch(state, variables)

        return algorithm._replace(epoch=epoch)

    monkeypatch.setattr(epochs_lib, "create_algorithm", from_here)
    before_epochs = 1  # the teacher's accuracy
    run(small(given), tmp_path, QUIET)
    assert epochs == [before_epochs + n for n in range(1, 6)]
    assert reads == []
    # 594 images in two batches, the second filled up: for teacher and student together.
    assert [shape for shape in puts if shape[1:] == (8, 8, 1)] == [(500, 8, 8, 1)] * 2
