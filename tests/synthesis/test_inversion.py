"""Rounds of inversion: what is kept of them, and when teacher and student act."""

from functools import partial

import jax
import numpy as np
import pytest

from dfkd_jax.distillation import steps
from dfkd_jax.methods.table import METHODS
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.metrics import averages
from tests.helpers.tiny import build, tiny_config
from tests.helpers.trees import same_bits

FIELDS = {"synthesis.steps": 4, "synthesis.augment": "none", "synthesis.warm_up": 0}
PLAIN = "tests.helpers.networks:Plain"
FAMILY = ("deepinversion", "cmi", "fast", "nayer")


def stepped(parts, step):
    return jax.jit(partial(step, parts))


@pytest.fixture(scope="module")
def fast():
    """Steps, a state in the middle of its first round, and a teacher, of Fast without warm-up."""
    built, state, teacher = build(tiny_config("fast", **FIELDS))
    state, _ = stepped(built.parts, steps.begin_step)(state, teacher)
    return built.parts, state, teacher


def test_the_images_of_the_least_loss_are_kept(fast):
    parts, state, teacher = fast
    update = stepped(parts, steps.update_step)
    seen = []
    # Too large a rate: the loss goes up and down.
    for _ in range(6):
        before = state.synthesizer
        state, metrics = update(state, teacher)
        loss = float(averages(metrics)["generator_loss"])
        seen.append((loss, before))
        best = state.synthesizer
        assert float(best.least) == min(loss for loss, _ in seen)
    _, holder = min(seen, key=lambda one: one[0])
    from dfkd_jax.methods import inversion_family
    from dfkd_jax.synthesis.latents import pixels

    config = tiny_config("fast", **FIELDS)
    setup = parse(config, reads_data=False)
    generator = inversion_family.create_generator(config, setup.spec)
    images = pixels(generator, holder.generator.params, holder.inputs.params["latents"], setup.spec)
    np.testing.assert_allclose(state.synthesizer.best.images, images, rtol=1e-5, atol=1e-5)


def test_a_round_starts_anew_and_its_images_outlive_it(fast):
    parts, state, teacher = fast
    first = state.synthesizer
    for _ in range(FIELDS["synthesis.steps"]):
        state, _ = stepped(parts, steps.update_step)(state, teacher)
    state, _ = stepped(parts, steps.finish_step)(state, teacher)
    kept = np.asarray(state.synthesizer.best.images)
    state, _ = stepped(parts, steps.begin_step)(state, teacher)
    again = state.synthesizer
    assert int(again.rounds) == 2 and float(again.least) > 1e30
    assert not np.array_equal(first.inputs.params["latents"], again.inputs.params["latents"])
    np.testing.assert_array_equal(kept, again.best.images)
    made = steps.generated(parts, state, state.key)
    np.testing.assert_array_equal(made, kept)
    assert 0 <= np.asarray(again.targets).min() and np.asarray(again.targets).max() < 10


def test_the_statistics_of_earlier_rounds_count_from_the_second_on(fast):
    """m = 0.9: the memory is what the last step of a round mixed."""
    parts, state, teacher = fast
    update, finish = (stepped(parts, s) for s in (steps.update_step, steps.finish_step))
    images = state.synthesizer
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(images.memory))
    state, _ = update(state, teacher)
    first = jax.tree.map(np.asarray, state.synthesizer.latest)
    state, _ = finish(state, teacher)
    assert same_bits(state.synthesizer.memory, first)
    state, _ = stepped(parts, steps.begin_step)(state, teacher)
    state, _ = update(state, teacher)
    mixed = state.synthesizer.latest
    shown = state.synthesizer.best.images  # of the only step of this round
    seen = steps.view(parts, state, teacher).teacher(shown)
    for (mean, variance), before, layer in zip(mixed, first, seen.statistics, strict=True):
        np.testing.assert_allclose(
            mean, 0.1 * layer.batch_mean + 0.9 * before[0], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            variance, 0.1 * layer.batch_variance + 0.9 * before[1], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("warm_up", [0, 1])
def test_the_student_acts_after_the_warm_up_alone(warm_up):
    """Another student, another generator's step; in the warm-up the same one, bit for bit."""
    config = tiny_config("fast", **{**FIELDS, "synthesis.warm_up": warm_up})
    config.synthesis.warm_up_rounds = 1
    built, state, teacher = build(config)
    # On untrained networks decisions are few: of one class, as both are the same.
    same = state.student.replace(params=teacher["params"], batch_stats=teacher["batch_stats"])
    near = same.replace(params=jax.tree.map(lambda x: 1.2 * x, same.params))
    after = []
    for student in (same, near):
        begun, _ = stepped(built.parts, steps.begin_step)(state, teacher)
        updated, metrics = stepped(built.parts, steps.update_step)(
            begun.replace(student=student), teacher
        )
        after.append(jax.tree.map(np.asarray, updated.synthesizer.generator.params))
        value = float(averages(metrics)["generator_adversarial"])
        assert (value == 0) == (warm_up == 1 or student is same)
    assert same_bits(*after) == (warm_up == 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("fast-5", "fast-2")])
def test_who_looks_at_the_student(method):
    """The generator's step depends on the student exactly where the source's does."""
    blind = {"dafl", "deepinversion"}
    fields = {"synthesis.warm_up": 0, "synthesis.augment": "none"} if method in FAMILY else {}
    fields |= {"synthesis.warm_up": 0} if method == "deepinversion-adaptive" else {}
    built, state, teacher = build(tiny_config(method, **fields))
    begin, update = (stepped(built.parts, s) for s in (steps.begin_step, steps.update_step))
    state, _ = begin(state, teacher)
    likes = state.student.replace(params=teacher["params"], batch_stats=teacher["batch_stats"])
    other = likes.replace(params=jax.tree.map(lambda x: 1.3 * x, likes.params))
    found = [
        update(state.replace(student=student), teacher)[0].synthesizer for student in (likes, other)
    ]
    if hasattr(found[0], "generator"):
        found = [(s.generator.params, s.inputs.params) for s in found]
    else:
        found = [s.params for s in found]
    assert same_bits(*found) == (method in blind)


def test_fields_that_do_not_go_together_are_one_sentence():
    for method, fields, words in (
        ("cmi", {"contrast.capacity": 12}, r"contrast\.capacity is 12; allowed are multiples of"),
        ("nayer", {"nayer.embedding_dim": 3}, r"nayer\.embedding_dim is 3; allowed is at least"),
        ("nayer", {"nayer.embeddings": "no.npy"}, r"nayer\.embeddings is 'no\.npy', which cannot"),
        ("fast", {"dataset.name": "digits", "synthesis.augment": "twist"}, r"augment is 'twist'"),
        (
            "fast",
            {"replay.kind": "momentum", "objective": "joint"},
            r"'momentum' but the method 'fast'",
        ),
        (
            "fast",
            {"loss.batch_norm_momentum": 1.0},
            r"batch_norm_momentum is 1\.0; allowed is 0 or",
        ),
        (
            "zskt",
            {"objective": "concatenated", "replay.kind": "memory_bank"},
            r"loss\.attention is",
        ),
        ("zskt", {"teacher.model": PLAIN}, r"loss\.attention is 250\.0 but .*Plain'"),
    ):
        with pytest.raises(UserError, match=words):
            parse(tiny_config(method, **fields), reads_data=False)
