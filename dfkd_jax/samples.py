"""The figure of what the generator makes now and of what the memory holds."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.data import DatasetSpec, denormalize
from dfkd_jax.figures import Panel, sample_grid
from dfkd_jax.replay import Batch, ReplayScheme
from dfkd_jax.state import DistillState, stream
from dfkd_jax.steps import Models, Steps, Variables

SHOWN = 16  # images of a panel


def panels(
    steps: Steps,
    replay: ReplayScheme | None,
    models: Models,
    state: DistillState,
    teacher_variables: Variables,
    spec: DatasetSpec,
) -> list[Panel]:
    """Images of the generator and, with replay, of the memory, with what the teacher sees."""

    def teacher(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return models.teacher.apply(teacher_variables, images, train=False)

    key = stream(state.key, "show", state.student_steps)
    images = steps.images(state, key)[:SHOWN]
    shown = [_panel("generator, now", Batch(images, teacher(images)[0]), spec)]
    if replay is not None:
        shown.append(_panel(replay.title, replay.exhibit(state.replay, SHOWN, key, teacher), spec))
    return shown


def write(shown: list[Panel], path: str | os.PathLike) -> None:
    """Draw the panels into one file."""
    sample_grid(shown, path)


def _panel(title: str, batch: Batch, spec: DatasetSpec) -> Panel:
    probabilities = jax.nn.softmax(batch.logits)
    return Panel(
        title,
        np.asarray(denormalize(batch.images, spec.mean, spec.std)),
        np.asarray(jnp.argmax(probabilities, axis=-1)),
        np.asarray(jnp.max(probabilities, axis=-1)),
    )
