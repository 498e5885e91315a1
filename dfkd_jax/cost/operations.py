"""Where the time of a student step goes, by kind of operation, on a CPU.

For `python -m dfkd_jax.benchmark --operations`: JAX's profiler says how long each instruction of
the compiled program ran, and the program's text what it was.
"""

import collections
import re
import tempfile
from pathlib import Path

import jax

from dfkd_jax.cost.measure import Program

_STEPS = 3  # profiled, after one that warms up

# An instruction of the program's text: its name and opcode; and the computation of a fusion.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?\s([a-z][a-z0-9-]*)\(", re.MULTILINE)
_CUSTOM_FUSION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.-]+) = .*kind=kCustom, calls=%([\w.-]+)", re.MULTILINE
)
_KINDS = {
    "convolution": "convolutions",
    "dot": "matrix products",
    "copy": "copies",
    "transpose": "copies",
    "concatenate": "copies",
    "pad": "copies",
    "slice": "copies",
    "fusion": "elementwise and sums",
    "reduce": "elementwise and sums",
    "reduce-window": "elementwise and sums",
}
_MOVES = re.compile(r"(copy|transpose|pad|slice|concatenate|bitcast|_)+fusion")
_CONTAINERS = {"while", "call", "conditional"}  # whose instructions are counted themselves


def opcodes_of(text: str) -> dict[str, str]:
    """The opcode of every instruction of a compiled program, by its name.

    A fusion that XLA hands to a library as a convolution or a product counts as that.
    """
    opcodes = dict(_INSTRUCTION.findall(text))
    bodies = dict(re.findall(r"^%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    for name, body in _CUSTOM_FUSION.findall(text):
        inside = {opcode for _, opcode in _INSTRUCTION.findall(bodies.get(body, ""))}
        opcodes[name] = next((o for o in ("convolution", "dot") if o in inside), "fusion")
    return opcodes


def kind(name: str, opcode: str) -> str | None:
    """The kind of an instruction, by which it is reported; None for one that contains others."""
    if opcode in _CONTAINERS:
        return None
    if opcode == "fusion" and _MOVES.match(name):
        return "copies"
    return _KINDS.get(opcode, "others")


def seconds_by_kind(program: Program) -> dict[str, float]:
    """Seconds of all threads in a student step by kind of operation, the largest first.

    An instruction that several threads share is counted by the time of the one that runs it.
    """
    opcodes = opcodes_of(program.text)
    program.student_step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_STEPS):
                program.student_step()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        seconds: collections.Counter[str] = collections.Counter()
        for plane in planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name not in opcodes:
                        continue
                    if own := kind(event.name, opcodes[event.name]):
                        seconds[own] += event.duration_ns / 1e9 / _STEPS
    return dict(seconds.most_common())
