"""How the cost of a step grows with batch, width, bank, kd_iter and inner steps.

For `python -m dfkd_jax.benchmark --growth`: the values in the configuration are the base, and one
field at a time is changed.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from matplotlib.figure import Figure

from dfkd_jax.cost.measure import Program
from dfkd_jax.run.figures import BLUE, GREEN, ORANGE
from dfkd_jax.runtime.files import replacing

_FACTORS = (0.5, 1, 2)

# What is changed: the axis, the values for a configuration, and how one is set.
Sweep = tuple[str, Callable[[Any], Sequence[int]], Callable[[Any, int], None]]


def _set_batch(config: ml_collections.ConfigDict, value: int) -> None:
    config.replay.entry_size = max(2, config.replay.entry_size * value // config.batch_size)
    config.batch_size = value


def _set_width(config: ml_collections.ConfigDict, value: int) -> None:
    wide, narrow = config.generator.channels
    config.generator.channels = (value, max(1, narrow * value // wide))


def _scaled(base: int) -> list[int]:
    return [max(2, int(factor * base)) for factor in _FACTORS]


SWEEPS: dict[str, Sweep] = {
    "batch_size": ("batch size", lambda c: _scaled(c.batch_size), _set_batch),
    "width": ("generator's channels", lambda c: _scaled(c.generator.channels[0]), _set_width),
    "capacity": (
        "memory bank, entries",
        lambda c: (c.replay.capacity, 4 * c.replay.capacity, 16 * c.replay.capacity),
        lambda c, value: c.replay.update({"capacity": value}),
    ),
    "kd_iter": (
        "student steps an iteration",
        lambda c: (1, 5, 10),
        lambda c, value: c.student.update({"steps": value}),
    ),
    "inner_steps": (
        "inner steps",
        lambda c: (1, 5, 10),
        lambda c, value: c.meta.update({"inner_steps": value}),
    ),
    "inner_steps_again": (
        "inner steps, computed again",
        lambda c: (1, 5, 10),
        lambda c, value: c.meta.update({"inner_steps": value, "remat": True}),
    ),
}


def growth(config: ml_collections.ConfigDict, rounds: int) -> list[dict[str, Any]]:
    """Measure every sweep, its values by turns.

    Returns:
      One record per sweep and value: `sweep`, `value`, `seconds_per_student_step`,
      `seconds_per_iteration`, `compile_seconds`, `flops`, `temp_bytes`.
    """
    records = []
    for name, (_, values_of, change) in SWEEPS.items():
        programs = {}
        for value in values_of(config):
            own = config.copy_and_resolve_references()
            change(own, value)
            programs[value] = Program(name, own)
        times = {value: ([], []) for value in programs}
        for program in programs.values():
            program.iteration()
        for _ in range(rounds):
            for value, program in programs.items():
                times[value][0].append(program.student_step())
                times[value][1].append(program.iteration())
        for value, program in programs.items():
            step, iteration = map(statistics.median, times[value])
            records.append(
                {
                    "sweep": name,
                    "value": value,
                    "seconds_per_student_step": step,
                    "seconds_per_iteration": iteration,
                    "compile_seconds": program.compile_seconds,
                    "flops": program.flops,
                    "temp_bytes": program.temp_bytes,
                }
            )
    return records


def draw(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A column per sweep: time of a step, or of an iteration over kd_iter, and memory or compiling.

    Args:
      records: as from `growth`.
      path: the file, replaced atomically; PNG.
    """
    figure = Figure(figsize=(3 * len(SWEEPS), 5), layout="constrained")
    panels = figure.subplots(2, len(SWEEPS), squeeze=False)
    for column, (name, (label, _, _)) in enumerate(SWEEPS.items()):
        own = sorted((r for r in records if r["sweep"] == name), key=lambda r: r["value"])
        values = [r["value"] for r in own]
        over_iterations = name == "kd_iter"
        upper, lower = panels[0, column], panels[1, column]
        key, what = (
            ("seconds_per_iteration", "iteration")
            if over_iterations
            else ("seconds_per_student_step", "student step")
        )
        upper.plot(values, [1e3 * r[key] for r in own], "o-", color=BLUE)
        upper.set_title(what, fontsize=9)
        upper.set_ylabel("milliseconds")
        if over_iterations:
            lower.plot(values, [r["compile_seconds"] for r in own], "o-", color=GREEN)
            lower.set_title("compiling", fontsize=9)
            lower.set_ylabel("seconds")
        else:
            lower.plot(values, [r["temp_bytes"] / 2**20 for r in own], "o-", color=ORANGE)
            lower.set_title("temporary memory of a student step", fontsize=9)
            lower.set_ylabel("MiB")
        for axes in (upper, lower):
            axes.set_xlabel(label)
            axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
            axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
