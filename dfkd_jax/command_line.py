"""What the commands share: their flags, and one sentence for what is wrong with them."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration, and after a colon the method: configs/digits.py:mb-dfkd."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; the same again resumes.")

# What a wrong flag, or a configuration file that cannot be read, raises.
FLAG_ERRORS = (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError)


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parse the command line; what is wrong with it becomes one sentence and exit code 2."""
    try:
        rest = flags.FLAGS(arguments)
        if CONFIG.value is None:
            raise ValueError("--config is missing; give a file such as configs/digits.py.")
        if len(rest) > 1:
            raise ValueError(f"{rest[1]!r} is no flag; fields are set as --config.FIELD=VALUE.")
        dict(CONFIG.value)  # a file that could not be read shows on first access
    except FLAG_ERRORS as error:
        sys.exit(fail(sentence(error), 2))
    return rest


def configurations() -> Callable[[str], ml_collections.ConfigDict]:
    """method ↦ the configuration that --config names, with the command line's fields set.

    Raises:
      ValueError: --config has a method of its own.
      Any of `FLAG_ERRORS`, from the function: the file knows no such method.
    """
    filename = config_flags.get_config_filename(flags.FLAGS[CONFIG.name])
    overrides = config_flags.get_override_values(flags.FLAGS[CONFIG.name])
    if ":" in filename:
        path, method = filename.split(":", 1)
        raise ValueError(
            f"--config is {filename!r}; here it names the file alone, --config={path}, "
            f"and the method is given as --methods={method}."
        )

    def load(method: str) -> ml_collections.ConfigDict:
        return with_overrides(f"{filename}:{method}", overrides)

    return load


def with_overrides(filename: str, overrides: dict[str, Any]) -> ml_collections.ConfigDict:
    """The configuration of a file such as "configs/digits.py:lra-mb", some fields set after it.

    Raises:
      Any of `FLAG_ERRORS`: the file refuses the method, or has no such field.
    """
    # Flags of its own, as the command line's are parsed already.
    arguments = ["", f"--config={filename}"]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    values(arguments)
    holder.value.update_from_flattened_dict(overrides)
    return holder.value


def sentence(error: Exception) -> str:
    """The last line says what is wrong; above it config_flags puts a traceback."""
    if isinstance(error, AttributeError):  # '\'batch_siz\'\nDid you mean "batch_size" ...'
        text = str(error).replace("\\'", "'").replace("\\n", "\n")
        name, _, hint = text.partition("\n")
        name = name.strip("'\"")
        hint = hint.rstrip("'\"?")
        return f"The configuration has no field {name!r}." + (f' {hint}"?' if hint else "")
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text.split("Error: ", 1)[-1]


def fail(text: str, code: int) -> int:
    """Say what is wrong on standard error; returns the exit code."""
    print(f"dfkd_jax: {text}", file=sys.stderr)
    return code
