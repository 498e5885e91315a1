"""Archives of `torch.export.save`: the same numbers as PyTorch, and nothing run that is in them."""

import io
import json
import os
import pickle
import zipfile
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.interchange import pt2
from dfkd_jax.losses import batch_norm
from dfkd_jax.networks.graph import network as graphs
from dfkd_jax.networks.graph import program
from dfkd_jax.runtime.errors import UserError

torch = pytest.importorskip("torch")
from tests.helpers import torch_graphs  # noqa: E402  it needs PyTorch

# Of each the output that is taken.
NETWORKS = {"Thin": None, "Mixed": "linear", "Words": None}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")

    @cache
    def archive(name):
        torch.manual_seed(0)
        module = torch_graphs.randomize(getattr(torch_graphs, name)())
        return module, torch_graphs.save(module, folder / f"{name}.pt2")

    return archive


def images(count, size=8):
    return np.random.default_rng(0).normal(size=(count, size, size, 3)).astype(np.float32)


def run(module, x):
    with torch.no_grad():
        found = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    return (found[0] if isinstance(found, tuple) else found).numpy()


def ours(found):
    """(network, variables) of a program."""
    constants = {n: found.arrays[n] for n, array in found.graph.arrays if array.constant}
    graphs.check(found.graph, constants, found.num_classes, found.count)
    variables = graphs.variables(found.graph, found.arrays)
    return graphs.GraphNetwork(found.graph, constants, found.num_classes), variables


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("count", [1, 5])
def test_the_same_logits_as_in_pytorch(archives, name, count):
    module, path = archives(name)
    found = pt2.read_program(path, logits=NETWORKS[name])
    network, variables = ours(found)
    x = images(count)
    logits, features = jax.jit(network.apply)(variables, x)
    expected = run(module, x)
    assert expected.std() > 0.05
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    dense = {"Thin": "linear", "Mixed": "head", "Words": "head"}[name]
    kernel, bias = (getattr(module, dense).state_dict()[k].numpy() for k in ("weight", "bias"))
    np.testing.assert_allclose(features @ kernel.T + bias, logits, rtol=0, atol=1e-5)


def test_the_gradient_of_the_images_is_that_of_pytorch(archives):
    module, path = archives("Thin")
    network, variables = ours(pt2.read_program(path))
    x = images(3)
    weights = np.random.default_rng(1).normal(size=(3, 10)).astype(np.float32)
    total = jax.jit(jax.grad(lambda x: jnp.sum(network.apply(variables, x)[0] * weights)))
    found = total(jnp.asarray(x))
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    (module(theirs) * torch.from_numpy(weights)).sum().backward()
    np.testing.assert_allclose(found, theirs.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[pytest.mark.slow] if s > 3 else []) for s in range(24)]
)
def test_random_networks_have_the_logits_and_gradients_of_pytorch(seed, tmp_path):
    torch.manual_seed(seed)
    module = torch_graphs.randomize(torch_graphs.Drawn(seed))
    network, variables = ours(pt2.read_program(torch_graphs.save(module, tmp_path / "drawn.pt2")))
    x = images(3)
    weights = np.random.default_rng(1).normal(size=(3, 10)).astype(np.float32)

    def total(x):
        logits, features = network.apply(variables, x)
        return jnp.sum(logits * weights), (logits, features)

    gradient, (logits, features) = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x))
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = module(theirs)
    (expected * torch.from_numpy(weights)).sum().backward()
    scale = expected.detach().abs().max().item()
    assert scale > 0.01
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=2e-5 * scale)
    again = features @ module.head.weight.detach().numpy().T + module.head.bias.detach().numpy()
    np.testing.assert_allclose(again, logits, rtol=0, atol=2e-5 * scale)
    wanted = theirs.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_second_derivatives_are_those_of_finite_differences(archives, x64):
    network, variables = ours(pt2.read_program(archives("Words")[1]))
    variables = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), variables)
    x, direction = (jnp.asarray(images(1, 8), jnp.float64) * s for s in (1.0, 0.3))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(network.apply(variables, x)[0][:, 0] ** 2)))
    _, product = jax.jit(lambda x, d: jax.jvp(gradient, (x,), (d,)))(x, direction)
    step = 1e-5
    numeric = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(product, numeric, rtol=1e-5, atol=1e-7)


def test_batch_norms_are_seen_with_what_enters_them(archives):
    module, path = archives("Thin")
    network, variables = ours(pt2.read_program(path))
    assert batch_norm.count(network, (8, 8, 3)) == 5
    x = images(4)

    @jax.jit
    def entering_layers(x):
        with batch_norm.recorded() as layers:
            network.apply(variables, x)
        return layers

    layers = entering_layers(jnp.asarray(x))
    entering = []
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.register_forward_pre_hook(lambda m, given: entering.append((m, given[0].numpy())))
    run(module, x)
    for layer, (norm, given) in zip(layers, entering, strict=True):
        np.testing.assert_allclose(layer.batch_mean, given.mean((0, 2, 3)), atol=1e-5)
        np.testing.assert_allclose(layer.batch_variance, given.var((0, 2, 3)), atol=1e-5)
        np.testing.assert_allclose(layer.running_mean, norm.running_mean.numpy(), atol=1e-6)


def test_images_are_transposed_nowhere(archives):
    network, variables = ours(pt2.read_program(archives("Thin")[1]))
    with graphs.convolution.plain():
        jaxpr = jax.make_jaxpr(lambda v, x: network.apply(v, x)[0])(variables, images(2))
    moved = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "transpose"]
    assert [shape for shape in moved if len(shape) == 4] == [(2, 8, 1, 1)]  # before the dense layer


def test_what_writes_into_slices_and_ends_in_a_softmax(archives):
    module, path = archives("Written")
    found = pt2.read_program(path)
    assert found.notes == ("the logits are what its last softmax is made of",)
    network, variables = ours(found)
    x = images(3)
    logits = jax.jit(network.apply)(variables, x)[0]
    np.testing.assert_allclose(jax.nn.softmax(logits), run(module, x), rtol=0, atol=1e-6)


def test_the_file_of_a_graph_is_read_as_it_was_written(archives, tmp_path):
    graph = pt2.read_program(archives("Mixed")[1], logits="linear").graph
    program.write(graph, tmp_path / "graph.json")
    assert program.read(tmp_path / "graph.json") == graph
    lines = (tmp_path / "graph.json").read_text().splitlines()
    assert sum('"conv2d.default"' in line for line in lines) == 4  # a node a line
    assert not any("other.weight" in line for line in lines)  # the head that is not taken


def test_other_features_can_be_named(archives):
    path = archives("Thin")[1]
    by_module = pt2.read_program(path, features="layers.0")
    network, variables = ours(by_module)
    features = jax.eval_shape(network.apply, variables, images(2))[1]
    assert features.shape == (2, 4)  # of maps, their means
    by_node = pt2.read_program(path, features=by_module.graph.features)
    assert by_node.graph == by_module.graph
    with pytest.raises(UserError, match="--features is 'nonsense'"):
        pt2.read_program(path, features="nonsense")


class Plain(torch.nn.Module):
    """One dense layer, and what a function does with its images."""

    def __init__(self, change=lambda x: x, size=192, classes=10):
        super().__init__()
        self.change, self.fc = change, torch.nn.Linear(size, classes)

    def forward(self, x):
        return self.fc(self.change(x).reshape(x.shape[0], -1))


class TwoNorms(Plain):
    """Two batch norms without modules, the second of a part of the images."""

    def __init__(self):
        super().__init__()
        for name in ("first", "second"):
            self.register_buffer(f"{name}_mean", torch.randn(3))
            self.register_buffer(f"{name}_var", torch.rand(3) + 0.5)

    def forward(self, x):
        norm = torch.nn.functional.batch_norm
        x = norm(x, self.first_mean, self.first_var)
        return self.fc(norm(x * 2, self.second_mean, self.second_var).reshape(x.shape[0], -1))


class Standardised(Plain):
    """The kernel is normalised by its own statistics, whatever is remembered of it."""

    def __init__(self):
        super().__init__(size=3)
        self.kernel = torch.nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x):
        flat = self.kernel.reshape(1, 3, -1)
        kernel = torch.nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0)
        x = torch.nn.functional.conv2d(x, kernel.reshape_as(self.kernel))
        return self.fc(x.mean((2, 3)))


def first_half_doubled(x):
    y = x.clone()
    torch.ops.aten.slice.Tensor(y, 2, end=4).mul_(2.0)  # the start is left out
    return y


SAME = {
    "two batch norms of one module": TwoNorms,
    "a standardised kernel": Standardised,
    "a slice without a start": lambda: Plain(first_half_doubled),
    "a softmax over something else": lambda: Plain(lambda x: torch.softmax(x, 0)),
}


@pytest.mark.parametrize("name", SAME)
def test_what_could_be_taken_for_something_else(name, tmp_path):
    torch.manual_seed(0)
    module = SAME[name]().eval()
    found = pt2.read_program(torch_graphs.save(module, tmp_path / "net.pt2"))
    network, variables = ours(found)
    x = images(3)
    logits = jax.jit(network.apply)(variables, x)[0]
    np.testing.assert_allclose(logits, run(module, x), rtol=0, atol=1e-5)


def test_a_softmax_that_is_not_over_classes_stays(tmp_path):
    class Odd(Plain):
        def forward(self, x):
            return torch.softmax(super().forward(x), 0)

    module = Odd().eval()
    found = pt2.read_program(torch_graphs.save(module, tmp_path / "net.pt2"))
    assert found.notes == ()
    network, variables = ours(found)
    x = images(3)
    np.testing.assert_allclose(network.apply(variables, x)[0], run(module, x), atol=1e-6)


def test_logits_that_are_changed_afterwards_are_refused(tmp_path):
    class Late(Plain):
        def forward(self, x):
            made = self.fc(x.reshape(x.shape[0], -1))
            logits = made.view(-1, 10)
            made.mul_(2.0)
            return logits

    path = torch_graphs.save(Late().eval(), tmp_path / "net.pt2")
    with pytest.raises(UserError, match="reads it again"):
        pt2.read_program(path)


def stale(x):
    part = x[:, :1]
    x.mul_(2.0)
    return x + part


REFUSED = {
    "several outputs": (lambda: torch_graphs.Mixed(), {}, "gives 2 tensors of shape"),
    "one number of images": (
        lambda: Plain(lambda x: x.view(2, 192)),
        {"any_number": False},
        "any number of images",
    ),
    "not square": (lambda: Plain(size=96), {"shape": (3, 8, 4)}, r"\(B, 1 or 3, H, H\)"),
    "channels": (lambda: Plain(size=128), {"shape": (2, 8, 8)}, r"\(B, 1 or 3, H, H\)"),
    "one class": (lambda: Plain(classes=1), {}, "gives 1 classes"),
    "unknown operation": (lambda: Plain(torch.special.bessel_j0), {}, "special_bessel_j0"),
    "part read again": (lambda: Plain(lambda x: stale(x.clone())), {}, "reads it again"),
    "training": (lambda: torch_graphs.Thin().train(), {}, r"model\.eval\(\)"),
    "dropout": (lambda: Plain(lambda x: torch.dropout(x, 0.5, True)), {}, r"model\.eval\(\)"),
    "statistics of the batch": (
        lambda: Plain(lambda x: torch.nn.functional.batch_norm(x, None, None, training=True)),
        {},
        r"model\.eval\(\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_is_no_such_classifier_is_refused(name, tmp_path):
    make, options, words = REFUSED[name]
    path = torch_graphs.save(make(), tmp_path / "net.pt2", **options)
    with pytest.raises(UserError, match=words) as refused:
        ours(pt2.read_program(path))
    assert "\n" not in str(refused.value)


def test_two_inputs_are_refused(tmp_path):
    class Two(Plain):
        def forward(self, x, y):
            return self.fc((x + y).reshape(x.shape[0], -1))

    x = torch.zeros(2, 3, 8, 8)
    torch.export.save(torch.export.export(Two(), (x, x)), tmp_path / "net.pt2")
    with pytest.raises(UserError, match="takes 2 tensors; allowed is one of images"):
        pt2.read_program(tmp_path / "net.pt2")


# Files that are no archives, or not any more: entries ↦ what becomes of them.


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def edited(change):
    """An archive whose JSON is another."""

    def edit(entries):
        name = next(n for n in entries if n.endswith("models/model.json"))
        found = json.loads(entries[name])
        change(found)
        return {**entries, name: json.dumps(found).encode()}

    return edit


def weights(change):
    def edit(entries):
        name = next(n for n in entries if n.endswith("model_weights_config.json"))
        found = json.loads(entries[name])
        change(found["config"])
        return {**entries, name: json.dumps(found).encode()}

    return edit


def without(ending):
    return lambda entries: {n: c for n, c in entries.items() if not n.endswith(ending)}


def replaced(ending, content):
    return lambda entries: {n: content if n.endswith(ending) else c for n, c in entries.items()}


def nodes(found):
    return found["graph_module"]["graph"]["nodes"]


def meta(name, **facts):
    return weights(lambda config: config[name]["tensor_meta"].update(facts))


SIZE = [{"as_int": 10**9}]
HOSTILE = {
    "no graph": (without("models/model.json"), "no archive of torch.export.save"),
    "no weight": (without("weights/weight_0"), "damaged"),
    "no list of weights": (without("model_weights_config.json"), "is not in it"),
    "no JSON": (replaced("models/model.json", b"{"), "damaged"),
    "JSON of another kind": (replaced("models/model.json", b"[1, 2]"), "damaged"),
    "deep JSON": (replaced("models/model.json", b"[" * 100_000), "damaged"),
    "not text": (replaced("models/model.json", b"\xff\xfe"), "damaged"),
    "another byte order": (replaced("byteorder", b"big"), "big-endian"),
    "half a weight": (replaced("weights/weight_0", b"1234"), "of which an array of shape"),
    "no bytes": (replaced("weights/weight_0", b""), "of which an array of shape"),
    "odd bytes": (replaced("weights/weight_0", b"123"), "damaged"),
    "huge sizes": (meta("linear.bias", sizes=SIZE, strides=[{"as_int": 0}]), "of which an array"),
    "far strides": (meta("linear.bias", strides=SIZE), "of which an array"),
    "negative strides": (meta("linear.bias", strides=[{"as_int": -1}]), "damaged"),
    "an offset beyond": (meta("linear.bias", storage_offset={"as_int": 9}), "of which an array"),
    "an unknown type": (meta("linear.bias", dtype=99), "numbers of PyTorch's type 99"),
    "a name that escapes": (
        weights(lambda config: config["linear.bias"].update(path_name="../../../etc/passwd")),
        "damaged",
    ),
    "another network's weight": (
        weights(lambda config: config.update({"x.bias": config.pop("linear.bias")})),
        "'linear.bias' is not in it",
    ),
    "a misshapen weight": (
        meta("linear.bias", sizes=[{"as_int": 2}]),
        "'linear.default' of the module 'linear' cannot be done",
    ),
    "a pickled weight": (
        weights(lambda config: config["linear.bias"].update(use_pickle=True)),
        "can run any code",
    ),
    "an unknown operation": (
        edited(lambda found: nodes(found)[1].update(target="torch.ops.evil.run.default")),
        "torch.ops.evil.run.default",
    ),
    "a name for Python": (
        edited(lambda found: nodes(found)[1].update(target="os.system")),
        "'os.system'",
    ),
    "a private operator": (
        edited(lambda found: nodes(found)[1].update(target="_operator.__import__")),
        "_operator.__import__",
    ),
    "an argument of another name": (
        edited(lambda found: nodes(found)[1]["inputs"][0].update(name="evil")),
        "cannot be done",
    ),
    "what nothing makes": (
        edited(lambda f: nodes(f)[1]["inputs"][0].update(arg={"as_tensor": {"name": "nothing"}})),
        "'nothing', which nothing makes",
    ),
    "an argument of an unknown kind": (
        edited(lambda f: nodes(f)[1]["inputs"][0].update(arg={"as_graph": {}})),
        "as_graph",
    ),
    "no nodes": (edited(lambda found: nodes(found).clear()), "which nothing makes"),
    "no signature": (edited(lambda f: f["graph_module"].pop("signature")), "damaged"),
}


def archive(entries, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def entries(archives):
    with zipfile.ZipFile(archives("Thin")[1]) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_one_sentence(name, entries, tmp_path):
    change, words = HOSTILE[name]
    path = tmp_path / "net.pt2"
    path.write_bytes(archive(change(entries)))
    with pytest.raises(UserError, match=words) as refused:
        ours(pt2.read_program(path))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


def test_a_bomb_is_not_unpacked(entries, tmp_path):
    path = tmp_path / "net.pt2"
    zeros = {**entries, "net/data/weights/weight_0": bytes(10**7)}
    path.write_bytes(archive(zeros, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="stored without compression"):
        pt2.read_program(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_half_an_archive(archives, share, tmp_path):
    whole = archives("Thin")[1].read_bytes()
    path = tmp_path / "net.pt2"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"damaged|no archive"):
        pt2.read_program(path)


def test_a_changed_byte_is_noticed(archives, tmp_path):
    whole = bytearray(archives("Thin")[1].read_bytes())
    whole[200] ^= 1  # in the first weight
    path = tmp_path / "net.pt2"
    path.write_bytes(bytes(whole))
    with pytest.raises(UserError, match="damaged"):
        pt2.read_program(path)


def test_nothing_in_an_archive_is_unpickled(entries, tmp_path, monkeypatch):
    """Everything that PyTorch's loader unpickles is a program here, and none of it runs."""
    ran = tmp_path / "ran"
    evil = pickle.dumps(Evil(ran))
    files = {**replaced("sample_inputs/model.pt", evil)(entries), "net/data/extra.pkl": evil}
    path = tmp_path / "net.pt2"
    path.write_bytes(archive(files))
    for module in (pickle, torch):
        for name in ("load", "loads"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("unpickled"))
    network, variables = ours(pt2.read_program(path))
    assert jax.eval_shape(network.apply, variables, images(1))[0].shape == (1, 10)
    marked = weights(lambda config: config["conv1.weight"].update(use_pickle=True))(files)
    name = next(n for n in marked if n.endswith("weight_0"))
    path.write_bytes(archive({**marked, name: evil}))
    with pytest.raises(UserError, match="can run any code"):
        pt2.read_program(path)
    assert not ran.exists()


def test_pytorch_itself_is_not_needed(archives, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    network, variables = ours(pt2.read_program(archives("Thin")[1]))
    assert jax.eval_shape(network.apply, variables, images(1))[0].shape == (1, 10)
