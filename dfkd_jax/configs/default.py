"""Every field of a run, once, with the paper's value for 32×32 images (ResNet-34 → ResNet-18).

The other files of this folder change only what differs. Each takes the method after a colon,
`--config=configs/cifar100.py:mb-dfkd`, and any field can be set on the command line,
`--config.replay.capacity=20`.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from dfkd_jax.methods.presets import apply_method


def get_config(method: str = "lra-mb") -> ml_collections.ConfigDict:
    """The paper's setting for the named method (the keys of `dfkd_jax.methods.presets.METHODS`)."""
    config = ml_collections.ConfigDict()
    config.seed = 1  # of the distillation: student, generator and all draws
    config.epochs = 400
    config.batch_size = 512  # B, global: split over the devices
    batch_size = config.get_oneway_ref("batch_size")
    config.iterations_per_epoch = 36 * (1024 // batch_size)
    config.loop = "auto"  # scan: an epoch is one compiled call; step: one call a step; auto
    config.compute_dtype = "float32"  # of the layers; bfloat16 leaves parameters and losses float32
    config.checkpoint_every = 1  # epochs from one checkpoint to the next; the last is always saved
    # Of matrix products: bfloat16, tensorfloat32 or float32. The default of a GPU may be TF32, that
    # of a TPU is bfloat16; then "exact" means exact up to their rounding.
    config.matmul_precision = "default"

    config.objective = "lra"  # the student's, a key of dfkd_jax.distillation.objectives.OBJECTIVES
    config.retention_weight = 1.0  # λ of L_ret; the concatenated objective has none

    config.parallel = parallel = ml_collections.ConfigDict()
    parallel.devices = 0  # how many share every batch; 0: all, of all processes
    parallel.mapping = "pmap"  # or shard_map; the same numbers

    config.dataset = dataset = ml_collections.ConfigDict()
    dataset.name = "cifar100"  # a key of dfkd_jax.data.data_table.SPECS, folder or none
    dataset.data_dir = placeholder(str)  # of tensorflow-datasets; None: its default folder
    # More than 0: so many training images, drawn once and for all, are kept from the teacher and
    # take the test images' place, to choose hyper-parameters without looking at these.
    dataset.validation_size = 0
    # folder: data_dir holds test/CLASS and train/CLASS with images. none: no data at all.
    # Only these two need the following; None takes it from the card of teacher.checkpoint.
    dataset.image_size = placeholder(int)  # H = W
    dataset.channels = placeholder(int)  # 1 or 3
    dataset.num_classes = placeholder(int)  # of folder it is counted
    dataset.mean = placeholder(tuple)  # per channel, of images in [0, 1]; the teacher takes
    dataset.std = placeholder(tuple)  # (images − mean) / std

    config.teacher = teacher = ml_collections.ConfigDict()
    teacher.model = (
        "resnet34"  # a key of dfkd_jax.networks.classifiers.CLASSIFIERS, or "package.module:Net"
    )
    teacher.checkpoint = placeholder(str)  # a trained teacher's folder; None: WORKDIR/teacher
    # How to train one where there is none:
    teacher.epochs = 200
    teacher.batch_size = 128
    teacher.learning_rate = 0.1  # SGD, momentum 0.9, cosine to 0 over the epochs
    teacher.weight_decay = 5e-4
    teacher.augment = True  # random crops, padded by 4, and flips
    teacher.seed = 0

    config.student = student = ml_collections.ConfigDict()
    student.model = "resnet18"
    student.initialization = "source"  # weights start as in the network's source; he: as He et al.
    student.optimizer = "sgd"  # or adam
    student.learning_rate = 0.1  # cosine to 0 over the epochs, stepped once an epoch
    student.momentum = 0.9  # of sgd
    student.weight_decay = 5e-4
    student.steps = 10  # kd_iter: student steps per iteration, each on a fresh batch
    student.checkpoint = placeholder(str)  # a run's folder, or a teacher's, to start from

    config.generator = generator = ml_collections.ConfigDict()
    generator.latent_dim = 1000  # dimension of z
    generator.channels = (128, 64)  # of its two inner convolutions
    generator.spectral_norm = True
    generator.learning_rate = 0.02  # Adam
    generator.final_learning_rate = placeholder(float)  # cosine to it; None: constant
    generator.steps = 1  # gen_iter: generator steps per iteration
    # The student's mode when the generator looks at it: train, eval, or eval_after_test: eval in an
    # epoch's first iteration, where the authors' code has just tested the student.
    generator.student_mode = "train"

    config.loss = loss = ml_collections.ConfigDict()
    loss.distance = "l1"  # d(S, T) of L_acq and L_ret: l1, kl
    loss.distance_temperature = 1.0  # of the kl distance
    # Weights of the generator's terms:
    loss.one_hot = 1.0  # oh, CE(T(x̂), argmax T(x̂))
    loss.information_entropy = 5.0  # ie, class balance Σ p̄ log p̄
    loss.entropy_logarithm = "log10"  # of the class balance; or ln, as in DFQ
    loss.activation = 0.1  # a, −mean |f_T(x̂)|
    loss.adversarial = 1.0
    loss.adversarial_form = "js"  # 1 − JS, l1: −mean |T − S|, kl: −KL(T ‖ S)
    loss.adversarial_temperature = 3.0  # of the js and kl forms
    loss.batch_norm = 0.0  # bn, distance to the teacher's running statistics

    config.meta = meta = ml_collections.ConfigDict()
    meta.variant = (
        "exact"  # of objectives with an inner step, a key of dfkd_jax.distillation.meta.VARIANTS
    )
    meta.inner_lr = 0.9  # α
    meta.inner_weight_decay = 0.0  # of the inner step; the authors' code has 5e-4
    meta.inner_steps = 1
    meta.measure_alignment = True  # cosine of ∇L_ret and ∇L_acq at θ, one more backward pass

    config.replay = replay = ml_collections.ConfigDict()
    replay.kind = "memory_bank"  # a key of dfkd_jax.replay.schemes.SCHEMES
    replay.capacity = 10  # entries of the memory bank
    replay.entry_size = batch_size // 8  # images of an entry, and of a retention batch
    replay.push_period = 5  # a push at the end of the first unit, then of every so many-th
    replay.push_unit = "epoch"  # or iteration
    replay.mix = False  # False: replay one stored entry; True: images of all entries, mixed
    # Of generative replay, which learns from batch_size // 2 images at a time:
    replay.observe_steps = 4  # it learns after the first so many student steps of an iteration
    replay.vae_learning_rate = 0.02 / 40  # Adam, encoder and memory generator
    replay.kl_weight = 1e-5  # of the divergence of the latents from N(0, I)
    replay.recall_steps = 1  # Adam steps on the latents of a retention batch
    replay.recall_learning_rate = 0.02
    replay.recall_information_entropy = 5.0  # ie of the recall, Σ p̄ log10 p̄
    replay.recall_one_hot = 1.0  # oh of the recall, CE(T(x̂_m), argmax T(x̂_m))
    # Habits of the authors' code, see docs/differences.md:
    replay.recall_running_statistics = False  # the student's recall uses running statistics
    replay.accumulate_recall_gradient = False  # the recall's gradient is added to the memory's next

    return apply_method(config, method)
