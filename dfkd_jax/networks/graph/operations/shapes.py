"""Operations that move, cut, join or repeat elements, and those that make tensors of nothing."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dfkd_jax.networks.graph.operations.elementwise import numpy_type
from dfkd_jax.networks.graph.tensors import (
    Tensor,
    aligned,
    axis_of,
    permuted,
    plain,
    reshaped,
    stored,
    tensor,
)

Number = int | float | bool


def view(self: Tensor, size: Sequence[int]) -> Tensor:
    """Another shape of the same elements."""
    return reshaped(self, size)


def reshape(self: Tensor, shape: Sequence[int]) -> Tensor:
    """As `view`."""
    return reshaped(self, shape)


def view_as(self: Tensor, other: Tensor) -> Tensor:
    """The shape of another."""
    return reshaped(self, other.shape)


def flatten(self: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """The axes from one to another as one."""
    first, last = (d % max(self.ndim, 1) for d in (start_dim, end_dim))
    return reshaped(self, (*self.shape[:first], -1, *self.shape[last + 1 :]))


def unflatten(self: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """One axis as several."""
    dim %= self.ndim
    return reshaped(self, (*self.shape[:dim], *sizes, *self.shape[dim + 1 :]))


def squeeze(self: Tensor, dim: Sequence[int] | int | None = None) -> Tensor:
    """Without these axes, as far as their size is 1."""
    dims = range(self.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % self.ndim for d in dims if self.shape[d] == 1}
    kept = [d for d in self.order if d not in gone]
    array = self.array.reshape([self.shape[d] for d in kept])
    return tensor(array, np.argsort(np.argsort(kept)))


def unsqueeze(self: Tensor, dim: int) -> Tensor:
    """With an axis of size 1 there."""
    dim %= self.ndim + 1
    order = [d + (d >= dim) for d in self.order]
    return tensor(self.array[..., None], (*order, dim))


def permute(self: Tensor, dims: Sequence[int]) -> Tensor:
    """The axes in another order."""
    return permuted(self, dims)


def transpose(self: Tensor, dim0: int, dim1: int) -> Tensor:
    """Two axes exchanged."""
    dims = list(range(self.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permuted(self, dims)


def swapped(self: Tensor) -> Tensor:
    """`t`: a matrix transposed."""
    return permuted(self, range(self.ndim)[::-1])


def matrix_transposed(self: Tensor) -> Tensor:
    """The last two axes exchanged."""
    return transpose(self, -1, -2)


def movedim(self: Tensor, source: Any, destination: Any) -> Tensor:
    """Axes moved to other places, the rest in its order."""
    pairs = [
        [d % self.ndim for d in ([dims] if isinstance(dims, int) else dims)]
        for dims in (source, destination)
    ]
    rest = iter(d for d in range(self.ndim) if d not in pairs[0])
    places = dict(zip(pairs[1], pairs[0], strict=True))
    return permuted(self, [places[d] if d in places else next(rest) for d in range(self.ndim)])


def expand(self: Tensor, size: Sequence[int], implicit: bool = False) -> Tensor:
    """Repeated along axes of size 1 and along new ones; -1 keeps an axis."""
    more = len(size) - self.ndim
    shape = [n if n != -1 else self.shape[i - more] for i, n in enumerate(size)]
    return tensor(jnp.broadcast_to(plain(self), shape))


def expand_as(self: Tensor, other: Tensor) -> Tensor:
    """To the shape of another."""
    return expand(self, other.shape)


def repeat(self: Tensor, repeats: Sequence[int]) -> Tensor:
    """So many copies along each axis."""
    return tensor(jnp.tile(plain(self), tuple(repeats)))


def repeat_interleave(self: Tensor, repeats: int, dim: int, output_size: Any = None) -> Tensor:
    """Each element so many times."""
    return Tensor(jnp.repeat(self.array, repeats, axis_of(self, dim)), self.axes)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One after another along an axis. An empty vector, which PyTorch lets pass, is left out."""
    tensors = [t for t in tensors if t.shape != (0,)]
    arrays, order = aligned(*tensors)
    return tensor(jnp.concatenate(arrays, order.index(dim % tensors[0].ndim)), order)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One after another along a new axis."""
    return cat([unsqueeze(t, dim % (t.ndim + 1)) for t in tensors], dim)


def slice_(
    self: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """Every `step`-th element from start to end."""
    index = [slice(None)] * self.ndim
    index[axis_of(self, dim)] = slice(start, end, step)
    return Tensor(self.array[tuple(index)], self.axes)


def select(self: Tensor, dim: int, index: int) -> Tensor:
    """One element of an axis, without the axis."""
    dim %= self.ndim
    kept = [d for d in self.order if d != dim]
    array = lax.index_in_dim(self.array, index, axis_of(self, dim), keepdims=False)
    return tensor(array, np.argsort(np.argsort(kept)))


def put_part(self: Tensor, value: Tensor, steps: Sequence[Any]) -> Tensor:
    """The whole with a part replaced by `value`, as writing into a slice does; not in PyTorch.

    Args:
      self: the whole.
      value: of the part.
      steps: ("slice", dim, start, end, step) and ("select", dim, index), from the whole on.
    """
    (kind, dim, *rest), *others = steps
    place: Any = rest[0] if kind == "select" else slice(*rest)
    axis = (dim or 0) % self.ndim
    where = tuple(place if i == axis else slice(None) for i in range(self.ndim))
    whole = plain(self)
    if others:
        value = put_part(tensor(whole[where]), value, others)
    return tensor(whole.at[where].set(plain(value)))


def fill(self: Tensor, value: Any = 0) -> Tensor:
    """One number for every element."""
    number = plain(value) if isinstance(value, Tensor) else value
    return Tensor(jnp.full(self.array.shape, number, self.array.dtype), self.axes)


def copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """The elements of another tensor, in the type of this one."""
    return tensor(jnp.broadcast_to(plain(src), self.shape).astype(self.array.dtype))


def narrow(self: Tensor, dim: int, start: int, length: int) -> Tensor:
    """So many elements from one on."""
    return slice_(self, dim, start, start + length)


def split(self: Tensor, split_size: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """Parts of one size, the last one perhaps smaller, or of given sizes."""
    length = self.shape[dim]
    if isinstance(split_size, int):
        edges = [*range(0, length, split_size), length]
    else:
        edges = [0, *np.cumsum(split_size).tolist()]
    return tuple(slice_(self, dim, *ends) for ends in itertools.pairwise(edges))


def split_with_sizes(self: Tensor, split_sizes: Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Parts of given sizes."""
    return split(self, split_sizes, dim)


def chunk(self: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """At most so many parts of one size."""
    return split(self, -(-self.shape[dim] // chunks), dim)


def unbind(self: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """Each element of an axis."""
    return tuple(select(self, dim, i) for i in range(self.shape[dim]))


def flip(self: Tensor, dims: Sequence[int]) -> Tensor:
    """Backwards along axes."""
    return Tensor(jnp.flip(self.array, [axis_of(self, dim) for dim in dims]), self.axes)


def roll(self: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    """Moved along axes, around the end."""
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not dims:
        return tensor(jnp.roll(plain(self), shifts[0]))
    return Tensor(jnp.roll(self.array, shifts, [axis_of(self, dim) for dim in dims]), self.axes)


def pad(self: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Tensor:
    """Elements added (or, of negative numbers, cut off), pairs from the last axis on.

    Raises:
      NotImplementedError: an unknown mode.
    """
    kinds = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if mode not in kinds:
        raise NotImplementedError(f"padding of mode {mode!r}")
    edges = [(0, 0, 0)] * self.ndim
    for i in range(len(pad) // 2):
        edges[axis_of(self, -1 - i)] = (pad[2 * i], pad[2 * i + 1], 0)
    if mode == "constant":
        fill = jnp.asarray(0 if value is None else value, self.array.dtype)
        return Tensor(lax.pad(self.array, fill, edges), self.axes)
    widths = [edge[:2] for edge in edges]
    return Tensor(jnp.pad(self.array, widths, mode=kinds[mode]), self.axes)


def index(self: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Elements at positions; an axis without positions is whole."""
    where = tuple(slice(None) if i is None else plain(i) for i in indices)
    return tensor(plain(self)[where])


def index_select(self: Tensor, dim: int, index: Tensor) -> Tensor:
    """Elements of one axis at positions."""
    return Tensor(jnp.take(self.array, plain(index), axis_of(self, dim)), self.axes)


def gather(self: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    """For each element the one at its own position along an axis."""
    return tensor(jnp.take_along_axis(plain(self), plain(index), dim))


def embedding(weight: Tensor, indices: Tensor, *args: Any, **options: Any) -> Tensor:
    """Rows of a table."""
    return tensor(plain(weight)[plain(indices)])


def triangle(function: Callable[..., jax.Array]) -> Callable[..., Tensor]:
    """`tril` or `triu`."""
    return lambda self, diagonal=0: tensor(function(plain(self), diagonal))


def meshgrid(tensors: Sequence[Tensor], indexing: str = "ij") -> tuple[Tensor, ...]:
    """Coordinates of a grid."""
    grids = jnp.meshgrid(*map(plain, tensors), indexing=indexing)
    return tuple(tensor(grid) for grid in grids)


def unfold(self: Tensor, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Tensor:
    """`im2col`: the window around each position, (B, C, H, W) → (B, C·kh·kw, positions)."""
    image = pad(self, [padding[1], padding[1], padding[0], padding[0]])
    array = stored(image, (0, 1, 2, 3))
    spans = [dilation[i] * (kernel_size[i] - 1) + 1 for i in range(2)]
    counts = [(array.shape[2 + i] - spans[i]) // stride[i] + 1 for i in range(2)]

    def taps(x: jax.Array, axis: int, i: int) -> list[jax.Array]:
        return [
            lax.slice_in_dim(x, t, t + (counts[i] - 1) * stride[i] + 1, stride[i], axis)
            for t in range(0, kernel_size[i] * dilation[i], dilation[i])
        ]

    every = [column for row in taps(array, 2, 0) for column in taps(row, 3, 1)]
    batch, channels = array.shape[:2]
    return tensor(jnp.stack(every, 2).reshape(batch, channels * len(every), -1))


def full(size: Sequence[int], fill_value: Number, dtype: int | None = None, **how: Any) -> Tensor:
    """A tensor of one number."""
    kind = np.result_type(type(fill_value)) if dtype is None else numpy_type(dtype)
    kind = float if np.issubdtype(kind, np.floating) else kind
    return tensor(jnp.full(tuple(size), fill_value, jax.dtypes.canonicalize_dtype(kind)))


def _of_size(number: Number) -> Callable[..., Tensor]:
    def make(size: Sequence[int], dtype: int | None = None, **how: Any) -> Tensor:
        return full(size, float(number) if dtype is None else number, dtype)

    return make


def _like(number: Number) -> Callable[..., Tensor]:
    def make(self: Tensor, dtype: int | None = None, **how: Any) -> Tensor:
        return full_like(self, number, dtype)

    return make


def full_like(self: Tensor, fill_value: Number, dtype: int | None = None, **how: Any) -> Tensor:
    """A tensor of one number, with the shape of another."""
    kind = self.array.dtype if dtype is None else numpy_type(dtype)
    return Tensor(jnp.full(self.array.shape, fill_value, kind), self.axes)


def new_full(
    self: Tensor, size: Sequence[int], fill_value: Number, dtype: int | None = None, **how: Any
) -> Tensor:
    """A tensor of one number, with the type of another."""
    kind = self.array.dtype if dtype is None else numpy_type(dtype)
    return tensor(jnp.full(tuple(size), fill_value, kind))


def _new(number: Number) -> Callable[..., Tensor]:
    return lambda self, size, dtype=None, **how: new_full(self, size, number, dtype)


def arange(
    end: Number, start: Number = 0, step: Number = 1, dtype: int | None = None, **how: Any
) -> Tensor:
    """Numbers from start up to and without end."""
    whole = all(isinstance(n, int) for n in (start, end, step))
    kind = (int if whole else float) if dtype is None else numpy_type(dtype)
    return tensor(jnp.arange(start, end, step, jax.dtypes.canonicalize_dtype(kind)))


def linspace(
    start: Number, end: Number, steps: int, dtype: int | None = None, **how: Any
) -> Tensor:
    """So many numbers from start to end."""
    return tensor(jnp.linspace(start, end, steps, dtype=numpy_type(dtype)))


def scalar(s: Number, dtype: int | None = None, **how: Any) -> Tensor:
    """A number as a tensor."""
    return full((), s, dtype)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "view": view,
    "_unsafe_view": view,
    "reshape": reshape,
    "view_as": view_as,
    "reshape_as": view_as,
    "flatten": flatten,
    "unflatten": unflatten,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "permute": permute,
    "transpose": transpose,
    "swapaxes": lambda self, axis0, axis1: transpose(self, axis0, axis1),
    "t": swapped,
    "numpy_T": swapped,
    "mT": matrix_transposed,
    "movedim": movedim,
    "moveaxis": movedim,
    "expand": expand,
    "expand_as": expand_as,
    "repeat": repeat,
    "tile": lambda self, dims: repeat(self, dims),
    "repeat_interleave": repeat_interleave,
    "cat": cat,
    "concat": cat,
    "stack": stack,
    "slice": slice_,
    "select": select,
    "narrow": narrow,
    "put_part": put_part,
    "fill": fill,
    "zero": fill,
    "copy": copy,
    "split": split,
    "split_with_sizes": split_with_sizes,
    "chunk": chunk,
    "unbind": unbind,
    "flip": flip,
    "roll": roll,
    "pad": pad,
    "constant_pad_nd": pad,
    "index": index,
    "index_select": index_select,
    "gather": gather,
    "embedding": embedding,
    "tril": triangle(jnp.tril),
    "triu": triangle(jnp.triu),
    "meshgrid": meshgrid,
    "im2col": unfold,
    "full": full,
    "zeros": _of_size(0),
    "ones": _of_size(1),
    "empty.memory_format": _of_size(0),
    "full_like": full_like,
    "zeros_like": _like(0),
    "ones_like": _like(1),
    "empty_like": _like(0),
    "new_full": new_full,
    "new_zeros": _new(0),
    "new_ones": _new(1),
    "arange": arange,
    "linspace": linspace,
    "scalar_tensor": scalar,
}
