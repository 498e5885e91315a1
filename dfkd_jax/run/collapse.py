"""Whether a run has collapsed: its generator, or its student, by what is recorded of each epoch."""

from collections.abc import Sequence

from dfkd_jax.run.records import ACCURACY, CLASS_SHARE, Record

SHARE = 99.0
"""Percent of the generated images in one class from which they count as all alike."""

EPOCHS = 3
"""So many epochs in a row must show a student at chance."""

FACTOR, MARGIN = 1.5, 0.05
"""A student is at chance up to 1.5 times the accuracy of guessing, 100 / K percent, and at most a
twentieth of the way from there to 100 %: of 2 classes up to 52.5 %, of 10 up to 14.5, of 100 up to
1.5. The first bound is for many classes, the second for few."""


def at_most_chance(num_classes: int) -> float:
    """The test accuracy, percent, up to which a student of so many classes is at chance."""
    guessing = 100.0 / num_classes
    return min(FACTOR * guessing, guessing + MARGIN * (100.0 - guessing))


def warnings(history: Sequence[Record], num_classes: int, split: str = "test") -> dict[str, str]:
    """What the newest epochs show of a collapse.

    Args:
      history: of the run so far, as in `metrics.jsonl`.
      num_classes: K.
      split: what accuracies are measured on.

    Returns:
      One sentence under "generator" when the images of the last epoch are of one class, and one
      under "student" when the last `EPOCHS` epochs all left it at chance.
    """
    found = {}
    if not history:
        return found
    epoch, share = history[-1]["epoch"], history[-1].get(CLASS_SHARE)
    if share is not None and share >= SHARE:
        found["generator"] = (
            f"The generator has collapsed: in epoch {epoch} the teacher puts {share:.0f} % of the "
            "generated images into one class, so agreement on them says little."
        )
    newest = [record.get(ACCURACY) for record in history[-EPOCHS:]]
    last = [accuracy for accuracy in newest if accuracy is not None]
    bound = at_most_chance(num_classes)
    if len(last) == EPOCHS and all(accuracy <= bound for accuracy in last):
        found["student"] = (
            f"The student is at chance: its {split} accuracy was at most {max(last):.2f} % in the "
            f"{EPOCHS} epochs up to epoch {epoch}, where guessing among {num_classes} classes "
            f"gives {100.0 / num_classes:.2f} %."
        )
    return found
