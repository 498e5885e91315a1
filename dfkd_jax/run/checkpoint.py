"""Checkpoints of a run: one per epoch, written whole or not at all, checked when read.

Each holds a pytree of arrays, in orbax's own format, the run's history as JSON, and the checksums
of these files, written last. Arrays are whole whatever they were split over, so a run may go on
with other devices or processes. Nothing is ever unpickled.
"""

import errno
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dfkd_jax.runtime import files, processes
from dfkd_jax.runtime.errors import UserError

SUMS = "checksums.json"
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
    try:
        _check_room(Path(manager.directory), state)
        manager.save(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                record=ocp.args.JsonSave({"history": history}),
            ),
        )
        if processes.is_main():
            directory = _directory(manager, epoch)
            files.write_json(directory / SUMS, file_checksums(directory))
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
) -> tuple[Any, History] | None:
    """State and history of the newest checkpoint that is whole; None if there is none at all.

    A damaged one is reported and removed once an older one has been read in its place.

    Args:
      manager: from `open_checkpoints`.
      abstract_state: the state, or its shapes and dtypes.
      report: called with one sentence per damaged checkpoint.

    Raises:
      DamagedCheckpoint: there are checkpoints and none can be read.
    """
    abstract_state = jax.tree.map(ocp.tree.to_shape_dtype_struct, abstract_state)
    epochs = sorted(manager.all_steps(), reverse=True)
    damage = {}
    for epoch in epochs:
        if processes.is_main():
            damage[epoch] = _damage(_directory(manager, epoch))
        if not processes.any_of(bool(damage.get(epoch))):
            break
        report(f"The checkpoint of epoch {epoch} is damaged and is left out: {damage.get(epoch)}")
    else:
        if not epochs:
            return None
        raise DamagedCheckpoint(
            f"None of the checkpoints in {manager.directory} can be read; "
            "remove that folder to start this run anew."
        )
    try:
        restored = manager.restore(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), record=ocp.args.JsonRestore()
            ),
        )
    except Exception as error:  # whole, but not what this program wrote
        reason = str(error).strip().split("\n")[0][:200]
        raise DamagedCheckpoint(
            f"The checkpoint of epoch {epoch} in {manager.directory} does not fit this version of "
            f"the program: {reason}"
        ) from error
    for later in epochs[: epochs.index(epoch)]:  # which will be written again
        manager.delete(later)
    return restored["state"], restored["record"]["history"]


def read_newest(directory: Path, abstract_part: Any) -> tuple[Any, History] | None:
    """Part of the newest whole state in `directory`, and its history; nothing is changed there.

    Args:
      directory: that `open_checkpoints` was given.
      abstract_part: a pytree of shapes and dtypes whose names are those of the saved state, with
        what is not wanted left out.

    Returns:
      The part as NumPy arrays, and the history; None if no checkpoint is whole.

    Raises:
      DamagedCheckpoint: it is whole, but has no such part.
    """
    epochs = sorted((int(p.name) for p in directory.glob("*") if p.name.isdigit()), reverse=True)
    whole = [directory / str(e) for e in epochs if _damage(directory / str(e)) is None]
    if not whole:
        return None
    _quiet()
    as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(np.ndarray, leaf.dtype), abstract_part)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            part = checkpointer.restore(
                whole[0].absolute() / "state",
                args=ocp.args.PyTreeRestore(
                    abstract_part, restore_args=as_numpy, partial_restore=True
                ),
            )
        shapes = [leaf.shape for leaf in jax.tree.leaves(abstract_part)]
        if [leaf.shape for leaf in jax.tree.leaves(part)] != shapes:
            raise ValueError("arrays of other shapes are in it")
    except Exception as error:  # whole, but not what this program wrote
        reason = str(error).strip().split("\n")[0][:200]
        raise DamagedCheckpoint(f"The checkpoint {whole[0]} cannot be used: {reason}.") from error
    return part, files.read_json(whole[0] / "record" / "metadata")["history"]


def _quiet() -> None:
    """Orbax reports every stage of every save at level INFO and some fallbacks as warnings.

    What it reports at level ERROR is raised too, and would come from each of its threads.
    """
    logging.set_verbosity(logging.FATAL)


def file_checksums(directory: Path) -> dict[str, int]:
    """CRC-32 of every file below `directory` by its relative path, but for the list itself."""
    return {
        str(path.relative_to(directory)): _crc(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != SUMS
    }


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc


def _damage(directory: Path) -> str | None:
    """What is wrong with the files of one checkpoint; None if nothing is."""
    try:
        expected, found = files.read_json(directory / SUMS), file_checksums(directory)
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, UserError) as error:
        return str(error)
    wrong = [name for name, crc in expected.items() if found.get(name) != crc]
    return f"{wrong[0]} is not what was written" if wrong else None


def _check_room(folder: Path, tree: Any) -> None:
    """Raise now if arrays will not fit: orbax's threads fail late, in many words.

    Raises:
      CannotWrite: see `files`.
    """
    if processes.is_main():
        size = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        if shutil.disk_usage(folder).free < size:
            raise files.CannotWrite(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _directory(manager: ocp.CheckpointManager, epoch: int) -> Path:
    return Path(manager.directory) / str(epoch)


def load_variables(directory: str | os.PathLike, abstract_variables: Any) -> Any:
    """Read the weights of a teacher as earlier versions wrote them, a folder of orbax.

    Raises:
      ValueError: it does not hold arrays of these names and shapes.
    """
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, abstract_variables)
    _quiet()
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(directory).absolute(), abstract)
