"""MNIST padded to 32×32, LeNet-5 → LeNet-5-Half."""

from dfkd_jax.configs import default
from dfkd_jax.configs.default import set_fields


def get_config(method: str = "lra-mb"):
    """A budget for a small machine: 10,000 student steps of 128 images.

    Chosen on 5,000 validation images. The teacher is trained without augmentation and with much
    weight decay on purpose: of one that has learned to tolerate shifts, or of one with large
    weights, a student learns less in the same steps.
    """
    config = default.get_config(method)
    set_fields(
        config,
        {
            "dataset.name": "mnist",
            "epochs": 50,
            "batch_size": 128,
            "iterations_per_epoch": 40,
            "teacher.model": "lenet5",
            "teacher.epochs": 20,
            "teacher.learning_rate": 0.05,
            "teacher.weight_decay": 0.005,
            "teacher.augment": False,
            "student.model": "lenet5_half",
            "student.learning_rate": 0.05,
            "student.steps": 5,
            "generator.latent_dim": 100,
            "generator.channels": (32, 16),
            "generator.learning_rate": 0.003,
            "loss.adversarial_form": "l1",
            "meta.inner_lr": 0.01,  # with 0.1 L_acq grows without bound here
            "replay.entry_size": 64,
            "replay.push_period": 10,
            "replay.push_unit": "iteration",
            "replay.mix": True,
        },
        "mnist",
    )
    if config.replay.kind == "generative":
        config.replay.observe_steps = 2  # of 5: the paper's share, 4 of 10, in half the time of 4
    return config
