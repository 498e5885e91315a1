"""DFQ: data-free network quantization with adversarial knowledge distillation (Choi et al., 2020).

Here as CMI and Fast-Datafree have it, to distil: the game of ZSKT with a generator that also
matches the teacher's batch statistics, makes images sure of their class and, by the natural
logarithm at weight 20, balanced over the classes.
"""

from dfkd_jax.methods import adversarial_family

FIELDS = adversarial_family.FIELDS

PRESETS = {
    "dfq": {
        **adversarial_family.NO_REPLAY,
        **adversarial_family.ONLY_ADVERSARIAL,
        "loss.distance": "kl",
        "loss.adversarial_form": "kl",
        "loss.adversarial_temperature": 1.0,
        "loss.one_hot": 1.0,
        "loss.information_entropy": 20.0,
        "loss.entropy_logarithm": "ln",
        "loss.batch_norm": 1.0,
    }
}

create = adversarial_family.create
