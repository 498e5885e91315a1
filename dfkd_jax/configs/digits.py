"""The 8×8 digits that scikit-learn embeds: a whole run in a minute, without a download."""

from dfkd_jax.configs import default


def get_config(method: str = "lra-mb"):
    """Small convolutional networks, 2,000 student steps of 128 images.

    The memory is young and broad: half a batch every fifth iteration, replayed mixed. Older and
    narrower ones cost accuracy here, where the generator's images improve all the time.
    """
    config = default.get_config(method)
    config.dataset.name = "digits"
    config.epochs = 10
    config.batch_size = 128
    config.iterations_per_epoch = 20

    config.teacher.model = "cnn"
    config.teacher.epochs = 30
    config.teacher.batch_size = 64
    config.teacher.learning_rate = 0.05
    config.teacher.augment = False

    config.student.model = "cnn_half"
    config.student.learning_rate = 0.05

    config.generator.latent_dim = 64
    config.generator.channels = (32, 16)
    config.generator.learning_rate = 0.001

    config.meta.inner_lr = 0.01
    config.replay.entry_size = 64
    config.replay.push_period = 5
    config.replay.push_unit = "iteration"
    config.replay.mix = True
    return config
