"""Images of what the generator makes now and of what the memory holds."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.data.splits import denormalize
from dfkd_jax.distillation import steps
from dfkd_jax.distillation.state import DistillState
from dfkd_jax.distillation.steps import Parts, Variables
from dfkd_jax.replay.scheme import Batch
from dfkd_jax.runtime.compilation import rarely_run
from dfkd_jax.runtime.draw import stream

SHOWN = 16  # images of a panel


class Panel(NamedTuple):
    """One block of a sample grid; a plain tuple of the four serves as well."""

    title: str
    images: np.ndarray  # (N, H, W, C) in [0, 1], C = 1 or 3
    labels: np.ndarray  # (N,), the classes the teacher gives them
    confidence: np.ndarray  # (N,) in [0, 1], the teacher's probability of that class


def panels(
    parts: Parts,
    state: DistillState,
    teacher_variables: Variables,
    spec: DatasetSpec,
) -> list[Panel]:
    """Images of the synthesizer and, with replay, of the memory, with what the teacher sees."""

    # Op by op there would be a hundred programs to compile.
    @partial(jax.jit, compiler_options=rarely_run())
    def generated(state: DistillState, variables: Variables, key: jax.Array) -> Batch:
        images = steps.generated(parts, state, key)[:SHOWN]
        return Batch(images, steps.view(parts, state, variables).teacher(images).logits)

    key = stream(state.key, "show", state.student_steps)
    title = "last round" if parts.method.synthesizer.made else "generator, now"
    shown = [_panel(title, generated(state, teacher_variables, key), spec)]
    replay = parts.method.replay
    if replay.replays:
        teacher = steps.view(parts, state, teacher_variables).teacher
        shown.append(_panel(replay.title, replay.exhibit(state.replay, SHOWN, key, teacher), spec))
    return shown


def _panel(title: str, batch: Batch, spec: DatasetSpec) -> Panel:
    probabilities = jax.nn.softmax(batch.logits)
    return Panel(
        title,
        np.asarray(denormalize(batch.images, spec.mean, spec.std)),
        np.asarray(jnp.argmax(probabilities, axis=-1)),
        np.asarray(jnp.max(probabilities, axis=-1)),
    )
