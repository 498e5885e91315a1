"""What one device computes and sends in a step, counted in the compiled program.

`python -m benchmarks.scaling --config=configs/cifar100.py --devices=8` compiles generator and
student step for emulated CPU devices, with XLA's convolutions as on GPU and TPU, and prints per
device: floating-point operations, bytes that instructions read and write (as if nothing stayed in a
cache), temporary memory, and the collectives in the HLO. Nothing is run.
"""

import os
import re
import sys

from absl import app, flags

from dfkd_jax import command_line
from dfkd_jax.command_line import CONFIG
from dfkd_jax.gradients_flag import chosen_gradients

DEVICES = flags.DEFINE_integer("devices", 8, "How many devices share the batch.")
_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


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


def main(arguments: list[str]) -> None:
    """Print one row per step."""
    del arguments
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES.value}"
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh

    from dfkd_jax import convolution, data_specs
    from dfkd_jax.devices import AXIS, Devices, mapped
    from dfkd_jax.models import create_models
    from dfkd_jax.replay import create_replay
    from dfkd_jax.state import layout_of
    from dfkd_jax.steps import create_steps

    convolution.on_cpu = lambda: False  # for GPU and TPU
    config, count = CONFIG.value, DEVICES.value
    spec = data_specs.spec(config)
    devices = Devices(Mesh(np.array(jax.devices()[:count]), (AXIS,)), "shard_map")
    axis = {"axis_name": devices.axis_name, "devices": count} if count > 1 else {}
    print(f"batch {config.batch_size} on {count} devices; each row is one step of one device")
    print("| step | GFLOP | GB accessed | temporary MiB | collectives |")
    print("|---|---:|---:|---:|---|")

    def row(name: str, variant: str, step_name: str) -> None:
        config.meta.variant = variant
        replay = create_replay(config, spec.image_shape, spec.num_classes, **axis)
        models = create_models(config, spec.image_shape, spec.num_classes, axis.get("axis_name"))
        steps = create_steps(config, models, replay, spec.image_shape, **axis)
        whole_replay = create_replay(config, spec.image_shape, spec.num_classes)
        whole = create_steps(config, models, whole_replay, spec.image_shape)
        state = jax.eval_shape(whole.init, jax.random.key(0))
        image = jnp.zeros((2, *spec.image_shape))
        teacher = jax.eval_shape(lambda: models.teacher.init(jax.random.key(0), image, train=False))
        step = mapped(devices, layout_of(replay and replay.layout)).step(getattr(steps, step_name))
        compiled = step.lower(state, teacher).compile()
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        sent = ", ".join(
            f"{n} {kind} of {size / 1e6:.2f} MB in all"
            for kind, (n, size) in collectives(compiled.as_text()).items()
        )
        print(
            f"| {name} | {cost['flops'] / 1e9:.0f} | {cost['bytes accessed'] / 1e9:.1f} "
            f"| {memory.temp_size_in_bytes / 2**20:.0f} | {sent or 'none'} |",
            flush=True,
        )

    row("generator", "none", "generator_step")
    for variant in chosen_gradients(default=("none", "first_order", "exact", "exact_hvp")):
        row(f"student, {variant}", variant, "student_step")


if __name__ == "__main__":
    sys.path.insert(0, ".")
    app.run(main, flags_parser=command_line.parse_flags)
