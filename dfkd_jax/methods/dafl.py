"""DAFL: data-free learning of student networks (Chen et al., ICCV 2019).

The generator does not look at the student: its images should be sure of their class, balanced over
the classes and exciting to the teacher's features. The student descends KL(T ‖ S).
"""

from dfkd_jax.methods import adversarial_family

FIELDS = adversarial_family.FIELDS

PRESETS = {
    "dafl": {
        **adversarial_family.NO_REPLAY,
        "loss.distance": "kl",
        "loss.one_hot": 1.0,
        "loss.information_entropy": 5.0,
        "loss.activation": 0.1,
        "loss.adversarial": 0.0,
    }
}

create = adversarial_family.create
