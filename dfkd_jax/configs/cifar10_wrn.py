"""CIFAR-10, WRN-16-2 → WRN-16-1, for a small machine."""

from dfkd_jax.configs import default
from dfkd_jax.methods.presets import apply_method


def get_config(method: str = "lra-mb"):
    """3,000 student steps of 64 images: a setting to start from, not tuned."""
    config = default.get_config(method)
    config.dataset.name = "cifar10"
    config.epochs = 30
    config.batch_size = 64
    config.iterations_per_epoch = 10

    config.teacher.model = "wrn16_2"
    config.teacher.epochs = 15

    config.student.model = "wrn16_1"

    config.generator.latent_dim = 100
    config.generator.channels = (64, 32)
    config.generator.learning_rate = 0.001
    config.loss.batch_norm = 1.0

    config.meta.inner_lr = 0.1
    config.replay.entry_size = 32
    config.replay.push_period = 5
    config.replay.push_unit = "iteration"
    config.replay.mix = True
    return apply_method(config, method)
