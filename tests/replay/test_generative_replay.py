"""Generative replay: its mathematics and what it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from dfkd_jax.data import data_specs
from dfkd_jax.data.data_table import SPECS
from dfkd_jax.networks.encoder import Encoder, normalize_height
from dfkd_jax.networks.generator import Generator
from dfkd_jax.replay import generative_replay
from dfkd_jax.replay.scheme import Batch
from dfkd_jax.replay.schemes import create_replay
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime import draw
from dfkd_jax.runtime.axis import Axis
from dfkd_jax.runtime.errors import UserError
from tests.helpers.schemes import (
    KEY,
    SHAPE,
    fresh,
    normal,
    scheme_of,
    teacher,
)
from tests.helpers.tiny import TINY, build, epoch_of, tiny_config
from tests.helpers.trees import cast


def leaves_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def variables_of(memory, name):
    return {"params": memory.params[name], "batch_stats": memory.batch_stats[name]}


def decode(memory, z):
    """What the memory generator makes of latent vectors."""
    generator = Generator(SHAPE, TINY["generator.channels"], spectral_norm=False)
    return generator.apply(variables_of(memory, "generator"), z, update_stats=False)


# The mathematics, against independent NumPy.


@pytest.mark.parametrize("weights", [None, [1, 1, 0, 0.5]])
def test_vae_loss(weights):
    x, y = normal(4, 3, 5, 2, seed=1), normal(4, 3, 5, 2, seed=2)
    t, u = normal(4, 7, seed=3), normal(4, 7, seed=4)
    mean, log_variance = normal(4, 6, seed=5), normal(4, 6, seed=6)
    w = np.ones(4) if weights is None else np.array(weights)
    expected = 0.0
    for i in range(4):
        variance = np.exp(log_variance[i])
        kl = np.sum(0.5 * (variance + mean[i] ** 2 - 1) - np.log(np.sqrt(variance)))
        expected += w[i] * (np.abs(x[i] - y[i]).mean() + np.abs(t[i] - u[i]).mean() + 0.3 * kl)
    value = generative_replay.vae_loss(
        Batch(x, t),
        Batch(y, u),
        mean,
        log_variance,
        kl_weight=0.3,
        example_weights=None if weights is None else jnp.asarray(w),
    )
    np.testing.assert_allclose(value, expected / w.sum(), rtol=1e-5)


def test_kl_is_the_divergence_of_two_gaussians():
    """Against a sum over a grid of the densities, for one dimension."""
    mean, log_variance = 0.7, np.log(0.4)
    x = np.linspace(-12, 12, 200_001)
    log_q = -0.5 * ((x - mean) ** 2 / 0.4 + np.log(2 * np.pi * 0.4))
    log_p = -0.5 * (x**2 + np.log(2 * np.pi))
    expected = np.sum(np.exp(log_q) * (log_q - log_p)) * (x[1] - x[0])
    value = generative_replay.kl_to_normal(jnp.full((1, 1), mean), jnp.full((1, 1), log_variance))
    np.testing.assert_allclose(value, [expected], rtol=1e-5)
    zero = generative_replay.kl_to_normal(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    np.testing.assert_array_equal(zero, 0)


def numpy_recall_objective(z, logits, ie, oh):
    log_p = log_softmax(logits, axis=1)
    share = np.exp(log_p).mean(axis=0)
    sure = -log_p[np.arange(len(z)), logits.argmax(axis=1)].mean()
    moments = ((z.var(axis=0, ddof=1) - 1) ** 2).mean() + (z.mean(axis=0) ** 2).mean()
    return ie * np.sum(share * np.log10(share)) + oh * sure + moments


def test_recall_objective():
    z, logits = normal(5, 6), 3 * normal(5, 4, seed=1)
    for ie, oh in [(5.0, 1.0), (0.0, 0.0), (2.0, 3.0)]:
        value = generative_replay.recall_objective(z, logits, information_entropy=ie, one_hot=oh)
        np.testing.assert_allclose(value, numpy_recall_objective(z, logits, ie, oh), rtol=1e-5)


@pytest.mark.slow
def test_recall_is_adam_on_the_latents(x64):
    """Two steps against Adam written out, on a gradient by finite differences."""
    z, matrix = normal(4, 3).astype(float), normal(3, 5, seed=1).astype(float)

    def objective(z):
        return numpy_recall_objective(z, z @ matrix, 5.0, 1.0)

    def gradient(z, h=1e-6):
        units = np.eye(z.size).reshape(z.size, *z.shape)
        slopes = [(objective(z + h * e) - objective(z - h * e)) / (2 * h) for e in units]
        return np.reshape(slopes, z.shape)

    expected, m, v = z, 0.0, 0.0
    for step in (1, 2):
        g = gradient(expected)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.02 / (1 - 0.9**step)
        expected = expected - rate * m / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    recall = functools.partial(
        generative_replay.recall_latent, logits_of=lambda z: z @ matrix, steps=2
    )
    np.testing.assert_allclose(recall(jnp.asarray(z)), expected, rtol=0, atol=1e-7)
    # Over two devices with half the batch each it is the same.
    halves = functools.partial(recall, axis=Axis("d", 2))
    split = jax.vmap(halves, axis_name="d")(z.reshape(2, 2, 3))
    np.testing.assert_allclose(split.reshape(4, 3), expected, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_a_recall_step_lowers_its_objective():
    """Through the memory generator and the teacher, for a small step."""
    scheme, _, _ = scheme_of("generative")
    memory = jax.jit(scheme.init)(KEY)

    def logits_of(z):
        return teacher(decode(memory, z))[0]

    @jax.jit
    def both(z):
        tuned = generative_replay.recall_latent(z, logits_of, learning_rate=1e-3)
        values = [generative_replay.recall_objective(x, logits_of(x)) for x in (z, tuned)]
        return tuned, *values

    z = jnp.asarray(normal(4, 4))
    tuned, before, after = both(z)
    assert after < before
    np.testing.assert_allclose(np.abs(tuned - z), 1e-3, rtol=0.05)  # Adam's first step


# The encoder.


@pytest.mark.parametrize("side, features", [(8, 1), (28, 16), (32, 16), (64, 64)])
def test_encoder_shapes(side, features):
    encoder = Encoder(latent_dim=5, channels=(2, 4))
    images = jnp.zeros((3, side, side, 3))
    (mean, log_variance), variables = jax.eval_shape(lambda: encoder.init_with_output(KEY, images))
    assert mean.shape == log_variance.shape == (3, 5)
    params = variables["params"]
    assert params["mean"]["kernel"].shape == (features * 4, 5)
    kernels = [params[f"conv{i}"]["kernel"].shape for i in (1, 2, 3)]
    assert kernels == [(3, 3, 3, 2), (3, 3, 2, 4), (3, 3, 4, 4)]


def test_columns_have_unit_norm_and_zeros_a_finite_gradient():
    images = normal(2, 6, 4, 3)
    norms = np.linalg.norm(normalize_height(jnp.asarray(images)), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    zeros = jnp.zeros((1, 4, 4, 1))
    assert np.all(normalize_height(zeros) == 0)
    assert np.isfinite(jax.grad(lambda x: normalize_height(x).sum())(zeros)).all()


# What observing does.


@pytest.mark.slow
def test_the_memory_learns_what_it_observes():
    scheme, observe, _ = scheme_of("generative")
    # Images that four latent dimensions can hold: shades of two patterns.
    shades = jnp.asarray([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    patterns = jnp.repeat(jnp.asarray(normal(2, 4, 4, 1)), 2, axis=1).repeat(2, axis=2)
    images = jnp.einsum("np,phwc->nhwc", shades, patterns)
    images = (images - images.mean()) / images.std()
    batch = Batch(images, teacher(images)[0])

    @jax.jit
    def error(memory):
        variables = variables_of(memory, "encoder")
        encoder = Encoder(TINY["generator.latent_dim"], TINY["generator.channels"][::-1])
        (mean, _), _ = encoder.apply(variables, images, mutable=["batch_stats"])
        return jnp.mean(jnp.abs(decode(memory, mean) - images))

    memory = jax.jit(scheme.init)(KEY)
    before = error(memory)
    for i in range(200):
        memory = observe(memory, batch, jax.random.fold_in(KEY, i), jnp.int32(i // 4))
    assert error(memory) < 0.5 * before
    assert int(memory.observations) == 200


@pytest.mark.slow
def test_iteration_0_learns_from_the_current_images_alone():
    """Whatever the memory would recall then has no part in loss and batch statistics."""
    scheme, observe, _ = scheme_of("generative")
    _, other, _ = scheme_of("generative", recall_learning_rate=1.0)
    batch = fresh(scheme)
    memory = observe(jax.jit(scheme.init)(KEY), batch, KEY, jnp.int32(0))
    results = [f(memory, batch, KEY, jnp.int32(i)) for i in (0, 1) for f in (observe, other)]
    same, different = (
        jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *pair)
        for pair in (results[:2], results[2:])
    )
    assert max(jax.tree.leaves(same)) == 0
    for name in ("encoder", "generator"):
        assert max(jax.tree.leaves(different.batch_stats[name])) > 1e-5
        assert max(jax.tree.leaves(different.params[name])) > 1e-5


@pytest.mark.slow
def test_the_recalls_gradient_can_be_left_in_the_memory_generator():
    """A habit of the authors' code: added to the next gradient of the autoencoder, not before it
    has recalled anything, and not to the encoder's."""
    scheme, observe, _ = scheme_of("generative")
    _, with_habit, _ = scheme_of("generative", accumulate_recall_gradient=True)
    batch = fresh(scheme)
    memory = jax.jit(scheme.init)(KEY).replace(observations=jnp.int32(1))

    def moments(observe, iteration):
        return observe(memory, batch, KEY, jnp.int32(iteration)).opt_state[0].mu

    leaves_close(moments(observe, 0), moments(with_habit, 0), rtol=1e-3, atol=1e-7)
    plain, habit = moments(observe, 1), moments(with_habit, 1)
    leaves_close(plain["encoder"], habit["encoder"], rtol=1e-3, atol=1e-7)
    z = draw.normal(draw.stream(KEY, "recall"), 0, TINY["replay.entry_size"], 4)

    def objective(params):
        images = decode(memory.replace(params={"generator": params}), z)
        return generative_replay.recall_objective(z, teacher(images)[0])

    left = jax.grad(objective)(memory.params["generator"])  # Adam's first moment is 0.1 of it
    expected = jax.tree.map(lambda g, more: g + 0.1 * more, plain["generator"], left)
    leaves_close(habit["generator"], expected, rtol=1e-3, atol=1e-6)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(left)) > 1e-3


@pytest.mark.slow
def test_the_students_recall_can_use_running_statistics():
    """Another habit of that code; what the memory recalls for itself keeps those of the batch."""
    scheme, observe, recall = scheme_of("generative")
    _, observe_with_habit, habit = scheme_of("generative", recall_running_statistics=True)
    memory = jax.jit(scheme.init)(KEY).replace(observations=jnp.int32(1))
    moved = memory.replace(
        batch_stats={**memory.batch_stats, "generator": _shifted(memory.batch_stats["generator"])}
    )
    leaves_close(recall(memory, KEY), recall(moved, KEY), rtol=0)
    assert np.abs(habit(memory, KEY).images - habit(moved, KEY).images).max() > 0.1
    batch = fresh(scheme)
    learned = (f(memory, batch, KEY, jnp.int32(1)) for f in (observe, observe_with_habit))
    leaves_close(*learned, rtol=1e-3, atol=1e-6)


def _shifted(statistics):
    return jax.tree.map(lambda x: x + 0.5, statistics)


def test_it_observes_after_the_first_steps_of_an_iteration():
    for steps, expected in [(2, (True, True)), (6, (True,) * 4 + (False,) * 2)]:
        config = tiny_config("lra-gr", **{"student.steps": steps})
        scheme = create_replay(config, SPECS["digits"])
        assert scheme.observes_after == expected
        assert scheme.observed_images == config.batch_size // 2


@pytest.mark.slow
def test_observing_over_two_devices_is_the_same():
    """A mapped axis of two halves gives the gradient and the statistics of the whole."""
    config = tiny_config("lra-gr")
    whole, observe, _ = scheme_of("generative")
    split = generative_replay.create(config, SPECS["digits"], Axis("d", 2))
    assert split.observed_images * 2 == whole.observed_images
    batch = fresh(whole)
    memory = jax.jit(whole.init)(KEY).replace(observations=jnp.int32(1))
    expected = observe(memory, batch, KEY, jnp.int32(1))

    @jax.jit
    @functools.partial(jax.vmap, axis_name="d")
    def observe_half(half):
        return split.observe(memory, half, KEY, jnp.int32(1), teacher)[0]

    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    mapped = observe_half(halves)
    # Adam's first moment is the gradient; a step would magnify the rounding of those that are 0.
    for kept in (lambda m: m.opt_state[0].mu, lambda m: m.batch_stats):
        for device in range(2):
            half = jax.tree.map(lambda x, device=device: x[device], kept(mapped))
            leaves_close(kept(expected), half, rtol=1e-3, atol=1e-5)


def test_no_gradient_flows_into_the_memory():
    scheme, _, recall = scheme_of("generative")
    memory = jax.jit(scheme.init)(KEY)

    def total(params):
        replayed = recall(memory.replace(params=params), KEY)
        return jnp.sum(replayed.images**2) + jnp.sum(replayed.logits**2)

    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(jax.grad(total)(memory.params)))


# In a run.


@pytest.fixture(scope="module")
def run():
    """(steps, state, teacher variables) of lra-gr."""
    return build(tiny_config("lra-gr", **{"meta.measure_alignment": False}))


def test_a_student_step_hands_the_memory_on_as_it_is(run):
    steps, *arguments = run

    def step(state, variables):
        after = steps.student_step(state, variables)
        for a, b in zip(*map(jax.tree.leaves, (state.replay, after.replay)), strict=True):
            assert a is b
        return after

    jax.eval_shape(step, *arguments)


@pytest.mark.slow
def test_both_loops_give_the_same_numbers(run, x64):
    """In double precision: Adam makes whole steps of gradients that are but rounding."""
    steps, *single = run
    first, variables = cast(single, jnp.float64)
    final = []
    for loop in ("scan", "step"):
        epoch = epoch_of(tiny_config("lra-gr", loop=loop, iterations_per_epoch=2), steps)
        state, metrics = epoch(jax.tree.map(jnp.copy, first), variables)
        assert int(state.replay.observations) == 4
        assert float(metrics["replayed_share"]) == 3 / 4  # all but the first student step
        assert float(metrics["retention_loss"]) > 0
        assert "gradient_alignment" not in metrics  # not measured
        final.append((state.student, state.replay, metrics))
    leaves_close(*final, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "field, value",
    [
        ("observe_steps", 0),
        ("vae_learning_rate", 0.0),
        ("kl_weight", -1.0),
        ("recall_steps", -1),
        ("recall_learning_rate", 0.0),
        ("recall_information_entropy", -1.0),
        ("recall_one_hot", -1.0),
        ("entry_size", 1),
    ],
)
def test_bad_fields_are_refused(field, value):
    config = tiny_config("lra-gr")
    assert data_specs.spec(config).image_shape == SHAPE
    parse(config)
    config.replay[field] = value
    with pytest.raises(UserError, match=rf"config\.replay\.{field} is {value}"):
        parse(config)
