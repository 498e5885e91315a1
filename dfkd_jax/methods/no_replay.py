"""The generator and student of LRA without any replay: the baseline that forgets."""

from dfkd_jax.methods import adversarial_family

FIELDS = adversarial_family.FIELDS

PRESETS = {"no-replay": adversarial_family.NO_REPLAY}

create = adversarial_family.create
