"""What a run takes from data: to test with, and nothing else; without data it is the same run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from PIL import Image
from rich.console import Console

from dfkd_jax.data import data_specs
from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import SPECS
from dfkd_jax.networks import models
from dfkd_jax.run import records, setup, teacher, train
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from tests.helpers.tiny import build, tiny_config

QUIET = Console(quiet=True)
DIGITS = SPECS["digits"]
COUNT = 37  # test images; no other array of a run has a side of 37


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The folder of a teacher that nobody trained, and a test split on which it is always right."""
    folder = tmp_path_factory.mktemp("teacher")
    config = tiny_config()
    _, _, variables = build(config)
    card = {"model": config.teacher.model, "num_classes": 10, "image_shape": DIGITS.image_shape}
    teacher.save_teacher(folder, variables, {**card, "mean": DIGITS.mean, "std": DIGITS.std})
    images = np.random.default_rng(0).integers(0, 256, (COUNT, *DIGITS.image_shape), np.uint8)
    inputs = data.normalize(images, DIGITS.mean, DIGITS.std)
    model = models.create_models(config, DIGITS.image_shape, DIGITS.num_classes).teacher
    logits, _ = jax.jit(lambda x: model.apply(variables, x, train=False))(inputs)
    return folder, data.Split(images, np.asarray(jnp.argmax(logits, -1), np.int32))


class Watched:
    """A run, with what its epochs were given and what they made of it."""

    def __init__(self, config, workdir, load):
        self.loaded, self.states, self.inputs = [], [], None

        def counted_load(spec, split, data_dir=None, validation_size=0):
            self.loaded.append(split)
            return load(spec, split)

        def watched_epoch(*args):
            self.epoch = create_epoch(*args)

            def epoch(state, variables):
                self.inputs = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, variables)
                )
                state, metrics = self.epoch(state, variables)
                self.states.append(
                    jax.device_get(state.replace(key=jax.random.key_data(state.key)))
                )
                return state, metrics

            return epoch

        create_epoch = setup.create_epoch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "load", counted_load)
            patch.setattr(setup, "create_epoch", watched_epoch)
            self.summary = train.run(config, workdir, QUIET)
        self.history = records.read_metrics(workdir / "metrics.jsonl")


def refuse(spec, split):
    raise AssertionError("a run without data has loaded some")


@pytest.fixture(scope="module")
def watched(given, tmp_path_factory):
    """The same run with one test split, with another, and without any data."""
    folder, split = given
    other = data.Split(255 - split.images[::-1], (split.labels + 1) % 10)
    fields = {"teacher.checkpoint": str(folder)}
    root = tmp_path_factory.mktemp("runs")

    def watch(name, load, **more):
        return Watched(tiny_config(**fields, **more), root / name, load)

    return {
        "one": watch("one", lambda spec, name: split),
        "other": watch("other", lambda spec, name: other),
        "none": watch("none", refuse, **{"dataset.name": "none"}),
    }


@pytest.mark.slow
def test_with_a_teacher_only_the_test_split_is_read_and_without_data_none(watched):
    assert {name: run.loaded for name, run in watched.items()} == {
        "one": ["test"],
        "other": ["test"],
        "none": [],
    }


@pytest.mark.slow
def test_no_bit_of_student_generator_and_memory_depends_on_the_data(watched):
    # The two splits are indeed not the same to those who see them.
    assert watched["one"].summary["teacher_accuracy"] == 100
    assert watched["other"].summary["teacher_accuracy"] != 100
    for name in ("other", "none"):
        assert len(watched["one"].states) == len(watched[name].states) == 3
        jax.tree.map(np.testing.assert_array_equal, watched["one"].states, watched[name].states)
    seen = {"student_accuracy", "seconds", "seconds_of_synthesis"}
    histories = [
        [{key: value for key, value in record.items() if key not in seen} for record in run.history]
        for run in watched.values()
    ]
    assert histories[0] == histories[1] == histories[2]


@pytest.mark.slow
def test_without_data_the_summary_is_of_the_agreement(watched):
    history, summary = watched["none"].history, watched["none"].summary
    agreements = [record["generated_agreement"] for record in history]
    assert all(record["student_accuracy"] is None for record in history)
    assert summary["dataset"] == "none"
    for name in ("mean_accuracy", "final_accuracy", "max_accuracy", "accuracy_variance"):
        assert summary[name] is None
    assert summary["teacher_accuracy"] is None
    assert summary["mean_agreement"] == pytest.approx(np.mean(agreements))
    assert summary["agreement_variance"] == pytest.approx(np.var(agreements))
    assert summary["max_agreement"] == max(agreements)
    assert summary["final_agreement"] == agreements[-1]
    assert all(record["memory_agreement"] is not None for record in history)
    for name in ("generated_distance", "memory_agreement", "memory_distance"):
        assert summary[f"final_{name}"] == history[-1][name]


def arrays_of(jaxpr, constants):
    """(the shapes and dtypes of all values of a program, its constants), inner ones included."""
    values, held = [], [np.asarray(constant) for constant in constants if is_array(constant)]
    for atom in [*jaxpr.invars, *jaxpr.constvars]:
        values.append(atom.aval)
    for equation in jaxpr.eqns:
        values += [atom.aval for atom in [*equation.invars, *equation.outvars]]
        held += [np.asarray(a.val) for a in equation.invars if isinstance(a, core.Literal)]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                closed = isinstance(inner, core.ClosedJaxpr)
                program = (inner.jaxpr, inner.consts) if closed else (inner, [])
                more_values, more_held = arrays_of(*program)
                values += more_values
                held += more_held
    return values, held


def is_program(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def is_array(value):
    return not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def traces_of_data(epoch, inputs):
    """What of the data a program of (state, teacher variables) could see: pixels, or its shape."""
    program = jax.make_jaxpr(epoch)(*inputs)
    values, constants = arrays_of(program.jaxpr, program.consts)
    assert len(values) > 1000  # the inner programs were looked into
    pixels = [value for value in [*values, *constants] if value.ndim and value.dtype == np.uint8]
    shaped = [value for value in [*values, *constants] if COUNT in value.shape]
    large = [value for value in constants if value.size > 100]
    return pixels + shaped + large


@pytest.mark.slow
def test_the_compiled_steps_hold_no_data(watched, given):
    """Neither among their arguments nor among what they close over."""
    run, (_, split) = watched["one"], given
    assert not traces_of_data(run.epoch, run.inputs)

    # Had they any, it would be found: pixels, images made of them, part of one.
    images = jnp.asarray(split.images)
    for leak in (images, images / 255, (images[:1] / 255.0).reshape(-1).repeat(2)):
        assert traces_of_data(leaking(run.epoch, leak), run.inputs)


def leaking(epoch, leak):
    """The epoch, but with an array in the program of one of its steps."""

    @jax.jit
    def step(state):
        return state.replace(early=jax.tree.map(lambda t: t + jnp.sum(leak), state.early))

    return lambda state, variables: epoch(step(state), variables)


def folder_of_digits(root, counts=(("train", 4), ("test", 2))):
    for split, count in counts:
        images, labels = data.load(DIGITS, split)
        for label in range(10):
            (root / split / str(label)).mkdir(parents=True)
            for i, image in enumerate(images[labels == label][:count]):
                Image.fromarray(image.squeeze()).save(root / split / str(label) / f"{i}.png")
    fields = {"name": "folder", "data_dir": str(root), "image_size": 8, "channels": 1}
    fields |= {"mean": DIGITS.mean, "std": DIGITS.std}
    return {f"dataset.{name}": value for name, value in fields.items()}


@pytest.mark.slow
def test_a_run_on_a_folder_trains_and_tests_a_teacher_on_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fields = folder_of_digits(tmp_path / "images")
    summary = train.run(tiny_config(**fields), tmp_path / "run", QUIET)
    card = files.read_json(tmp_path / "run" / "teacher" / data_specs.CARD)
    assert card["num_classes"] == 10 and card["mean"] == list(DIGITS.mean)
    assert summary["dataset"] == "folder" and summary["final_accuracy"] is not None
    assert summary["teacher_accuracy"] == card["accuracy"]


def test_a_broken_image_ends_a_run_with_one_sentence(given, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fields = folder_of_digits(tmp_path / "images", [("test", 1)])
    broken = tmp_path / "images" / "test" / "7" / "0.png"
    broken.write_bytes(b"no image")
    config = tiny_config(**fields, **{"teacher.checkpoint": str(given[0])})
    with pytest.raises(UserError, match=r"7/0\.png cannot be decoded as an image\.$"):
        train.run(config, tmp_path / "run", QUIET)
