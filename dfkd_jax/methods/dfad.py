"""DFAD: data-free adversarial distillation (Fang et al., 2019).

Generator and student play for mean |T − S|: one raises it, the other lowers it.
"""

from dfkd_jax.methods import adversarial_family

FIELDS = adversarial_family.FIELDS

PRESETS = {
    "dfad": {
        **adversarial_family.NO_REPLAY,
        **adversarial_family.ONLY_ADVERSARIAL,
        "loss.adversarial_form": "l1",
    }
}

create = adversarial_family.create
