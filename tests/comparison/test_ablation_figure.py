"""The figure of an ablation: which field it is of, and where its points are."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from dfkd_jax import report
from dfkd_jax.comparison import run_folders
from dfkd_jax.comparison.ablation_figure import ablation, varied_field
from dfkd_jax.runtime import files
from tests.helpers.fabricated import fabricate


def vary(root, method="lra-mb", seeds=(1, 2), **fields):
    """Runs with these values of the fields, one after the other."""
    for i, values in enumerate(zip(*fields.values(), strict=True)):
        for seed in seeds:
            accuracies = [10.0 * i, 10.0 * i + 2 * seed]
            own = dict(zip(fields, values, strict=True))
            fabricate(root / method / str(i), method, seed, accuracies, **own)


def groups_of(root):
    return run_folders.groups(run_folders.find([root])[0])


def test_with_a_run_that_lacks_the_field_there_is_no_figure(tmp_path):
    vary(tmp_path, **{"generator.final_learning_rate": (0.0, 0.001)})
    assert varied_field(groups_of(tmp_path)) == "generator.final_learning_rate"
    folder = fabricate(tmp_path / "old", "lra-mb", 1, [10.0, 20.0])
    config = files.read_json(folder / "config.json")
    del config["generator"]["final_learning_rate"]
    files.write_json(folder / "config.json", config)
    assert varied_field(groups_of(tmp_path)) is None
    report.write([tmp_path])
    assert not (tmp_path / "ablation.png").exists()


@pytest.mark.parametrize(
    "fields, found",
    [
        ({"meta.inner_lr": (0.01, 0.1)}, "meta.inner_lr"),
        ({"meta.inner_steps": (1, 2, 3)}, "meta.inner_steps"),
        ({"meta.inner_lr": (0.01,)}, None),
        ({"loss.adversarial_form": ("js", "l1")}, None),
        ({"replay.mix": (True, False)}, None),
        ({"meta.inner_lr": (0.01, 0.1), "meta.inner_steps": (1, 2)}, None),
    ],
)
def test_the_field_is_the_one_number_that_varies(tmp_path, fields, found):
    vary(tmp_path, **fields)
    fabricate(tmp_path, "mb-dfkd", 1, [10.0, 20.0], **{"meta.inner_lr": 0.5})  # its own label
    assert varied_field(groups_of(tmp_path)) == found


def test_runs_of_several_teachers_have_no_figure(tmp_path):
    for i, alpha in enumerate((0.01, 0.1, 0.1)):
        fields = {"meta.inner_lr": alpha, "teacher.checkpoint": f"teacher{i}"}
        fabricate(tmp_path / str(i), "lra-mb", 1, [10.0, 20.0], **fields)
    groups = groups_of(tmp_path)
    assert len(groups) == 3 and varied_field(groups) is None


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def test_points_are_means_over_seeds_at_the_values(tmp_path, drawn):
    vary(tmp_path, **{"meta.inner_lr": (0.01, 0.1, 0.9)})
    fabricate(tmp_path, "mb-dfkd", 1, [40.0, 50.0], **{"meta.inner_lr": 0.5})
    ablation(groups_of(tmp_path), tmp_path / "f.png")
    mean, final, alignment = drawn[0].axes
    for axes, expected, joint in (
        (mean, [1.5, 11.5, 21.5], 45.0),
        (final, [3.0, 13.0, 23.0], 50.0),
        (alignment, [0.15, 0.15, 0.15], 0.15),
    ):
        (points,) = (c for c in axes.containers if c.get_label() == "lra-mb_exact")
        x, y = (np.asarray(values, float) for values in points.lines[0].get_data())
        np.testing.assert_allclose(x, [0.01, 0.1, 0.9], rtol=0.1)
        np.testing.assert_allclose(y, expected)
        (line,) = (line for line in axes.lines if line.get_label() == "mb-dfkd")
        assert list(line.get_ydata()) == [pytest.approx(joint)] * 2
        assert axes.get_xscale() == "log" and axes.get_xlabel() == "meta.inner_lr"
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.01", "0.1", "0.9"]


def test_few_steps_stand_on_a_linear_scale_and_what_is_missing_is_said(tmp_path, drawn):
    vary(tmp_path, "no-replay", seeds=(1,), **{"student.steps": (1, 2, 3)})
    ablation(groups_of(tmp_path), tmp_path / "f.png")
    mean, _, alignment = drawn[0].axes
    assert mean.get_xscale() == "linear"
    assert [text.get_text() for text in alignment.texts] == ["not measured in any of the runs"]


def test_a_report_has_it_where_a_field_varies(tmp_path):
    vary(tmp_path / "varied", **{"meta.inner_lr": (0.01, 0.1)})
    fabricate(tmp_path / "plain", "lra-mb", 1, [10.0, 20.0])
    report.write([tmp_path / "varied"])
    assert (tmp_path / "varied" / "ablation.png").stat().st_size > 10_000
    assert "What meta.inner_lr does" in (tmp_path / "varied" / "report.html").read_text()
    report.write([tmp_path / "plain"])
    assert not (tmp_path / "plain" / "ablation.png").exists()
