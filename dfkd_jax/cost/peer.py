"""A peer to measure against: the same iteration in another framework, in a process of its own.

The peer idles while it is not asked, so that the two can take turns. Its source is beside this
file.
"""

import json
import subprocess
import sys
import tempfile
from typing import Any

import ml_collections

from dfkd_jax.configs import default
from dfkd_jax.data import data_specs
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import get

PEERS = {"torch": "dfkd_jax.cost.torch_peer"}
SAME_VALUE = {
    "exact": "exact",
    "exact_hvp": "exact",
    "first_order": "first_order",
    "none": "none",
}
"""The peer's gradient that has the value of ours."""


def describe(
    config: ml_collections.ConfigDict,
    variant: str,
    threads: int,
    clock: str = "wall",
    *,
    channels_last: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """The work of one configuration, as the peer reads it.

    Args:
      config: of the run.
      variant: config.meta.variant in its place.
      threads: how many the peer may use.
      clock: a key of `dfkd_jax.cost.measure.CLOCKS`.
      channels_last: whether the peer keeps images and kernels in that layout of memory.
      device: as the peer names it, such as cuda.

    Raises:
      UserError: the peer does not do what the configuration asks for.
    """
    needed = {
        "student.optimizer": "sgd",
        "generator.final_learning_rate": None,
        "replay.kind": "memory_bank",
        "retention_weight": 1.0,
        "generator.student_mode": "train",
        "meta.inner_weight_decay": 0.0,
        "meta.measure_alignment": False,
        "loss.distance": "l1",
        "loss.batch_norm": 0.0,
        "compute_dtype": "float32",
    }
    for field, value in needed.items():
        if field not in default.fields(config.method):
            raise UserError(
                f"The method {config.method!r} has no field config.{field}; the peer of --peer has "
                "methods with one generator only."
            )
        given = get(config, field)
        if given != value:
            raise UserError(f"config.{field} is {given!r}; the peer of --peer only has {value!r}.")
    if variant not in SAME_VALUE:
        raise UserError(
            f"--gradients has {variant!r}; the peer of --peer only has {', '.join(SAME_VALUE)}."
        )
    if config.loss.adversarial_form not in ("js", "l1"):
        raise UserError(
            f"config.loss.adversarial_form is {config.loss.adversarial_form!r}; the peer of --peer "
            "only has 'js' and 'l1'."
        )
    spec = data_specs.spec(config)
    return {
        "variant": SAME_VALUE[variant],
        "threads": threads,
        "clock": clock,
        "channels_last": channels_last,
        "device": device,
        "tf32": config.matmul_precision in ("default", "tensorfloat32"),
        "image_shape": spec.image_shape,
        "num_classes": spec.num_classes,
        "batch_size": config.batch_size,
        "teacher": config.teacher.model,
        "student": config.student.model,
        "student_learning_rate": config.student.learning_rate,
        "momentum": config.student.momentum,
        "weight_decay": config.student.weight_decay,
        "student_steps": config.student.steps,
        "latent_dim": config.generator.latent_dim,
        "channels": list(config.generator.channels),
        "spectral_norm": config.generator.spectral_norm,
        "generator_learning_rate": config.generator.learning_rate,
        "generator_steps": config.generator.steps,
        "one_hot": config.loss.one_hot,
        "information_entropy": config.loss.information_entropy,
        "activation": config.loss.activation,
        "adversarial": config.loss.adversarial,
        "adversarial_form": config.loss.adversarial_form,
        "temperature": config.loss.adversarial_temperature,
        "inner_lr": config.meta.inner_lr,
        "inner_steps": config.meta.inner_steps,
        "capacity": config.replay.capacity,
        "entry_size": config.replay.entry_size,
        "mix": config.replay.mix,
    }


class Peer:
    """A running peer; `close` it, or use it as a context."""

    def __init__(self, name: str, description: dict[str, Any]) -> None:
        """Start it.

        Args:
          name: a key of `PEERS`.
          description: as from `describe`.

        Raises:
          UserError: it cannot be started.
        """
        self.variant = description["variant"]
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads could fill up
        self._process = subprocess.Popen(
            [sys.executable, "-m", PEERS[name]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self._ask(json.dumps(description))
        except BaseException:
            self.close()
            raise

    def student_step(self) -> float:
        """Let it take a student step; the seconds by its own clock."""
        return self._ask("student_step")["seconds"]

    def iteration(self) -> float:
        """Let it do one iteration; the seconds by its own clock."""
        return self._ask("iteration")["seconds"]

    def _ask(self, line: str) -> dict[str, Any]:
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # what it said before it ended follows
        assert self._process.stdout  # a pipe
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["nothing"]
            raise UserError(
                f"The peer of --peer ended; it needs torch and higher, and said: {said[-1]}"
            )
        return json.loads(answer)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
