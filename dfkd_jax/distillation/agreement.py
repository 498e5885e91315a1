"""How far student and teacher agree, measured without data: on generated and on replayed images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dfkd_jax.distillation import steps
from dfkd_jax.distillation.objectives import alignment
from dfkd_jax.distillation.state import DistillState
from dfkd_jax.distillation.steps import Parts, Variables
from dfkd_jax.losses.terms import l1_distance
from dfkd_jax.replay.scheme import Batch, RetentionBatch
from dfkd_jax.runtime.arrays import AnyArray
from dfkd_jax.runtime.draw import stream

Agreement = Callable[[DistillState, Variables], dict[str, jax.Array]]


def class_share(logits: Float[Array, "B K"]) -> Float[Array, ""]:
    """Percent of the images in the commonest class by the arg max of logits."""
    counts = jnp.bincount(jnp.argmax(logits, axis=-1), length=logits.shape[-1])
    return 100.0 * jnp.max(counts) / logits.shape[0]


def spread(images: Float[AnyArray, "B H W C"]) -> Float[Array, ""]:
    """The mean over all pairs of different images of |x_i − x_j| / √(H·W·C), ≥ 0.

    That is the root mean square difference of two images' pixels, in the space the images are in:
    here the teacher's, where 1 is a standard deviation of real ones; 0 where all are alike. The
    squared distances are |x_i|² + |x_j|² − 2 x_i·x_j, of images without their mean, which keeps
    rounding small; what it makes negative counts as 0. NaN where an image is.

    Args:
      images: two or more.
    """
    count = images.shape[0]
    flat = images.reshape(count, -1).astype(jnp.float32)
    flat = flat - jnp.mean(flat, axis=0)
    products = jnp.matmul(flat, flat.T, precision=lax.Precision.HIGHEST)
    norms = jnp.sum(jnp.square(flat), axis=-1)
    squares = jnp.maximum(norms[:, None] + norms[None] - 2.0 * products, 0.0)
    distances = jnp.sqrt(squares / flat.shape[1]) * (1.0 - jnp.eye(count))
    return jnp.sum(distances) / (count * (count - 1))


def _together(recalls: Float[Array, "recalls m *rest"]) -> Float[Array, "recalls*m *rest"]:
    return recalls.reshape(-1, *recalls.shape[2:])


def create_agreement(parts: Parts) -> Agreement:
    """(state, teacher variables) -> what they agree on now; pure, draws from a stream of its own.

    Student and teacher are in evaluation mode. The generated images are one batch that the
    generator makes now; the replayed ones are recalled as for the student, so many times that they
    are at least as many. The result holds scalars,

    - `generated_agreement`, `memory_agreement`: percent of the images on which both have the same
      arg max, in [0, 100];
    - `generated_distance`, `memory_distance`: mean over images and classes of |S − T|, logits, ≥ 0;
    - `generated_class_share`: percent of the generated images in the class that is the teacher's
      arg max most often, in [100/K, 100];
    - `generated_spread`: see `spread`;
    - `early_agreement`: percent of the images that were generated after the first epoch;
    - `gradient_alignment`, of an objective that looks at replayed images alone: the cosine of
      ∇L_acq(θ) on the generated images and ∇L_ret(θ) on a recalled batch, the student in training
      mode; other objectives measure it in every step.

    Those of the memory are NaN without replay; they and the alignment are NaN while there is
    nothing to replay.
    """

    replay = parts.method.replay

    def measure(state: DistillState, teacher_variables: Variables) -> dict[str, jax.Array]:
        variables = {"params": state.student.params, "batch_stats": state.student.batch_stats}
        keys = {
            name: stream(state.key, f"agreement_{name}", state.student_steps)
            for name in ("generated", "memory")
        }

        teacher = steps.view(parts, state, teacher_variables).teacher
        fresh = steps.generated(parts, state, keys["generated"])
        sets = {"generated": (fresh, teacher(fresh).logits)}
        if replay.replays:

            def recall(key: jax.Array) -> RetentionBatch:
                return replay.recall(state.replay, key, teacher)

            recalls = -(-len(fresh) // len(jax.eval_shape(recall, keys["memory"]).images))
            recalled = jax.vmap(recall)(jax.random.split(keys["memory"], recalls))
            sets["memory"] = (_together(recalled.images), _together(recalled.logits))
        images = jnp.concatenate([images for images, _ in sets.values()])
        student, _ = parts.student.apply(variables, images, train=False)  # once: less to compile
        nothing = dict.fromkeys(("memory_agreement", "memory_distance"), jnp.full((), jnp.nan))
        measured = {
            "early_agreement": steps.early_agreement(parts, state),
            "generated_class_share": class_share(sets["generated"][1]),
            "generated_spread": spread(fresh),
            **nothing,
        }
        for name, (images, wanted) in sets.items():
            logits, student = student[: len(images)], student[len(images) :]
            same = jnp.argmax(logits, axis=-1) == jnp.argmax(wanted, axis=-1)
            measured[f"{name}_agreement"] = 100.0 * jnp.mean(same)
            measured[f"{name}_distance"] = jnp.mean(l1_distance(logits, wanted))
        if replay.replays:
            if parts.method.objective.aligns_later:
                first = jax.tree.map(lambda leaf: leaf[0], recalled)
                batch = Batch(*sets["generated"])
                losses = steps.student_losses(parts, teacher, state.student, batch, first)
                measured["gradient_alignment"] = alignment(losses, state.student.params)
            some = recalled.weight[0] > 0
            of_replayed = {*nothing, "gradient_alignment"} & measured.keys()
            measured |= {name: jnp.where(some, measured[name], jnp.nan) for name in of_replayed}
        return measured

    return measure
