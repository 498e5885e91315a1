"""Random keys by name, and draws that do not depend on how a batch is split."""

import re
from pathlib import Path

import jax
import numpy as np

from dfkd_jax.runtime import draw

PACKAGE = Path(draw.__file__).parents[1]
KEY = jax.random.key(7)


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_a_key_depends_on_its_name_and_counter_alone():
    names = ("init_student", "generate", "acquire", "recall", "learn", "show", "early", "a", "b")
    keys = {bits(draw.stream(KEY, name, i)) for name in names for i in range(5)}
    assert len(keys) == 5 * len(names)
    # Written out, as another rule would move every draw of every run.
    assert bits(draw.stream(KEY, "generate", 3)) == bits(
        jax.random.fold_in(jax.random.fold_in(KEY, 0xFB0663BB), 3)
    )
    traced = jax.jit(lambda i: draw.stream(KEY, "generate", i))(3)
    assert bits(traced) == bits(draw.stream(KEY, "generate", 3))


def test_all_draws_have_their_keys_from_here():
    """One mechanism: no module folds numbers of its own into a key."""
    for path in PACKAGE.rglob("*.py"):
        if path.name != "draw.py":
            assert not re.search(r"\bfold_in\(|_STREAMS\b", path.read_text()), path.name


def test_an_example_is_drawn_by_its_global_index():
    whole = draw.normal(KEY, 0, 6, 3)
    parts = [draw.normal(KEY, first, 2, 3) for first in (0, 2, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
