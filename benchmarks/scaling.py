"""What one device computes and sends in a step, counted in the compiled program.

`python -m benchmarks.scaling --config=configs/cifar100.py --devices=8` compiles generator and
student step (and with generative replay the observe step) for emulated CPU devices, with XLA's
convolutions as on GPU and TPU, and prints per device: floating-point operations, bytes that
instructions read and write (as if nothing stayed in a cache), temporary memory, and the collectives
in the HLO. Nothing is run. Networks of one's own are counted too, as those of `benchmarks/vit.py`
with `--config.student.model=benchmarks.vit:ViTB16`.
"""

import os
import re
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from dfkd_jax.distillation import steps
from dfkd_jax.distillation.epoch import nothing_measured, recorded, steps_of
from dfkd_jax.distillation.state import layout_of
from dfkd_jax.networks import convolution
from dfkd_jax.run import command_line
from dfkd_jax.run.command_line import CONFIG
from dfkd_jax.run.gradients_flag import chosen_gradients, with_gradient
from dfkd_jax.run.setup import create_parts, parse
from dfkd_jax.runtime.devices import AXIS, WHOLE, Devices, mapped

DEVICES = flags.DEFINE_integer("devices", 8, "How many devices share the batch.")
_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


class Cost(NamedTuple):
    """Of one step of one device."""

    flops: float
    accessed_bytes: float
    temporary_bytes: int
    collectives: dict[str, tuple[int, int]]  # see `collectives`


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Kind of collective ↦ (how many instructions, bytes of their results on one device)."""
    found: dict[str, tuple[int, int]] = {}
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    for shapes, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", hlo):
        size = 0
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = 1
            for dim in filter(None, dims.split(",")):
                count *= int(dim)
            size += count * _BYTES[dtype]
        n, total = found.get(kind, (0, 0))
        found[kind] = (n + 1, total + size)
    return found


def cost(config: ml_collections.ConfigDict, devices: Devices, step: str) -> Cost:
    """Compile a step of the configuration for the devices and count.

    Args:
      config: of a run.
      devices: under shard_map; their memory is not used.
      step: of `dfkd_jax.distillation.epoch.Steps`, such as "student".
    """
    setup = parse(config, reads_data=False)
    whole, parts = create_parts(setup), create_parts(setup, devices.axis)
    state = jax.eval_shape(lambda: steps.init(whole, jax.random.key(0)))
    image = jnp.zeros((2, *whole.image_shape))
    teacher = jax.eval_shape(lambda: parts.teacher.init(jax.random.key(0), image, train=False))
    carry = (state, jax.eval_shape(partial(nothing_measured, steps_of(whole)), state, teacher))
    layout = (layout_of(whole.method), WHOLE)
    function = getattr(recorded(steps_of(parts), mapped(devices, layout).step), step)
    compiled = function.lower(carry, teacher).compile()
    counted, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return Cost(
        counted["flops"],
        counted["bytes accessed"],
        memory.temp_size_in_bytes,
        collectives(compiled.as_text()),
    )


def main(arguments: list[str]) -> None:
    """Print one row per step."""
    del arguments
    count, config = DEVICES.value, CONFIG.value
    # Read when JAX starts its backend, which nothing has done yet.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    convolution.on_cpu = lambda: False  # for GPU and TPU
    devices = Devices(Mesh(np.array(jax.devices()[:count]), (AXIS,)), "shard_map")
    print(f"batch {config.batch_size} on {count} devices; each row is one step of one device")
    print("| step | GFLOP | GB accessed | temporary MiB | collectives |")
    print("|---|---:|---:|---:|---|")

    def row(name: str, step: str, own: ml_collections.ConfigDict = config) -> None:
        flops, accessed, temporary, sent = cost(own, devices, step)
        words = [f"{n} {kind} of {size / 1e6:.2f} MB in all" for kind, (n, size) in sent.items()]
        print(
            f"| {name} | {flops / 1e9:.0f} | {accessed / 1e9:.1f} | {temporary / 2**20:.0f} "
            f"| {', '.join(words) or 'none'} |",
            flush=True,
        )

    row("generator", "update")
    if config.replay.kind == "generative":
        row("observe", "observe")
    for variant in chosen_gradients(default=("none", "first_order", "exact", "exact_hvp")):
        row(f"student, {variant}", "student", with_gradient(config, variant))


if __name__ == "__main__":
    sys.path.insert(0, ".")
    app.run(main, flags_parser=command_line.parse_flags)
