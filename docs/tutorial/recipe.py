"""Public ResNet-20 of CIFAR-10 → WRN-16-1, in less than an hour on two cores, without a data set.

One generator of pixels that learns all along, by the terms of DFQ and with the batch statistics
foremost; the student learns from a pool of what it made, as the methods with a pool do.
"""

from dfkd_jax.configs import default

RECIPE = {
    "dataset.name": "none",  # there is none; what the images are the teacher's card says
    "dataset.flip": True,  # a mirrored image keeps its class
    "teacher.model": "resnet20",
    "student.model": "wrn16_1",
    # 720 updates of the generator, each followed by 12 steps of the student.
    "epochs": 36,
    "iterations_per_epoch": 20,
    "batch_size": 128,
    "student.steps": 12,
    "student.weight_decay": 1e-4,
    # The student reads batches of the pool, cropped and mirrored.
    "objective": "retention",
    "replay.kind": "pool",
    "pool.batch_size": 64,
    "pool.capacity": 25_600,
    "loss.distance": "kl",
    "loss.distance_temperature": 20.0,
    # The generator.
    "generator.output": "pixels",
    "generator.latent_dim": 256,
    "generator.channels": (64, 32),
    "generator.learning_rate": 3e-3,
    "generator.final_learning_rate": 5e-4,
    "loss.batch_norm": 10.0,
    "loss.one_hot": 0.5,
    "loss.information_entropy": 0.0,
    "loss.adversarial": 1.33,
    "loss.adversarial_form": "decision",
}


def get_config():
    config = default.get_config("dfq")
    config.update_from_flattened_dict(RECIPE)
    return config
