"""MNIST padded to 32×32, LeNet-5 → LeNet-5-Half."""

from dfkd_jax.configs import default
from dfkd_jax.methods.presets import apply_method


def get_config(method: str = "lra-mb"):
    """A budget for a small machine: 10,000 student steps of 128 images.

    Chosen on 5,000 validation images. The teacher is trained without augmentation and with much
    weight decay on purpose: of one that has learned to tolerate shifts, or of one with large
    weights, a student learns less in the same steps.
    """
    config = default.get_config(method)
    config.dataset.name = "mnist"
    config.epochs = 50
    config.batch_size = 128
    config.iterations_per_epoch = 40

    config.teacher.model = "lenet5"
    config.teacher.epochs = 20
    config.teacher.learning_rate = 0.05
    config.teacher.weight_decay = 0.005
    config.teacher.augment = False

    config.student.model = "lenet5_half"
    config.student.learning_rate = 0.05
    config.student.steps = 5

    config.generator.latent_dim = 100
    config.generator.channels = (32, 16)
    config.generator.learning_rate = 0.003
    config.loss.adversarial_form = "l1"

    config.meta.inner_lr = 0.01  # with 0.1 L_acq grows without bound here
    config.replay.entry_size = 64
    config.replay.push_period = 10
    config.replay.push_unit = "iteration"
    config.replay.mix = True
    if config.replay.kind == "generative":
        config.replay.observe_steps = 2  # of 5: the paper's share, 4 of 10, in half the time of 4
    return apply_method(config, method)  # whose losses win
