"""The report of runs that had no data to test on."""

import pytest
from matplotlib.figure import Figure

from dfkd_jax import report, results
from tests.fabricated import fabricate, read_csv, rows


def without_data(root, method, agreements):
    """The folder of a finished run with these agreements (percent) over the epochs."""
    folder = fabricate(root, method, 1, [None] * len(agreements), teacher=None)
    history = results.read_metrics(folder / "metrics.jsonl")
    for record, agreement in zip(history, agreements, strict=True):
        record["generated_agreement"] = agreement
    results.write_metrics(folder / "metrics.jsonl", history)
    names = results.read_json(folder / "summary.json")
    summary = results.summarize(history, None, names)
    summary["final_generated_class_share"] = 25.0
    results.write_json(folder / "summary.json", summary)


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
