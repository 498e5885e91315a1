"""The embedded 8×8 digits: a whole run in a minute, without a download."""

from dfkd_jax.configs import default
from dfkd_jax.configs.default import set_fields


def get_config(method: str = "lra-mb"):
    """Small convolutional networks, 2,000 student steps of 128 images.

    The memory is young and broad: half a batch every fifth iteration, replayed mixed. Older and
    narrower ones cost accuracy here, where the generator's images improve all the time.
    """
    return set_fields(
        default.get_config(method),
        {
            "dataset.name": "digits",
            "epochs": 10,
            "batch_size": 128,
            "iterations_per_epoch": 20,
            "teacher.model": "cnn",
            "teacher.epochs": 30,
            "teacher.batch_size": 64,
            "teacher.learning_rate": 0.05,
            "teacher.augment": False,
            "student.model": "cnn_half",
            "student.learning_rate": 0.05,
            "generator.latent_dim": 64,
            "generator.channels": (32, 16),
            "generator.learning_rate": 0.001,
            "meta.inner_lr": 0.01,
            "replay.entry_size": 64,
            "replay.push_period": 5,
            "replay.push_unit": "iteration",
            "replay.mix": True,
        },
        "digits",
    )
