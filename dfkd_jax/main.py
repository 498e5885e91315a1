"""Command line: `python -m dfkd_jax.main --config=configs/digits.py --workdir=DIR`."""

from collections.abc import Sequence

from absl import app, flags, logging

from dfkd_jax import command_line
from dfkd_jax.checkpoint import DamagedCheckpoint, SaveFailed
from dfkd_jax.command_line import CONFIG, WORKDIR, fail
from dfkd_jax.config import UserError
from dfkd_jax.host_memory import keep_freed_memory
from dfkd_jax.stop import Stopped
from dfkd_jax.train import NonFiniteLoss, run

flags.adopt_module_key_flags(command_line)  # --help shows them


def main(arguments: Sequence[str]) -> int | None:
    """Run what the flags ask for; the exit code."""
    del arguments
    if WORKDIR.value is None:
        return fail("--workdir is missing; give the folder for this run's results.", 2)
    logging.set_verbosity(logging.WARNING)  # JAX reports every backend that it does not find
    keep_freed_memory()
    try:
        run(CONFIG.value, WORKDIR.value)
    except UserError as error:
        return fail(str(error), 1 if isinstance(error, NonFiniteLoss) else 2)
    except (DamagedCheckpoint, SaveFailed) as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"{error}; the epochs that were reported are saved.", 1)
    except Stopped as stopped:
        print(f"{stopped} The same command goes on from there.")
    return None


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
