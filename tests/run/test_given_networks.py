"""Networks that a run is given: a teacher by its content, and a student to start from."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dfkd_jax.comparison import run_folders
from dfkd_jax.data import data_specs
from dfkd_jax.networks.classifiers import create_classifier
from dfkd_jax.run import epochs as epochs_lib
from dfkd_jax.run import student, teacher
from dfkd_jax.run.config import to_dict
from dfkd_jax.run.resume import other_fields
from dfkd_jax.run.setup import parse
from dfkd_jax.run.train import run
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import SMALL_NET, tiny_config, untrained_teacher
from tests.helpers.trees import same_bits

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
SMALL = {"iterations_per_epoch": 1, "student.steps": 1, "epochs": 1}


def small(given, **fields):
    return tiny_config("mb-dfkd", **{**SMALL, "teacher.checkpoint": str(given), **fields})


def is_finished(config, folder):
    return run_folders.is_finished(config, data_specs.teacher_card(config), folder)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return untrained_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """A finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    run(small(given), folder, QUIET)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_digest_is_of_names_shapes_types_and_values():
    variables = {"params": {"a": jnp.arange(6.0), "b": jnp.zeros(2)}}
    others = [
        {"params": {"a": jnp.arange(6.0), "c": jnp.zeros(2)}},
        {"params": {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(2)}},
        {"params": {"a": jnp.arange(6.0, dtype=jnp.float16), "b": jnp.zeros(2)}},
        {"params": {"a": jnp.arange(6.0).at[3].set(3.5), "b": jnp.zeros(2)}},
        {"params": {"a": jnp.zeros(2), "b": jnp.arange(6.0)}},
    ]
    found = {teacher.digest(tree) for tree in (variables, *others)}
    assert len(found) == 6
    again = {"params": {"b": np.zeros(2, np.float32), "a": np.arange(6, dtype=np.float32)}}
    assert teacher.digest(again) == teacher.digest(variables)


def test_a_run_goes_on_with_its_teacher_wherever_that_lies(given, folder, tmp_path, monkeypatch):
    moved = shutil.copytree(given, tmp_path / "elsewhere")
    monkeypatch.chdir(given.parent)
    for path in (given, f"{given}/", "teacher", f"../{given.parent.name}/teacher", moved):
        run(small(path), folder, QUIET)
        assert is_finished(small(path), folder)
    kept = files.read_json(folder / student.TEACHER_COPY)
    assert kept["folder"] == str(moved) and len(kept["digest"]) == 64
    assert files.read_json(folder / "config.json")["teacher"]["checkpoint"] == str(given)
    # Also the run may have moved, and its first teacher be gone.
    assert student.load_student(shutil.move(folder, tmp_path / "moved")).card["epoch"] == 1


def test_another_teacher_is_refused_in_one_sentence(given, folder, tmp_path):
    other = untrained_teacher(tmp_path / "other", seed=1)
    differs = rf"another configuration.*teacher\.checkpoint: '{given}' → '{other}'\.$"
    with pytest.raises(UserError, match=differs):
        run(small(other), folder, QUIET)
    with pytest.raises(UserError, match=differs):
        is_finished(small(other), folder)


def test_another_teacher_in_the_same_place_is_refused(given, tmp_path):
    place = shutil.copytree(given, tmp_path / "place")
    run(small(place), tmp_path / "run", QUIET)
    shutil.rmtree(place)
    untrained_teacher(place, seed=1)
    with pytest.raises(UserError, match=r"fields are the content of teacher\.checkpoint\.$"):
        run(small(place), tmp_path / "run", QUIET)
    # Its card put back, its weights say it.
    shutil.copy(given / data_specs.CARD, place)
    with pytest.raises(UserError, match=r"another teacher: the weights in .*place are not those"):
        run(small(place), tmp_path / "run", QUIET)


def test_runs_of_versions_without_a_digest_are_told_by_the_card(given, folder, tmp_path):
    copy = folder / student.TEACHER_COPY
    kept = files.read_json(copy)
    del kept["digest"], kept["card"]["digest"]
    files.write_json(copy, kept)
    other = shutil.copytree(given, tmp_path / "other")
    card = files.read_json(other / data_specs.CARD)
    files.write_json(other / data_specs.CARD, {**card, "source": "another"})
    with pytest.raises(UserError, match="another configuration"):
        run(small(other), folder, QUIET)
    run(small(shutil.copytree(given, tmp_path / "same")), folder, QUIET)
    assert files.read_json(copy)["digest"] == teacher.digest(weights(given))


def weights(directory):
    return teacher.load_teacher(directory, create_classifier(SMALL_NET, 10), (8, 8, 1))


def test_a_run_that_trained_its_teacher_may_name_it(tmp_path):
    untrained_teacher(tmp_path / "teacher")
    config = tiny_config("mb-dfkd", **SMALL)
    run(config, tmp_path, QUIET)
    run(small(tmp_path / "teacher"), tmp_path, QUIET)
    elsewhere = untrained_teacher(tmp_path / "elsewhere", seed=1)
    with pytest.raises(UserError, match=r"teacher\.checkpoint: None → "):
        run(small(elsewhere), tmp_path, QUIET)


def test_one_teacher_in_two_places_makes_one_label(given, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "b")
    config = files.read_json(other / "config.json")
    config["teacher"]["checkpoint"] = "elsewhere/teacher"
    files.write_json(other / "config.json", config)
    runs, notes = run_folders.find([tmp_path])
    assert {found.label for found in runs} == {"mb-dfkd"} and "is there twice" in notes[0]
    kept = files.read_json(other / student.TEACHER_COPY)
    files.write_json(other / student.TEACHER_COPY, {**kept, "digest": "another"})
    assert len({found.label for found in run_folders.find([tmp_path])[0]}) == 2


def first_states(monkeypatch, config, folder):
    """The student that each epoch of a run begins with."""
    create, seen = epochs_lib.create_algorithm, []

    def recorded(*args):
        algorithm = create(*args)

        def epoch(state, variables):
            own = {"params": state.student.params, "batch_stats": state.student.batch_stats}
            seen.append(jax.tree.map(np.array, own))
            return algorithm.epoch(state, variables)

        return algorithm._replace(epoch=epoch)

    monkeypatch.setattr(epochs_lib, "create_algorithm", recorded)
    run(config, folder, QUIET)
    return seen


@pytest.mark.parametrize("fields", [{}, {"parallel.devices": 2}])
def test_a_run_starts_from_the_student_of_another(given, finished, tmp_path, monkeypatch, fields):
    config = small(given, **{"student.checkpoint": str(finished), "epochs": 2, **fields})
    begun, second = first_states(monkeypatch, config, tmp_path)
    assert same_bits(begun, student.load_student(finished).variables)
    assert not same_bits(begun, second)
    # Resumed, it goes on from its own; another spelling of the folder is the same one.
    (tmp_path / "summary.json").unlink()
    config.student.checkpoint = f"{finished}/../{finished.name}/"
    run(config, tmp_path, QUIET)
    config.student.checkpoint = None
    with pytest.raises(UserError, match=r"student\.checkpoint: '.*' → None"):
        run(config, tmp_path, QUIET)


def test_a_run_starts_from_a_teacher_of_the_same_network(given, tmp_path, monkeypatch):
    config = small(given, **{"student.checkpoint": str(given), "student.model": SMALL_NET})
    (begun,) = first_states(monkeypatch, config, tmp_path)
    assert same_bits(begun, jax.tree.map(np.asarray, dict(weights(given))))


def test_other_epochs_are_refused_and_the_sentence_says_how_to_go_on(given, folder, tmp_path):
    with pytest.raises(UserError) as caught:
        run(small(given, epochs=2), folder, QUIET)
    message = str(caught.value)
    assert "epochs: 1 → 2" in message and "the learning rate follows config.epochs" in message
    assert f"--config.student.checkpoint={folder}" in message
    assert message.count(". ") == 0 and message.endswith(".")
    with pytest.raises(UserError, match=r"student\.checkpoint="):
        is_finished(small(given, epochs=2), folder)
    with pytest.raises(UserError) as other:
        run(small(given, batch_size=16), folder, QUIET)
    assert "learning rate" not in str(other.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"student.model": "cnn"}, rf"a student with model '{SMALL_NET}'; this run needs 'cnn'"),
        ({"student.checkpoint": "/nowhere"}, r"/nowhere holds no config\.json"),
    ],
)
def test_a_start_that_does_not_fit_is_one_sentence(given, finished, fields, words):
    config = small(given, **{"student.checkpoint": str(finished), **fields})
    with pytest.raises(UserError, match=rf"^config\.student\.checkpoint is '.*{words}"):
        parse(config)


def test_a_start_with_other_arrays_or_without_a_checkpoint_is_one_sentence(given, folder, tmp_path):
    config = small(given, **{"student.checkpoint": str(given), "student.model": "cnn"})
    card = files.read_json(given / data_specs.CARD)
    wrong = shutil.copytree(given, tmp_path / "wrong")
    files.write_json(wrong / data_specs.CARD, {**card, "model": "cnn"})
    config.student.checkpoint = str(wrong)
    with pytest.raises(UserError, match=r"^config\.student\.checkpoint is '.*wrong'"):
        run(config, tmp_path / "a", QUIET)
    files.write_json(wrong / data_specs.CARD, {**card, "num_classes": 7})
    with pytest.raises(UserError, match="a student with num_classes 7; this run needs 10"):
        parse(small(given, **{"student.checkpoint": str(wrong)}))
    shutil.rmtree(folder / "checkpoints" / "1")
    with pytest.raises(UserError, match="has no checkpoint; one epoch must be finished"):
        parse(small(given, **{"student.checkpoint": str(folder)}))


def test_a_field_that_an_earlier_version_lacked_counts_as_its_default(given, tmp_path):
    config = small(given)
    stored = to_dict(config)
    del stored["pool"]
    files.write_json(tmp_path / "config.json", stored)
    assert other_fields(tmp_path, config, data_specs.teacher_card(config)) == []
    config.pool.capacity = 64
    found = other_fields(tmp_path, config, data_specs.teacher_card(config))
    assert found == ["pool.capacity: 51200 → 64"]
