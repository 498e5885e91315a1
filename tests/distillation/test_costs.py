"""The images that a method costs, counted by hand."""

import pytest

from dfkd_jax.distillation import costs
from dfkd_jax.distillation.costs import Costs
from dfkd_jax.run.setup import create_parts, parse
from tests.helpers.tiny import tiny_config


def of(method, iterations, **fields):
    parts = create_parts(parse(tiny_config(method, **fields), reads_data=False))
    return costs.of_run(parts, iterations)


# B = 8, m = 4 of the memory bank, 2 student steps an iteration.
CASES = {
    # An update shows 8 images to both; a student step 8 to both.
    "no-replay": ({}, Costs(6 * 8, 3, 3 * 8 + 6 * 8, 3 * 8 + 6 * 8)),
    # Its generator does not look at the student.
    "dafl": ({}, Costs(6 * 8, 3, 3 * 8 + 6 * 8, 6 * 8)),
    # The bank keeps the teacher's logits; the student sees 8 and 4.
    "mb-dfkd": ({}, Costs(6 * 8, 3, 3 * 8 + 6 * 8, 3 * 8 + 6 * 12)),
    # L_acq at θ, L_ret at θ'; the alignment takes L_ret at θ as well.
    "lra-mb": ({}, Costs(6 * 8, 3, 3 * 8 + 6 * 8, 3 * 8 + 6 * 16)),
    # One iteration of warm-up with 2 rounds of 2 updates, then 2 with 1 round: 4 rounds, 8 updates
    # of 8 images, which the teacher labels when the pool observes them; 4 student steps on 8 images
    # of the pool, labelled anew. The decision adversary always asks the student.
    "fast": ({}, Costs(4 * 8, 8, 8 * 8 + 4 * 8 + 4 * 8, 8 * 8 + 4 * 8)),
    # Without an adversary; the contrast's local view is one more pass of the teacher.
    "cmi": ({"loss.adversarial": 0.0}, Costs(4 * 8, 8, 8 * 16 + 4 * 8 + 4 * 8, 4 * 8)),
    # The student learns from 8 images of the generator and 8 of its average.
    "mad": ({}, Costs(6 * 8, 3, 3 * 8 + 6 * 16, 3 * 8 + 6 * 16 + 0)),
}


@pytest.mark.parametrize("method", CASES)
def test_images_are_counted_as_they_are_by_hand(method):
    fields, expected = CASES[method]
    if method in ("lra-mb", "mb-dfkd", "mad"):
        fields = {**fields, "meta.measure_alignment": method == "lra-mb"}
    if method == "lra-mb":
        expected = expected._replace(student_images=3 * 8 + 6 * (8 + 4 + 4))
    assert of(method, 3, **fields) == expected


def test_a_generative_memory_shows_the_teacher_more():
    plain, generative = of("no-replay", 2), of("pre-dfkd", 2)
    assert generative.teacher_images > plain.teacher_images
    assert generative.generated_images == plain.generated_images
