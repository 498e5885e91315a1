"""The example of docs/own_method.md: at most 80 lines, and a run by its name."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dfkd_jax.compare import combinations
from dfkd_jax.run import records
from dfkd_jax.run.command_line import with_overrides
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY, build, tiny_config, untrained_teacher


def test_the_example_is_short(own_method_example):
    assert len(own_method_example.read_text().splitlines()) <= 80


def test_its_pixels_move_towards_the_targets(own_method_example):
    config = tiny_config("pixels")
    built, state, teacher = build(config)
    update = jax.jit(built.generator_step)
    losses = []
    for _ in range(20):
        logits = built.parts.teacher.apply(teacher, state.synthesizer.images, train=False)[0]
        log_p = jax.nn.log_softmax(logits)
        losses.append(-np.mean(np.take_along_axis(log_p, state.synthesizer.targets[:, None], 1)))
        state = update(state, teacher)
    assert losses[-1] < losses[0]
    assert list(state.synthesizer.targets) == list(range(8))


@pytest.mark.parametrize("objective", ["joint", "concatenated", "lra", "lra_concatenated"])
def test_every_objective_runs_on_top_of_it(own_method_example, objective):
    config = tiny_config("pixels", objective=objective)
    built, state, teacher = build(config)
    assert jax.eval_shape(built.student_step, state, teacher).student_steps.shape == ()


def test_a_comparison_takes_it(own_method_example, tmp_path):
    def load(method, **fields):
        return with_overrides(f"{ROOT}/configs/digits.py:{method}", {}, fields)

    found = combinations(load, ["pixels", "mb-dfkd"], ["exact", "first_order"], tmp_path)
    assert {c.label for c in found} == {"pixels_exact", "pixels_first_order", "mb-dfkd"}


@pytest.mark.slow
def test_the_command_runs_it_by_its_name(own_method_example, tmp_path):
    teacher = untrained_teacher(tmp_path / "teacher")
    fields = {**TINY, "teacher.checkpoint": teacher, "pixels.steps": 2}
    fields = {name: value for name, value in fields.items() if "learning" not in name}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dfkd_jax.main", "--config=digits:pixels"),
            *(f"--config.{name}={value}" for name, value in fields.items()),
            f"--workdir={tmp_path / 'run'}",
        ],
        cwd=own_method_example.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    history = records.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(history) == 3 and all(record["synthesis_loss"] for record in history)
    assert (tmp_path / "run" / "samples.png").is_file()
