"""Devices: which ones a run uses, what of its state is split over them, how a step runs on each.

An epoch runs per device, under `jax.pmap` or `jax.shard_map`: a device makes its share of every
batch and averages over the axis `AXIS` whatever belongs to the whole batch. Everything around the
epoch (checkpoints, evaluation, figures) sees whole arrays on a mesh, the same for both mappings.

A layout is a pytree prefix of the state: the array axis that is split, or WHOLE for a copy on each
device.
"""

import os
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.errors import UserError

AXIS = "data"
WHOLE = -1
MAPPINGS = ("pmap", "shard_map")

Layout = Any
Step = Callable[[Any, Any], Any]  # (state, teacher variables) -> state


class Devices(NamedTuple):
    """The devices of a run, over all processes, along one axis."""

    mesh: Mesh
    mapping: str = "pmap"

    @classmethod
    def first(cls) -> "Devices":
        """The default device alone."""
        return cls(Mesh(np.array(jax.devices()[:1]), (AXIS,)))

    @property
    def count(self) -> int:
        """How many, over all processes."""
        return self.mesh.size

    @property
    def axis(self) -> Axis:
        """The axis that per-device code averages over."""
        return Axis(AXIS, self.count) if self.count > 1 else ONE

    def shardings(self, layout: Layout) -> Any:
        """The layout as shardings of whole arrays."""
        if self.count == 1:
            return SingleDeviceSharding(self.mesh.devices.flat[0])
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), _specs(layout))

    def put(self, tree: Any, layout: Layout = WHOLE) -> Any:
        """NumPy arrays, the same in every process, laid out over the devices."""
        if self.count == 1:
            return jax.device_put(tree)
        return jax.tree.map(
            lambda sharding, part: jax.tree.map(
                lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), part
            ),
            self.shardings(layout),
            tree,
        )

    def split(self, tree: Any) -> Any:
        """Inside of `jax.jit`: tell the compiler to split the first axis of these arrays."""
        if self.count == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shardings(0))

    def local(self, tree: Any) -> Any:
        """Whole arrays on this process's first device; to be called by all processes."""
        if self.count == 1:
            return tree
        whole = jax.jit(lambda tree: tree, out_shardings=self.shardings(WHOLE))(tree)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


class Mapped(NamedTuple):
    """Per-device functions over all devices: gather(step(f)(shard(state), replicate(teacher)))."""

    shard: Callable[[Any], Any]  # a whole state to what mapped functions take; consumes it
    replicate: Callable[[Any], Any]  # likewise the teacher's variables, a copy on each device
    step: Callable[[Step], Step]  # a per-device function to a mapped one, the state donated
    gather: Callable[[Any], Any]  # back to a whole state; consumes it
    block_until_ready: Callable[
        [Any], Any
    ]  # a mapped state, waited for where steps may not queue up


def memory_bytes() -> int:
    """Of one local device; where it does not say so, as a CPU, of this machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """Bytes at most so far: of the first device where it counts them, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# How XLA, cuDNN and cuBLAS say that a device has too little memory left.
_FULL = (
    *("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "CUDNN_STATUS_NOT_INITIALIZED"),
    *("CUBLAS_STATUS_NOT_INITIALIZED", "cublas handle", "DNN library initialization failed"),
)


def full_memory(error: Exception) -> str | None:
    """What to do where an error of the device means that its memory is full; else None."""
    said = (str(error).strip().splitlines() or [""])[0]
    if not any(sign in said for sign in _FULL):
        return None
    return (
        f"The device's memory is full ({said[:200]}); two programs share a GPU when both are "
        "started with XLA_PYTHON_CLIENT_MEM_FRACTION=0.45 in the environment, as JAX takes three "
        "quarters of it otherwise, and one program needs less with config.meta.remat=True, "
        "config.compute_dtype=bfloat16 or a smaller config.batch_size."
    )


def choose(parallel: ml_collections.ConfigDict, sizes: Mapping[str, int]) -> Devices:
    """The devices that `config.parallel` asks for.

    Args:
      parallel: config.parallel.
      sizes: what is split over the devices, by the fields of the configuration that give it.

    Raises:
      UserError: there are not so many, or batch or memory cannot be split over them; one sentence.
    """
    count, available = parallel.devices or jax.device_count(), jax.device_count()
    if jax.process_count() > 1 and count != available:
        raise UserError(
            f"config.parallel.devices is {count}; with {jax.process_count()} processes all "
            f"{available} devices are used, allowed are 0 and {available}."
        )
    if count > available:
        raise UserError(
            f"config.parallel.devices is {count}; there are {available}, allowed are 0 (all) "
            f"to {available}."
        )
    for field, size in sizes.items():
        if size % count:
            raise UserError(
                f"config.{field} is {size}, which {count} devices cannot share equally; allowed "
                f"are multiples of {count} (or config.parallel.devices that divides it)."
            )
    return Devices(Mesh(np.array(jax.devices()[:count]), (AXIS,)), parallel.mapping)


def mapped(devices: Devices, layout: Layout) -> Mapped:
    """The chosen mapping for states of that layout; on one device a plain `jax.jit`."""
    if devices.count == 1:
        return Mapped(_same, _same, lambda step: jax.jit(step, donate_argnums=0), _same, _same)
    return {"pmap": _pmap, "shard_map": _shard_map}[devices.mapping](devices, layout)


def _same(tree: Any) -> Any:
    return tree


def _specs(layout: Layout) -> Any:
    def spec(axis: int) -> P:
        return P() if axis == WHOLE else P(*(None,) * axis, AXIS)

    return jax.tree.map(spec, layout)


def _per_device(devices: Devices, function: Callable, in_layouts: tuple, out: Layout) -> Callable:
    # Without vma checks gradients and collectives mean what they mean under pmap, so the same
    # per-device code is right under both.
    return jax.shard_map(
        function,
        mesh=devices.mesh,
        in_specs=_specs(in_layouts),
        out_specs=_specs(out),
        check_vma=False,
    )


def _shard_map(devices: Devices, layout: Layout) -> Mapped:
    def step(function: Step) -> Step:
        return jax.jit(_per_device(devices, function, (layout, WHOLE), layout), donate_argnums=0)

    return Mapped(_same, _same, step, _same, _block_until_ready(devices))


def _pmap(devices: Devices, layout: Layout) -> Mapped:
    """`jax.pmap` takes and gives this process's part, with a leading axis over its devices."""
    mesh, several = devices.mesh, jax.process_count() > 1

    def stack(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], tree)

    def unstack(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[0], tree)

    stack_state = jax.jit(_per_device(devices, stack, (layout,), 0))
    stack_copies = jax.jit(_per_device(devices, stack, (WHOLE,), 0))
    unstack_state = jax.jit(_per_device(devices, unstack, (0,), layout))

    def local(tree: Any) -> Any:
        if not several:
            return tree
        return multihost_utils.global_array_to_host_local_array(tree, mesh, P(AXIS))

    def shard(state: Any) -> Any:
        stacked = local(stack_state(state))
        _delete(state)
        return stacked

    def gather(stacked: Any) -> Any:
        if several:
            stacked = multihost_utils.host_local_array_to_global_array(stacked, mesh, P(AXIS))
        state = unstack_state(stacked)
        _delete(stacked)
        return state

    def step(function: Step) -> Step:
        return jax.pmap(function, axis_name=AXIS, devices=list(mesh.devices.flat), donate_argnums=0)

    def replicate(tree: Any) -> Any:
        return local(stack_copies(tree))

    return Mapped(shard, replicate, step, gather, _block_until_ready(devices))


def _block_until_ready(devices: Devices) -> Callable[[Any], Any]:
    # Emulated devices share the threads of one CPU: with several steps under way the threads can
    # all wait in collectives whose other participants then find none.
    return jax.block_until_ready if devices.mesh.devices.flat[0].platform == "cpu" else _same


def _delete(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.delete()
