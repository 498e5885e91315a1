"""ZSKT: zero-shot knowledge transfer (Micaelli and Storkey, NeurIPS 2019), without its attention.

Generator and student play for KL(T ‖ S): one raises it, the other lowers it.
"""

from dfkd_jax.methods import adversarial_family

FIELDS = adversarial_family.FIELDS

PRESETS = {
    "zskt": {
        **adversarial_family.NO_REPLAY,
        **adversarial_family.ONLY_ADVERSARIAL,
        "loss.distance": "kl",
        "loss.adversarial_form": "kl",
        "loss.adversarial_temperature": 1.0,
    }
}

create = adversarial_family.create
