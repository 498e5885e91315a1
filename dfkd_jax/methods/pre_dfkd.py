"""PRE-DFKD: joint replay from a generative memory (Binici et al., AAAI 2022).

`pre-dfkd` descends L_acq(θ) + λ L_ret(θ), as the paper of LRA writes it. `pre-dfkd-concatenated`
takes the mean of d over [x̂; x̂_m] in one pass, as the authors' code computes it, and in effect
"Ours-2" too.
"""

from dfkd_jax.methods import adversarial_family

FIELDS = adversarial_family.FIELDS

PRESETS = {
    "pre-dfkd": {"replay.kind": "generative", "objective": "joint"},
    "pre-dfkd-concatenated": {"replay.kind": "generative", "objective": "concatenated"},
}

create = adversarial_family.create
