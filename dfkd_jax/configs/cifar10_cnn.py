"""CIFAR-10, the small CNN → its half (61,290 and 15,802 parameters), for a small machine."""

from dfkd_jax.configs import default
from dfkd_jax.configs.default import set_fields


def get_config(method: str = "lra-mb"):
    """A run of minutes: 1,000 student steps of 64 images: a setting to start from, not tuned."""
    config = default.get_config(method)
    set_fields(
        config,
        {
            "dataset.name": "cifar10",
            "epochs": 10,
            "batch_size": 64,
            "iterations_per_epoch": 20,
            "teacher.model": "cnn",
            "teacher.epochs": 30,
            "student.model": "cnn_half",
            "student.steps": 5,
            "generator.latent_dim": 100,
            "generator.channels": (32, 16),
            "generator.learning_rate": 0.003,
            "loss.batch_norm": 1.0,
            "meta.inner_lr": 0.1,
            "replay.push_unit": "iteration",
            "replay.mix": True,
        },
        "cifar10_cnn",
    )
    if config.replay.kind == "memory_bank":
        config.replay.capacity = 200
        config.replay.entry_size = config.get_oneway_ref("batch_size")
        config.replay.push_period = 1
    if config.replay.kind == "generative":
        config.replay.entry_size = 32
        config.replay.observe_steps = 2  # of 5
    return config
