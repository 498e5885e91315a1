"""Losses against independent NumPy computations, and what each term acts on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.losses import batch_norm
from dfkd_jax.losses import terms as losses
from dfkd_jax.networks.classifiers import create_classifier

RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.normal(size=(2, 6, 4)) * 3
FEATURES = RNG.normal(size=(6, 5))
TARGETS = np.array([3, 0, 1, 2, 2, 0])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def js_as_published(teacher, student, tau):
    p, q = softmax(teacher / tau), softmax(student / tau)
    m = np.clip((p + q) / 2, 0.01, 0.99)
    p, q = np.clip(p, 0.01, 0.99), np.clip(q, 0.01, 0.99)
    js = 0.5 * (m * np.log(m / p)).mean() + 0.5 * (m * np.log(m / q)).mean()
    return 1 - np.clip(js, 0, 1)


EXPECTED = {
    "l1": (losses.l1_distance, np.abs(STUDENT - TEACHER).mean(-1)),
    "kl": (losses.kl_distance, 4 * kl(softmax(TEACHER / 2), softmax(STUDENT / 2))),
    "mse": (losses.mse_distance, ((STUDENT - TEACHER) ** 2).mean(-1)),
}


@pytest.mark.parametrize("name", losses.DISTANCES)
def test_distances(name):
    function, expected = EXPECTED[name]
    assert losses.DISTANCES[name] is function
    np.testing.assert_allclose(function(STUDENT, TEACHER, 2.0), expected, rtol=1e-4)
    np.testing.assert_allclose(function(TEACHER, TEACHER, 2.0), 0, atol=1e-6)


def terms():
    mean = softmax(TEACHER).mean(0)
    return {
        "one_hot": -np.log(softmax(TEACHER).max(-1)).mean(),
        "information_entropy": (mean * np.log10(mean)).sum(),
        "activation": -np.abs(FEATURES).mean(),
    }


@pytest.mark.parametrize(
    "form, tau, adversarial",
    [
        ("js", 3.0, js_as_published(TEACHER, STUDENT, 3.0)),
        ("l1", 3.0, -np.abs(TEACHER - STUDENT).mean()),
        ("kl", 2.0, -4 * kl(softmax(TEACHER / 2), softmax(STUDENT / 2)).mean()),
    ],
)
def test_generator_loss_is_the_weighted_sum_of_its_terms(form, tau, adversarial):
    mean, variance = RNG.normal(size=3), RNG.uniform(size=3)
    layers = [losses.LayerStatistics(mean, variance, jnp.zeros(3), jnp.ones(3))] * 2
    expected = {
        **terms(),
        "adversarial": adversarial,
        "batch_norm": 2 * (np.linalg.norm(mean) + np.linalg.norm(variance - 1)),
    }
    expected["target"] = -np.log(softmax(TEACHER)[np.arange(6), TARGETS]).mean()
    weights = losses.GeneratorLossWeights(1.5, 5.0, 0.1, 2.0, 0.7, 0.3)
    value, values = losses.generator_loss(
        TEACHER,
        FEATURES,
        STUDENT,
        layers,
        weights,
        targets=jnp.asarray(TARGETS),
        adversarial_form=form,
        adversarial_temperature=tau,
    )
    total = sum(w * expected[name] for name, w in weights._asdict().items())
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert set(values) == set(weights._fields)
    for name, term in values.items():  # as they are recorded, without their weights
        np.testing.assert_allclose(term, expected[name], rtol=1e-4)
    for name in weights._fields:  # each alone
        only = losses.GeneratorLossWeights(**{n: float(n == name) for n in weights._fields})
        value, values = losses.generator_loss(
            TEACHER,
            FEATURES,
            STUDENT,
            layers,
            only,
            targets=jnp.asarray(TARGETS),
            adversarial_form=form,
            adversarial_temperature=tau,
        )
        np.testing.assert_allclose(value, expected[name], rtol=1e-4)
        assert list(values) == [name]  # one without a weight is not computed


@pytest.mark.parametrize("form, through_teacher", [("js", False), ("l1", True), ("kl", True)])
def test_the_adversarial_term_acts_through_the_student_and_where_the_source_does_the_teacher(
    form, through_teacher
):
    def loss(teacher, student):
        return losses.ADVERSARIAL[form](teacher, student, 3.0)

    by_teacher, by_student = jax.grad(loss, argnums=(0, 1))(TEACHER, STUDENT)
    assert np.abs(by_student).max() > 1e-4
    if through_teacher:
        assert np.abs(by_teacher).max() > 1e-4
    else:
        np.testing.assert_array_equal(by_teacher, 0)
    # Lower where the two differ more: the generator looks for disagreement.
    near = losses.ADVERSARIAL[form](jnp.asarray(TEACHER), TEACHER + 0.1 * STUDENT, 3.0)
    assert loss(TEACHER, STUDENT) < near


def test_the_absolute_value_has_derivative_zero_at_zero():
    x = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_array_equal(losses.absolute(x), [2.0, 0.0, 3.0])
    np.testing.assert_array_equal(jax.grad(lambda x: losses.absolute(x).sum())(x), [-1, 0, 1])
    assert np.isnan(losses.absolute(jnp.nan))


@pytest.mark.parametrize("name", losses.DISTANCES)
def test_a_student_that_equals_its_teacher_is_not_pushed(name):
    """At the kink of |S − T| too: no term may prefer one side of agreement."""

    def loss(student):
        return jnp.mean(losses.DISTANCES[name](student, jnp.asarray(TEACHER), 2.0))

    gradient = jax.grad(loss)(jnp.asarray(TEACHER))
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_the_entropy_term_has_either_logarithm():
    mean = softmax(TEACHER).mean(0)
    for name, log in (("log10", np.log10), ("ln", np.log)):
        value = losses.information_entropy_loss(jnp.asarray(TEACHER), logarithm=name)
        np.testing.assert_allclose(value, (mean * log(mean)).sum(), rtol=1e-5)


def test_the_entropy_term_survives_a_class_that_never_comes():
    logits = jnp.array([[300.0, 0.0], [300.0, 0.0]])
    value, gradient = jax.value_and_grad(losses.information_entropy_loss)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_allclose(
        losses.information_entropy_loss(jnp.eye(4) * 100), -np.log10(4), rtol=1e-5
    )


@pytest.fixture(scope="module")
def teacher():
    model = create_classifier("cnn_half", 10)
    images = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    return model, model.init(jax.random.key(1), images, train=False), images


def test_recorded_statistics_are_those_of_what_enters_batch_norm(teacher):
    model, variables, images = teacher
    with batch_norm.recorded() as layers:
        plain = model.apply(variables, images, train=False)
    _, captured = model.apply(
        variables, images, train=False, capture_intermediates=True, mutable=["intermediates"]
    )
    inputs = [captured["intermediates"][f"conv{i}"]["__call__"][0] for i in (1, 2, 3)]
    assert len(layers) == 3
    for layer, x in zip(layers, inputs, strict=True):
        np.testing.assert_allclose(layer.batch_mean, np.mean(x, (0, 1, 2)), atol=1e-5)
        np.testing.assert_allclose(layer.batch_variance, np.var(x, (0, 1, 2)), atol=1e-5)
        np.testing.assert_array_equal(layer.running_mean, 0)
        np.testing.assert_array_equal(layer.running_variance, 1)
    np.testing.assert_array_equal(plain[0], model.apply(variables, images, train=False)[0])


def test_recorded_statistics_are_centred_and_in_single_precision(teacher):
    """In bfloat16, of values far from 0, E[x²] − E[x]² has no digit left."""
    x = (100 + np.random.default_rng(0).normal(size=(64, 4, 4, 3))).astype(np.float32)
    half = jnp.asarray(x, jnp.bfloat16)
    norm = nn.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), half)
    with batch_norm.recorded() as layers:
        norm.apply(variables, half)
    exact = np.asarray(half, np.float64)
    assert layers[0].batch_mean.dtype == layers[0].batch_variance.dtype == jnp.float32
    np.testing.assert_allclose(layers[0].batch_mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(layers[0].batch_variance, exact.var((0, 1, 2)), rtol=1e-4)


def test_the_number_of_layers_that_are_recorded():
    assert batch_norm.count(create_classifier("cnn_half", 10), (8, 8, 1)) == 3
    assert batch_norm.count(create_classifier("lenet5", 10), (32, 32, 1)) == 0


def test_masked_batch_norm_ignores_masked_examples(teacher):
    model, variables, images = teacher
    real = images[:4]
    mask = jnp.array([True, True, True, True, False, False])
    (expected, _), stats = model.apply(variables, real, train=True, mutable=["batch_stats"])
    with batch_norm.masked(mask):
        (logits, _), masked_stats = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
    np.testing.assert_allclose(logits[:4], expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(masked_stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def decision(teacher, student, tau):
    each = tau**2 * kl(softmax(teacher / tau), softmax(student / tau))
    return -np.where(teacher.argmax(-1) == student.argmax(-1), each, 0).mean()


NEAR = TEACHER + 0.3 * RNG.normal(size=TEACHER.shape)  # often of the teacher's class, not always
NEAR[0] = -TEACHER[0]


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_decision_adversary_counts_images_of_one_decision(tau):
    same = TEACHER.argmax(-1) == NEAR.argmax(-1)
    assert 0 < same.sum() < len(same)
    value = losses.decision_adversarial(TEACHER, NEAR, tau)
    np.testing.assert_allclose(value, decision(TEACHER, NEAR, tau), rtol=1e-4)
    gradients = jax.grad(losses.decision_adversarial, (0, 1))(
        jnp.asarray(TEACHER), jnp.asarray(NEAR), tau
    )
    for gradient in gradients:  # through both networks, of these images alone
        np.testing.assert_array_equal(np.any(np.asarray(gradient) != 0, axis=-1), same)


def test_which_adversaries_act_through_the_teacher():
    """The authors' code of LRA detaches the teacher; ADI and the others do not."""
    through = {}
    for name, adversarial in losses.ADVERSARIAL.items():
        gradient = jax.grad(adversarial)(jnp.asarray(TEACHER), jnp.asarray(NEAR), 1.0)
        through[name] = bool(np.any(gradient))
        assert np.any(jax.grad(adversarial, 1)(jnp.asarray(TEACHER), jnp.asarray(NEAR), 1.0))
    assert through == {"js": False, "adi": True, "l1": True, "kl": True, "decision": True}
    value = losses.adi_adversarial(TEACHER, STUDENT, 3.0)
    np.testing.assert_allclose(value, js_as_published(TEACHER, STUDENT, 3.0), rtol=1e-4)


def test_chosen_targets():
    expected = -np.log(softmax(TEACHER)[np.arange(6), TARGETS]).mean()
    np.testing.assert_allclose(
        losses.target_loss(TEACHER, jnp.asarray(TARGETS)), expected, rtol=1e-5
    )


def test_total_variation_and_norm_are_of_the_batch():
    x = RNG.normal(size=(3, 4, 5, 2))
    expected = sum(
        np.linalg.norm(d.ravel())
        for d in (
            np.diff(x, axis=2),
            np.diff(x, axis=1),
            x[:, 1:, 1:] - x[:, :-1, :-1],
            x[:, 1:, :-1] - x[:, :-1, 1:],
        )
    )
    np.testing.assert_allclose(losses.total_variation(x), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.image_norm(x), np.linalg.norm(x.ravel()), rtol=1e-5)
    flat = jax.grad(losses.total_variation)(jnp.ones((2, 4, 4, 1)))
    assert np.all(np.isfinite(flat))  # a constant image has no direction


def test_batch_statistics_mix_with_those_of_earlier_rounds():
    arrays = RNG.uniform(size=(6, 3))
    layer = losses.LayerStatistics(*map(jnp.asarray, arrays[:4]))
    memory = [(jnp.asarray(arrays[4]), jnp.asarray(arrays[5]))]
    (found,) = losses.mixed([layer], memory, 0.9)
    np.testing.assert_allclose(found.batch_mean, 0.1 * arrays[0] + 0.9 * arrays[4], rtol=1e-5)
    np.testing.assert_allclose(found.batch_variance, 0.1 * arrays[1] + 0.9 * arrays[5], rtol=1e-5)
    np.testing.assert_array_equal(found.running_mean, layer.running_mean)
    (alone,) = losses.mixed([layer], memory, 0.0)
    np.testing.assert_array_equal(alone.batch_mean, layer.batch_mean)
    np.testing.assert_array_equal(losses.moments([found])[0][0], found.batch_mean)

    def of_memory(mean):
        return losses.batch_norm_loss(losses.mixed([layer], [(mean, memory[0][1])], 0.9))

    assert not np.any(jax.grad(of_memory)(memory[0][0]))
