from collections.abc import Sequence
from typing import Any

import absl.flags

def DEFINE_config_file(
    name: str,
    default: str | None = None,
    help_string: str = "path to config file.",
    flag_values: absl.flags.FlagValues = ...,
    lock_config: bool = True,
    accept_new_attributes: bool = False,
    sys_argv: Sequence[str] | None = None,
    **kwargs: Any,
) -> absl.flags.FlagHolder[Any]: ...
def __getattr__(name: str) -> Any: ...
