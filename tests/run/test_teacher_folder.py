"""`dfkd_jax.save_teacher` and `load_teacher`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dfkd_jax
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import SMALL_NET, tiny_config

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def variables():
    network = create_classifier(SMALL_NET, 10)
    return jax.jit(network.init)(jax.random.key(0), jnp.zeros((2, *SHAPE)))


def test_what_is_saved_is_what_a_run_takes(variables, tmp_path):
    folder = tmp_path / "made" / "teacher"
    dfkd_jax.save_teacher(folder, SMALL_NET, variables, SHAPE, 10, mean=[0.5], std=[0.25])
    loaded = dfkd_jax.load_teacher(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, dict(variables))
    x = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    logits, features = jax.eval_shape(loaded.network.apply, loaded.variables, x)
    assert logits.shape == (3, 10) and features.shape == (3, 4)
    setup = parse(tiny_config(**{"teacher.checkpoint": str(folder)}))
    assert (setup.spec.mean, setup.spec.std) == ((0.5,), (0.25,))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": "nothing"}, "Unknown classifier 'nothing'"),
        ({"model": "no.module:Net"}, "cannot be imported"),
        ({"num_classes": 9}, "misshapen are params/Dense_0/bias"),
        ({"variables": {"params": {}}}, "missing are batch_stats"),
        ({"mean": [0.5]}, "mean and std belong together"),
    ],
)
def test_what_is_wrong_leaves_nothing(variables, change, words, tmp_path):
    given = {"model": SMALL_NET, "variables": variables, "image_shape": SHAPE, "num_classes": 10}
    with pytest.raises(UserError, match=words):
        dfkd_jax.save_teacher(tmp_path / "made" / "teacher", **{**given, **change})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_used_is_left_alone(variables, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="which exists; give a new or empty one"):
        dfkd_jax.save_teacher(tmp_path, SMALL_NET, variables, SHAPE, 10)
    with pytest.raises(UserError, match=r"which holds no teacher\.json"):
        dfkd_jax.load_teacher(tmp_path)
