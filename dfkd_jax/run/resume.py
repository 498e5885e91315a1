"""A run's folder: whose it is, and where to go on."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console

from dfkd_jax.configs import default
from dfkd_jax.distillation.epoch import finite_parts
from dfkd_jax.methods.table import RENAMED
from dfkd_jax.run import checkpoint
from dfkd_jax.run import config as config_lib
from dfkd_jax.run.student import is_teacher_of, keep_teacher_card
from dfkd_jax.runtime import fields, files
from dfkd_jax.runtime.errors import UserError
from dfkd_jax.runtime.finite import NonFinite


class Run(NamedTuple):
    """The folder of a run, and what is open in it."""

    config: ml_collections.ConfigDict
    workdir: Path
    manager: ocp.CheckpointManager
    history: checkpoint.History


def check_or_write_config(
    config: ml_collections.ConfigDict, card: dict[str, Any], workdir: Path
) -> None:
    """Write `config.json`, or compare with the one that is there; keep the card of a given teacher.

    Raises:
      UserError: it is another one, or the folder cannot be used.
    """
    path = workdir / "config.json"
    found = []
    try:
        if path.exists():
            found = other_fields(workdir, config, card)
        else:
            files.write_json(path, config_lib.to_dict(config))
        if not found:
            keep_teacher_card(workdir, config.teacher.checkpoint, card)
    except (OSError, UserError) as error:
        raise UserError(f"--workdir {workdir} cannot be used: {error}") from error
    if found:
        raise UserError(another_run(workdir, found))


def other_fields(
    workdir: Path, config: ml_collections.ConfigDict, card: dict[str, Any]
) -> list[str]:
    """In what the run in a folder differs from `config`, as `config.differences` says it.

    Paths are compared by what they lead to: the teacher by its content, the student to start from
    by its folder.

    Args:
      workdir: the folder.
      config: to go on with.
      card: of its teacher, if one is given; else empty.

    Raises:
      OSError, UserError: `config.json` or a card cannot be read.
    """
    stored, current = files.read_json(workdir / "config.json"), config_lib.to_dict(config)
    # A version that lacked a field did what its default does now.
    defaults = fields.declare(default.fields(config.method))
    defaults.batch_size = stored.get("batch_size", config.batch_size)  # from which others follow
    stored = _filled(stored, config_lib.to_dict(defaults))
    stored["method"] = RENAMED.get(str(stored.get("method")), stored.get("method"))

    def checkpoints(network: str) -> list[str | None]:
        return [c.get(network, {}).get("checkpoint") for c in (stored, current)]

    before, now = checkpoints("teacher")
    same = is_teacher_of(workdir, before, now, card)
    if same:
        current["teacher"]["checkpoint"] = before
    started, starts = checkpoints("student")
    if started and starts and Path(started).resolve() == Path(starts).resolve():
        current["student"]["checkpoint"] = started
    found = config_lib.differences(stored, current)
    return found if same or before != now else [*found, "the content of teacher.checkpoint"]


def _filled(stored: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The stored values, and defaults where there are none."""
    both = {**defaults, **stored}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(both[name], dict):
            both[name] = _filled(both[name], value)
    return both


def another_run(workdir: Path, found: Sequence[str]) -> str:
    """The sentence for a folder whose run differs in the fields found."""
    sentence = f"{workdir} holds a run of another configuration; the differing fields are "
    sentence += "; ".join(found)
    if any(field.startswith("epochs: ") for field in found):
        sentence += (
            "; the learning rate follows config.epochs, so a run cannot be made longer or shorter: "
            f"give a new --workdir, and --config.student.checkpoint={workdir} to start from this "
            "student"
        )
    return sentence + "."


def resume(
    config: ml_collections.ConfigDict,
    workdir: Path,
    init: Callable[[int], Any],
    console: Console,
) -> tuple[Any, Run]:
    """The state to go on from, and the folder with the history up to it.

    Args:
      config: of the run.
      workdir: its folder.
      init: seed ↦ the state before the first epoch.
      console: where damaged checkpoints are reported.

    Raises:
      DamagedCheckpoint: see `checkpoint.restore_latest`.
      NonFinite: an earlier version of this program saved parameters that are no finite numbers.
    """
    fresh = init(config.seed)
    with contextlib.ExitStack() as unless_returned:
        manager = checkpoint.open_checkpoints(workdir / "checkpoints")
        unless_returned.callback(manager.close)
        report = partial(console.print, soft_wrap=True)
        found = checkpoint.restore_latest(manager, fresh, report)
        if found is None:
            unless_returned.pop_all()
            return fresh, Run(config, workdir, manager, [])
        state, history = found
        if not np.all(jax.jit(lambda state: jnp.stack(list(finite_parts(state).values())))(state)):
            raise NonFinite(
                f"The checkpoint of epoch {len(history)} in {manager.directory} holds parameters "
                "that are no finite numbers, as training diverged; remove that folder to start "
                "this run anew."
            )
        unless_returned.pop_all()
        return state, Run(config, workdir, manager, history)
