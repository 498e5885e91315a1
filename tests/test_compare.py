import pickle
from pathlib import Path

import pytest

from configs import cifar10_cnn, cifar100
from dfkd_jax import compare
from dfkd_jax.run import command_line
from dfkd_jax.run.config import to_dict
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import SMALL_NET, tiny_config

BOTH = ["first_order", "exact"]


def labels(found):
    return [combination.label for combination in found]


def test_meta_methods_run_once_per_gradient_and_others_once(tmp_path):
    methods = ["mb-dfkd", "lra-mb", "dafl", "lra-mb"]
    found = compare.combinations(tiny_config, methods, BOTH, tmp_path)
    assert labels(found) == ["mb-dfkd", "lra-mb_first_order", "lra-mb_exact", "dafl"]
    assert [c.config.objective for c in found] == ["joint", "lra", "lra", "acquisition"]
    assert [c.config.meta.variant for c in found[1:3]] == ["first_order", "exact"]
    teachers = {c.config.teacher.checkpoint for c in found}
    assert teachers == {str(tmp_path / "teacher")}
    # Relative, so that runs kept in a repository go on in any clone of it.
    (one,) = compare.combinations(tiny_config, ["mb-dfkd"], BOTH, Path("results"))
    assert one.config.teacher.checkpoint == "results/teacher"


def test_every_value_of_a_varied_field_is_a_combination(tmp_path):
    varied = compare.settings(["meta.inner_lr=0.1,0.9", "replay.mix=True,False"])
    assert len(varied) == 4 and varied[1] == {"meta.inner_lr": "0.1", "replay.mix": "False"}

    def load(method, **fields):
        return command_line.with_overrides(
            f"configs/digits.py:{method}", {"meta.inner_lr": 0.5}, fields
        )

    found = compare.combinations(load, ["lra-mb"], ["exact"], tmp_path, varied)
    assert [c.label for c in found][1] == "lra-mb_exact meta.inner_lr=0.1 replay.mix=False"
    assert {(c.config.meta.inner_lr, c.config.replay.mix) for c in found} == {
        (lr, mix) for lr in (0.1, 0.9) for mix in (True, False)
    }
    jobs, _ = compare.plan(found, 1, tmp_path)
    assert len({job.workdir for job in jobs}) == 4 and " " not in str(jobs[0].workdir)


@pytest.mark.parametrize(
    "text, words",
    [("meta.inner_lr", "FIELD=VALUE"), ("a=1,,2", "FIELD=VALUE"), ("seed=1,2", "--seeds")],
)
def test_a_wrong_vary_is_one_sentence(text, words):
    with pytest.raises(UserError, match=words):
        compare.settings([text])


@pytest.mark.parametrize(
    "field, values",
    [("teacher.epochs", "2,9"), ("teacher.seed", "0,1"), ("dataset.validation_size", "0,100")],
)
def test_what_would_need_several_teachers_is_not_varied(tmp_path, field, values):
    def load(method, **fields):
        return command_line.with_overrides(f"configs/digits.py:{method}", given, fields)

    given = {}
    varied = compare.settings([f"{field}={values}"])
    with pytest.raises(UserError, match=rf"--vary is given for {field}, but one teacher"):
        compare.combinations(load, ["mb-dfkd"], ["exact"], tmp_path, varied)
    # Given teachers are not trained, and may be what is varied.
    folders = [write_card(tmp_path / name) for name in ("a", "b")]
    given = {"teacher.checkpoint": folders[0], "teacher.model": SMALL_NET}
    assert len(compare.combinations(load, ["mb-dfkd"], ["exact"], tmp_path, varied)) == 2
    varied = compare.settings([f"teacher.checkpoint={','.join(folders)}"])
    found = compare.combinations(load, ["mb-dfkd"], ["exact"], tmp_path, varied)
    assert [c.config.teacher.checkpoint for c in found] == folders


def write_card(folder):
    card = {"model": SMALL_NET, "num_classes": 10, "image_shape": [8, 8, 1]}
    files.write_json(folder / "teacher.json", card)
    return str(folder)


def test_a_teacher_that_is_given_is_kept(tmp_path):
    given = tmp_path / "mine"
    write_card(given)
    fields = {"teacher.checkpoint": str(given)}
    found = compare.combinations(
        lambda method: tiny_config(method, **fields), ["mb-dfkd"], BOTH, tmp_path
    )
    assert found[0].config.teacher.checkpoint == str(given)


def test_a_teacher_of_another_model_in_the_folder_is_refused(tmp_path):
    card = {"model": "lenet5", "num_classes": 10, "image_shape": [8, 8, 1]}
    files.write_json(tmp_path / "teacher" / "teacher.json", card)
    with pytest.raises(UserError, match="a teacher with model 'lenet5'"):
        compare.combinations(tiny_config, ["mb-dfkd"], BOTH, tmp_path)


@pytest.mark.parametrize(
    "methods, gradients, words",
    [
        (["mb-dfkd", "magic"], BOTH, "--methods is 'magic'; allowed are lra-mb, lra-gr"),
        ([], BOTH, "--methods is empty; allowed"),
        (["lra-mb"], ["second"], "--gradients is 'second'; allowed are detached, first_order"),
        (["lra-mb"], [], "--gradients is empty"),
    ],
)
def test_wrong_names_are_one_sentence(tmp_path, methods, gradients, words):
    with pytest.raises(UserError, match=words):
        compare.combinations(tiny_config, methods, gradients, tmp_path)


def test_a_field_that_cannot_work_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match=r"config\.epochs is 0"):
        compare.combinations(lambda method: tiny_config(method, epochs=0), ["dafl"], BOTH, tmp_path)


def test_fields_of_the_command_line_win_over_the_method():
    fields = {"batch_size": 64, "loss.one_hot": 0.25, "generator.channels": (8, 4)}
    config = command_line.with_overrides("configs/cifar100.py:dfad", fields)
    assert (config.method, config.loss.one_hot, config.loss.adversarial) == ("dfad", 0.25, 1.0)
    assert config.generator.channels == (8, 4) and config.replay.entry_size == 64 // 8
    with pytest.raises(command_line.FLAG_ERRORS, match="'magic'; allowed are"):
        command_line.with_overrides("configs/digits.py:magic", {})


def finish(config, folder, seed):
    own = config.copy_and_resolve_references()
    own.seed = seed
    files.write_json(folder / "config.json", to_dict(own))
    files.write_json(folder / "summary.json", {})


def test_finished_runs_are_not_planned_again(tmp_path):
    found = compare.combinations(tiny_config, ["mb-dfkd", "lra-mb"], ["exact"], tmp_path)
    finish(found[0].config, tmp_path / "runs/mb-dfkd/seed2", 2)
    jobs, finished = compare.plan(found, 2, tmp_path)
    names = [job.name for job in jobs]
    assert names == ["mb-dfkd, seed 1", "lra-mb_exact, seed 1", "lra-mb_exact, seed 2"]
    assert finished == 1
    assert jobs[2].workdir == tmp_path / "runs/lra-mb_exact/seed2"
    jobs, finished = compare.plan(found, 3, tmp_path)
    assert [job.config.seed for job in jobs] == [1, 3, 1, 2, 3] and finished == 1
    assert [c.config.seed for c in found] == [1, 1]


@pytest.mark.parametrize("module", [cifar100, cifar10_cnn])
def test_jobs_of_configurations_with_derived_fields_reach_a_child_process(module, tmp_path):
    # There a field is derived from another, by a function that no pickle takes.
    found = [compare.Combination("lra-mb exact", module.get_config(), {})]
    (job,), _ = compare.plan(found, 1, tmp_path)
    config, workdir = pickle.loads(pickle.dumps((job.config, job.workdir)))
    assert to_dict(config) == to_dict(found[0].config) and config.seed == 1
    assert workdir == tmp_path / "runs/lra-mb_exact/seed1"


def test_seeds_count_from_the_configurations_own(tmp_path):
    found = compare.combinations(
        lambda method: tiny_config(method, seed=40), ["dafl"], BOTH, tmp_path
    )
    jobs, _ = compare.plan(found, 2, tmp_path)
    assert [job.config.seed for job in jobs] == [40, 41]
    with pytest.raises(UserError, match="--seeds is 0; allowed is 1 or more"):
        compare.plan(found, 0, tmp_path)


def test_the_folder_of_another_configuration_is_refused(tmp_path):
    found = compare.combinations(tiny_config, ["mb-dfkd"], BOTH, tmp_path)
    finish(tiny_config("mb-dfkd", epochs=9), tmp_path / "runs/mb-dfkd/seed1", 1)
    with pytest.raises(UserError, match=r"another configuration.* epochs: 9 → 3"):
        compare.plan(found, 1, tmp_path)
