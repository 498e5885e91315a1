"""The figures of a comparison, and the page that holds them."""

import base64
import itertools
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dfkd_jax import report
from dfkd_jax.comparison import figures, run_folders
from tests.helpers.fabricated import fabricate


@pytest.fixture
def runs(tmp_path):
    for seed in (1, 2, 3):
        fabricate(tmp_path, "mb-dfkd", seed, [10.0, 19.0 + seed])
    fabricate(tmp_path, "lra-mb", 1, [10.0, 21.0])
    return tmp_path


def test_the_page_needs_nothing_but_itself(runs):
    report.write([runs])
    page = (runs / "report.html").read_text()
    sources, others = [], []

    class Attributes(HTMLParser):
        def handle_starttag(self, tag, attributes):
            sources.extend(v for k, v in attributes if k == "src")
            others.extend((tag, k) for k, _ in attributes if k in ("href", "srcset", "data"))

    Attributes().feed(page)
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in sources) and not others
    inside = [base64.b64decode(source.removeprefix(prefix)) for source in sources]
    assert inside == [(runs / name).read_bytes() for name in report.FIGURES]
    without_images = page.replace("base64,", "")
    assert "http" not in without_images.split("<body>")[0] and "url(" not in page
    for words in ("lra-mb_exact", "Acc_max", "Paired differences to mb-dfkd", "paired difference"):
        assert words in page


def test_every_figure_is_a_picture(runs):
    report.write([runs])
    for name in report.FIGURES:
        with Image.open(runs / name) as image:
            assert np.asarray(image.convert("L")).std() > 0
        pdf = (runs / name).with_suffix(".pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf


def test_validation_images_are_not_called_the_test_set(tmp_path):
    held_out = {"dataset.validation_size": 100}
    fabricate(tmp_path / "a", "mb-dfkd", 1, [10.0, 20.0], **held_out)
    page = report_of(tmp_path / "a")
    assert "Accuracy on the validation set over the epochs" in page
    assert "validation accuracy over all epochs" in page and "test accuracy" not in page
    fabricate(tmp_path / "b", "no-replay", 1, [10.0, 20.0])
    assert "Accuracy on the test set over" in report_of(tmp_path / "b")
    assert "Accuracy on the test or validation set over" in report_of(tmp_path)


def report_of(folder):
    report.write([folder])
    return (folder / "report.html").read_text()


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_curve_is_the_mean_over_seeds_with_the_teacher(runs, drawn, tmp_path):
    groups = run_folders.groups(run_folders.find([runs])[0])
    figures.learning_evolution(groups, tmp_path / "f.png")
    joint = drawn[0].axes[0].lines[0]
    assert joint.get_ydata().tolist() == [10.0, 21.0] and joint.get_label() == "mb-dfkd"
    assert legend(drawn[0]) == ["mb-dfkd", "lra-mb_exact", "teacher 90.00"]
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 10 and high > 90


def test_a_legend_says_what_the_authors_code_is(runs, drawn, tmp_path):
    fabricate(runs, "lra-mb-detached", 1, [10.0, 20.0])
    groups = run_folders.groups(run_folders.find([runs])[0])
    figures.learning_evolution(groups, tmp_path / "f.png")
    names = [" ".join(name.split()) for name in legend(drawn[0])]  # it stands on two lines
    assert "lra-mb-detached (as the authors' code)" in names


def test_schemes_have_panels_and_missing_ones_say_so(runs, drawn, tmp_path):
    fabricate(runs, "dafl", 1, [10.0, 20.0])
    groups = run_folders.groups(run_folders.find([runs])[0])
    figures.replay_schemes(groups, tmp_path / "f.png")
    panels = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    assert list(panels) == ["memory bank", "generative replay", "no replay"]
    assert [text.get_text() for text in panels["generative replay"].texts] == ["no runs"]


def test_a_series_that_was_not_measured_is_said_to_be_missing(runs, drawn, tmp_path):
    fabricate(runs, "dafl", 1, [10.0, 20.0], extra={"early_agreement": 75.0})
    groups = run_folders.groups(run_folders.find([runs])[0])
    figures.alignment(groups, tmp_path / "a.png")
    assert legend(drawn[0])[-1] == "dafl: not measured"
    figures.forgetting(groups, tmp_path / "f.png")
    assert legend(drawn[1])[1:] == ["mb-dfkd: not measured", "lra-mb_exact: not measured"]
    del groups["dafl"]
    figures.forgetting(groups, tmp_path / "f.png")
    assert "not measured in any of the runs" in [t.get_text() for t in drawn[2].axes[0].texts]


@pytest.mark.filterwarnings("error")
def test_long_labels_cover_no_curve(runs, drawn, tmp_path):
    found = run_folders.groups(run_folders.find([runs])[0])["mb-dfkd"]
    fields = " ".join(f"replay.field_{i}=0.{i}" for i in range(8))
    groups = {f"mb-dfkd {fields} {i}": found for i in range(6)}
    figures.learning_evolution(groups, tmp_path / "f.png")
    figure = drawn[0]
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    axes = figure.axes[0].get_window_extent()
    assert axes.width > 0.5 * figure.bbox.width and axes.x1 < legend.x0
    assert 0 <= legend.y0 and legend.y1 <= figure.bbox.height
    figures.final_accuracy(groups, tmp_path / "f.png")
    drawn[1].draw_without_rendering()  # it was saved with other dots per inch than its own
    boxes = [label.get_window_extent() for label in drawn[1].axes[0].get_yticklabels()]
    assert all(0 <= box.x0 for box in boxes)
    assert all(lower.y1 <= upper.y0 for upper, lower in itertools.pairwise(boxes))
