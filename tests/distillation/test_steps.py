"""The steps: what acts on what, batch norm's rules, an empty bank, and both loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.data.data_table import SPECS
from dfkd_jax.distillation import steps as all_steps
from dfkd_jax.distillation.objectives import OBJECTIVES
from dfkd_jax.distillation.steps import generated, update_step
from dfkd_jax.distillation.steps import student_step as take_student_step
from dfkd_jax.networks.training import generator_optimizer, student_optimizer
from dfkd_jax.replay.scheme import Batch
from dfkd_jax.runtime.draw import stream
from tests.helpers.tiny import build, epoch_of, measured, tiny_config
from tests.helpers.trees import cast

OTHERS = [name for name in OBJECTIVES if name not in ("acquisition", "lra", "retention")]
OTHER_VARIANTS = ("first_order", "exact_hvp")
OF_REPLAY = ("retention_loss", "gradient_alignment")


def leaves_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(x, y, **tolerance)


def differs(a, b):
    return jax.tree.map(lambda x, y: bool(np.max(np.abs(x - y)) > 1e-7), a, b)


def student_step(config, state=None):
    steps, fresh, teacher = build(config)
    return jax.jit(steps.student_step)(fresh if state is None else state, teacher)


@pytest.fixture(scope="module")
def filled():
    """A state whose bank holds entries, with its steps and teacher."""
    steps, state, teacher = build(tiny_config())
    student, observe = jax.jit(steps.student_step), jax.jit(steps.observe_step)
    for _ in range(2):
        for _ in range(2):
            state = student(state, teacher)
        state = observe(state, teacher)
    assert int(state.replay.size) == 2
    return steps, state, teacher


@pytest.mark.parametrize(
    "method", ["lra-mb", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lra-gr", "dfq"))]
)
def test_a_method_takes_its_steps(method):
    config = tiny_config(method)
    steps, state, teacher = build(config)
    before = state
    state = jax.jit(steps.generator_step)(state, teacher)
    state = jax.jit(steps.student_step)(state, teacher)
    assert all(jax.tree.leaves(differs(before.student.params, state.student.params)))
    moved = differs(before.synthesizer.params, state.synthesizer.params)
    # A convolution's bias before batch norm has no effect, so it need not move.
    assert all(np.all(jax.tree.leaves(v["kernel"])) for v in moved.values() if "kernel" in v)
    assert int(state.student_steps) == int(state.updates) == 1
    for step in (update_step, take_student_step):
        found = measured(step, steps, state, teacher)
        # Nothing is replayed yet: NaN is "nothing was measured".
        assert all(np.isfinite(v) for k, v in found.items() if k not in OF_REPLAY)


def test_the_generator_learns_from_the_student_as_well_as_from_the_teacher():
    """The adversarial term must depend on the student: another student, another gradient."""
    config = tiny_config("dfad")
    steps, state, teacher = build(config)
    step = jax.jit(steps.generator_step)
    other = state.replace(
        student=state.student.replace(params=jax.tree.map(lambda p: 1.5 * p, state.student.params))
    )
    a, b = (step(s, teacher).synthesizer.opt_state[0].mu for s in (state, other))
    assert any(jax.tree.leaves(differs(a, b)))


def test_the_teacher_sees_the_images_that_the_student_sees(filled):
    """What is remembered are the images with the teacher's logits for them."""
    steps, state, teacher = filled
    bank = state.replay
    images = bank.images.reshape(-1, *bank.images.shape[2:])
    logits, _ = steps.parts.teacher.apply(teacher, images, train=False)
    np.testing.assert_allclose(logits, bank.logits.reshape(-1, 10), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"meta.variant": "exact"},
        *(pytest.param({"meta.variant": v}, marks=pytest.mark.slow) for v in OTHER_VARIANTS),
        pytest.param({"objective": "joint"}, marks=pytest.mark.slow),
    ],
)
def test_only_the_outer_pass_over_theta_moves_the_running_statistics(filled, fields):
    """The retention pass, at θ or at θ', leaves no trace: as if nothing were replayed."""
    steps, state, teacher = filled
    after = student_step(tiny_config(**fields), state).student.batch_stats
    adversarial = student_step(tiny_config("no-replay"), state.replace(replay=(), recent=()))
    leaves_close(after, adversarial.student.batch_stats, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["concatenated", "lra_concatenated"])
def test_replayed_images_in_the_pass_over_theta_move_the_running_statistics(filled, objective):
    steps, state, teacher = filled
    both = student_step(tiny_config(objective=objective), state).student.batch_stats
    adversarial = student_step(tiny_config("no-replay"), state.replace(replay=(), recent=()))
    assert any(jax.tree.leaves(differs(both, adversarial.student.batch_stats)))


def test_generator_steps_leave_the_student_alone_and_student_steps_the_generator(filled):
    steps, state, teacher = filled
    generated = jax.jit(steps.generator_step)(state, teacher)
    leaves_close(generated.student, state.student, rtol=0)
    assert any(
        jax.tree.leaves(differs(generated.synthesizer.batch_stats, state.synthesizer.batch_stats))
    )
    learned = jax.jit(steps.student_step)(state, teacher)
    leaves_close(learned.synthesizer, state.synthesizer, rtol=0)


def test_a_generator_of_pixels_learns_and_stays_in_their_range():
    config = tiny_config("dfad", **{"generator.output": "pixels"})
    steps, state, teacher = build(config)
    learned = jax.jit(steps.generator_step)(state, teacher)
    moved = differs(learned.synthesizer.params, state.synthesizer.params)
    assert any(jax.tree.leaves(moved))
    images = jax.jit(lambda s: generated(steps.parts, s, jax.random.key(0)))(learned)
    spec = SPECS["digits"]
    pixels = np.asarray(images) * spec.std + spec.mean
    assert -1e-6 < pixels.min() < pixels.max() < 1 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", ["lra", *(pytest.param(o, marks=pytest.mark.slow) for o in OTHERS)]
)
def test_an_empty_bank_adds_nothing(objective):
    """Before the first push the update is that of no replay, finite and the same to rounding."""
    fields = {"objective": objective, "meta.inner_weight_decay": 0.1}
    config = tiny_config(**fields)
    replayed, plain = student_step(config), student_step(tiny_config("no-replay"))
    found = measured(take_student_step, *build(config))
    assert np.isnan([found[name] for name in OF_REPLAY]).all()
    leaves_close(replayed.student.params, plain.student.params, rtol=1e-4, atol=1e-6)
    leaves_close(replayed.student.batch_stats, plain.student.batch_stats, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_authors_code_is_joint_replay_in_one_pass(filled):
    """Their LRA with the retention gradient cut, whatever α is, and their MB-DFKD: one update."""
    _, state, _ = filled
    joint = student_step(tiny_config("mb-dfkd-concatenated"), state).student
    for lr in (0.0, 0.5):
        config = tiny_config("lra-mb-detached", **{"meta.inner_lr": lr})
        leaves_close(student_step(config, state).student, joint, rtol=1e-5, atol=1e-7)
    exact = student_step(tiny_config(objective="lra_concatenated"), state).student.params
    assert any(jax.tree.leaves(differs(exact, joint.params)))
    two_passes = student_step(tiny_config("mb-dfkd"), state).student.params
    assert any(jax.tree.leaves(differs(two_passes, joint.params)))


@pytest.mark.slow
def test_without_weight_the_retention_term_adds_nothing(filled):
    """λ = 0: what is left is L_acq, or the one-pass joint loss. Linearity is meta_gradient's."""
    _, state, _ = filled
    alone = student_step(tiny_config("no-replay"), state.replace(replay=(), recent=()))
    one_pass = student_step(tiny_config("mb-dfkd-concatenated"), state)
    for objective, expected in (("joint", alone), ("lra", alone), ("lra_concatenated", one_pass)):
        config = tiny_config(objective=objective, retention_weight=0.0)
        found = student_step(config, state).student.params
        leaves_close(found, expected.student.params, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_the_one_pass_measures_both_halves(filled):
    """L_acq and L_ret are recorded for every objective, the alignment too."""
    _, state, _ = filled
    found = {}
    for objective in ("joint", "concatenated"):
        steps, _, teacher = build(tiny_config(objective=objective))
        measures = measured(take_student_step, steps, state, teacher)
        assert measures["acquisition_loss"] > 0 and measures["retention_loss"] > 0
        found[objective] = measures["gradient_alignment"]
    np.testing.assert_allclose(found["joint"], found["concatenated"], rtol=1e-4)


@pytest.mark.slow
def test_the_students_mode_for_the_generator(filled):
    """Evaluation mode: running statistics, and the generator's gradient is another."""
    _, state, teacher = filled

    def moments(mode, **replaced):
        config = tiny_config("dfad", **{"generator.student_mode": mode})
        steps, _, _ = build(config)
        own = state.replace(replay=(), recent=(), **replaced)
        return jax.jit(steps.generator_step)(own, teacher).synthesizer.opt_state[0].mu

    train, evaluation = moments("train"), moments("eval")
    assert any(jax.tree.leaves(differs(train, evaluation)))
    per_epoch = tiny_config().iterations_per_epoch
    for step, expected in ((0, train), (1, train), (per_epoch, evaluation), (per_epoch + 1, train)):
        counted = {"updates": jnp.int32(step)}
        wanted = moments("eval" if expected is evaluation else "train", **counted)
        leaves_close(moments("eval_after_test", **counted), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("unit", [pytest.param("epoch", marks=pytest.mark.slow), "iteration"])
def test_replay_begins_after_the_first_unit(unit):
    """The first push comes at the end of the first epoch, not of the fifth."""
    fields = {"replay.push_unit": unit, "replay.push_period": 5}
    config = tiny_config(epochs=2, **fields)
    state, history = run_epochs(config, 2)
    per_epoch = config.iterations_per_epoch * config.student.steps
    first = 0 if unit == "epoch" else per_epoch - config.student.steps
    shares = [float(record["replayed_share"]) for record in history]
    assert shares == pytest.approx([first / per_epoch, 1])
    assert int(state.replay.size) == (1 if unit == "epoch" else 2)  # iterations 0 and 5 of 6


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_learning_rate_is_constant_within_an_epoch_and_follows_the_cosine(name):
    """Of a gradient that is always 1 Adam's update is its rate too."""
    fields = {"student.momentum": 0.0, "student.weight_decay": 0.0, "student.optimizer": name}
    config = tiny_config("no-replay", **fields)
    optimizer = student_optimizer(config)
    params, state = jnp.ones(()), None
    state = optimizer.init(params)
    per_epoch = config.iterations_per_epoch * config.student.steps
    rates = []
    for _ in range(config.epochs * per_epoch):
        update, state = optimizer.update(jnp.ones(()), state, params)
        rates.append(-float(update))
    expected = [
        0.5 * config.student.learning_rate * (1 + np.cos(np.pi * epoch / config.epochs))
        for epoch in range(config.epochs)
        for _ in range(per_epoch)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


@pytest.mark.parametrize("final", [None, 0.0, 0.001])
def test_the_generators_rate_is_constant_or_follows_the_cosine_to_its_end(final):
    fields = {"generator.learning_rate": 0.01, "generator.steps": 2}
    config = tiny_config(**fields, **{"generator.final_learning_rate": final})
    optimizer = generator_optimizer(config)
    params = jnp.ones(())
    state = optimizer.init(params)
    per_epoch = config.iterations_per_epoch * 2
    rates = []
    for _ in range(config.epochs * per_epoch):
        update, state = optimizer.update(jnp.ones(()), state, params)
        rates.append(-float(update))  # of a gradient that is always 1
    final = 0.01 if final is None else final
    expected = [
        final + 0.5 * (0.01 - final) * (1 + np.cos(np.pi * epoch / config.epochs))
        for epoch in range(config.epochs)
        for _ in range(per_epoch)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


def test_a_step_is_traced_once_for_all_that_needs_it(monkeypatch):
    """The epoch's steps and the names of its sums."""
    config = tiny_config()
    built, state, teacher = build(config)
    calls = []

    @functools.wraps(take_student_step)
    def counted(*arguments):
        calls.append(1)
        return take_student_step(*arguments)

    monkeypatch.setattr(all_steps, "student_step", counted)
    state, _ = epoch_of(config, built)(state, teacher)
    assert len(calls) == 1 and int(state.student_steps) > 1


def run_epochs(config, epochs, dtype=jnp.float32):
    steps, state, teacher = build(config)
    state, teacher = cast(state, dtype), cast(teacher, dtype)
    epoch = epoch_of(config, steps)
    history = []
    for _ in range(epochs):
        state, metrics = epoch(state, teacher)
        history.append(jax.device_get(metrics))
    return state, history


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["epoch", "iteration"])
def test_both_loops_give_the_same_numbers(unit, x64):
    """In double precision: Adam makes whole steps of gradients that are but rounding."""
    fields = {"replay.push_unit": unit, "generator.steps": 2}
    scanned, a = run_epochs(tiny_config(loop="scan", **fields), 2, jnp.float64)
    stepped, b = run_epochs(tiny_config(loop="step", **fields), 2, jnp.float64)
    assert int(scanned.replay.size) == int(stepped.replay.size) > 0
    leaves_close(scanned, stepped, rtol=1e-6, atol=1e-7)
    for x, y in zip(a, b, strict=True):
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("loop", ["scan", "step"])
def test_an_epoch_never_touches_the_host(loop):
    config = tiny_config(loop=loop)
    steps, state, teacher = build(config)
    epoch = epoch_of(config, steps)
    with jax.transfer_guard("disallow"):
        state, metrics = epoch(state, teacher)  # compiles
        state, metrics = epoch(state, teacher)
    assert set(metrics) >= {"acquisition_loss", "retention_loss", "generator_loss"}
    assert all(isinstance(value, jax.Array) for value in metrics.values())


def test_the_state_is_donated():
    config = tiny_config(loop="scan")
    steps, state, teacher = build(config)
    images = state.replay.images
    epoch_of(config, steps)(state, teacher)
    assert images.is_deleted()


def test_metrics_of_an_epoch_are_means_over_its_own_steps():
    config = tiny_config(**{"replay.push_unit": "epoch"})
    _, history = run_epochs(config, 2)
    assert np.isnan(history[0]["retention_loss"]) and history[0]["replayed_share"] == 0
    assert history[1]["replayed_share"] == 1
    assert -1 <= history[1]["gradient_alignment"] <= 1
    assert all(bool(record["finite"]) for record in history)


@pytest.mark.slow
def test_a_diverging_epoch_is_marked():
    _, history = run_epochs(tiny_config(**{"student.learning_rate": 1e30}), 1)
    assert not history[0]["finite"]


def test_the_bank_holds_images_spread_over_the_last_batch(filled):
    steps, state, teacher = filled
    newest = Batch(state.replay.images[1], state.replay.logits[1])
    leaves_close(newest, state.recent, rtol=0)
    last = generated(steps.parts, state, stream(state.key, "acquire", state.student_steps - 1))
    np.testing.assert_allclose(newest.images, last[::2], rtol=1e-5, atol=1e-5)  # 4 of 8
