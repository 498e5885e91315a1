"""The authors' formulas, in PyTorch code written here, against what this project computes.

Double precision on both sides, the same weights and the same images. Sources: Patel et al. (CVPR
2023) and Binici et al. (AAAI 2022), and their published code, where it decides what a formula
leaves open.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dfkd_jax import losses
from dfkd_jax.classifiers import CNN
from dfkd_jax.generator import Generator

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402

from tests import torch_twins  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64")

SHAPE, K, LATENT, CHANNELS = (8, 8, 1), 10, 4, (8, 4)
WIDTHS = (4, 6, 8, 7)
B, M = 8, 4  # images of a fresh and of a replayed batch
DECAY, MOMENTUM = 5e-4, 0.9
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def random_variables(module, *inputs, seed):
    """Double precision, nothing at its initial value, of a size that keeps the signal's."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)

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


def classifier(seed):
    """(module, variables, twin in training mode)."""
    module = CNN(K, WIDTHS)
    variables = random_variables(module, jnp.zeros((2, *SHAPE)), seed=seed)
    variables["params"]["fc"]["kernel"] *= 9  # logits of some size, as of a trained network
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
            value = losses.generator_loss(*teacher(images), student_out, [], weights)
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
