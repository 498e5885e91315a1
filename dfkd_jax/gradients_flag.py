"""The flag --gradients of the commands that go through variants of the meta-gradient.

absl's flags are global, so what several commands have is defined once.
"""

from collections.abc import Sequence

from absl import flags

from dfkd_jax.meta import VARIANTS

_GRADIENTS = flags.DEFINE_list("gradients", None, f"Variants: {', '.join(VARIANTS)}.")


def chosen_gradients(default: Sequence[str]) -> list[str]:
    """The variants that were asked for; `default` without the flag, none with an empty one."""
    return list(default) if _GRADIENTS.value is None else _GRADIENTS.value
