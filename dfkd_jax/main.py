"""Command line: `python -m dfkd_jax.main --config=configs/digits.py --workdir=DIR`."""

import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from dfkd_jax.checkpoint import DamagedCheckpoint, SaveFailed
from dfkd_jax.config import UserError
from dfkd_jax.host_memory import keep_freed_memory
from dfkd_jax.stop import Stopped
from dfkd_jax.train import NonFiniteLoss, run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration, and after a colon the method: configs/digits.py:mb-dfkd."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run; the same one again resumes it.")


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parse the command line; what is wrong with it becomes one sentence and exit code 2."""
    try:
        rest = flags.FLAGS(arguments)
        if CONFIG.value is None:
            raise ValueError("--config is missing; give a file such as configs/digits.py.")
        if len(rest) > 1:
            raise ValueError(f"{rest[1]!r} is no flag; fields are set as --config.FIELD=VALUE.")
        dict(CONFIG.value)  # a file that could not be read shows on first access
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        sys.exit(_fail(_sentence(error), 2))
    return rest


def _sentence(error: Exception) -> str:
    """The last line says what is wrong; above it config_flags puts a traceback."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    if isinstance(error, AttributeError):  # "'batch_siz'\nDid you mean "batch_size" ..."
        return "There is no such field in the configuration: " + " ".join(lines)
    return text.split("Error: ", 1)[-1]


def _fail(sentence: str, code: int) -> int:
    print(f"dfkd_jax: {sentence}", file=sys.stderr)
    return code


def main(arguments: Sequence[str]) -> int | None:
    """Run what the flags ask for; the exit code."""
    del arguments
    if WORKDIR.value is None:
        return _fail("--workdir is missing; give the folder for this run's results.", 2)
    keep_freed_memory()
    try:
        run(CONFIG.value, WORKDIR.value)
    except UserError as error:
        return _fail(str(error), 1 if isinstance(error, NonFiniteLoss) else 2)
    except (DamagedCheckpoint, SaveFailed) as error:
        return _fail(str(error), 1)
    except Stopped as stopped:
        print(f"{stopped} The same command goes on from there.")
    return None


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
