"""FastMeta against a computation of its own, in float64, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.distillation import steps
from dfkd_jax.losses import terms as losses
from dfkd_jax.methods import inversion_family
from dfkd_jax.run.setup import parse
from dfkd_jax.synthesis.latents import pixels
from tests.helpers.tiny import build, tiny_config
from tests.helpers.trees import cast

FIELDS = {
    "synthesis.augment": "none",
    "synthesis.steps": 3,
    "synthesis.warm_up": 1,
    "loss.batch_norm_momentum": 0.0,
}


class Adam:
    """As in its paper, on trees of NumPy arrays, β₁ = 0.5."""

    def __init__(self, rate):
        self.rate, self.first, self.second, self.count = rate, 0.0, 0.0, 0

    def step(self, x, gradient):
        self.count += 1
        self.first = 0.5 * self.first + 0.5 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first = self.first / (1 - 0.5**self.count)
        second = self.second / (1 - 0.999**self.count)
        return x - self.rate * first / (np.sqrt(second) + 1e-8)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("meta", ["maml", "reptile"])
def test_two_rounds_move_the_common_generator_as_computed_by_hand(x64, meta):
    config = tiny_config("fast", **{**FIELDS, "fast.meta": meta})
    built, state, teacher = build(config)
    state, teacher = cast(state, jnp.float64), cast(teacher, jnp.float64)
    setup = parse(config, reads_data=False)
    generator = inversion_family.create_generator(config, setup.spec)
    view = steps.view(built.parts, state, teacher)

    def loss(params, latents, targets):
        seen = view.teacher(pixels(generator, params, latents, setup.spec))
        return 10.0 * losses.batch_norm_loss(seen.statistics) + 0.5 * losses.target_loss(
            seen.logits, targets
        )

    gradient_of = jax.jit(jax.grad(loss, (0, 1)))
    common = state.synthesizer.kept.common.params
    structure = jax.tree.structure(common)
    mine = leaves(common)
    outer = [Adam(config.synthesis.learning_rate * 3) for _ in mine]
    begin, update, finish = (
        jax.jit(lambda s, t, step=step: step(built.parts, s, t)[0])
        for step in (steps.begin_step, steps.update_step, steps.finish_step)
    )
    for _ in range(2):
        state = begin(state, teacher)
        started = state.synthesizer
        fast, latents = list(mine), np.asarray(started.inputs.params["latents"])
        total = [np.zeros_like(x) for x in mine]
        inner = [Adam(config.synthesis.learning_rate) for _ in mine]
        of_latents = Adam(config.synthesis.latent_learning_rate)
        for _ in range(3):
            params = jax.tree.unflatten(structure, fast)
            of_params, of_z = gradient_of(params, latents, started.targets)
            total = [a + b for a, b in zip(total, leaves(of_params), strict=True)]
            fast = [a.step(x, g) for a, x, g in zip(inner, fast, leaves(of_params), strict=True)]
            latents = of_latents.step(latents, np.asarray(of_z))
            state = update(state, teacher)
        for found, expected in zip(leaves(state.synthesizer.generator.params), fast, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(
            state.synthesizer.inputs.params["latents"], latents, rtol=1e-6, atol=1e-9
        )
        if meta == "reptile":
            total = [67.0 * (a - b) for a, b in zip(mine, fast, strict=True)]
        mine = [a.step(x, g) for a, x, g in zip(outer, mine, total, strict=True)]
        state = finish(state, teacher)
        for found, expected in zip(leaves(state.synthesizer.kept.common.params), mine, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_first_layer_is_drawn_anew_when_it_is_due():
    config = tiny_config("fast", **{**FIELDS, "fast.renewal": 1, "synthesis.warm_up_rounds": 1})
    built, state, teacher = build(config)
    begin, update, finish = (
        jax.jit(lambda s, t, step=step: step(built.parts, s, t)[0])
        for step in (steps.begin_step, steps.update_step, steps.finish_step)
    )
    kept = state.synthesizer.kept
    for number in (1, 2, 3):  # one of the warm-up, one after it, and another
        state = finish(update(begin(state, teacher), teacher), teacher)
        params = state.synthesizer.kept.common.params
        renewed = np.array_equal(params["fc"]["kernel"], kept.fresh["fc"]["kernel"])
        assert renewed == (number == 2)


def test_the_presets_have_the_rates_of_the_paper():
    from dfkd_jax.configs import cifar10

    for method, count, rate, latent_rate in (
        ("fast", 10, 2e-3, 0.01),
        ("fast-5", 5, 3e-3, 0.01),
        ("fast-2", 2, 5e-3, 0.015),
    ):
        synthesis = cifar10.get_config(method).synthesis
        assert (synthesis.steps, synthesis.learning_rate) == (count, rate)
        assert synthesis.latent_learning_rate == latent_rate
