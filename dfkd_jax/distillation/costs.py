"""What a method costs, counted in images: how often the networks are called, not how long it takes.

The steps of the algorithm are traced, not run, and every call of teacher and student is noted, so a
new method has no count of its own to keep. A forward pass of a batch of B images counts as B; a
backward pass is not counted apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dfkd_jax.distillation import steps
from dfkd_jax.distillation.steps import Parts


class Costs(NamedTuple):
    """Of some iterations."""

    generated_images: int  # that the student could learn from
    synthesis_steps: int  # optimisation steps of the generator, or of the pixels
    teacher_images: int  # forward passes of the teacher
    student_images: int  # forward passes of the student

    def times(self, count: int) -> "Costs":
        """So many of them."""
        return Costs(*(count * value for value in self))

    def plus(self, *others: "Costs") -> "Costs":
        """Together with others."""
        return Costs(*map(sum, zip(self, *others, strict=True)))


class _Counted:
    """A network that adds up the images it is applied to."""

    def __init__(self, network: Any) -> None:
        self._network, self.images = network, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def apply(self, variables: Any, images: jax.Array, *given: Any, **options: Any) -> Any:
        self.images += images.shape[0]
        return self._network.apply(variables, images, *given, **options)


def of_run(parts: Parts, iterations: int) -> Costs:
    """What so many iterations of a run cost, warm-up included.

    Args:
      parts: on whole batches.
      iterations: from the start of the run.
    """
    plan, replay = parts.method.plan, parts.method.replay
    warming = min(plan.warm_up, iterations)
    learning = iterations - warming
    rounds = warming * plan.warm_up_rounds + learning * plan.rounds
    student_steps = learning * plan.student_steps
    calls = {steps.update_step: rounds * plan.updates, steps.student_step: student_steps}
    if replay.observes_rounds:
        calls[steps.observe_round_step] = rounds
    if any(replay.observes_after):
        calls[steps.observe_step] = learning * sum(replay.observes_after)
    images = jnp.zeros((2, *parts.image_shape))
    state = jax.eval_shape(partial(steps.init, parts), jax.random.key(0))
    variables = jax.eval_shape(
        lambda key: parts.teacher.init(key, images, train=False), jax.random.key(0)
    )
    total = Costs(0, 0, 0, 0).plus(
        *(_of_step(parts, step, state, variables).times(count) for step, count in calls.items())
    )
    # A synthesizer that keeps what it has made gives that; another makes a batch for each step.
    batches = rounds if parts.method.synthesizer.made else student_steps
    return total._replace(
        generated_images=batches * parts.batch_size, synthesis_steps=rounds * plan.updates
    )


def _of_step(parts: Parts, step: Callable[..., Any], state: Any, variables: Any) -> Costs:
    """The images that one call of a step shows teacher and student; traced, not computed."""
    teacher, student = _Counted(parts.teacher), _Counted(parts.student)
    synthesizer = parts.method.synthesizer
    if synthesizer.student_mode == "eval_after_test":  # which traces both modes and runs one
        synthesizer = synthesizer._replace(student_mode="train")
    counted = parts._replace(
        teacher=teacher,
        student=student,
        method=parts.method._replace(synthesizer=synthesizer),
    )
    jax.eval_shape(partial(step, counted), state, variables)
    return Costs(0, 0, teacher.images, student.images)
