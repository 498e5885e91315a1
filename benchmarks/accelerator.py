"""What this project does on the accelerator that is here, in one command.

    python -m benchmarks.accelerator

It leaves `DEVICE.json` and `DEVICE.md` in `benchmarks/measured/`, written anew after each part, so
that a run that is cut off keeps what it has. The parts, what matters most first:

    digits         the whole digits run: seconds, accuracy
    agreement      a student's update by the device against the CPU's, in float32
    interruption   a run that was cut off and went on, against one that was not: bit by bit
    exact ... none a student step, an iteration and an epoch of `configs/cifar100.py` (B = 512,
                   random images and teacher), compiling, memory, share of the rate of a matrix
                   product; and where PyTorch and higher are installed the same step there, by turns
    loops          an epoch as one compiled call against an epoch of calls
    devices        with several: pmap and shard_map on 1, 2, 4 and 8

No part begins after `--minutes` (8). A part that fails is written down with its error, and the
others go on. `--options` measures XLA's options for GPUs instead, each in a process of its own.
The data set's, TensorBoard's and PyTorch's packages need not be installed.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

# PyTorch takes turns on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich.console import Console

from dfkd_jax.benchmark import LAYOUTS, STEP, Ratio, faster_layout, measure
from dfkd_jax.configs import cifar100, digits
from dfkd_jax.cost.measure import Program, product_rate
from dfkd_jax.cost.peer import SAME_VALUE, Peer, describe
from dfkd_jax.distillation import steps
from dfkd_jax.run import epochs, train
from dfkd_jax.run.gradients_flag import with_gradient
from dfkd_jax.run.setup import create_algorithm, create_parts, parse
from dfkd_jax.runtime import devices as devices_lib
from dfkd_jax.runtime import files
from dfkd_jax.runtime.devices import AXIS, MAPPINGS, WHOLE, Devices

PAPER_ITERATIONS = 72  # an epoch: 720 student steps
OPTIONS = {
    "as it is": "",
    "latency-hiding scheduler": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "no Triton for products": "--xla_gpu_enable_triton_gemm=false",
    "no autotuning": "--xla_gpu_autotune_level=0",
}
QUIET = Console(quiet=True)


class Sizes(NamedTuple):
    """How much is measured."""

    large: Callable[[], ml_collections.ConfigDict]  # whose steps are measured
    run: dict[str, Any]  # fields of the digits run
    step: dict[str, Any]  # fields of the large configuration
    iterations: int  # of an epoch that is measured, if it is not the paper's
    paper_iterations: int
    rounds: int
    product_side: int


FULL = Sizes(cifar100.get_config, {}, {}, 7, PAPER_ITERATIONS, 7, 8192)
TINY = Sizes(
    digits.get_config,
    {"epochs": 2, "iterations_per_epoch": 2, "teacher.epochs": 2},
    {
        "batch_size": 8,
        "teacher.model": "cnn_half",
        "student.steps": 2,
        "generator.channels": (8, 4),
        "replay.entry_size": 4,
    },
    1,
    2,
    2,
    256,
)


class Bench(NamedTuple):
    """What the parts share."""

    sizes: Sizes
    folder: Path  # where runs are kept meanwhile
    torch: bool = True  # whether PyTorch is measured too, where it is installed

    def digits(self, **fields: Any) -> ml_collections.ConfigDict:
        """The configuration of the digits, on one device."""
        config = digits.get_config()
        return _with(config, {**self.sizes.run, "parallel.devices": 1, **fields})

    def large(self, **fields: Any) -> ml_collections.ConfigDict:
        """The configuration of the paper's main table, on random images."""
        config = self.sizes.large()
        fields = {"meta.measure_alignment": False, **self.sizes.step, **fields}
        return _with(config, {"iterations_per_epoch": self.sizes.iterations, **fields})


def _with(config: ml_collections.ConfigDict, fields: dict[str, Any]) -> ml_collections.ConfigDict:
    config.update_from_flattened_dict(fields)
    return config


def whole_run(bench: Bench) -> dict[str, Any]:
    """The digits from nothing, teacher and figures included."""
    started = time.perf_counter()
    summary = train.run(bench.digits(), bench.folder / "digits", QUIET)
    seconds = time.perf_counter() - started
    keys = ("teacher_accuracy", "final_accuracy", "max_accuracy", "seconds_per_student_step")
    return {"seconds": seconds, **{key: summary[key] for key in keys}}


def agreement(bench: Bench) -> dict[str, Any]:
    """‖Δ − Δ_cpu‖ / ‖Δ_cpu‖ of a student's update Δ, with exact meta-gradients, from one state."""
    parts = create_parts(parse(bench.digits()))
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]

    def student(state: Any, teacher: Any) -> Any:
        return steps.student_step(parts, state, teacher)[0].student.params

    with jax.default_device(cpu):
        state = jax.jit(partial(steps.init, parts))(jax.random.key(1))
        image = jnp.zeros((2, *parts.image_shape))
        teacher = jax.jit(lambda key: parts.teacher.init(key, image, train=False))(
            jax.random.key(2)
        )
        for step in (steps.update_step, steps.student_step, steps.observe_step):
            state, _ = jax.jit(partial(step, parts))(state, teacher)

    def update(place: Any, precision: str) -> np.ndarray:
        with jax.default_matmul_precision(precision):
            after = jax.jit(student)(*jax.device_put((state, teacher), place))
        moved = jax.tree.map(
            lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64),
            jax.device_get(after),
            jax.device_get(state.student.params),
        )
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moved)])

    wanted = update(cpu, "float32")
    return {
        precision: float(
            np.linalg.norm(update(device, precision) - wanted) / np.linalg.norm(wanted)
        )
        for precision in ("float32", "default")
    }


class _Cut(Exception):
    pass


def interruption(bench: Bench) -> dict[str, Any]:
    """Two epochs in one piece, and the same cut off after the first and gone on with."""
    fields = {"epochs": 2, "iterations_per_epoch": 2, "teacher.epochs": 2}
    teacher = bench.folder / "uninterrupted" / "teacher"

    def run(folder: str, tell: Callable[[dict[str, Any], Any], None]) -> tuple[Any, Any]:
        given = {"teacher.checkpoint": str(teacher)} if teacher.exists() else {}
        setup = parse(bench.digits(**fields, **given))
        devices = devices_lib.choose(setup.config.parallel, setup.split_sizes)
        made = epochs.prepare(setup, devices, bench.folder / folder, QUIET, lambda: None)
        return train.in_folder(made, bench.folder / folder, epochs.starting(made), tell)

    def cut(record: dict[str, Any], state: Any) -> None:
        del record, state
        raise _Cut

    gone_on: list[int] = []  # the epochs after the cut

    def measured(history: Any) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in history]

    state, history = run("uninterrupted", lambda record, state: None)
    with suppress(_Cut):
        run("interrupted", cut)
    again, history_again = run("interrupted", lambda record, _: gone_on.append(record["epoch"]))
    return {
        "epochs": len(history),
        "epochs_after_the_cut": gone_on,
        "same_state": _same_bits(state, again),
        "same_metrics": measured(history) == measured(history_again),
    }


def _same_bits(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)

    def plain(leaf: Any) -> Any:
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    return all(plain(x).tobytes() == plain(y).tobytes() for x, y in pairs)


def variant(bench: Bench, name: str, *, peer: bool = True, **fields: Any) -> dict[str, Any]:
    """A student step, an iteration and an epoch with one way to take the gradient."""
    config = with_gradient(bench.large(**fields), name)
    program = Program(name, config)
    program.iteration()
    seconds = [program.student_step() for _ in range(bench.sizes.rounds)]
    iterations = [program.iteration() for _ in range(3)]
    rate = product_rate(side=bench.sizes.product_side, dtype=config.compute_dtype)
    rates = [rate() for _ in range(3)]
    first, epoch = program.epoch(), program.epoch()
    step, count = statistics.median(seconds), config.iterations_per_epoch
    found = {
        "seconds_per_student_step": step,
        "seconds_per_iteration": statistics.median(iterations),
        "iterations_of_the_epoch": count,
        "seconds_per_epoch": epoch,
        "seconds_per_paper_epoch": epoch * PAPER_ITERATIONS / count,
        "compile_seconds_of_the_steps": program.compile_seconds,
        "compile_seconds_of_the_epoch": first - epoch,
        "flops_per_student_step": program.flops,
        "temporary_bytes_per_student_step": program.temp_bytes,
        "product_flops_per_second": statistics.median(rates),
        "share_of_the_product_rate": program.flops / step / statistics.median(rates),
        "peak_bytes_of_the_process": devices_lib.peak_memory(),
    }
    if peer and bench.torch:
        found["torch"] = _against_torch(program, config, name, bench.sizes.rounds)
    return found


def _against_torch(
    program: Program, config: ml_collections.ConfigDict, name: str, rounds: int
) -> dict[str, Any] | str:
    """Student steps by turns with PyTorch in both layouts; against the faster one."""
    missing = [package for package in ("torch", "higher") if not util.find_spec(package)]
    if missing:
        return f"not measured: {' and '.join(missing)} missing"
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    rate = product_rate()
    with ExitStack() as closing:
        peers = {}
        for layout in LAYOUTS:
            last = layout == "channels_last"
            work = describe(config, name, threads, channels_last=last, device=device)
            peers[layout] = closing.enter_context(Peer("torch", work))
        times, _ = measure([program, *peers.values()], rounds, steps_only=True, rate=rate)
    layout, theirs = faster_layout({layout: times[peer] for layout, peer in peers.items()})
    return {
        "gradient": SAME_VALUE[name],
        "layout": layout,
        STEP: statistics.median(theirs[STEP]),
        "times_faster": list(Ratio.of(theirs[STEP], times[program][STEP])),
    }


def loops(bench: Bench) -> dict[str, Any]:
    """Seconds of the same epoch, compiled whole and step by step."""
    found = {}
    for loop in ("scan", "step"):
        program = Program(loop, with_gradient(bench.large(loop=loop), "exact"))
        program.epoch()
        found[f"{loop}_seconds"] = min(program.epoch() for _ in range(2))
    return {**found, "step_over_scan": found["step_seconds"] / found["scan_seconds"]}


def several(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of an epoch of the same global batch over more and more devices."""
    counts = [count for count in (2, 4, 8) if count <= jax.device_count()]
    alone = _epoch_on(bench, 1, MAPPINGS[0])
    found: list[dict[str, Any]] = [{"devices": 1, "seconds_per_epoch": alone}]
    for mapping, count in itertools.product(MAPPINGS, counts):
        seconds = _epoch_on(bench, count, mapping)
        found.append({"mapping": mapping, "devices": count, "seconds_per_epoch": seconds})
        found[-1]["times_faster_than_one"] = alone / seconds
    return found


def _epoch_on(bench: Bench, count: int, mapping: str) -> float:
    """Seconds of an epoch with exact meta-gradients on so many devices."""
    setup = parse(with_gradient(bench.large(), "exact"), reads_data=False)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), (AXIS,))
    devices = Devices(mesh, mapping)
    algorithm = create_algorithm(setup, devices)
    parts = algorithm.parts
    image = jnp.zeros((2, *parts.image_shape))
    start = jax.jit(
        lambda key: parts.teacher.init(key, image, train=False),
        out_shardings=devices.shardings(WHOLE),
    )
    state, teacher = algorithm.init(1), start(jax.random.key(0))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        state, metrics = algorithm.epoch(state, teacher)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def options(bench: Bench) -> dict[str, Any]:
    """The exact step under XLA's options for GPUs, each in a process of its own."""
    found = {}
    for name, flag in OPTIONS.items():
        folder = bench.folder / re.sub(r"\W+", "_", name)
        command = [sys.executable, "-m", "benchmarks.accelerator", "--only=exact", "--no-torch"]
        command += [f"--output={folder}", *(["--tiny"] if bench.sizes is TINY else [])]
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()  # a blank is taken for a file
        environment = {**os.environ, "XLA_FLAGS": flags}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        reports = list(folder.glob("*.json"))
        if ended.returncode or not reports:
            found[name] = {"flag": flag, "failed": (ended.stderr.strip().splitlines() or [""])[-1]}
            continue
        exact = json.loads(reports[0].read_text())["parts"]["exact"]
        keys = ("seconds_per_student_step", "seconds_per_epoch", "compile_seconds_of_the_epoch")
        found[name] = {"flag": flag, **{key: exact[key] for key in keys}}
        print(name, found[name], flush=True)
    return found


def machine() -> dict[str, Any]:
    """Device and versions."""
    device = jax.devices()[0]
    installed = {}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch"):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = None
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "device_memory_bytes": devices_lib.memory_bytes(),
        "platform_version": device.client.platform_version,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": installed,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


PARTS: dict[str, Callable[[Bench], Any]] = {
    "digits": whole_run,
    "agreement": agreement,
    "interruption": interruption,
    "exact": lambda bench: variant(
        bench, "exact", iterations_per_epoch=bench.sizes.paper_iterations
    ),
    "first_order": lambda bench: variant(bench, "first_order"),
    "exact_hvp": lambda bench: variant(bench, "exact_hvp"),
    "bfloat16": lambda bench: variant(bench, "exact", peer=False, compute_dtype="bfloat16"),
    "none": lambda bench: variant(bench, "none"),
    "loops": loops,
    "devices": several,
}
VARIANTS = ("exact", "exact_hvp", "first_order", "none", "bfloat16")


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    here, parts = report["machine"], report["parts"]
    versions = ", ".join(f"{name} {v}" for name, v in here["versions"].items() if v)
    lines = [
        f"# {here['device']}",
        "",
        f"{here['devices']} × {here['device']} ({here['device_memory_bytes'] / 2**30:.0f} GiB), "
        f"{here['cores']} cores, Python {here['python']}, {versions}. "
        f"`{report['command']}`, {report['seconds']:.0f} s in all.",
        "",
    ]
    rows = [(name, parts[name]) for name in VARIANTS if "failed" not in parts.get(name, "failed")]
    if rows:
        head = ["gradient", "student step", "paper epoch", "compiling an epoch", "temporary"]
        head += ["of the product's rate", "× faster than PyTorch"]
        lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
        lines += [_row(name, found) for name, found in rows] + [""]
    for name in ("digits", "agreement", "interruption", "loops", "devices", "options"):
        if name in parts and "failed" not in parts[name]:
            lines += [f"{name}: {_words(parts[name])}", ""]
    for name, found in parts.items():
        if "failed" in found:
            lines += [f"{name} failed: {found['failed']}", ""]
    if report["not_measured"]:
        lines += [f"Not measured: {', '.join(report['not_measured'])}.", ""]
    return "\n".join(lines)


def _row(name: str, found: dict[str, Any]) -> str:
    torch = found.get("torch")
    faster = "–"
    if isinstance(torch, dict):
        faster = str(Ratio(*torch["times_faster"]))
    cells = [
        name,
        f"{1e3 * found['seconds_per_student_step']:.3g} ms",
        f"{found['seconds_per_paper_epoch']:.3g} s",
        f"{found['compile_seconds_of_the_epoch']:.3g} s",
        f"{found['temporary_bytes_per_student_step'] / 2**30:.3g} GiB",
        f"{100 * found['share_of_the_product_rate']:.0f} %",
        faster,
    ]
    return "| " + " | ".join(cells) + " |"


def _words(found: Any) -> str:
    if isinstance(found, list):
        return "; ".join(map(_words, found))
    if not isinstance(found, dict):
        return f"{found:.4g}" if isinstance(found, float) else str(found)
    return ", ".join(f"{key.replace('_', ' ')} {_words(value)}" for key, value in found.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the two files; 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description="What this project does on the accelerator that is here."
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/measured"), help="Folder.")
    parser.add_argument("--minutes", type=float, default=8, help="No part begins after so many.")
    parser.add_argument("--only", choices=PARTS, action="append", help="This part; repeatable.")
    parser.add_argument("--options", action="store_true", help="Try XLA's options for GPUs.")
    parser.add_argument("--no-torch", action="store_true", help="Leave PyTorch out.")
    parser.add_argument("--tiny", action="store_true", help="Sizes of a test.")
    chosen = parser.parse_args(arguments)
    started = time.perf_counter()
    report: dict[str, Any] = {
        "machine": machine(),
        "command": "python -m benchmarks.accelerator " + " ".join(arguments or sys.argv[1:]),
        "parts": {},
        "not_measured": [],
    }
    name = re.sub(r"\W+", "-", report["machine"]["device"].lower()).strip("-")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(TINY if chosen.tiny else FULL, Path(folder), not chosen.no_torch)
        parts = dict(PARTS)
        if jax.device_count() == 1:
            del parts["devices"]
        if chosen.only:
            parts = {part: parts[part] for part in chosen.only if part in parts}
        if chosen.options:
            name += "-options"
            parts = {"options": options}
        for part, measure in parts.items():
            if time.perf_counter() - started > 60 * chosen.minutes:
                report["not_measured"].append(part)
                continue
            try:
                report["parts"][part] = measure(bench)
            except Exception as error:  # whatever it is, the other parts are worth having
                said = (str(error).strip().splitlines() or [""])[0]
                report["parts"][part] = {"failed": f"{type(error).__name__}: {said}"}
            report["seconds"] = time.perf_counter() - started
            print(
                f"{report['seconds']:5.0f} s  {part}: {_words(report['parts'][part])}", flush=True
            )
            jax.clear_caches()
            _write(report, chosen.output, name)
        report["seconds"] = time.perf_counter() - started
        _write(report, chosen.output, name)
    return int(any("failed" in found for found in report["parts"].values()))


def _write(report: dict[str, Any], output: Path, name: str) -> None:
    files.write_json(output / f"{name}.json", report)
    with files.replacing(output / f"{name}.md") as file:
        file.write(markdown(report).encode())


if __name__ == "__main__":
    sys.exit(main())
