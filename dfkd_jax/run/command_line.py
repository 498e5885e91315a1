"""What the commands share: their flags, and one sentence for what is wrong with them."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from dfkd_jax import configs
from dfkd_jax.run.config import RENAMED
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.fields import get

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration, a name or a file, and after a colon the method: digits:mb-dfkd."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; the same again resumes.")

CONFIGURATIONS = Path(configs.__file__).parent

# What a wrong flag, or a configuration file that cannot be read, raises.
FLAG_ERRORS = (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError)


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parse the command line; what is wrong with it becomes one sentence and exit code 2."""
    try:
        check_fields(arguments)
        rest = flags.FLAGS(with_named_config(arguments))
        if CONFIG.value is None:
            raise ValueError("--config is missing; give a name such as digits, or a file.")
        if len(rest) > 1:
            raise ValueError(f"{rest[1]!r} is no flag; fields are set as --config.FIELD=VALUE.")
        dict(CONFIG.value)  # a file that could not be read shows on first access
    except FLAG_ERRORS as error:
        sys.exit(fail(sentence(error), 2))
    return rest


def with_named_config(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the file of the package for a configuration given by its name.

    `--config=digits:mb-dfkd` names `dfkd_jax/configs/digits.py`; what has a suffix or is a path is
    left as it is.
    """
    found = list(arguments)
    for i, argument in enumerate(found):
        flag, given, value = argument.partition("=")
        if flag.lstrip("-") != CONFIG.name:
            continue
        place = i if given else i + 1
        if place < len(found):
            name, *method = (value if given else found[place]).split(":", 1)
            file = CONFIGURATIONS / f"{name}.py"
            if name.isidentifier() and file.is_file():
                resolved = ":".join([str(file), *method])
                found[place] = f"{flag}={resolved}" if given else resolved
    return found


def check_fields(arguments: Sequence[str]) -> None:
    """Refuse fields that cannot be set, or no longer under that name, on the command line.

    Raises:
      ValueError: one sentence.
    """
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        field, given, value = argument.lstrip("-").partition("=")
        value = value if given else following  # --config.FIELD VALUE
        field = field.removeprefix("config.") if field.startswith("config.") else None
        if field in RENAMED:
            raise ValueError(f"config.{field} is no field any more; allowed is {RENAMED[field]}.")
        if field == "meta.variant" and value == "none":
            raise ValueError(
                "config.meta.variant is 'none'; joint replay is --config.objective=joint, and no "
                "replay the method no-replay."
            )
        if field == "method":
            raise ValueError(
                f"config.method is {value!r}, which would only rename the run; the method follows "
                f"the colon, --config=FILE:{value}."
            )


def configurations() -> Callable[..., ConfigDict]:
    """(method, **fields) ↦ the configuration that --config names, with the command line's fields
    set, and then these, given as text.

    Raises:
      UserError: --config has a method of its own.
      Any of `FLAG_ERRORS`, from the function: the file knows no such method.
    """
    filename = config_flags.get_config_filename(flags.FLAGS[CONFIG.name])
    overrides = config_flags.get_override_values(flags.FLAGS[CONFIG.name])
    if ":" in filename:
        path, method = filename.split(":", 1)
        raise UserError(
            f"--config is {filename!r}; here it names the file alone, --config={path}, "
            f"and the method is given as --methods={method}."
        )

    def load(method: str, **fields: str) -> ConfigDict:
        return with_overrides(f"{filename}:{method}", overrides, fields)

    return load


def with_overrides(
    filename: str, overrides: dict[str, Any], texts: Mapping[str, str] = MappingProxyType({})
) -> ConfigDict:
    """The configuration of a file or name such as "digits:lra-mb", some fields set after it.

    Args:
      filename: the file, and a method after a colon.
      overrides: field ↦ value.
      texts: field ↦ value as on the command line; they win.

    Raises:
      Any of `FLAG_ERRORS`: the file refuses the method, or has no such field.
    """
    # Flags of its own, as the command line's are parsed already.
    fields = (f"--config.{field}={value}" for field, value in texts.items())
    arguments = with_named_config(["", f"--config={filename}", *fields])
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    values(arguments)
    parsed = {field: get(holder.value, field) for field in texts}
    holder.value.update_from_flattened_dict({**overrides, **parsed})
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


def create_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """For the commands that take files and need no configuration; refuses by `UserError`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m dfkd_jax.{command}", description=description, allow_abbrev=False
    )

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags.")

    parser.error = refuse  # one sentence, without the usage before it
    return parser


def fail(text: str, code: int) -> int:
    """Say what is wrong on standard error; returns the exit code."""
    print(f"dfkd_jax: {text}", file=sys.stderr)
    return code
