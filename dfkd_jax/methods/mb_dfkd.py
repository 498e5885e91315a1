"""MB-DFKD: joint replay of a memory bank (Binici et al., WACV 2022).

`mb-dfkd` descends L_acq(θ) + λ L_ret(θ), as the paper of LRA writes it. `mb-dfkd-concatenated`
takes the mean of d over [x̂; x̂_m] in one pass. That is what the authors' code of LRA computes for
MB-DFKD, and in effect for "Ours-1" too.
"""

from dfkd_jax.methods import adversarial_family

FIELDS = adversarial_family.FIELDS

PRESETS = {
    "mb-dfkd": {"replay.kind": "memory_bank", "objective": "joint"},
    "mb-dfkd-concatenated": {"replay.kind": "memory_bank", "objective": "concatenated"},
}

create = adversarial_family.create
