"""The methods of the field as settings of one training step.

A method names who replays what and how the student's gradient is taken; loss weights that make a
method what it is belong here too, hyper-parameters that depend on the data set do not.
"""

import ml_collections

_NO_REPLAY = {"replay.kind": "none", "objective": "acquisition"}
_LRA = {"objective": "lra", "meta.variant": "exact"}
_ONLY_ADVERSARIAL = {
    "loss.one_hot": 0.0,
    "loss.information_entropy": 0.0,
    "loss.activation": 0.0,
    "loss.adversarial": 1.0,
}

METHODS: dict[str, dict] = {
    # Learning to retain while acquiring (Patel et al., CVPR 2023), with a memory bank.
    "lra-mb": {"replay.kind": "memory_bank", **_LRA},
    # Joint replay of a memory bank (Binici et al., WACV 2022) as the paper of LRA writes it.
    "mb-dfkd": {"replay.kind": "memory_bank", "objective": "joint"},
    # The same in one pass over [x̂; x̂_m]: what the authors' code computes for MB-DFKD, and in effect
    # for "Ours-1" too.
    "mb-dfkd-concatenated": {"replay.kind": "memory_bank", "objective": "concatenated"},
    # LRA with generative replay in place of the bank: "Ours-2" of the paper.
    "lra-gr": {"replay.kind": "generative", **_LRA},
    # Joint generative replay (Binici et al., AAAI 2022), as the paper of LRA writes it.
    "pre-dfkd": {"replay.kind": "generative", "objective": "joint"},
    # The same in one pass, as the authors' code computes PRE-DFKD and in effect "Ours-2".
    "pre-dfkd-concatenated": {"replay.kind": "generative", "objective": "concatenated"},
    # What the authors' code does for lra-mb, step by step: its inner model is detached from the
    # student, so only the one-pass joint loss reaches θ. The same update as mb-dfkd-concatenated.
    "lra-mb-detached": {
        "replay.kind": "memory_bank",
        "objective": "lra_concatenated",
        "meta.variant": "detached",
    },
    # The same generator and student without any replay.
    "adversarial": _NO_REPLAY,
    # Data-free learning of student networks (Chen et al., ICCV 2019).
    "dafl": {
        **_NO_REPLAY,
        "loss.distance": "kl",
        "loss.one_hot": 1.0,
        "loss.information_entropy": 5.0,
        "loss.activation": 0.1,
        "loss.adversarial": 0.0,
    },
    # Data-free adversarial distillation (Fang et al., 2019).
    "dfad": {**_NO_REPLAY, **_ONLY_ADVERSARIAL, "loss.adversarial_form": "l1"},
    # Zero-shot knowledge transfer (Micaelli and Storkey, NeurIPS 2019), without its attention term.
    "zskt": {
        **_NO_REPLAY,
        **_ONLY_ADVERSARIAL,
        "loss.distance": "kl",
        "loss.adversarial_form": "kl",
        "loss.adversarial_temperature": 1.0,
    },
    # Data-free network quantization with adversarial knowledge distillation (Choi et al., 2020), as
    # CMI and Fast-Datafree have it: class balance with the natural logarithm, weight 20.
    "dfq": {
        **_NO_REPLAY,
        **_ONLY_ADVERSARIAL,
        "loss.distance": "kl",
        "loss.adversarial_form": "kl",
        "loss.adversarial_temperature": 1.0,
        "loss.one_hot": 1.0,
        "loss.information_entropy": 20.0,
        "loss.entropy_logarithm": "ln",
        "loss.batch_norm": 1.0,
    },
}


def apply_method(config: ml_collections.ConfigDict, method: str) -> ml_collections.ConfigDict:
    """Set the fields of a method, and `config.method` to its name.

    Raises:
      ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(
            f"The method after the colon of --config is {method!r}; "
            f"allowed are {', '.join(METHODS)}."
        )
    config.method = method
    config.update_from_flattened_dict(METHODS[method])
    return config
