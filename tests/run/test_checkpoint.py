"""Checkpoints: exact, atomic, checked."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.run import checkpoint
from tests.helpers import earlier
from tests.helpers.trees import same_bits


def state_of(value):
    return {
        "weights": [jnp.full((300, 10), value), jnp.arange(5) + value],
        "key": jax.random.key(value),
        "empty": (),
        "half": jnp.full(3, value, jnp.bfloat16),
    }


def damage(directory):
    """Flip bits in the middle of every file of arrays."""
    files = [f for f in (directory / "state").rglob("*") if f.is_file() and f.parent.name == "d"]
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 8] = bytes(b ^ 0xFF for b in data[middle : middle + 8])
        file.write_bytes(data)


def test_round_trip_is_exact_and_old_ones_go(tmp_path, open_checkpoints):
    manager = open_checkpoints(tmp_path)
    assert checkpoint.restore_latest(manager, state_of(0), print) is None
    for epoch in (1, 2, 3):
        checkpoint.save(manager, epoch, state_of(epoch), [{"epoch": epoch}])
    assert sorted(manager.all_steps()) == [2, 3]
    state, history = checkpoint.restore_latest(manager, state_of(0), print)
    assert same_bits(state, state_of(3))
    assert history == [{"epoch": 3}]


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "unfinished"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    tmp_path, kind, open_checkpoints
):
    manager = open_checkpoints(tmp_path)
    for epoch in (1, 2):
        checkpoint.save(manager, epoch, state_of(epoch), [{"epoch": epoch}])
    manager.close()
    if kind == "flipped":
        damage(tmp_path / "2")
    elif kind == "truncated":
        for file in (tmp_path / "2" / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:3])
    elif kind == "missing":
        (tmp_path / "2" / "record" / "metadata").unlink()
    else:
        (tmp_path / "2" / checkpoint.SUMS).unlink()

    manager, reports = open_checkpoints(tmp_path), []
    state, history = checkpoint.restore_latest(manager, state_of(0), reports.append)
    assert same_bits(state, state_of(1)) and history == [{"epoch": 1}]
    assert len(reports) == 1 and "checkpoint of epoch 2 is damaged" in reports[0]
    checkpoint.save(manager, 2, state_of(5), [{"epoch": 2}])  # its place is free again
    assert same_bits(checkpoint.restore_latest(manager, state_of(0), print)[0], state_of(5))


def test_nothing_is_started_anew_silently_when_all_are_damaged(tmp_path, open_checkpoints):
    manager = open_checkpoints(tmp_path)
    checkpoint.save(manager, 1, state_of(1), [])
    manager.close()
    damage(tmp_path / "1")
    manager = open_checkpoints(tmp_path)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="None of the checkpoints"):
        checkpoint.restore_latest(manager, state_of(0), lambda message: None)
    assert manager.all_steps()  # evidence is kept


# A thread of orbax's storage may report its own refusal to an event loop that is closed by then.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)
def test_a_save_that_the_file_system_refuses_leaves_the_one_before(tmp_path, open_checkpoints):
    manager = open_checkpoints(tmp_path)
    checkpoint.save(manager, 1, state_of(1), [{"epoch": 1}])
    big = {
        **state_of(2),
        "weights": [jax.random.normal(jax.random.key(0), (300_000,)), state_of(2)["weights"][1]],
    }
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as on a full disk
    try:
        with pytest.raises(checkpoint.SaveFailed, match="Epoch 2 could not be saved"):
            checkpoint.save(manager, 2, big, [{"epoch": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    manager = open_checkpoints(tmp_path)
    state, history = checkpoint.restore_latest(manager, state_of(0), print)
    assert same_bits(state, state_of(1)) and history == [{"epoch": 1}]


def test_weights_of_earlier_versions_are_read_and_wrong_shapes_refused(tmp_path):
    variables = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}}
    earlier.save_weights(tmp_path, variables)
    loaded = checkpoint.load_variables(tmp_path / "weights", variables)
    np.testing.assert_array_equal(loaded["params"]["w"], variables["params"]["w"])
    for wrong in ({"params": {"w": jnp.zeros((3, 3))}}, {"params": {"v": jnp.zeros((2, 3))}}):
        with pytest.raises(ValueError):
            checkpoint.load_variables(tmp_path / "weights", wrong)
