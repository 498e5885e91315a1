"""MNIST padded to 32×32, LeNet-5 → LeNet-5-Half."""

from configs import default


def get_config(method: str = "lra-mb"):
    """A budget for a small machine: 10,000 student steps of 128 images."""
    config = default.get_config(method)
    config.dataset.name = "mnist"
    config.epochs = 50
    config.batch_size = 128
    config.iterations_per_epoch = 20

    config.teacher.model = "lenet5"
    config.teacher.epochs = 10
    config.teacher.learning_rate = 0.05
    config.teacher.augment = False

    config.student.model = "lenet5_half"
    config.student.learning_rate = 0.05

    config.generator.latent_dim = 100
    config.generator.channels = (32, 16)
    config.generator.learning_rate = 0.001

    config.meta.inner_lr = 0.1
    config.replay.push_period = 1
    return config
