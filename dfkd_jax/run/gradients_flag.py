"""The flag --gradients of the commands that go through variants of the meta-gradient.

absl's flags are global, so what several commands have is defined once.
"""

from collections.abc import Sequence

import ml_collections
from absl import flags

from dfkd_jax.distillation.meta import VARIANTS

_GRADIENTS = flags.DEFINE_list("gradients", None, f"Variants: {', '.join(VARIANTS)}.")


def chosen_gradients(default: Sequence[str]) -> list[str]:
    """The variants that were asked for; `default` without the flag, none with an empty one."""
    return list(default) if _GRADIENTS.value is None else _GRADIENTS.value


def with_gradient(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """A copy of the configuration that takes this gradient; "none" is joint replay."""
    own = config.copy_and_resolve_references()
    if variant == "none":
        own.objective = "joint"
    else:
        own.meta.variant = variant
    return own
