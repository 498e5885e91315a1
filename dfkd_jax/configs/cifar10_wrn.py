"""CIFAR-10, WRN-16-2 → WRN-16-1, for a small machine."""

from dfkd_jax.configs import default
from dfkd_jax.configs.default import set_fields


def get_config(method: str = "lra-mb"):
    """3,000 student steps of 64 images: a setting to start from, not tuned."""
    config = default.get_config(method)
    set_fields(
        config,
        {
            "dataset.name": "cifar10",
            "epochs": 30,
            "batch_size": 64,
            "iterations_per_epoch": 10,
            "teacher.model": "wrn16_2",
            "teacher.epochs": 15,
            "student.model": "wrn16_1",
            "generator.latent_dim": 100,
            "generator.channels": (64, 32),
            "generator.learning_rate": 0.001,
            "loss.batch_norm": 1.0,
            "meta.inner_lr": 0.1,
            "replay.entry_size": 32,
            "replay.push_period": 5,
            "replay.push_unit": "iteration",
            "replay.mix": True,
        },
        "cifar10_wrn",
    )
    return config
