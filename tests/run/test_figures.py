import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from dfkd_jax.run import figures


def record(epoch, **changes):
    values = {
        "epoch": epoch,
        "student_accuracy": 50.0 + epoch,
        "acquisition_loss": 1 / epoch,
        "retention_loss": 0.5 / epoch,
        "generator_loss": -3.0,
        "gradient_alignment": 0.3,
    }
    return values | changes


NO_REPLAY = {"retention_loss": None, "gradient_alignment": None}
HISTORIES = {
    "whole": [record(e) for e in range(1, 9)],
    "late replay": [record(e, **(NO_REPLAY if e < 4 else {})) for e in range(1, 9)],
    "no replay": [record(e, **NO_REPLAY) for e in range(1, 9)],
    "one epoch": [record(1)],
    "diverged": [record(1), record(2, acquisition_loss=float("nan"), student_accuracy=None)],
    "few keys": [{"epoch": 1}],
    "empty": [],
}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def texts(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("name", HISTORIES)
def test_learning_curves_of_all_kinds_are_drawn(tmp_path, drawn, name):
    path = tmp_path / "figures/curve.png"
    figures.learning_curve(HISTORIES[name], 97.5, path)
    shown = [text.get_text() for text in drawn[0].findobj(Text)]
    assert "teacher 97.50" in shown
    assert not [text for text in shown if "nan" in text or "None" in text]
    assert pixels(path).std() > 0
    assert [file.name for file in path.parent.iterdir()] == ["curve.png"]


def test_the_curve_shows_teacher_maximum_and_last(tmp_path, drawn):
    history = [record(1), record(2, student_accuracy=91.0), record(3, student_accuracy=90.0)]
    figures.learning_curve(history, 97.5, tmp_path / "curve.png")
    accuracy = drawn[0].axes[0]
    legend = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert legend == ["teacher 97.50", "student", "max 91.00 (epoch 2)", "final 90.00 (epoch 3)"]


def test_without_data_the_agreement_is_drawn(tmp_path, drawn):
    history = [
        record(
            e,
            student_accuracy=None,
            generated_agreement=10.0 * e,
            generated_class_share=100.0 / e,
            gradient_alignment=None,
        )
        for e in (1, 2, 4)
    ]
    figures.learning_curve(history, None, tmp_path / "curve.png")
    agreement = drawn[0].axes[0]
    assert "agreement with the teacher" in agreement.get_title(loc="left")
    share, student = agreement.lines[:2]
    assert share.get_ydata().tolist() == [100, 50, 25]
    assert student.get_ydata().tolist() == [10, 20, 40]
    legend = [text.get_text() for text in agreement.get_legend().get_texts()]
    assert legend == [
        "images in the commonest class",
        "student",
        "max 40.00 (epoch 4)",
        "final 40.00 (epoch 4)",
    ]


def test_epochs_before_the_first_replay_are_gaps(tmp_path, drawn):
    figures.learning_curve(HISTORIES["late replay"], 97.5, tmp_path / "curve.png")
    alignment = drawn[0].axes[3]
    line = alignment.lines[-1].get_ydata()
    assert np.isnan(line[:3]).all() and np.allclose(line[3:], 0.3)
    assert "no replay" not in texts(alignment)


def test_a_run_without_replay_says_so(tmp_path, drawn):
    figures.learning_curve(HISTORIES["no replay"], 97.5, tmp_path / "curve.png")
    _, losses, _, alignment = drawn[0].axes
    assert "no replay" in texts(alignment)
    replayed = [record(e, acquisition_loss=None, gradient_alignment=None) for e in range(1, 9)]
    figures.learning_curve(replayed, 97.5, tmp_path / "curve.png")
    other = drawn[-1].axes[3]
    assert "not measured" in texts(other) and "no replay" not in texts(other)
    assert "retention: no replay" in [t.get_text() for t in losses.get_legend().get_texts()]


@pytest.mark.parametrize(("count", "size", "channels"), [(1, 8, 1), (16, 28, 1), (40, 64, 3)])
def test_sample_grids_of_all_sizes_are_drawn(tmp_path, drawn, count, size, channels):
    rng = np.random.default_rng(0)
    images = rng.random((count, size, size, channels))
    panel = ("generator now", images, rng.integers(0, 10, count), rng.random(count))
    path = tmp_path / "samples.png"
    figures.sample_grid([panel, ("memory bank", images[:0], [], [])], path)
    assert pixels(path).std() > 0
    (axes,) = drawn[0].axes
    assert len(axes.images) == min(count, 32)
    assert "empty" in texts(axes) and "memory bank" in texts(axes)


def test_images_are_captioned_and_keep_their_colours(tmp_path, drawn):
    colours = np.array([[1.0, 0, 0], [0, 1, 0]])
    images = np.broadcast_to(colours[:, None, None], (2, 8, 8, 3))
    path = tmp_path / "samples.png"
    figures.sample_grid([("memory", images, np.array([7, 12]), np.array([0.984, 1.0]))], path)
    assert texts(drawn[0].axes[0]) == ["memory", "7 · 98%", "12 · 100%"]
    seen = {tuple(colour) for colour in pixels(path).reshape(-1, 3)}
    assert {(255, 0, 0), (0, 255, 0)} <= seen


def test_a_class_that_the_teacher_does_not_give_is_a_dash(tmp_path, drawn):
    images, labels = np.zeros((2, 8, 8, 1)), np.array([0, 3])
    figures.sample_grid([("now", images, labels, np.array([np.nan, 0.5]))], tmp_path / "s.png")
    assert texts(drawn[0].axes[0]) == ["now", "–", "3 · 50%"]


def test_no_panels_make_an_empty_figure(tmp_path):
    figures.sample_grid([], tmp_path / "samples.png")
    assert pixels(tmp_path / "samples.png").size


def test_arrays_that_do_not_belong_together_are_refused(tmp_path):
    images = np.zeros((2, 8, 8, 1))
    with pytest.raises(ValueError, match="'memory' holds 2 images, 1 labels, 2 confidences"):
        figures.sample_grid([("memory", images, [1], [1.0, 1.0])], tmp_path / "s.png")
    with pytest.raises(ValueError, match="N, H, W, 1 or 3"):
        figures.sample_grid([("memory", images[..., 0], [1, 1], [1, 1])], tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


def test_every_other_measure_is_drawn_without_being_listed(tmp_path, drawn):
    """A measure that only one method has, one that begins late, and none that is never there."""
    common = {"student_accuracy": 90.0, "acquisition_loss": 1.0, "seconds": 2.0, "never": None}
    history = [
        {"epoch": 1, **common, "generator_one_hot": 0.5, "of_my_own": None},
        {"epoch": 2, **common, "generator_one_hot": 0.4, "of_my_own": 3.0},
        {"epoch": 3, **common, "generator_one_hot": 0.3, "of_my_own": 4.0},
    ]
    figures.measures(history, tmp_path / "measures.png")
    shown = [axes for axes in drawn[-1].axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["generator one hot", "of my own"]
    (line,) = shown[1].lines
    np.testing.assert_array_equal(line.get_ydata(), [np.nan, 3.0, 4.0])
    assert (tmp_path / "measures.png").stat().st_size > 1000
