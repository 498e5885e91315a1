"""What a step costs: time by the clock, work and memory by the compiler.

A `Program` is the compiled steps of one configuration with a state to run them on. The teacher is
untrained and the memory empty: neither changes what is computed.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dfkd_jax.distillation import steps
from dfkd_jax.distillation.epoch import create_epoch, observes_after
from dfkd_jax.distillation.state import layout_of
from dfkd_jax.run.setup import create_parts, parse
from dfkd_jax.runtime.devices import WHOLE, Devices, mapped

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PRODUCT_SIDE = 2048  # of the matrices whose product measures the machine


class Program:
    """The steps of one configuration, compiled for the default device.

    Attributes:
      name: for tables.
      clock: seconds so far; `time.process_time` counts the processor time of all threads.
      compile_seconds: of the generator, student and observe step together.
      flops: floating-point operations of a student step, as XLA counts them.
      temp_bytes: temporary memory of a student step, beside state and teacher.
    """

    def __init__(
        self,
        name: str,
        config: ml_collections.ConfigDict,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self.clock = clock
        self.config = config
        parts = create_parts(parse(config, reads_data=False))
        device = Devices.first()
        init = jax.jit(partial(steps.init, parts), out_shardings=device.shardings(WHOLE))
        self._state = init(jax.random.key(config.seed))
        images = jnp.zeros((2, *parts.image_shape))
        self._teacher = jax.jit(lambda key: parts.teacher.init(key, images, train=False))(
            jax.random.key(config.teacher.seed)
        )
        self._observes_after = observes_after(parts)
        layout, self._plan = layout_of(parts.method), parts.method.plan
        self._epoch = create_epoch(config.loop, parts, parts, mapped(device, (layout, WHOLE)))

        def compiled(step: Callable[..., Any]) -> Any:
            with jax.default_matmul_precision(config.matmul_precision):
                program = jax.jit(partial(step, parts), donate_argnums=0)
                return program.lower(self._state, self._teacher).compile()

        started = time.perf_counter()
        self._update_step, self._student_step = map(
            compiled, (steps.update_step, steps.student_step)
        )
        replay = parts.method.replay
        self._observe_step = compiled(steps.observe_step) if any(self._observes_after) else None
        self._observe_round = compiled(steps.observe_round_step) if replay.observes_rounds else None
        self.compile_seconds = time.perf_counter() - started
        self.flops, self.temp_bytes = cost(self._student_step)

    @property
    def text(self) -> str:
        """The compiled student step, as XLA writes it."""
        return self._student_step.as_text()

    def student_step(self) -> float:
        """Take one student step; its seconds."""
        return self._timed(lambda: self._run(self._student_step))

    def iteration(self) -> float:
        """Generator steps, student steps and what the replay observes among them; the seconds."""

        def work() -> None:
            for _ in range(self._plan.rounds * self._plan.updates):
                self._run(self._update_step)
            if self._observe_round:
                self._run(self._observe_round)
            for observes in self._observes_after:
                self._run(self._student_step)
                if observes and self._observe_step:
                    self._run(self._observe_step)

        return self._timed(work)

    def epoch(self) -> float:
        """Run an epoch as `dfkd_jax.main` does and read its metrics; the seconds."""

        def work() -> None:
            self._state, metrics = self._epoch(self._state, self._teacher)
            jax.device_get(metrics)

        return self._timed(work)

    def _run(self, step: Callable[[Any, Any], Any]) -> None:
        self._state, _ = step(self._state, self._teacher)

    def _timed(self, work: Callable[[], None]) -> float:
        started = self.clock()
        work()
        jax.block_until_ready(self._state)
        return self.clock() - started


def epochs_and_steps(program: Program, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of an epoch and of its iterations, awaited one by one, in each round."""
    program.epoch()
    epochs, steps = [], []
    for _ in range(rounds):
        epochs.append(program.epoch())
        iterations = range(program.config.iterations_per_epoch)
        steps.append(sum(program.iteration() for _ in iterations))
    return epochs, steps


def cost(compiled: Any) -> tuple[float, int]:
    """(floating-point operations, temporary bytes) of a compiled function, as XLA counts them.

    Neither depends on the speed of the machine. A loop's body is counted once.
    """
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def product_rate(
    clock: Callable[[], float] = time.perf_counter,
    *,
    side: int = PRODUCT_SIDE,
    dtype: str = "float32",
) -> Callable[[], float]:
    """A function that measures the floating-point operations a second of a matrix product.

    Args:
      clock: seconds so far.
      side: of the square matrices.
      dtype: of their entries.
    """
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()

    def measure() -> float:
        started = clock()
        product(matrix, matrix).block_until_ready()
        return 2 * side**3 / (clock() - started)

    return measure
