"""Learning to retain while acquiring (Patel, Mopuri and Qiu, CVPR 2023).

    min_θ  L_acq(θ) + λ L_ret(θ − α ∇L_acq(θ))

An adversarial generator invents x̂; x̂_m comes from a memory bank (`lra-mb`, the paper's "Ours-1") or
a generative memory (`lra-gr`, "Ours-2"). `lra-mb-detached` is "Ours-1" step by step as the authors'
code computes it: its inner model is detached from the student, so only the one-pass joint loss
reaches θ, and the update is that of `mb-dfkd-concatenated`.
"""

from dfkd_jax.methods import adversarial_family

FIELDS = adversarial_family.FIELDS

PRESETS = {
    "lra-mb": {"replay.kind": "memory_bank", "objective": "lra", "meta.variant": "exact"},
    "lra-gr": {"replay.kind": "generative", "objective": "lra", "meta.variant": "exact"},
    "lra-mb-detached": {
        "replay.kind": "memory_bank",
        "objective": "lra_concatenated",
        "meta.variant": "detached",
    },
}

create = adversarial_family.create
