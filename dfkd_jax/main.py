"""Command line: `python -m dfkd_jax.main --config=configs/digits.py --workdir=DIR`."""

import os
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging

from dfkd_jax.run import command_line
from dfkd_jax.run.checkpoint import DamagedCheckpoint, SaveFailed
from dfkd_jax.run.command_line import CONFIG, WORKDIR, fail
from dfkd_jax.run.train import run
from dfkd_jax.runtime import processes
from dfkd_jax.runtime.compilation import keep_compiled_programs
from dfkd_jax.runtime.devices import full_memory
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.finite import NonFinite
from dfkd_jax.runtime.host_memory import keep_freed_memory
from dfkd_jax.runtime.processes import LostProcess
from dfkd_jax.runtime.stop import STOPPED, Stopped

flags.adopt_module_key_flags(command_line)  # --help shows them
DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "off", "cluster"],
    "Several processes: found in the environment (cluster: TPU pod, SLURM, Open MPI, Kubernetes), "
    "named by --coordinator (auto), or none.",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(arguments: Sequence[str]) -> int | None:
    """Run what the flags ask for; the exit code, `STOPPED` of a run that was asked to stop."""
    del arguments
    if WORKDIR.value is None:
        return fail("--workdir is missing; give the folder for this run's results.", 2)
    logging.set_verbosity(logging.WARNING)  # JAX reports every backend that it does not find
    keep_freed_memory()
    keep_compiled_programs()
    try:
        processes.start(DISTRIBUTED.value, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    except UserError as error:
        return fail(str(error), 2)
    except LostProcess as error:
        return fail(str(error), 1)
    try:
        run(CONFIG.value, WORKDIR.value)
    except Stopped as stopped:
        if processes.is_main():
            print(f"{stopped} The same command goes on from there.")
        return STOPPED
    except UserError as error:
        code = fail(str(error), 1 if isinstance(error, NonFinite) else 2)
    except (DamagedCheckpoint, SaveFailed) as error:
        code = fail(str(error), 1)
    except OSError as error:
        code = fail(f"{error}; the same command goes on after the last checkpoint.", 1)
    except jax.errors.JaxRuntimeError as error:
        memory = full_memory(error)
        if memory:
            code = fail(f"{memory} The same command goes on after the last saved epoch.", 1)
        elif jax.process_count() == 1:
            raise
        else:
            code = fail(
                "Another process of this run was lost; start all of them again with the same "
                "command to go on after the last saved epoch. "
                f"({str(error).splitlines()[0][:200]})",
                1,
            )
    else:
        return None
    if jax.process_count() > 1:
        # The others may be in the middle of an epoch: do not wait for them at the exit.
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
