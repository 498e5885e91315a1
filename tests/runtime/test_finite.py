"""Networks that diverge: nothing of them is saved, summed up or exported."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dfkd_jax import convert, export
from dfkd_jax.data import data_specs
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import checkpoint, records, teacher
from dfkd_jax.run.train import run
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.finite import NonFinite, all_finite, check_variables
from tests.helpers import earlier
from tests.helpers.tiny import SMALL_NET, build, epoch_of, tiny_config, untrained_teacher

QUIET = Console(quiet=True)


@jax.custom_vjp
def bent(x):
    """The identity; its gradient is not a number."""
    return x


bent.defvjp(lambda x: (x, None), lambda _, gradient: (gradient * jnp.nan,))


class Bent(nn.Module):
    """A student whose forward pass is finite and whose parameters' gradient is not."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        features = x.reshape(x.shape[0], -1)
        shape = (features.shape[1], self.num_classes)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return features @ bent(kernel), features


ONE_STEP = {"iterations_per_epoch": 1, "student.steps": 1, "epochs": 2}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """An untrained teacher in a folder."""
    return untrained_teacher(tmp_path_factory.mktemp("teacher"))


def test_every_floating_leaf_counts_and_no_other():
    tree = {"a": jnp.ones((2, 3)), "n": jnp.arange(2), "key": jax.random.split(jax.random.key(0))}
    assert all_finite(tree) and all_finite({}) and all_finite(())
    for value in (np.nan, np.inf, -np.inf):
        broken = {**tree, "a": tree["a"].at[1, 2].set(value)}
        assert not all_finite(broken)
        with pytest.raises(NonFinite, match=r"^It holds values in a that are no finite numbers"):
            check_variables({"a": broken["a"]}, "It")
    check_variables({"a": tree["a"]}, "It")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["student", "synthesizer", "replay"])
def test_an_epoch_says_which_part_of_the_state_is_broken(part):
    config = tiny_config(**{**ONE_STEP, "loop": "scan"})
    steps, state, variables = build(config)
    epoch = epoch_of(config, steps)
    if part == "replay":
        images = state.replay.images.at[:].set(jnp.nan)
        state = state.replace(replay=state.replay.replace(images=images))
    else:
        network = getattr(state, part)
        # Batch statistics that no loss of this epoch reads.
        stats = jax.tree.map(lambda x: x * jnp.nan, network.batch_stats)
        state = state.replace(**{part: network.replace(batch_stats=stats)})
    _, metrics = epoch(state, variables)
    assert not metrics[f"finite_{part}"]


@pytest.mark.slow
def test_nan_of_the_last_update_of_an_epoch_is_not_saved(given, tmp_path):
    fields = {"student.model": f"{__name__}:Bent", "teacher.checkpoint": str(given)}
    words = r"^A parameter of the student became non-finite in epoch 1; no checkpoint was saved"
    for _ in range(2):  # and nothing of it is resumed
        with pytest.raises(NonFinite, match=words):
            run(tiny_config("mb-dfkd", **ONE_STEP, **fields), tmp_path, QUIET)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    assert not (tmp_path / "summary.json").exists()
    assert records.read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_teacher_that_diverges_is_one_sentence_and_leaves_no_card(tmp_path):
    config = tiny_config(**{"teacher.learning_rate": 1e30})
    with pytest.raises(NonFinite) as caught:
        run(config, tmp_path, QUIET)
    message = str(caught.value)
    assert "teacher diverged in epoch 1" in message
    assert "config.teacher.learning_rate is 1e+30" in message and len(message.splitlines()) == 1
    assert not data_specs.is_teacher(tmp_path / "teacher")
    assert not list((tmp_path / "teacher" / "checkpoints").glob("[0-9]*"))


def poisoned(variables):
    """The variables with one value that is not a number."""
    leaves, tree = jax.tree.flatten(variables)
    leaves[0] = jnp.asarray(leaves[0]).at[(0,) * leaves[0].ndim].set(jnp.nan)
    return tree.unflatten(leaves)


def test_a_teacher_that_is_not_finite_is_neither_written_nor_loaded(given, tmp_path):
    model = create_classifier(SMALL_NET, 10)
    variables = teacher.load_teacher(given, model, (8, 8, 1))
    with pytest.raises(NonFinite, match=r"^The teacher holds values in batch_stats\."):
        teacher.save_teacher(tmp_path / "new", poisoned(variables), {})
    assert not (tmp_path / "new").exists()
    description = convert.Description("cnn_half", 10, (8, 8, 1))
    with pytest.raises(UserError, match="no finite numbers"):
        convert._write(tmp_path / "converted", poisoned(variables), description._asdict())
    assert not list(tmp_path.iterdir())
    shutil.copytree(given, tmp_path / "old")  # as an earlier version may have left it
    (tmp_path / "old" / teacher.WEIGHTS).unlink()
    earlier.save_weights(tmp_path / "old", poisoned(variables))
    config = tiny_config(**{"teacher.checkpoint": str(tmp_path / "old"), **ONE_STEP})
    with pytest.raises(NonFinite, match=r"^The teacher in .*old holds values in batch_stats\."):
        run(config, tmp_path / "run", QUIET)


@pytest.mark.slow
def test_a_student_that_is_not_finite_is_neither_exported_nor_summed_up(
    given, tmp_path, open_checkpoints
):
    """As a version that looked at the losses alone may have left it."""
    config = tiny_config(**{"teacher.checkpoint": str(given), **ONE_STEP, "epochs": 1})
    run(config, tmp_path, QUIET)
    (tmp_path / "summary.json").unlink()
    _, state, _ = build(config)
    manager = open_checkpoints(tmp_path / "checkpoints")
    state, history = checkpoint.restore_latest(manager, state, pytest.fail)
    broken = state.replace(student=state.student.replace(params=poisoned(state.student.params)))
    manager.delete(1)
    checkpoint.save(manager, 1, broken, history)
    with pytest.raises(NonFinite, match=r"^The student in .* no finite numbers; "):
        export.export(tmp_path, "safetensors", tmp_path / "export")
    with pytest.raises(NonFinite, match=r"^The checkpoint of epoch 1 in .* no finite numbers"):
        run(config, tmp_path, QUIET)
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "export").exists()
