"""Command line: what a step costs, for each way to take the gradient, and against a peer.

`python -m dfkd_jax.benchmark --config=configs/mnist.py --gradients=none,first_order,exact` prints a
table and one JSON line per variant; with --workdir the lines are kept. All candidates take turns,
round by round, so that what else the machine does meets all of them. No data set is needed.
"""

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from dfkd_jax.cost import growth, operations
from dfkd_jax.cost.measure import CLOCKS, Program, epochs_and_steps, product_rate
from dfkd_jax.cost.peer import PEERS, SAME_VALUE, Peer, describe
from dfkd_jax.distillation.meta import VARIANTS
from dfkd_jax.run import command_line
from dfkd_jax.run.command_line import CONFIG, WORKDIR, fail
from dfkd_jax.run.gradients_flag import chosen_gradients, with_gradient
from dfkd_jax.run.setup import parse
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.host_memory import keep_freed_memory

ALL_GRADIENTS = ("none", "first_order", "exact", "exact_hvp")
ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each is measured, by turns.")
STEPS_ONLY = flags.DEFINE_boolean("steps_only", False, "Student steps alone, no iterations.")
PEER = flags.DEFINE_enum("peer", None, list(PEERS), "Compare with the same in this framework.")
THREADS = flags.DEFINE_integer("threads", 2, "Processor cores that each may use, on CPU.")
CLOCK = flags.DEFINE_enum(
    "clock",
    "wall",
    list(CLOCKS),
    "Seconds by the clock, or of processor time (with --threads=1, on a machine that is busy).",
)
EPOCH = flags.DEFINE_boolean(
    "epoch", False, "A whole epoch against its iterations one by one, of the first of --gradients."
)
OPERATIONS = flags.DEFINE_boolean(
    "operations", False, "Time of a student step by kind of operation, of the first of --gradients."
)
GROWTH = flags.DEFINE_boolean(
    "growth", False, "How cost grows, of the first of --gradients, into --workdir."
)
flags.adopt_module_key_flags(command_line)  # --help shows them

LAYOUTS = ("channels_first", "channels_last")  # of the peer, which is taken in its faster one
STEP, ITERATION = "seconds_per_student_step", "seconds_per_iteration"


class Ratio(NamedTuple):
    """A ratio of times over rounds: its median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        """Of the ratios round by round, at least two rounds."""
        pairs = zip(numerators, denominators, strict=True)
        return cls(*statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def measure(
    candidates: Sequence[Any], rounds: int, steps_only: bool, rate: Callable[[], float]
) -> tuple[dict[Any, dict[str, list[float]]], float]:
    """Seconds of each candidate in each round, and the median rate of a matrix product.

    Every candidate warms up once. A round then takes one student step and one iteration (unless
    `steps_only`) of each, in the order given, and one matrix product after each.
    """
    for candidate in candidates:
        candidate.student_step() if steps_only else candidate.iteration()
    times: dict[Any, dict[str, list[float]]] = {c: {STEP: [], ITERATION: []} for c in candidates}
    rates = []
    for _ in range(rounds):
        for candidate in candidates:
            times[candidate][STEP].append(candidate.student_step())
            if not steps_only:
                times[candidate][ITERATION].append(candidate.iteration())
            rates.append(rate())
    return times, statistics.median(rates)


def record(program: Program, times: dict[str, list[float]], rate: float) -> dict[str, Any]:
    """What is reported of a variant; times in seconds, medians over the rounds."""
    step = statistics.median(times[STEP])
    return {
        "variant": program.name,
        STEP: step,
        ITERATION: statistics.median(times[ITERATION]) if times[ITERATION] else None,
        "compile_seconds": program.compile_seconds,
        "flops": program.flops,
        "temp_bytes": program.temp_bytes,
        "fraction_of_peak": program.flops / step / rate,
    }


def benchmark(
    config: ml_collections.ConfigDict,
    gradients: Sequence[str],
    rounds: int,
    *,
    steps_only: bool = False,
    peer: str | None = None,
    threads: int = 2,
    clock: str = "wall",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure the variants, and the peer's gradients of the same value.

    Returns:
      One record per variant, and one per comparison with the peer in its faster layout of memory:
      `variant`, `peer`, `peer_layout`, the peer's times, and by how much the variant is faster, as
      [quartile, median, quartile] over the rounds.

    Raises:
      UserError: a peer cannot be started, or does not do what is asked.
    """

    with ExitStack() as closing:
        peers = {}
        for variant, layout in product(gradients if peer else (), LAYOUTS):
            own, last = with_gradient(config, variant), layout == "channels_last"
            description = describe(own, variant, threads, clock, channels_last=last)
            key = description["variant"], layout
            if peer and key not in peers:
                peers[key] = closing.enter_context(Peer(peer, description))
        now = CLOCKS[clock]
        programs = [Program(variant, with_gradient(config, variant), now) for variant in gradients]
        candidates = [*programs, *peers.values()]
        times, rate = measure(candidates, rounds, steps_only, product_rate(now))
    records = [record(program, times[program], rate) for program in programs]
    comparisons = []
    for program in programs if peer else ():
        layout, other = faster_layout(
            {layout: times[peers[SAME_VALUE[program.name], layout]] for layout in LAYOUTS}
        )
        compared: dict[str, Any] = {"variant": program.name, "peer": peer, "peer_layout": layout}
        for key in (STEP, ITERATION):
            if other[key]:
                compared[f"peer_{key}"] = statistics.median(other[key])
                compared[f"times_faster_{key.removeprefix('seconds_per_')}"] = list(
                    Ratio.of(other[key], times[program][key])
                )
        comparisons.append(compared)
    return records, comparisons


def faster_layout(
    times: dict[str, dict[str, list[float]]],
) -> tuple[str, dict[str, list[float]]]:
    """The layout in which the peer's steps took less time, and its times."""
    layout = min(times, key=lambda layout: statistics.median(times[layout][STEP]))
    return layout, times[layout]


def epoch_over_steps(
    config: ml_collections.ConfigDict, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """What an epoch takes beyond its steps: medians in seconds and the quartiles of the ratio."""
    program = Program(config.meta.variant, config, clock)
    epochs, steps = epochs_and_steps(program, rounds)
    return {
        "variant": program.name,
        "seconds_per_epoch": statistics.median(epochs),
        "seconds_of_its_steps": statistics.median(steps),
        "epoch_over_its_steps": list(Ratio.of(epochs, steps)),
    }


def table(records: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> Table:
    """The records for a reader."""
    shown = Table(box=None, header_style="bold")
    columns = ["variant", "step", "iteration", "compile", "GFLOP", "temporary", "of peak"]
    faster = {c["variant"]: c for c in comparisons}
    if faster:
        columns += ["peer's step", "step: × faster", "peer's iteration", "iteration: × faster"]
    for column in columns:
        shown.add_column(column, justify="left" if column == "variant" else "right")

    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.3g} s"

    for r in records:
        row = [
            r["variant"],
            seconds(r[STEP]),
            seconds(r[ITERATION]),
            seconds(r["compile_seconds"]),
            f"{r['flops'] / 1e9:.3g}",
            f"{r['temp_bytes'] / 2**20:.4g} MiB",
            f"{100 * r['fraction_of_peak']:.0f} %",
        ]
        other = faster.get(r["variant"], {})
        for key in (STEP, ITERATION) if faster else ():
            ratio = other.get(f"times_faster_{key.removeprefix('seconds_per_')}")
            row += [seconds(other.get(f"peer_{key}")), str(Ratio(*ratio)) if ratio else ""]
        shown.add_row(*row)
    return shown


def main(arguments: Sequence[str]) -> int | None:
    """Run what the flags ask for; the exit code."""
    del arguments
    logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    try:
        variants = chosen_gradients(default=ALL_GRADIENTS)
        config = _checked(variants)
        if hasattr(os, "sched_setaffinity"):  # of both: the peer inherits it
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: THREADS.value])
        if EPOCH.value or OPERATIONS.value or GROWTH.value:
            config = with_gradient(config, variants[0])
        if EPOCH.value:
            _write([epoch_over_steps(config, ROUNDS.value, CLOCKS[CLOCK.value])], "epoch.jsonl")
            return None
        if OPERATIONS.value:
            program = Program(variants[0], config)
            for name, seconds in operations.seconds_by_kind(program).items():
                print(f"{name:20} {1e3 * seconds:8.1f} ms")
            print(f"{'the step':20} {1e3 * program.student_step():8.1f} ms")
            return None
        if GROWTH.value:
            grown = growth.growth(config, ROUNDS.value)
            _write(grown, "growth.jsonl")
            growth.draw(grown, Path(WORKDIR.value or ".") / "growth.png")
            return None
        records, comparisons = benchmark(
            config,
            variants,
            ROUNDS.value,
            steps_only=STEPS_ONLY.value,
            peer=PEER.value,
            threads=THREADS.value,
            clock=CLOCK.value,
        )
        Console(width=200).print(table(records, comparisons))
        load = os.getloadavg()[0]
        print(f"{platform.processor() or platform.machine()}, load {load:.1f}, {CLOCK.value} clock")
        _write([*records, *comparisons], "benchmark.jsonl")
    except UserError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(str(error), 1)
    return None


def _write(records: Sequence[dict[str, Any]], name: str) -> None:
    """Print the records, one a line, and keep them in --workdir."""
    lines = "".join(json.dumps(r) + "\n" for r in records)
    print(lines, end="")
    if WORKDIR.value is not None:
        with files.replacing(Path(WORKDIR.value) / name) as file:
            file.write(lines.encode())


def _checked(variants: Sequence[str]) -> ml_collections.ConfigDict:
    if ROUNDS.value < 2:
        raise UserError(f"--rounds is {ROUNDS.value}; allowed is 2 or more.")
    if GROWTH.value and WORKDIR.value is None:
        raise UserError("--workdir is missing; --growth needs a folder for its figure.")
    if THREADS.value < 1:
        raise UserError(f"--threads is {THREADS.value}; allowed is 1 or more.")
    if OPERATIONS.value and jax.default_backend() != "cpu":
        raise UserError(f"--operations is on with {jax.default_backend()}; allowed on cpu only.")
    wrong = [name for name in variants if name not in VARIANTS]
    if wrong or not variants:
        given = repr(wrong[0]) if wrong else "empty"
        raise UserError(f"--gradients is {given}; allowed are {', '.join(VARIANTS)}.")
    parse(CONFIG.value, reads_data=False)
    return CONFIG.value


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
