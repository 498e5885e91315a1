"""The teacher: a folder of weights and a card, trained here only where there is none.

Training one is the only use that a run makes of real training data.
"""

import hashlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console

from dfkd_jax.data.data_specs import CARD, is_teacher
from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.data.splits import Split, augmented, normalize
from dfkd_jax.networks.given import AnyClassifier
from dfkd_jax.run import checkpoint
from dfkd_jax.run.accuracy import Accuracy
from dfkd_jax.run.progress import TEACHER_FIELDS, Progress
from dfkd_jax.runtime import array_files, files, processes
from dfkd_jax.runtime.compilation import rarely_run
from dfkd_jax.runtime.devices import WHOLE, Devices
from dfkd_jax.runtime.draw import stream
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.finite import NonFinite, all_finite, check_variables
from dfkd_jax.runtime.stop import Stopped

WEIGHTS = "weights.safetensors"
OLD_WEIGHTS = "weights"  # a folder of orbax, as earlier versions wrote it
SAVE_SECONDS = 2  # shorter epochs share a checkpoint, which would take most of their time
Variables = dict[str, Any]


class TrainState(struct.PyTreeNode):
    """A classifier in supervised training."""

    key: jax.Array
    step: jax.Array  # () int32
    order: jax.Array  # (N,) int32, the epoch's permutation of the training images
    params: Any
    batch_stats: Any
    opt_state: Any
    loss: jax.Array  # () sum over the steps of the epoch


class Training(NamedTuple):
    """The pure functions of supervised training."""

    init: Callable[[int], TrainState]  # from the seed
    epoch: Callable[[TrainState], TrainState]
    steps_per_epoch: int


def digest(variables: Variables) -> str:
    """What these weights are, wherever they lie: 64 hexadecimal digits.

    SHA-256 over the names of the arrays in their order, their types, shapes and bytes.
    """
    found = hashlib.sha256()
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    for name, leaf in sorted(named.items()):
        array = np.asarray(leaf)
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def load_teacher(
    directory: str | os.PathLike,
    model: AnyClassifier,
    image_shape: tuple,
    devices: Devices | None = None,
) -> Variables:
    """The teacher's variables, a copy on each device.

    Raises:
      UserError: the weights are not those of `model`, or no finite numbers; one sentence.
    """
    abstract = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((2, *image_shape)), train=False)
    )
    path = Path(directory) / WEIGHTS
    try:
        if path.exists():
            variables = _of_names(array_files.read(path), abstract)
        else:
            variables = checkpoint.load_variables(Path(directory) / OLD_WEIGHTS, abstract)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(
            f"The teacher in {directory} cannot be read as config.teacher.model: {reason}"
        ) from error
    variables = devices.put(variables) if devices else jax.tree.map(jnp.asarray, variables)
    check_variables(variables, f"The teacher in {directory}")
    return variables


def _of_names(arrays: dict[str, np.ndarray], abstract: Variables) -> Variables:
    """The arrays as the network's variables, whose shapes are given; see `check_names`."""
    wanted: dict[str, Any] = flatten_dict(abstract, sep="/")
    check_names(unflatten_dict(arrays, sep="/"), abstract)
    typed = {name: np.asarray(array, wanted[name].dtype) for name, array in arrays.items()}
    return unflatten_dict(typed, sep="/")


def check_names(variables: Variables, abstract: Variables) -> None:
    """Refuse variables that are not those of a network, whose shapes are given.

    Raises:
      UserError: some are missing, unknown or of another shape; one sentence with the first names.
    """
    arrays: dict[str, Any] = flatten_dict(variables, sep="/")
    wanted: dict[str, Any] = flatten_dict(abstract, sep="/")
    shapes = [{name: leaf.shape for name, leaf in flat.items()} for flat in (arrays, wanted)]
    wrong = array_files.differences(*shapes)
    if wrong:
        raise UserError(f"{wrong}.")


def save_teacher(directory: str | os.PathLike, variables: Variables, card: dict[str, Any]) -> None:
    """Write the weights, then the card that marks them complete, with their digest.

    Raises:
      NonFinite: some are no finite numbers; nothing is written.
    """
    check_variables(variables, "The teacher")
    # A network without batch norm has no such collection when it is loaded.
    variables = {name: collection for name, collection in variables.items() if collection}
    if processes.is_main():
        arrays: dict[str, Any] = flatten_dict(jax.tree.map(np.asarray, variables), sep="/")
        array_files.write(Path(directory) / WEIGHTS, arrays)
        files.write_json(Path(directory) / CARD, {**card, "digest": digest(variables)})
    processes.any_of(False)  # nobody looks for the card before it is there


class Recipe(NamedTuple):
    """What stays the same during a training: the network, its optimizer and how it sees images."""

    model: nn.Module
    optimizer: optax.GradientTransformation
    spec: DatasetSpec
    devices: Devices
    augment: bool
    examples: int  # training images
    batch_size: int
    steps_per_epoch: int


def create_recipe(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    count: int,
    spec: DatasetSpec,
    devices: Devices,
) -> Recipe:
    """SGD with momentum, weight decay and a learning rate that falls as a cosine.

    Args:
      config: of the teacher.
      model: to train.
      count: of training images.
      spec: of their data set.
      devices: their number divides the size of a batch, which is made smaller for it.
    """
    batch_size = min(config.batch_size, count) // devices.count * devices.count
    steps_per_epoch = count // batch_size
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.epochs * steps_per_epoch)
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )
    return Recipe(
        model=model,
        optimizer=optimizer,
        spec=spec,
        devices=devices,
        augment=config.augment,
        examples=count,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
    )


def init(recipe: Recipe, seed: int) -> TrainState:
    """The state before the first step."""
    key = jax.random.key(seed)
    images = jnp.zeros((2, *recipe.spec.image_shape))
    variables = recipe.model.init(stream(key, "init"), images, train=True)
    return TrainState(
        key=key,
        step=jnp.zeros((), jnp.int32),
        order=jnp.arange(recipe.examples, dtype=jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=recipe.optimizer.init(variables["params"]),
        loss=jnp.zeros(()),
    )


def shuffle(recipe: Recipe, state: TrainState) -> TrainState:
    """Begin an epoch: a new order of the images, and no loss so far."""
    key = stream(state.key, "order", state.step)
    order = jax.random.permutation(key, recipe.examples).astype(jnp.int32)
    return state.replace(order=order, loss=jnp.zeros(()))


def train_step(
    recipe: Recipe, state: TrainState, images: jax.Array, labels: jax.Array
) -> TrainState:
    """One step of SGD down the cross-entropy of the next batch in the epoch's order.

    Args:
      recipe: of the training.
      state: before the step.
      images: all of them, uint8 (N, H, W, C). labels: theirs, int32 (N,).
    """
    first = (state.step % recipe.steps_per_epoch) * recipe.batch_size
    chosen = jax.lax.dynamic_slice_in_dim(state.order, first, recipe.batch_size)
    batch, targets = recipe.devices.split((images[chosen], labels[chosen]))
    if recipe.augment:
        key = stream(state.key, "augment", state.step)
        keys = jax.random.split(key, batch.shape[0])
        batch = augmented(keys, batch, recipe.spec.flip)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        (logits, _), updated = recipe.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            normalize(batch, recipe.spec.mean, recipe.spec.std),
            train=True,
            mutable=["batch_stats"],
        )
        value = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(value), updated.get("batch_stats", {})

    (value, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(gradient, state.opt_state, state.params)
    return state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        loss=state.loss + value,
    )


def create_training(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    train: Split,
    spec: DatasetSpec,
    devices: Devices | None = None,
) -> Training:
    """SGD with momentum and cross-entropy; the training images stay on the device as uint8.

    Each of several devices holds all images and, by the compiler's partitioning, computes its share
    of every batch; batch statistics are global.
    """
    devices = devices or Devices.first()
    recipe = create_recipe(config, model, len(train.labels), spec, devices)
    data = devices.put((train.images, train.labels))
    compiled = partial(jax.jit, out_shardings=devices.shardings(WHOLE))
    start = compiled(partial(init, recipe), compiler_options=rarely_run())
    begin = compiled(partial(shuffle, recipe), donate_argnums=0, compiler_options=rarely_run())
    advance = compiled(partial(train_step, recipe), donate_argnums=0)

    def epoch(state: TrainState) -> TrainState:
        state = begin(state)
        for _ in range(recipe.steps_per_epoch):
            state = advance(state, *data)
        return state

    return Training(start, epoch, recipe.steps_per_epoch)


def train_teacher(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    train: Split,
    spec: DatasetSpec,
    accuracy: Accuracy,
    directory: Path,
    *,
    devices: Devices,
    report: Callable[[dict[str, Any]], None],
    log: Callable[[str], None],
    stop_requested: Callable[[], str | None],
) -> tuple[Variables, dict[str, Any]] | None:
    """Train `config.teacher` on real data, resuming where an earlier process was cut.

    Returns:
      The variables and a record of the training (`accuracy` in percent, `seconds`, `epochs`), or
      None if it was asked to stop; the epochs so far are saved then.

    Raises:
      NonFinite: training diverged; nothing of that epoch is saved.
    """
    finite = jax.jit(lambda state: all_finite((state.loss, state.params, state.batch_stats)))
    training = create_training(config, model, train, spec, devices)
    state, history = training.init(config.seed), []
    with checkpoint.open_checkpoints(directory / "checkpoints") as manager:
        restored = checkpoint.restore_latest(manager, state, log)
        if restored is not None:
            state, history = restored
        saved = -float("inf")  # the first epoch is saved in any case
        for epoch in range(len(history) + 1, config.epochs + 1):
            started = time.perf_counter()
            state = training.epoch(state)
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            loss, correct, sound = jax.device_get(
                (state.loss, accuracy.correct(variables), finite(state))
            )
            if not sound:
                raise NonFinite(
                    f"The training of the teacher diverged in epoch {epoch}: its loss or a "
                    "parameter is no finite number; config.teacher.learning_rate is "
                    f"{config.learning_rate}, and a lower one may help."
                )
            record = {
                "epoch": epoch,
                "loss": float(loss) / training.steps_per_epoch,
                "teacher_accuracy": accuracy.percent(correct),
                "seconds": time.perf_counter() - started,
            }
            history = [*history, record]
            last = epoch == config.epochs
            stop = not last and stop_requested()
            if last or stop or processes.from_main(time.monotonic() - saved > SAVE_SECONDS):
                checkpoint.save(manager, epoch, state, history)
                saved = time.monotonic()
            report(record)
            if stop:
                return None
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return variables, {
        "accuracy": history[-1]["teacher_accuracy"],
        "epochs": len(history),
        "seconds": sum(r["seconds"] for r in history),
    }


def obtain_teacher(
    config: ml_collections.ConfigDict,
    model: Any,
    spec: DatasetSpec,
    load: Callable[[str], Split],
    accuracy: Accuracy,
    workdir: Path,
    *,
    console: Console,
    stop_requested: Callable[[], str | None],
    devices: Devices | None = None,
) -> Variables:
    """Load the teacher from its checkpoint, or train and save it in `workdir`/teacher.

    Raises:
      UserError: see `load_teacher` and `train_teacher`.
      Stopped: asked to stop while training; the epochs so far are saved.
    """
    devices = devices or Devices.first()
    directory = Path(config.teacher.checkpoint or workdir / "teacher")
    if not processes.from_main(is_teacher(directory)):
        fields = {"fields": TEACHER_FIELDS, "console": console}
        with Progress(config.teacher.epochs, description="teacher", **fields) as progress:
            progress.log(
                f"There is no teacher in {directory}: training {config.teacher.model} on the "
                f"training split of {config.dataset.name}. "
                "Nothing else in this run reads real training data."
            )
            trained = train_teacher(
                config.teacher,
                model,
                load("train"),
                spec,
                accuracy,
                directory,
                devices=devices,
                report=progress.update,
                log=progress.log,
                stop_requested=stop_requested,
            )
        if trained is None:
            raise Stopped("A signal came while training the teacher; its epochs are saved.")
        variables, record = trained
        card = {
            "model": config.teacher.model,
            "num_classes": spec.num_classes,
            "image_shape": spec.image_shape,
            "dataset": config.dataset.name,
            "mean": spec.mean,
            "std": spec.std,
            **record,
        }
        save_teacher(directory, variables, card)
    return load_teacher(directory, model, spec.image_shape, devices)
