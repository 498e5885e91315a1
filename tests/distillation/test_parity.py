"""The authors' formulas, in PyTorch code written here, against what this project computes.

Double precision on both sides, the same weights and the same images. Sources: Patel et al. (CVPR
2023) and Binici et al. (AAAI 2022), and their published code, where it decides what a formula
leaves open.
"""

import copy
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dfkd_jax.data.data_table import SPECS
from dfkd_jax.distillation import meta
from dfkd_jax.distillation.steps import init, student_step
from dfkd_jax.losses import terms as losses
from dfkd_jax.networks.classifiers import CNN
from dfkd_jax.networks.encoder import Encoder
from dfkd_jax.networks.generator import Generator
from dfkd_jax.networks.training import Network, generator_optimizer, student_optimizer
from dfkd_jax.replay.generative_replay import recall_latent
from dfkd_jax.replay.scheme import Batch, RetentionBatch
from dfkd_jax.replay.schemes import create_replay
from dfkd_jax.run.setup import create_parts, parse
from dfkd_jax.runtime import draw
from dfkd_jax.synthesis import adversarial
from tests.helpers.tiny import tiny_config
from tests.helpers.trees import cast

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402

from tests.helpers import torch_twins  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster than the default
SPEC = SPECS["digits"]
SHAPE, K, LATENT, CHANNELS = (8, 8, 1), 10, 4, (8, 4)
WIDTHS = (4, 6, 8, 7)
B, M = 8, 4  # images of a fresh and of a replayed batch
DECAY, MOMENTUM = 5e-4, 0.9
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def random_variables(module, *inputs, seed):
    """Double precision, nothing at its initial value, of a size that keeps the signal's."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, KEY, *inputs)

    def draw_leaf(path, leaf):
        if path[-1] in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        if path[-1] == "kernel":
            return rng.normal(size=leaf.shape) * (2 / np.prod(leaf.shape[:-1])) ** 0.5
        return rng.normal(size=leaf.shape)  # biases, means and the vectors of spectral norm

    flat = flatten_dict(dict(shapes))
    drawn = {path: jnp.asarray(draw_leaf(path, leaf), float) for path, leaf in flat.items()}
    return unflatten_dict(drawn)


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), float)


def tensor(array):
    """Of an array of ours, images channels first."""
    array = np.array(array)
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy() if array.ndim == 4 else array)


def classifier(seed, gain=9.0):
    """(module, variables, twin in training mode); the gain gives logits of a trained size."""
    module = CNN(K, WIDTHS)
    variables = random_variables(module, jnp.zeros((2, *SHAPE)), seed=seed)
    variables["params"]["fc"]["kernel"] *= gain
    return module, variables, torch_twins.load(torch_twins.CNN(K, WIDTHS), variables)


def teacher_of(seed=0):
    """Images ↦ (logits, features) in evaluation mode, here and in PyTorch."""
    module, variables, twin = classifier(seed)
    twin.eval().requires_grad_(False)
    return functools.partial(module.apply, variables, train=False), twin


def assert_equal(ours, network, what="data", **tolerance):
    """A tree of ours, {"params": ...} or gradients in its place, against tensors of a twin."""
    named = torch_twins.tensors(network)
    for path, array in flatten_dict(ours).items():
        theirs = named[torch_twins.twin_name(path)]
        theirs = theirs.grad if what == "grad" else theirs
        theirs = torch_twins.in_our_order(theirs)
        np.testing.assert_allclose(array, theirs, err_msg=str(path), **TOLERANCE | tolerance)


def batch_counts(network):
    """Numbers per channel that each batch norm of a twin sees, filled in by its next passes."""
    counts = {}

    def record(module, inputs, name):
        counts[name] = inputs[0].numel() // inputs[0].shape[1]

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(functools.partial(record, name=name))
    return counts


def assert_running_statistics(before, after, network, counts):
    """Means are PyTorch's; of the variance it stores the unbiased one, we the biased one."""
    named = torch_twins.tensors(network)
    for path, array in flatten_dict(after).items():
        name = torch_twins.twin_name(("batch_stats", *path))
        if path[-1] == "mean":
            np.testing.assert_allclose(array, named[name], **TOLERANCE)
        elif path[-1] == "var":
            kept = 0.9 * flatten_dict(before)[path]
            count = counts[path[0]]
            biased = (named[name].numpy() - kept) * (count - 1) / count
            np.testing.assert_allclose(array - kept, biased, **TOLERANCE)


# a. The generator's loss.


def generator_loss(teacher, features, student, oh, ie, a, temperature):
    """Of LRA and PRE-DFKD; the disagreement sees the teacher's logits without gradient."""
    cross_entropy = F.cross_entropy(teacher, teacher.argmax(1))
    mean = F.softmax(teacher, dim=1).mean(0)
    entropy = (mean * mean.log10()).sum()
    p = F.softmax(teacher.detach() / temperature, dim=1)
    q = F.softmax(student / temperature, dim=1)
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
    clipped = ((p == 0.01) | (q == 0.01)).double().mean()
    assert 0.05 < clipped < 0.95  # both sides of the clip are compared
    js = 0.5 * (m * (m / p).log()).mean() + 0.5 * (m * (m / q).log()).mean()
    assert 0 < js < 1
    return oh * cross_entropy + ie * entropy - a * features.abs().mean() + 1 - js


@pytest.mark.parametrize("spectral_norm", [True, False])
def test_generator_loss_and_its_gradient(spectral_norm):
    """With respect to the images and to every parameter; the student in training mode."""
    module = Generator(SHAPE, CHANNELS, spectral_norm)
    z = normal(B, LATENT, seed=1)
    variables = random_variables(module, z, seed=2)
    teacher, teacher_twin = teacher_of()
    student, student_variables, student_twin = classifier(seed=3)
    weights = losses.GeneratorLossWeights(0.7, 5.0, 0.3, 1.0, 0.0)

    @jax.jit
    def compute(params, shift):
        def loss(params, shift):
            images, updated = module.apply(
                variables | {"params": params}, z, mutable=["batch_stats"]
            )
            images = images + shift  # zero: the gradient at it is that at the images
            (student_out, _), _ = student.apply(
                student_variables, images, train=True, mutable=["batch_stats"]
            )
            value, _ = losses.generator_loss(*teacher(images), student_out, [], weights)
            return value, (images, updated["batch_stats"])

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, shift)

    (value, (images, stats)), (gradient, image_gradient) = compute(
        variables["params"], jnp.zeros((B, *SHAPE))
    )

    twin = torch_twins.Generator(SHAPE, LATENT, CHANNELS, spectral_norm)
    twin = torch_twins.load(twin, variables)
    counts = batch_counts(twin)
    generated = twin(tensor(z))
    generated.retain_grad()
    expected = generator_loss(
        *teacher_twin(generated), student_twin(generated)[0], oh=0.7, ie=5.0, a=0.3, temperature=3
    )
    expected.backward()
    np.testing.assert_allclose(images, generated.detach().permute(0, 2, 3, 1), **TOLERANCE)
    np.testing.assert_allclose(value, expected.item(), **TOLERANCE)
    np.testing.assert_allclose(image_gradient, generated.grad.permute(0, 2, 3, 1), **TOLERANCE)
    assert_equal({"params": gradient}, twin, "grad")
    assert_running_statistics(variables["batch_stats"], stats, twin, counts)
    if spectral_norm:
        for index in (1, 2, 3):
            u = stats[f"conv{index}_sn"][f"conv{index}/kernel/u"].reshape(-1)
            np.testing.assert_allclose(u, getattr(twin, f"conv{index}").weight_u, **TOLERANCE)


# b. The authors' joint replay: one pass over [x̂; x̂_m].

# As this project's configuration calls it; everything else here is its formula.
ONE_PASS = {"objective": "concatenated"}


@pytest.mark.slow
def test_the_one_pass_joint_update_over_two_steps():
    """Mean |S − T| over the concatenated batch, SGD with momentum and weight decay."""
    fields = {"student.weight_decay": DECAY, "student.momentum": MOMENTUM, "batch_size": B}
    config = tiny_config(**fields, **ONE_PASS)
    teacher_module, teacher_variables, teacher_twin = classifier(seed=0)
    teacher_twin.eval()
    module, variables, twin = classifier(seed=1)
    replayed = normal(M, *SHAPE, seed=2)
    scheme = create_replay(config, SPEC)._replace(
        recall=lambda memory, key, teacher: RetentionBatch(
            replayed, teacher(replayed)[0], jnp.ones(())
        ),
        observed_images=B,  # so the state keeps the whole fresh batch
    )
    parts = create_parts(parse(config, reads_data=False))
    method = parts.method._replace(replay=scheme, synthesizer=adversarial.create(config, SPEC))
    parts = parts._replace(method=method, teacher=teacher_module, student=module)
    student = Network(
        variables["params"],
        variables["batch_stats"],
        student_optimizer(config).init(variables["params"]),
    )
    state = cast(jax.jit(partial(init, parts))(KEY), jnp.float64).replace(student=student)
    step = jax.jit(lambda *arguments: student_step(parts, *arguments)[0])
    optimizer = torch.optim.SGD(
        twin.parameters(), config.student.learning_rate, MOMENTUM, weight_decay=DECAY
    )
    counts = batch_counts(twin)
    for number in range(2):  # of one epoch, so at one learning rate
        before, state = state, step(state, teacher_variables)
        images = torch.cat([tensor(state.recent.images), tensor(replayed)])
        optimizer.zero_grad()
        F.l1_loss(twin(images)[0], teacher_twin(images)[0].detach()).backward()
        optimizer.step()
        assert_equal({"params": state.student.params}, twin)
        if number == 0:  # then the stored variances go their own ways
            assert_running_statistics(
                before.student.batch_stats, state.student.batch_stats, twin, counts
            )


# c. Learning to retain while acquiring, with the objective of the authors' code.


def acquisition_and_retention(seed):
    """Fresh and replayed images with the teacher's logits of them: (x̂, T), (x̂_m, T_m)."""
    x, x_m = normal(B, *SHAPE, seed=seed), normal(M, *SHAPE, seed=seed + 1)
    return (x, 3 * normal(B, K, seed=seed + 2)), (x_m, 3 * normal(M, K, seed=seed + 3))


def inner_loop(twin, acquisition, retention, alpha, **options):
    """L_ret(θ') in PyTorch, θ' one step of SGD on L_acq, differentiable by `higher`."""
    higher = pytest.importorskip("higher")
    optimizer = torch.optim.SGD(twin.parameters(), alpha, MOMENTUM, weight_decay=DECAY)
    with higher.innerloop_ctx(twin, optimizer, **options) as (inner, descent):
        descent.step(F.l1_loss(inner(tensor(acquisition[0]))[0], tensor(acquisition[1])))
        return F.l1_loss(inner(tensor(retention[0]))[0], tensor(retention[1]))


@pytest.mark.parametrize("alpha", [0.02, 0.9])
def test_exact_meta_gradient_with_the_objective_of_the_code(alpha):
    """Joint loss on [x̂; x̂_m] + L_ret(θ'), against `higher` that keeps the parameters' graph."""
    pytest.importorskip("higher")
    module, variables, twin = classifier(seed=1, gain=1.0)
    acquisition, retention = acquisition_and_retention(seed=2)
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), acquisition, retention)

    def loss_on(images, logits):
        def loss(params):
            (out, _), updated = module.apply(
                variables | {"params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(losses.l1_distance(out, logits)), updated["batch_stats"]

        return loss

    @jax.jit
    def compute(params, alpha):
        gradient, metrics = meta.meta_gradient(
            loss_on(*acquisition),
            loss_on(*retention),
            params,
            inner_lr=alpha,
            variant="exact",
            outer_loss=loss_on(*both),
            inner_weight_decay=DECAY,
            has_aux=True,
        )
        return gradient, metrics["retention_loss"]

    gradient, retention_loss = compute(variables["params"], alpha)
    retained = inner_loop(twin, acquisition, retention, alpha, copy_initial_weights=False)
    joint = F.l1_loss(twin(tensor(both[0]))[0], tensor(both[1]))
    (joint + retained).backward()
    np.testing.assert_allclose(retention_loss, retained.item(), **TOLERANCE)
    assert_equal({"params": gradient}, twin, "grad")

    # The term at θ' is no small part of it, so the comparison is one of the meta-gradient.
    whole = {name: tensor.grad.clone() for name, tensor in twin.named_parameters()}
    twin.zero_grad()
    F.l1_loss(twin(tensor(both[0]))[0], tensor(both[1])).backward()
    for name, parameter in twin.named_parameters():
        assert (whole[name] - parameter.grad).norm() > 1e-2 * whole[name].norm(), name


def test_as_shipped_the_inner_loop_sends_no_gradient_to_the_student():
    """With the default of `higher`, `copy_initial_weights=True`: what the tables call severed."""
    pytest.importorskip("higher")
    acquisition, retention = acquisition_and_retention(seed=2)
    for options, reaches in (({}, False), ({"copy_initial_weights": False}, True)):
        _, _, twin = classifier(seed=1)
        inner_loop(twin, acquisition, retention, 0.02, **options).backward()
        for name, parameter in twin.named_parameters():
            reached = parameter.grad is not None and bool((parameter.grad != 0).any())
            assert reached == reaches, name


# d. Generative replay: a step of the variational autoencoder.


@pytest.fixture
def latents(monkeypatch):
    """Every draw of latents and of noise is one of these, by how many there are."""
    fixed = {count: normal(count, LATENT, seed=count) for count in (B // 2, M)}
    monkeypatch.setattr(draw, "normal", lambda key, first, count, dim: fixed[count])
    return {count: tensor(array) for count, array in fixed.items()}


def recall_objective(z, logits, ie, oh):
    """Of the authors' code: balanced and sure classes, and latents as if from N(0, I)."""
    mean = F.softmax(logits, dim=1).mean(0)
    return (
        ie * (mean * mean.log10()).sum()
        + oh * F.cross_entropy(logits, logits.argmax(1))
        + F.mse_loss(z.var(0), torch.ones_like(z[0]))
        + F.mse_loss(z.mean(0), torch.zeros_like(z[0]))
    )


def recalled(z, logits_of, steps, ie=5.0, oh=1.0, learning_rate=0.02):
    z = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        recall_objective(z, logits_of(z), ie, oh).backward()
        optimizer.step()
    return z.detach()


def without_trace(network):
    """A function of the network's input, in training mode, on a copy of it."""
    return lambda x: copy.deepcopy(network)(x)


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [0, 3])
def test_an_observation_of_generative_replay(latents, iteration):
    """Two of them: loss, Adam of both networks, running statistics, and the recall inside.

    In iteration 0 the current images stand alone.
    """
    fields = {"replay.kind": "generative", "batch_size": B, "generator.latent_dim": LATENT}
    config = tiny_config(**fields, **{"generator.channels": CHANNELS, "replay.entry_size": M})
    config.replay.vae_learning_rate, config.replay.kl_weight = 0.01, 0.05
    scheme = create_replay(config, SPEC)
    teacher, teacher_twin = teacher_of()
    images = normal(B // 2, *SHAPE, seed=1)
    variables = {
        "encoder": random_variables(Encoder(LATENT, CHANNELS[::-1]), images, seed=2),
        "generator": random_variables(
            Generator(SHAPE, CHANNELS, spectral_norm=False), jnp.zeros((2, LATENT)), seed=3
        ),
    }
    params, stats = (
        {name: tree[part] for name, tree in variables.items()} for part in ("params", "batch_stats")
    )
    memory = cast(jax.jit(scheme.init)(KEY), jnp.float64).replace(
        params=params, batch_stats=stats, observations=jnp.ones((), jnp.int32)
    )
    observe = jax.jit(
        lambda memory, iteration: scheme.observe(
            memory, Batch(images, teacher(images)[0]), KEY, iteration, teacher
        )[0]
    )

    encoder = torch_twins.Encoder(SHAPE, LATENT, CHANNELS[::-1])
    generator = torch_twins.Generator(SHAPE, LATENT, CHANNELS, spectral_norm=False)
    twins = {"encoder": encoder, "generator": generator}
    for name, twin in twins.items():
        torch_twins.load(twin, variables[name])
    optimizer = torch.optim.Adam([*encoder.parameters(), *generator.parameters()], 0.01)
    counts = {name: batch_counts(twin) for name, twin in twins.items()}
    for number in range(2):
        z = recalled(latents[M], lambda z: teacher_twin(without_trace(generator)(z))[0], steps=1)
        x, noise = tensor(images), latents[B // 2]
        if iteration > 0:
            x = torch.cat([x, without_trace(generator)(z).detach()])
            noise = torch.cat([noise, latents[M]])
        mean, log_variance = encoder(x)
        reconstruction = generator(mean + (log_variance / 2).exp() * noise)
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        loss = (
            F.l1_loss(reconstruction, x)
            + F.l1_loss(teacher_twin(reconstruction)[0], teacher_twin(x)[0])
            + 0.05 * divergence
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        memory = observe(memory, iteration)
        for name, twin in twins.items():
            # Adam divides by the gradient's size, which of a bias before batch norm is rounding.
            assert_equal({"params": memory.params[name]}, twin, atol=1e-7)
            if number == 0:
                assert_running_statistics(stats[name], memory.batch_stats[name], twin, counts[name])


# e. The recall.


@pytest.mark.parametrize("steps", [1, 4])
def test_recall(steps):
    weights = [normal(LATENT, 6, seed=1), 4 * normal(6, K, seed=2)]
    z = normal(M, LATENT, seed=0)
    recall = functools.partial(
        recall_latent,
        logits_of=lambda z: jnp.tanh(z @ weights[0]) @ weights[1],
        steps=steps,
        learning_rate=0.02,
        information_entropy=3.0,
        one_hot=0.7,
    )
    ours = jax.jit(recall)(z)
    first, second = map(tensor, weights)
    theirs = recalled(tensor(z), lambda z: torch.tanh(z @ first) @ second, steps, ie=3.0, oh=0.7)
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    assert np.abs(ours - z).max() > 0.015 * steps  # it has moved


# f. Steps of the optimizers.


def random_gradients(shapes, count, seed=0):
    rng = np.random.default_rng(seed)
    return [{n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()} for _ in range(count)]


SIZES = {"a": (3, 2), "b": (4,)}


def descend_here(optimizer, params, gradients):
    """Parameters after every step."""
    state, seen = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def descend_in_torch(create, params, gradients, steps_per_epoch, schedule=None):
    params = {name: tensor(array).requires_grad_() for name, array in params.items()}
    optimizer = create(params.values())
    schedule = schedule and schedule(optimizer)
    seen = []
    for number, gradient in enumerate(gradients, start=1):
        for name, parameter in params.items():
            parameter.grad = tensor(gradient[name])
        optimizer.step()
        seen.append({name: parameter.detach().clone() for name, parameter in params.items()})
        if schedule and number % steps_per_epoch == 0:
            schedule.step()
    return seen


def assert_same_path(ours, theirs):
    for here, there in zip(ours, theirs, strict=True):
        for name in SIZES:
            np.testing.assert_allclose(here[name], there[name], **TOLERANCE)


def test_the_students_descent_over_all_epochs():
    """SGD with momentum and weight decay; the cosine is stepped once an epoch."""
    config = tiny_config(**{"student.weight_decay": DECAY, "student.momentum": MOMENTUM})
    config.student.learning_rate = 0.1
    epochs, steps = config.epochs, config.iterations_per_epoch * config.student.steps
    params, *gradients = random_gradients(SIZES, 1 + epochs * steps)
    theirs = descend_in_torch(
        lambda p: torch.optim.SGD(p, 0.1, MOMENTUM, weight_decay=DECAY),
        params,
        gradients,
        steps,
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs),
    )
    assert_same_path(descend_here(student_optimizer(config), params, gradients), theirs)


def test_the_generators_descent():
    config = tiny_config(**{"generator.learning_rate": 0.02})
    params, *gradients = random_gradients(SIZES, 13)
    theirs = descend_in_torch(lambda p: torch.optim.Adam(p, 0.02), params, gradients, 1)
    assert_same_path(descend_here(generator_optimizer(config), params, gradients), theirs)


def test_the_inner_step():
    """A fresh SGD: its momentum never acts, its weight decay does."""
    params, gradient = random_gradients(SIZES, 2)
    ours = meta.inner_step(params, gradient, 0.9, DECAY)
    theirs = descend_in_torch(
        lambda p: torch.optim.SGD(p, 0.9, MOMENTUM, weight_decay=DECAY), params, [gradient], 1
    )
    assert_same_path([ours], theirs)
