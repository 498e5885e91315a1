"""The configurations by data set: complete, with every method, and with the papers' numbers."""

import functools
import importlib

import pytest

from configs import digits
from dfkd_jax.data import splits as data
from dfkd_jax.losses import batch_norm
from dfkd_jax.methods import table as methods
from dfkd_jax.run.config import to_dict
from dfkd_jax.run.resume import other_fields
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import get

NAMES = (
    *("default", "digits", "mnist", "cifar10", "cifar10_cnn", "cifar10_wrn", "cifar100"),
    *("cifar100_authors", "svhn", "tiny_imagenet"),
)


@functools.cache
def traced(module, image_shape):
    """What every configuration of these networks would trace anew."""
    return TRACED(module, image_shape)


TRACED = batch_norm._traced


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_config_file_takes_every_method(name, method, monkeypatch):
    monkeypatch.setattr(data, "check_prepared", lambda *args, **kwargs: None)
    monkeypatch.setattr(batch_norm, "_traced", traced)
    config = importlib.import_module(f"configs.{name}").get_config(method)
    lacking = config.loss.batch_norm or config.loss.get("attention")
    if name == "mnist" and lacking:  # LeNet-5 has no batch norm
        with pytest.raises(UserError, match=r"loss\.(batch_norm|attention).* allowed is 0\.0"):
            parse(config)
    else:
        parse(config)
    assert config.method == method
    assert set(to_dict(config)) == set(to_dict(digits.get_config(method)))  # no field of its own
    for field, value in methods.preset(method).items():
        # The authors' code adds the one-pass joint loss to LRA's retention term.
        authors = name == "cifar100_authors" and (field, value) == ("objective", "lra")
        assert get(config, field) == ("lra_concatenated" if authors else value)


def test_the_papers_hyper_parameters():
    from configs import cifar100

    config = cifar100.get_config()
    assert (config.batch_size, config.iterations_per_epoch, config.epochs) == (512, 72, 400)
    assert (config.replay.capacity, config.replay.entry_size) == (10, 64)
    assert (config.meta.inner_lr, config.student.steps, config.generator.steps) == (0.9, 10, 1)
    joint = cifar100.get_config("mb-dfkd")  # compared at one batch size
    assert (joint.batch_size, joint.iterations_per_epoch, joint.replay.entry_size) == (512, 72, 64)


def test_the_authors_settings_are_a_configuration_of_their_own():
    """Twice the batch in half the steps for joint replay, and the habits of their code."""
    from configs import cifar100, cifar100_authors

    joint = cifar100_authors.get_config("mb-dfkd-concatenated")
    sizes = (joint.batch_size, joint.iterations_per_epoch, joint.replay.entry_size)
    assert sizes == (1024, 36, 128)
    lra = cifar100_authors.get_config("lra-gr")
    assert (lra.batch_size, lra.iterations_per_epoch, lra.replay.entry_size) == (512, 72, 64)
    assert (lra.objective, lra.meta.inner_weight_decay) == ("lra_concatenated", 5e-4)
    assert cifar100_authors.get_config("mad").batch_size == cifar100.get_config("mad").batch_size
    shipped = cifar100_authors.get_config()
    assert (shipped.objective, shipped.meta.variant) == ("lra_concatenated", "detached")
    for config in (joint, lra, shipped):
        assert config.generator.student_mode == "eval_after_test"
        assert config.replay.recall_running_statistics
        assert config.replay.accumulate_recall_gradient


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [m for m in methods.METHODS if m not in ("mad", "zskt")])
def test_a_pool_has_room_for_all_that_a_run_makes(name, method):
    """As the folders of images in the sources, which only grow."""
    config = importlib.import_module(f"configs.{name}").get_config(method)
    if config.replay.kind != "pool":
        return
    synthesis, iterations = config.synthesis, config.epochs * config.iterations_per_epoch
    rounds = synthesis.warm_up * synthesis.warm_up_rounds
    rounds += (iterations - synthesis.warm_up) * synthesis.rounds
    assert config.pool.capacity >= rounds * config.batch_size


def test_an_old_run_of_zskt_had_no_attention(tmp_path):
    """Its configuration lacks the field: to go on with the term would be another run."""
    config = digits.get_config("zskt")
    stored = to_dict(config)
    del stored["loss"]["attention"]
    files.write_json(tmp_path / "config.json", stored)
    assert other_fields(tmp_path, config, {}) == ["loss.attention: 0.0 → 250.0"]
    config.loss.attention = 0.0
    assert other_fields(tmp_path, config, {}) == []
