"""Each operation against PyTorch's, values and gradient, however its arguments lie."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfkd_jax.networks.graph import operations
from dfkd_jax.networks.graph.tensors import Tensor, plain, tensor

torch = pytest.importorskip("torch")
aten = torch.ops.aten


class Drawn:
    """A tensor of random numbers: positive ones, with `positive`; whole ones, with `below`."""

    def __init__(self, *shape, positive=False, below=None, distinct=False):
        self.shape, self.positive, self.below, self.distinct = shape, positive, below, distinct

    def array(self, rng):
        if self.below is not None:
            return rng.integers(0, self.below, self.shape)
        if self.distinct:  # as where equal ones share a gradient
            return rng.permutation(int(np.prod(self.shape))).reshape(self.shape) / 7.0
        found = rng.normal(size=self.shape) * 2
        return np.abs(found) + 0.5 if self.positive else found


X, V = Drawn(2, 4, 6, 6), Drawn(2, 5, 8)
UNARY = (
    "abs neg exp expm1 sin cos tanh erf sigmoid log_sigmoid relu silu mish selu sign "
    "floor ceil round trunc relu6 hardsigmoid hardswish gelu elu leaky_relu softplus hardtanh "
    "square"
).split()
POSITIVE = "log log1p log2 sqrt rsqrt reciprocal".split()
BINARY = "mul sub add div rsub".split()
SAME_SHAPE = "maximum minimum atan2".split()
COMPARE = "eq ne lt le gt ge".split()
CASES = {
    **{name: ({"self": X},) for name in UNARY},
    **{name: ({"self": Drawn(3, 4, positive=True)},) for name in POSITIVE},
    **{f"{name}.Tensor": ({"self": X, "other": Drawn(4, 1, 1, positive=True)},)
       for name in BINARY},
    **{name: ({"self": X, "other": Drawn(2, 4, 6, 6)},) for name in SAME_SHAPE},
    **{f"{name}.Scalar": ({"self": X, "other": 0.5},) for name in COMPARE},
    "add.Scalar": ({"self": X, "other": 2.0, "alpha": 3},),
    "div.Tensor_mode": (
        {"self": V, "other": Drawn(8, positive=True), "rounding_mode": "floor"},
        {"self": V, "other": Drawn(8, positive=True), "rounding_mode": "trunc"},
    ),
    "pow.Tensor_Scalar": ({"self": X, "exponent": 2}, {"self": X, "exponent": 3.0}),
    "addcmul": ({"self": V, "tensor1": V, "tensor2": V, "value": 0.5},),
    "addcdiv": ({"self": V, "tensor1": V, "tensor2": Drawn(2, 5, 8, positive=True)},),
    "lerp.Scalar": ({"self": V, "end": Drawn(2, 5, 8), "weight": 0.3},),
    "clamp": ({"self": X, "min": -1.0, "max": 1.5}, {"self": X, "min": 0.0}),
    "clamp_min": ({"self": X, "min": 0.2},),
    "clamp_max": ({"self": X, "max": 0.2},),
    "prelu": ({"self": X, "weight": Drawn(4)}, {"self": X, "weight": Drawn(1)}),
    "where.self": ({"condition": Drawn(2, 5, 8, below=2), "self": V, "other": Drawn(2, 5, 8)},),
    "masked_fill.Scalar": ({"self": V, "mask": Drawn(5, 8, below=2), "value": -2.0},),
    "gelu": ({"self": X, "approximate": "tanh"}, {"self": X}),
    "dropout": ({"input": X, "p": 0.5, "train": False},),
    "conv1d": ({"input": V, "weight": Drawn(6, 5, 3), "bias": Drawn(6), "padding": [1]},),
    "conv2d": (
        {"input": X, "weight": Drawn(6, 4, 3, 3), "padding": [1, 1]},
        {"input": X, "weight": Drawn(6, 4, 3, 3), "bias": Drawn(6), "stride": [2, 2]},
        {"input": X, "weight": Drawn(8, 1, 3, 3), "padding": [1, 1], "groups": 4},
        {"input": X, "weight": Drawn(8, 2, 3, 3), "padding": [2, 2], "dilation": [2, 2],
         "groups": 2},
        {"input": X, "weight": Drawn(5, 4, 1, 1), "stride": [2, 2]},
        {"input": X, "weight": Drawn(5, 4, 3, 1), "padding": [1, 0]},
    ),
    "conv2d.padding": (
        {"input": X, "weight": Drawn(6, 4, 4, 3), "padding": "same"},
        {"input": X, "weight": Drawn(6, 4, 3, 3), "padding": "valid"},
    ),
    "convolution": (
        {"input": X, "weight": Drawn(6, 4, 3, 3), "bias": Drawn(6), "stride": [1, 1],
         "padding": [1, 1], "dilation": [1, 1], "transposed": False, "output_padding": [0, 0],
         "groups": 1},
    ),
    "max_pool2d": tuple(
        {"self": Drawn(2, 3, 7, 7, distinct=True), "kernel_size": [3, 3], **options}
        for options in (
            {"stride": [2, 2], "padding": [1, 1]},
            {"stride": [2, 2], "ceil_mode": True},
            {"stride": [1, 1], "dilation": [2, 2]},
            {},
        )
    ),
    "max_pool1d": ({"self": Drawn(2, 3, 8, distinct=True), "kernel_size": [2]},),
    "avg_pool2d": tuple(
        {"self": Drawn(2, 3, 7, 7), "kernel_size": [3, 3], **options}
        for options in (
            {"stride": [2, 2], "padding": [1, 1]},
            {"stride": [2, 2], "padding": [1, 1], "count_include_pad": False},
            {"stride": [2, 2], "padding": [1, 1], "ceil_mode": True},
            {"stride": [3, 3], "ceil_mode": True, "count_include_pad": False},
            {"divisor_override": 5},
        )
    ),
    "adaptive_avg_pool2d": (
        {"self": X, "output_size": [1, 1]},
        {"self": X, "output_size": [3, 2]},
        {"self": Drawn(2, 3, 7, 5), "output_size": [3, 4]},
        {"self": Drawn(2, 3, 2, 2), "output_size": [3, 3]},
    ),
    "adaptive_avg_pool1d": ({"self": V, "output_size": [3]},),
    "adaptive_max_pool2d": ({"self": Drawn(2, 3, 7, 5, distinct=True), "output_size": [3, 4]},),
    "layer_norm": (
        {"input": V, "normalized_shape": [8], "weight": Drawn(8), "bias": Drawn(8)},
        {"input": V, "normalized_shape": [5, 8]},
    ),
    "rms_norm": ({"input": V, "normalized_shape": [8], "weight": Drawn(8), "eps": 1e-6},),
    "group_norm": ({"input": X, "num_groups": 2, "weight": Drawn(4), "bias": Drawn(4)},),
    "softmax.int": ({"self": X, "dim": 1}, {"self": V, "dim": -1}),
    "log_softmax.int": ({"self": X, "dim": 1},),
    "linear": (
        {"input": V, "weight": Drawn(3, 8), "bias": Drawn(3)},
        {"input": Drawn(2, 8), "weight": Drawn(3, 8)},
    ),
    "matmul": ({"self": V, "other": Drawn(2, 8, 3)}, {"self": V, "other": Drawn(8, 3)}),
    "bmm": ({"self": V, "mat2": Drawn(2, 8, 3)},),
    "addmm": ({"self": Drawn(3), "mat1": Drawn(2, 8), "mat2": Drawn(8, 3), "alpha": 2, "beta": 3},),
    "einsum": ({"equation": "bij,bjk->bik", "tensors": [V, Drawn(2, 8, 3)]},),
    "scaled_dot_product_attention": (
        {"query": Drawn(2, 3, 5, 8), "key": Drawn(2, 3, 7, 8), "value": Drawn(2, 3, 7, 4)},
        {"query": Drawn(2, 3, 5, 8), "key": Drawn(2, 3, 5, 8), "value": Drawn(2, 3, 5, 8),
         "is_causal": True},
        {"query": Drawn(2, 3, 5, 8), "key": Drawn(2, 3, 7, 8), "value": Drawn(2, 3, 7, 4),
         "attn_mask": Drawn(5, 7), "scale": 0.3},
    ),
    "mean.dim": ({"self": X, "dim": [2, 3]}, {"self": X, "dim": [-1], "keepdim": True}),
    "mean": ({"self": X},),
    "sum.dim_IntList": ({"self": X, "dim": [1]},),
    "amax": ({"self": Drawn(2, 3, 4, distinct=True), "dim": [1]},),
    "max.dim": ({"self": Drawn(2, 3, 4, distinct=True), "dim": 2},),
    "max.other": ({"self": V, "other": Drawn(2, 5, 8)},),
    "argmax": ({"self": Drawn(2, 3, 4, distinct=True), "dim": 1},),
    "var.correction": ({"self": X, "dim": [1], "correction": 0}, {"self": V, "dim": [2]}),
    "var_mean.correction": ({"self": V, "dim": [-1], "correction": 0, "keepdim": True},),
    "std.correction": ({"self": V, "dim": [1]},),
    "linalg_vector_norm": ({"self": V, "ord": 2, "dim": [-1], "keepdim": True},
                           {"self": V, "ord": 1, "dim": [1]}),
    "cumsum": ({"self": V, "dim": 1},),
    "view": ({"self": X, "size": [2, -1]}, {"self": X, "size": [2, 2, 2, 6, 6]}),
    "flatten.using_ints": ({"self": X, "start_dim": 1}, {"self": X, "start_dim": 2, "end_dim": 3}),
    "unflatten.int": ({"self": X, "dim": 1, "sizes": [2, -1]},),
    "squeeze.dim": ({"self": Drawn(2, 1, 3), "dim": 1}, {"self": V, "dim": 1}),
    "squeeze.dims": ({"self": Drawn(2, 1, 3, 1), "dim": [1, 3]},),
    "unsqueeze": ({"self": X, "dim": 1}, {"self": X, "dim": -1}),
    "permute": ({"self": X, "dims": [0, 2, 3, 1]},),
    "transpose.int": ({"self": X, "dim0": 1, "dim1": -1},),
    "movedim.int": ({"self": X, "source": 1, "destination": -1},),
    "expand": (
        {"self": Drawn(1, 4, 1), "size": [3, -1, 2]},
        {"self": Drawn(4, 1), "size": [2, 4, 3]},
    ),
    "repeat": ({"self": V, "repeats": [2, 1, 3]},),
    "repeat_interleave.self_int": ({"self": V, "repeats": 3, "dim": 1},),
    "cat": ({"tensors": [X, Drawn(2, 3, 6, 6)], "dim": 1}, {"tensors": [V, V], "dim": -1}),
    "stack": ({"tensors": [V, V], "dim": 1}, {"tensors": [V, V], "dim": -1}),
    "slice.Tensor": (
        {"self": X, "dim": 2, "start": 1, "end": 5, "step": 2},
        {"self": X, "dim": -1, "start": -3, "end": 9223372036854775807},
    ),
    "select.int": ({"self": X, "dim": 1, "index": -1},),
    "narrow": ({"self": X, "dim": 1, "start": 1, "length": 2},),
    "split.Tensor": ({"self": V, "split_size": 3, "dim": 1},),
    "split_with_sizes": ({"self": V, "split_sizes": [1, 4], "dim": 1},),
    "chunk": ({"self": V, "chunks": 2, "dim": 1},),
    "unbind.int": ({"self": V, "dim": 1},),
    "flip": ({"self": X, "dims": [2]},),
    "roll": ({"self": X, "shifts": [1, -2], "dims": [2, 3]}, {"self": V, "shifts": [3]}),
    "pad": (
        {"self": X, "pad": [1, 2, 0, 1]},
        {"self": X, "pad": [0, 0, 0, 0, 1, 1], "value": 2.0},
        {"self": X, "pad": [1, 2, 2, 1], "mode": "reflect"},
        {"self": X, "pad": [1, 2, 2, 1], "mode": "replicate"},
        {"self": X, "pad": [-1, 0]},
    ),
    "index.Tensor": ({"self": Drawn(5, 3), "indices": [Drawn(2, 4, below=5)]},
                     {"self": V, "indices": [None, Drawn(3, below=5)]}),
    "index_select": ({"self": V, "dim": 1, "index": Drawn(3, below=5)},),
    "gather": ({"self": V, "dim": 1, "index": Drawn(2, 3, 8, below=5)},),
    "embedding": ({"weight": Drawn(5, 3), "indices": Drawn(2, 4, below=5)},),
    "tril": ({"self": Drawn(4, 4)}, {"self": Drawn(4, 4), "diagonal": 1}),
    "triu": ({"self": Drawn(4, 4)},),
    "im2col": ({"self": X, "kernel_size": [3, 2], "dilation": [1, 1], "padding": [1, 0],
                "stride": [2, 1]},),
    "full_like": ({"self": V, "fill_value": 2.0},),
    "zeros_like": ({"self": V},),
    "new_full": ({"self": V, "size": [2, 3], "fill_value": 1.5},),
    "arange": ({"end": 5},),
    "arange.start_step": ({"start": 1.0, "end": 3.0, "step": 0.5},),
    "linspace": ({"start": -1.0, "end": 1.0, "steps": 5},),
    "upsample_bilinear2d.vec": tuple(
        {"input": X, "output_size": size, "align_corners": corners, "scale_factors": scales}
        for size, scales in (([9, 12], None), (None, [2.0, 1.5]), ([3, 4], None))
        for corners in (False, True)
    ),
    "upsample_bicubic2d.vec": tuple(
        {"input": X, "output_size": [9, 4], "align_corners": corners, "scale_factors": None}
        for corners in (False, True)
    ),
    "_upsample_bilinear2d_aa": ({"self": X, "output_size": [3, 4], "align_corners": False},),
    "_upsample_bicubic2d_aa": ({"self": X, "output_size": [3, 9], "align_corners": False},),
    "upsample_nearest2d.vec": (
        {"input": X, "output_size": [9, 4], "scale_factors": None},
        {"input": X, "output_size": None, "scale_factors": [2.0, 2.0]},
    ),
    "copy": ({"self": V, "src": Drawn(8)},),
    "nan_to_num": ({"self": V},),
    "to.dtype": ({"self": V, "dtype": "half"},),
}  # fmt: skip


def overload(name):
    base, _, rest = name.partition(".")
    return getattr(getattr(aten, base), rest or "default")


def drawn(arguments, rng, make):
    def one(value):
        if isinstance(value, Drawn):
            return make(value.array(rng))
        return [one(part) for part in value] if isinstance(value, list) else value

    return {name: one(value) for name, value in arguments.items()}


def of_torch(array):
    kind = torch.float64 if array.dtype.kind == "f" else torch.int64
    return torch.tensor(array, dtype=kind)


def somehow_lying(array):
    order = tuple(np.random.default_rng(array.ndim).permutation(array.ndim))
    return tensor(jnp.asarray(array).transpose(order), order)


def listed(result):
    several = isinstance(result, tuple | list) and not isinstance(result, Tensor)
    return result if several else (result,)


@pytest.mark.parametrize(
    "name, case", [(name, i) for name, cases in CASES.items() for i in range(len(cases))]
)
def test_values_and_gradient_are_those_of_pytorch(name, case, x64):
    arguments = dict(CASES[name][case])
    theirs = drawn(arguments, np.random.default_rng(0), of_torch)
    ours = drawn(arguments, np.random.default_rng(0), somehow_lying)
    if arguments.get("dtype") == "half":
        theirs["dtype"], ours["dtype"] = torch.float64, 6  # the precision of the computation
    if name in ("where.self", "masked_fill.Scalar"):
        mask = "condition" if "condition" in arguments else "mask"
        theirs[mask] = theirs[mask].bool()
        ours[mask] = Tensor(ours[mask].array.astype(bool), ours[mask].axes)
    first = next(
        (k for k, v in theirs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()),
        None,
    )
    if first is not None:
        theirs[first].requires_grad_()
    expected = [e for e in listed(overload(name)(**theirs)) if e is not None]
    derivative = first is not None and expected[0].requires_grad and name not in WITHOUT_DERIVATIVE
    weights = np.random.default_rng(1).normal(size=tuple(expected[0].shape))
    function = operations.find(name)

    @jax.jit  # one program, which compiles sooner than its operations one by one
    def results(array):
        given = ours if first is None else {**ours, first: Tensor(array, ours[first].axes)}
        return [None if r is None else plain(r) for r in listed(function(**given))]

    array = jnp.zeros(()) if first is None else ours[first].array
    for found, want in zip(results(array), expected, strict=False):
        if found is not None:
            assert found.shape == tuple(want.shape)
            np.testing.assert_allclose(found, want.detach().numpy(), rtol=1e-9, atol=1e-9)
    if not derivative:
        return
    (expected[0] * torch.tensor(weights)).sum().backward()
    gradient = jax.jit(jax.grad(lambda array: jnp.sum(results(array)[0] * weights)))(array)
    # PyTorch's sixth, of which hardsigmoid is made, is one in single precision.
    rtol = 1e-7 if name == "hardsigmoid" else 1e-8
    found = np.asarray(gradient).transpose(ours[first].axes)
    np.testing.assert_allclose(found, theirs[first].grad, rtol=rtol, atol=1e-8)


NOT_ATEN = {"put_part"}  # of this project alone
WITHOUT_DERIVATIVE = {"copy"}  # in PyTorch


@pytest.mark.parametrize("name", sorted(operations.OPERATIONS))
def test_what_aten_calls_its_arguments_is_understood(name):
    """Each overload that a program may hold; those that write into `out` are not in any."""
    if name in NOT_ATEN:
        return
    base, _, only = name.partition(".")
    packet = getattr(aten, base)
    parameters = inspect.signature(operations.OPERATIONS[name]).parameters
    takes_more = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    understood = 0
    for kind in [only] if only else packet.overloads():
        schema = getattr(packet, kind)._schema
        names = {argument.name for argument in schema.arguments}
        understood += takes_more or names <= parameters.keys() | {"generator"}
    assert understood


def test_an_operation_that_writes_is_found_under_the_name_of_the_other():
    assert operations.find("relu_.default") is operations.find("relu.default") is not None
    assert operations.changes_its_argument("relu_.default")
    assert not operations.changes_its_argument("relu.default")
    assert operations.find("no_such_operation.default") is None


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("dropout.default", {"input": V, "p": 0.5, "train": True}, "active"),
        ("pad.default", {"self": V, "pad": [1, 1], "mode": "odd"}, "padding of mode 'odd'"),
        (
            "convolution.default",
            {**CASES["convolution"][0], "transposed": True},
            "a transposed convolution",
        ),
    ],
)
def test_what_cannot_be_done_says_so(name, arguments, words):
    given = drawn(arguments, np.random.default_rng(0), somehow_lying)
    with pytest.raises(NotImplementedError, match=words):
        operations.find(name)(**given)
