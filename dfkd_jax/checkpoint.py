"""Checkpoints of a run: one per epoch, written whole or not at all, checked when read.

Each holds a pytree of arrays, in orbax's own format, and the run's history as JSON with a checksum
of the arrays. Nothing is ever unpickled.
"""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

History = list[dict[str, Any]]


class DamagedCheckpoint(Exception):
    """No checkpoint of a run can be read."""


class SaveFailed(Exception):
    """A checkpoint could not be written, for want of space or of permission."""


def open_checkpoints(directory: str | os.PathLike, keep: int = 2) -> ocp.CheckpointManager:
    """The checkpoints of `directory`, made if missing; the newest `keep` are kept.

    Saving is synchronous: once an epoch is reported, a kill cannot lose it.
    """
    _quiet()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def save(manager: ocp.CheckpointManager, epoch: int, state: Any, history: History) -> None:
    """Write the state after `epoch` epochs. The checkpoint before it stays until this one is whole.

    Raises:
      SaveFailed: the file system refused; older checkpoints are untouched.
    """
    record = {"history": history, "checksum": checksum(state)}
    try:
        manager.save(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
            ),
        )
    except Exception as error:  # orbax and its storage each have errors of their own
        reason = str(error).strip().split("\n")[0][:200]
        raise SaveFailed(
            f"Epoch {epoch} could not be saved in {manager.directory} ({reason}); "
            "the checkpoints before it are untouched, and the same command goes on from them."
        ) from error


def restore_latest(
    manager: ocp.CheckpointManager,
    abstract_state: Any,
    report: Callable[[str], None],
    newest: int | None = None,
) -> tuple[Any, History] | None:
    """State and history of the newest checkpoint that is whole; None if there is none at all.

    A damaged one is reported and removed once an older one has been read in its place.

    Args:
      manager: from `open_checkpoints`.
      abstract_state: the state, or its shapes and dtypes.
      report: called with one sentence per damaged checkpoint.
      newest: look at no checkpoint of a later epoch.

    Raises:
      DamagedCheckpoint: there are checkpoints and none can be read.
    """
    abstract_state = jax.tree.map(ocp.tree.to_shape_dtype_struct, abstract_state)
    damaged = []
    for epoch in sorted(manager.all_steps(), reverse=True):
        if newest is not None and epoch > newest:
            continue
        try:
            restored = manager.restore(
                epoch,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state), record=ocp.args.JsonRestore()
                ),
            )
            state, record = restored["state"], restored["record"]
            if checksum(state) != record["checksum"]:
                raise ValueError("its checksum does not match")
        except Exception as error:  # damage shows in as many ways as there are readers
            reason = str(error).strip().split("\n")[0][:200]
            damaged.append(epoch)
            report(f"The checkpoint of epoch {epoch} is damaged and is left out: {reason}")
            continue
        for step in damaged:
            manager.delete(step)
        return state, record["history"]
    if damaged:
        raise DamagedCheckpoint(
            f"None of the checkpoints in {manager.directory} can be read; "
            "remove that folder to start this run anew."
        )
    return None


def forget_after(manager: ocp.CheckpointManager, epoch: int) -> None:
    """Remove the checkpoints of later epochs, which will be written again."""
    for step in manager.all_steps():
        if step > epoch:
            manager.delete(step)


def _quiet() -> None:
    """Orbax reports every stage of every save at level INFO and some fallbacks as warnings."""
    logging.set_verbosity(logging.ERROR)


def checksum(tree: Any) -> int:
    """CRC-32 over the bytes of all leaves, in order."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        crc = zlib.crc32(np.asarray(leaf).reshape(-1).view(np.uint8).data, crc)
    return crc


def save_variables(directory: str | os.PathLike, variables: Any) -> None:
    """Write a network's variables (params, batch_stats) as one orbax checkpoint."""
    _quiet()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory).absolute(), variables, force=True)


def load_variables(directory: str | os.PathLike, abstract_variables: Any) -> Any:
    """Read what `save_variables` wrote.

    Raises:
      ValueError: it does not hold arrays of these names and shapes.
    """
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, abstract_variables)
    _quiet()
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(directory).absolute(), abstract)
