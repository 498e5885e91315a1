"""The report of runs that had no data to test on."""

import re

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from dfkd_jax import report
from dfkd_jax.comparison import run_folders
from dfkd_jax.run import records
from dfkd_jax.runtime import files
from tests.helpers.fabricated import fabricate, read_csv, rows


def without_data(root, method, agreements):
    """The folder of a finished run with these agreements (percent) over the epochs."""
    folder = fabricate(root, method, 1, [None] * len(agreements), teacher=None)
    history = records.read_metrics(folder / "metrics.jsonl")
    for record, agreement in zip(history, agreements, strict=True):
        record["generated_agreement"] = agreement
        record["generated_class_share"] = 25.0
    records.write_metrics(folder / "metrics.jsonl", history)
    names = files.read_json(folder / "summary.json")
    summary = records.summarize(history, None, names)
    summary["final_generated_class_share"] = 25.0
    files.write_json(folder / "summary.json", summary)


@pytest.fixture
def runs(tmp_path):
    without_data(tmp_path, "mb-dfkd", [50.0, 70.0])
    without_data(tmp_path, "lra-mb", [60.0, 90.0])
    return tmp_path


def test_the_tables_are_of_the_agreement_and_say_so(runs):
    text = report.write([runs])
    assert rows(text, "Means")["lra-mb_exact"][1:6] == [
        "75.00 ± –",
        "225.00 ± –",
        "90.00 ± –",
        "90.00 ± –",
        "25.00 ± –",
    ]
    assert rows(text, "Paired")["lra-mb_exact"][1:] == [
        *("+15.00", "+125.00", "+20.00", "+20.00", "+0.00"),
        *("+0.000", "–"),
    ]
    written = (runs / "comparison.md").read_text()
    assert "No run has data to test on" in written and "Acc_max" not in written
    assert read_csv(runs / "comparison.csv")[0]["final_agreement"] == "70.0"
    page = (runs / "report.html").read_text()
    assert "Agreement with the teacher on generated images over the epochs" in page


def test_the_figures_are_of_the_agreement(runs, monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: saved.append(self))
    monkeypatch.setattr(report.report_page, "html", lambda *args: "")
    report.write([runs])
    evolution, schemes, final = saved[::2][:3]  # of each a PNG and a PDF
    assert evolution.axes[0].lines[0].get_ydata().tolist() == [50, 70]
    assert evolution.axes[1].lines[0].get_ydata().tolist() == [25, 25]  # the share of one class
    assert schemes.axes[0].lines[0].get_ydata().tolist() == [50, 70]
    assert final.axes[0].lines[0].get_xdata().tolist() == [70]
    for figure in (evolution, schemes):
        assert not any("teacher" in t.get_text() for t in figure.legends[0].get_texts())


def test_beside_runs_with_data_they_are_not_measured(runs):
    fabricate(runs, "dafl", 1, [10.0, 20.0])
    text = report.write([runs])
    assert rows(text, "Means")["dafl"][1] == "15.00 ± –"
    assert rows(text, "Means")["mb-dfkd"][1:5] == ["–"] * 4
    assert "No run has data" not in (runs / "comparison.md").read_text()


NOTHING = r"\b(nan|None|inf|null)\b"


@pytest.mark.parametrize("methods", [["mb-dfkd"], ["mb-dfkd", "lra-mb", "dafl"]])
@pytest.mark.parametrize("accuracies", [[None], [50.0], [None, 50.0]])
def test_what_was_not_measured_is_a_dash_everywhere(tmp_path, monkeypatch, methods, accuracies):
    """One seed, one epoch, costs unknown, a method without data among others, one that failed."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: saved.append(self))
    monkeypatch.setattr(report.report_page, "_html_figure", lambda path, caption: caption)
    for i, method in enumerate(methods):
        seen = [None] * len(accuracies) if i == 1 else accuracies
        teacher = None if seen[-1] is None else 90.0
        fabricate(tmp_path, method, 1, seen, teacher=teacher, cost={})
    files.write_json(
        tmp_path / "failed" / run_folders.FAILURE,
        {"method": "dfq", "gradient": "none", "seed": 2},
    )
    report.write([tmp_path])
    written = [tmp_path / name for name in ("comparison.md", "report.html")]
    written += sorted(tmp_path.glob("*.csv"))
    assert len(written) == 4
    for file in written:
        shown = re.search(NOTHING, file.read_text())
        assert not shown, (file.name, file.read_text()[shown.start() - 80 :][:160])
    texts = [text.get_text() for figure in saved for text in figure.findobj(Text)]
    assert len(texts) > 50 and not [text for text in texts if re.search(NOTHING, text)]


def test_runs_without_any_data_are_not_compared_on_a_data_set(tmp_path):
    without_data(tmp_path, "mb-dfkd", [50.0])
    for folder in tmp_path.rglob("summary.json"):
        summary = files.read_json(folder)
        files.write_json(folder, {**summary, "dataset": "none"})
    assert report.write([tmp_path]).startswith("# Comparison without data\n")
    fabricate(tmp_path, "dafl", 1, [10.0])
    assert report.write([tmp_path]).startswith("# Comparison on digits\n")


def test_seeds_in_common_are_counted_where_one_measure_has_none(runs):
    """Of alignment there are pairs, of accuracy none."""
    fabricate(runs, "dafl", 1, [10.0, 20.0])
    fabricate(runs, "mb-dfkd", 1, [10.0, 20.0])
    paired = rows(report.write([runs]), "Paired")["lra-mb_exact"]
    assert paired[0] == "1" and paired[1] == "–" and paired[5] == "+0.000"
