"""CIFAR-10, the small CNN → its half (61,290 and 15,802 parameters), for a small machine."""

from dfkd_jax.configs import default
from dfkd_jax.methods.presets import apply_method


def get_config(method: str = "lra-mb"):
    """A run of minutes: 1,000 student steps of 64 images: a setting to start from, not tuned."""
    config = default.get_config(method)
    config.dataset.name = "cifar10"
    config.epochs = 10
    config.batch_size = 64
    config.iterations_per_epoch = 20

    config.teacher.model = "cnn"
    config.teacher.epochs = 30

    config.student.model = "cnn_half"
    config.student.steps = 5

    config.generator.latent_dim = 100
    config.generator.channels = (32, 16)
    config.generator.learning_rate = 0.003
    config.loss.batch_norm = 1.0

    config.meta.inner_lr = 0.1
    config.replay.push_unit = "iteration"
    config.replay.mix = True
    if config.replay.kind == "memory_bank":
        config.replay.capacity = 200
        config.replay.entry_size = config.get_oneway_ref("batch_size")
        config.replay.push_period = 1
    if config.replay.kind == "generative":
        config.replay.entry_size = 32
        config.replay.observe_steps = 2  # of 5
    return apply_method(config, method)
