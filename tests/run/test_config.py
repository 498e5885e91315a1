"""Configurations: complete, consistent, and refused in one sentence when they cannot work."""

import pytest

from configs import digits
from dfkd_jax.data import data_specs
from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import SPECS
from dfkd_jax.run import config as config_lib
from dfkd_jax.run.config import differences, to_dict
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    "field, value, words",
    [
        (
            "dataset.name",
            "imagenet",
            ["config.dataset.name", "'imagenet'", "folder, none"],
        ),
        ("dataset.name", "none", ["config.teacher.checkpoint is None", "'none'", "a trained one"]),
        ("dataset.name", "folder", ["config.dataset.name is 'folder'", "test is no folder"]),
        ("dataset.image_size", 32, ["config.dataset.image_size is 32 but 8", "'digits'"]),
        ("dataset.num_classes", 7, ["config.dataset.num_classes is 7 but 10", "leave it out"]),
        ("dataset.mean", (0.5,), ["config.dataset.mean is (0.5,) but (0.3053,)"]),
        ("dataset.flip", True, ["config.dataset.flip is True but False for", "'digits'"]),
        ("teacher.model", "vgg99", ["config.teacher.model", "'vgg99'", "resnet34"]),
        ("student.model", "", ["config.student.model", "lenet5"]),
        ("student.model", "squeezenet", ["config.student.model", "8×8×1 images", "17×17 or more"]),
        ("student.model", "imagenet_vgg16", ["config.student.model", "32×32 or more"]),
        ("student.model", "lenet5", ["config.student.model", "8×8×1 images", "28×28"]),
        ("meta.variant", "second_order", ["config.meta.variant", "'second_order'", "exact_hvp"]),
        ("objective", "thesis", ["config.objective", "acquisition, joint, concatenated, lra"]),
        ("student.optimizer", "lion", ["config.student.optimizer", "sgd, adam"]),
        ("replay.kind", "disk", ["config.replay.kind", "memory_bank"]),
        ("replay.push_unit", "day", ["config.replay.push_unit", "epoch, iteration"]),
        ("loss.distance", "l7", ["config.loss.distance", "l1, kl"]),
        (
            "loss.adversarial_form",
            "x",
            ["config.loss.adversarial_form", "js, adi, l1, kl, decision"],
        ),
        ("loop", "while", ["config.loop", "auto, scan, step"]),
        ("method", "dadl", ["The method is", "'dadl'", "lra-mb, lra-gr"]),
        ("matmul_precision", "int8", ["config.matmul_precision", "tensorfloat32, float32"]),
        ("generator.student_mode", "test", ["config.generator.student_mode", "eval_after_test"]),
        ("loss.entropy_logarithm", "log2", ["config.loss.entropy_logarithm", "log10, ln"]),
        ("meta.variant", "none", ["config.meta.variant is 'none'", "allowed are detached"]),
        ("retention_weight", -1.0, ["config.retention_weight", "-1.0", "0 or more"]),
        ("epochs", 0, ["config.epochs", "0", "1 or more"]),
        ("batch_size", 1, ["config.batch_size", "2 or more"]),
        ("replay.entry_size", 500, ["config.replay.entry_size", "500", "at most"]),
        ("replay.capacity", 0, ["config.replay.capacity", "1 or more"]),
        ("meta.inner_steps", 0, ["config.meta.inner_steps", "1 or more"]),
        ("meta.inner_lr", -0.1, ["config.meta.inner_lr", "-0.1", "0 or more"]),
        ("meta.inner_lr", float("nan"), ["config.meta.inner_lr", "nan"]),
        ("student.learning_rate", 0.0, ["config.student.learning_rate", "more than 0"]),
        ("generator.final_learning_rate", -0.1, ["generator.final_learning_rate", "None or 0"]),
        ("generator.channels", (8,), ["config.generator.channels", "two numbers"]),
        ("teacher.checkpoint", "/nowhere", ["config.teacher.checkpoint", "'/nowhere'"]),
        (
            "dataset.name",
            "cifar100",
            ["dfkd_jax.prepare --dataset=cifar100", "array_record"],
        ),
    ],
)
def test_bad_fields_are_one_sentence(field, value, words, tmp_path):
    config = digits.get_config()
    config.dataset.data_dir = str(tmp_path)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as caught:
        parse(config)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_without_replay_there_is_no_meta_gradient():
    config = digits.get_config("no-replay")
    config.objective = "lra"
    with pytest.raises(UserError, match=r"replay\.kind is 'none', with which allowed are acquis"):
        parse(config)
    config = digits.get_config("lra-mb")
    config.objective = "acquisition"
    with pytest.raises(UserError, match=r"'memory_bank', with which allowed are joint, concat"):
        parse(config)


@pytest.mark.parametrize("fields", [{"retention_weight": 0.5}])
@pytest.mark.parametrize("method", ["no-replay", "mb-dfkd-concatenated"])
def test_an_objective_without_a_retention_weight_refuses_one(method, fields):
    config = digits.get_config(method)
    config.update(fields)
    with pytest.raises(UserError, match=r"retention_weight is 0\.5 .* allowed is 1\.0"):
        parse(config)


def test_a_finite_difference_needs_single_precision():
    config = digits.get_config()
    config.meta.variant, config.compute_dtype = "finite_difference", "bfloat16"
    with pytest.raises(UserError, match=r"config\.compute_dtype is 'bf.*allowed is 'float32'"):
        parse(config)


def test_a_batch_norm_term_needs_a_teacher_with_batch_norm(monkeypatch):
    """LeNet-5 has none: the term would be 0 in silence."""
    from configs import mnist

    monkeypatch.setattr(data, "check_prepared", lambda *args, **kwargs: None)
    config = mnist.get_config()
    config.loss.batch_norm = 1.0
    with pytest.raises(UserError, match=r"config\.loss\.batch_norm is 1\.0 .*'lenet5' has no"):
        parse(config)
    config = digits.get_config("dfq")
    parse(config)
    config.teacher.model = "tests.helpers.networks:LayerNormNet"
    with pytest.raises(UserError, match=r"LayerNormNet' has no flax\.linen\.BatchNorm"):
        parse(config)


def test_the_recalls_gradient_is_left_over_from_one_step_only():
    config = digits.get_config("lra-gr")
    config.replay.accumulate_recall_gradient, config.replay.recall_steps = True, 2
    with pytest.raises(UserError, match=r"recall_steps is 2; allowed is 1"):
        parse(config)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"'lra-xx'; allowed are lra-mb, lra-gr"):
        digits.get_config("lra-xx")


def test_fields_that_repeat_the_table_are_allowed():
    fields = {"image_size": 8, "channels": 1, "num_classes": 10, "mean": (0.3053,), "std": (0.376,)}
    config = digits.get_config()
    config.dataset.update(fields)
    parse(config)


@pytest.mark.parametrize(
    "field, value",
    [("num_classes", 7), ("image_shape", [32, 32, 3]), ("model", "lenet5"), ("std", [0.5])],
)
def test_a_teacher_for_other_data_is_refused(tmp_path, field, value):
    card = {"model": "cnn", "num_classes": 10, "image_shape": [8, 8, 1]}
    files.write_json(tmp_path / data_specs.CARD, card)
    config = digits.get_config()
    config.teacher.checkpoint = str(tmp_path)
    parse(config)
    files.write_json(tmp_path / data_specs.CARD, {**card, field: value})
    with pytest.raises(UserError, match=field):
        parse(config)


def test_images_are_normalised_as_the_teacher_has_learned_them(tmp_path):
    card = {"model": "cnn", "num_classes": 10, "image_shape": [8, 8, 1]}
    config = digits.get_config()
    config.teacher.checkpoint = str(tmp_path)
    files.write_json(tmp_path / data_specs.CARD, {**card, "mean": None, "std": None})
    parse(config)
    assert data_specs.spec(config) == SPECS["digits"]
    files.write_json(tmp_path / data_specs.CARD, {**card, "mean": [0.5], "std": [0.25]})
    parse(config)
    assert data_specs.spec(config) == SPECS["digits"]._replace(mean=(0.5,), std=(0.25,))
    config.dataset.mean = (0.3,)
    with pytest.raises(UserError, match=r"config\.dataset\.mean is \(0\.3,\) but \(0\.5,\)"):
        parse(config)


def test_differences_name_the_fields_and_spare_the_free_ones():
    stored, config = to_dict(digits.get_config()), digits.get_config()
    config.meta.inner_lr = 0.5
    config.loop = "scan"
    config.seed = 3
    assert differences(stored, to_dict(config)) == ["meta.inner_lr: 0.01 → 0.5", "seed: 1 → 3"]
    free = {"checkpoint_every", "loop", "dataset.data_dir"}
    free |= {"parallel.devices", "parallel.mapping"}
    assert set(config_lib.FREE_FIELDS) == free
