"""Several processes of one run: starting together, deciding together, and who writes.

Every process runs the same program on the same folder and takes every decision alike; process 0
alone writes metrics and figures and reports. A process that dies takes the others with it: their
collectives fail, or the coordinator in process 0 misses its heartbeat.
"""

import faulthandler
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from dfkd_jax.runtime.errors import UserError

HEARTBEAT_SECONDS = 30  # after so long without a sign of life a process counts as dead
START_SECONDS = 300  # how long to wait for the others at the start


class LostProcess(Exception):
    """Another process of the run has died."""


def start(
    distributed: str, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Join the other processes of the run, before anything else uses JAX.

    Args:
      distributed: "off": this is the only process. "cluster": all is found in the environment (TPU
        pod, SLURM, Open MPI, Kubernetes). "auto": by the coordinator if one is given, else off.
      coordinator: HOST:PORT of process 0, the same for all.
      num_processes: how many.
      process_id: which of them this is, from 0.

    Raises:
      UserError: some of coordinator, num_processes and process_id is missing or impossible.
      LostProcess: the others did not come.
    """
    explicit = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    given = [name for name, value in explicit.items() if value is not None]
    if distributed != "auto" and given:
        raise UserError(
            f"--distributed is {distributed} and --{given[0]} is given; a coordinator is named "
            "with --distributed=auto only."
        )
    if distributed == "off" or (distributed == "auto" and not given):
        return
    if given and len(given) < len(explicit):
        missing = next(name for name, value in explicit.items() if value is None)
        raise UserError(
            f"--{missing} is missing; --coordinator, --num_processes and --process_id go together."
        )
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id}; allowed are 0 to {num_processes - 1}, one for each of "
            f"the {num_processes} processes."
        )
    # When another process dies JAX says so and aborts; a dump of all stacks would bury it.
    faulthandler.disable()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=START_SECONDS,
        )
    except ValueError as error:  # nothing in the environment names the cluster
        raise UserError(
            f"--distributed is cluster, but the environment does not describe one ({error}); "
            "start under a TPU pod, SLURM, Open MPI or Kubernetes, or give --coordinator."
        ) from error
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise LostProcess(f"The processes of this run did not find each other: {reason}") from error


def is_main() -> bool:
    """Whether this process writes and reports."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether any process says so; called by all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_main(value: int) -> int:
    """The number that process 0 gives; called by all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.array(value, np.int32)))


def on_main(function: Callable[[], object], errors: type[Exception]) -> None:
    """Run `function` in process 0 while the others wait; what it raises ends all of them."""
    error = None
    if is_main():
        try:
            function()
        except errors as caught:
            error = caught
    if any_of(error is not None):
        raise error or errors("Process 0 refused; its message says why.")
