"""NAYER: groups, noisy layers, the generator's life, and tables of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation import steps
from dfkd_jax.methods import nayer
from dfkd_jax.networks.label_generator import grouped_dense
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import build, tiny_config


@pytest.mark.parametrize("devices", [1, 2, 3, 6])
def test_every_row_goes_through_the_layer_of_its_group(devices):
    """Shares may begin and end within a group, and the last group need not be whole."""
    rng = np.random.default_rng(0)
    size, groups, count = 4, 5, 18
    x, kernel = rng.normal(size=(count, 3)), rng.normal(size=(groups, 3, 2))
    bias = rng.normal(size=(groups, 2))
    expected = np.stack([row @ kernel[i // size] + bias[i // size] for i, row in enumerate(x)])
    share = count // devices
    found = [
        jax.jit(grouped_dense, static_argnums=3)(
            jnp.asarray(x[first : first + share]), kernel, bias, size, jnp.int32(first)
        )
        for first in range(0, count, share)
    ]
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-5, atol=1e-5)


def test_the_generator_lives_so_many_iterations():
    config = tiny_config(
        "nayer",
        **{
            "synthesis.warm_up": 4,
            "synthesis.warm_up_rounds": 3,
            "synthesis.rounds": 2,
            "nayer.generator_life": 2,
        },
    )
    new = [r for r in range(24) if bool(nayer.renewed(jnp.int32(r), config))]
    # Warm-up: iterations 0 and 2 begin with rounds 0 and 6; then every fourth round.
    assert new == [0, 6, 12, 16, 20]


@pytest.mark.slow
def test_noise_is_drawn_every_round_and_the_rest_goes_on():
    config = tiny_config("nayer", **{"nayer.generator_life": 5, "synthesis.warm_up_rounds": 3})
    built, state, teacher = build(config)
    begin, update, finish = (
        jax.jit(lambda s, t, step=step: step(built.parts, s, t)[0])
        for step in (steps.begin_step, steps.update_step, steps.finish_step)
    )
    state = update(begin(state, teacher), teacher)
    first = jax.tree.map(np.asarray, state.synthesizer.generator.params)
    state = begin(finish(state, teacher), teacher)
    second = state.synthesizer.generator.params
    jax.tree.map(np.testing.assert_array_equal, first["rest"], second["rest"])
    assert not np.any(second["noisy"]["bias"])
    assert not np.array_equal(first["noisy"]["kernel"], second["noisy"]["kernel"])
    assert abs(np.std(second["noisy"]["kernel"]) - 1) < 0.3
    assert second["noisy"]["kernel"].shape == (1, 10, 4)  # ⌈8 / 10⌉ groups


@pytest.mark.slow
def test_a_group_holds_each_class_once():
    built, state, teacher = build(tiny_config("nayer", **{"batch_size": 28, "pool.capacity": 56}))
    state, _ = steps.begin_step(built.parts, state, teacher)
    targets = np.asarray(state.synthesizer.targets)
    for group in (targets[:10], targets[10:20]):
        assert sorted(group.tolist()) == list(range(10))
    assert len(set(targets[20:].tolist())) == 8


def test_random_embeddings_are_orthonormal_and_always_the_same():
    config = tiny_config("nayer")
    table = nayer.embeddings(config, 10)
    np.testing.assert_allclose(table @ table.T, np.eye(10), atol=1e-5)
    np.testing.assert_array_equal(table, nayer.embeddings(config, 10))


def test_a_table_of_embeddings_is_read_and_checked(tmp_path):
    path = tmp_path / "table.npy"
    table = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float16)
    np.save(path, table)
    config = tiny_config("nayer", **{"nayer.embeddings": str(path)})
    np.testing.assert_array_equal(nayer.embeddings(config, 10), table.astype(np.float32))
    assert parse(config, reads_data=False).method.plan.updates == 2
    wrong = {
        "rows": np.zeros((9, 6)),
        "flat": np.zeros(10),
        "nan": np.full((10, 6), np.nan),
        "text": np.array([["a"] * 6] * 10),
    }
    for name, array in wrong.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(UserError, match=r"allowed is one of \(10, D\) finite numbers"):
            parse(tiny_config("nayer", **{"nayer.embeddings": str(tmp_path / f"{name}.npy")}))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "torn.npy").write_bytes(path.read_bytes()[:60])
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("object", "torn", "empty", "missing"):
        with pytest.raises(UserError, match=r"cannot be read as a \.npy file of numbers"):
            parse(tiny_config("nayer", **{"nayer.embeddings": str(tmp_path / f"{name}.npy")}))
