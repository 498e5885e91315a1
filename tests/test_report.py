import base64
import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dfkd_jax import comparison_figures, report, results, run_folders
from dfkd_jax.config import UserError, to_dict
from dfkd_jax.outputs import method_names
from tests.conftest import tiny_config

MIB = 2**20


def fabricate(root, method, seed, accuracies, teacher=90.0, extra=None, **fields):
    """The folder that a finished run leaves, with these accuracies (percent) over the epochs."""
    config = tiny_config(method, seed=seed, **fields)
    folder = root / "runs" / run_folders.label(method, config.meta.variant) / f"seed{seed}"
    replays = config.replay.kind != "none"
    history = [
        {
            "epoch": epoch,
            "student_accuracy": accuracy,
            "gradient_alignment": 0.1 * epoch if replays else None,
            "seconds": 1.0,
            **(extra or {}),
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    cost = {"seconds_per_student_step": 0.0125, "peak_memory_bytes": 300 * MIB}
    summary = {**results.summarize(history, teacher, method_names(config)), **cost}
    results.write_metrics(folder / "metrics.jsonl", history)
    results.write_json(folder / "config.json", to_dict(config))
    results.write_json(folder / "summary.json", summary)
    return folder


@pytest.fixture
def runs(tmp_path):
    """mb-dfkd with seeds 1, 2, 3 and lra-mb with seeds 1, 2, 3, 4; final: 20, 21, 22 and more."""
    for seed in (1, 2, 3):
        fabricate(tmp_path, "mb-dfkd", seed, [10.0, 19.0 + seed])
    for seed in (1, 2, 3, 4):
        fabricate(tmp_path, "lra-mb", seed, [10.0, 19.0 + 2 * seed])
    return tmp_path


def rows(text, title):
    """The table below a heading of Markdown: row name → cells."""
    block = text.split(f"## {title}", 1)[1].split("##")[0]
    lines = [line for line in block.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_agree_with_numbers_computed_by_hand(runs):
    text = report.write([runs])
    means = rows(text, "Means over seeds")
    # Final 20, 21, 22: s = 1, ± 4.302653 / √3 = 2.48; μ 15, 15.5, 16: half of that.
    # σ² = ((19 + seed − 10) / 2)²: 25, 30.25, 36, whose mean is 30.4167 and s 5.5019.
    assert means["mb-dfkd"] == [
        "3",
        "15.50 ± 1.24",
        "30.42 ± 13.67",
        "21.00 ± 2.48",
        "21.00 ± 2.48",
        "0.01250",
        "300",
    ]
    assert means["lra-mb_exact"][0] == "4"
    # Common seeds 1, 2, 3: differences of the final accuracy 1, 2, 3 and of μ half of that.
    differences = rows(text, "Paired differences to mb-dfkd")
    assert list(differences) == ["lra-mb_exact"]
    count, mean, variance, final = differences["lra-mb_exact"]
    assert count == "3"
    assert mean == "+1.00 [-0.24, +2.24], p = 0.074"
    assert final == "+2.00 [-0.48, +4.48], p = 0.074"
    # σ² of lra-mb: 30.25, 42.25, 56.25; differences 5.25, 12, 20.25.
    assert variance.startswith("+12.50 [")
    assert text in (runs / "comparison.md").read_text()


def test_an_interval_without_zero_is_marked(tmp_path):
    for seed, gain in ((1, 2.0), (2, 2.1), (3, 1.9)):
        fabricate(tmp_path, "mb-dfkd", seed, [50.0, 50.0])
        fabricate(tmp_path, "lra-mb", seed, [50.0, 50.0 + gain])
    text = report.write([tmp_path])
    final = rows(text, "Paired differences")["lra-mb_exact"][3]
    # s = 0.1: 2 ± 4.302653 · 0.1 / √3
    assert final == "+2.00 [+1.75, +2.25], p < 0.001 \\*"
    assert '<td class="marked">+2.00 [+1.75' in (tmp_path / "report.html").read_text()


def test_one_seed_has_no_interval(tmp_path):
    fabricate(tmp_path, "mb-dfkd", 1, [10.0, 20.0])
    fabricate(tmp_path, "dafl", 1, [10.0, 30.0])
    text = report.write([tmp_path])
    assert rows(text, "Means")["mb-dfkd"][1] == "15.00 ± –"
    assert rows(text, "Paired")["dafl"] == ["1", "+5.00", "+75.00", "+10.00"]


def test_one_label_alone_has_nothing_to_compare_with(tmp_path):
    fabricate(tmp_path, "dafl", 1, [10.0, 20.0])
    assert "Nothing to compare with." in report.write([tmp_path])


def test_measures_that_a_run_lacks_are_absent(tmp_path):
    folder = fabricate(tmp_path, "mb-dfkd", 1, [10.0, 20.0])
    summary = results.read_json(folder / "summary.json")
    del summary["seconds_per_student_step"], summary["peak_memory_bytes"]
    summary["final_accuracy"] = None
    results.write_json(folder / "summary.json", summary)
    assert rows(report.write([tmp_path]), "Means")["mb-dfkd"][-3:] == ["–", "–", "–"]


def test_the_csv_files_hold_runs_and_labels(runs):
    report.write([runs])
    each = read_csv(runs / "comparison.csv")
    assert [(r["label"], r["seed"]) for r in each] == [
        *(("mb-dfkd", str(s)) for s in (1, 2, 3)),
        *(("lra-mb_exact", str(s)) for s in (1, 2, 3, 4)),
    ]
    assert float(each[0]["final_accuracy"]) == 20 and each[0]["status"] == "finished"
    baseline, other = read_csv(runs / "comparison_summary.csv")
    assert float(baseline["peak_memory_bytes"]) == 300 * MIB
    assert baseline["final_accuracy_difference"] == ""
    assert float(other["final_accuracy_difference"]) == 2 and other["baseline"] == "mb-dfkd"
    assert float(other["final_accuracy_pairs"]) == 3
    half_width = float(other["final_accuracy_difference_half_width"])
    assert half_width == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)


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


@pytest.fixture
def drawn(monkeypatch):
    saved = []
    original = Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_curve_is_the_mean_over_seeds_with_the_teacher(runs, drawn, tmp_path):
    groups = run_folders.groups(run_folders.find([runs])[0])
    comparison_figures.learning_evolution(groups, tmp_path / "f.png")
    joint = drawn[0].axes[0].lines[0]
    assert joint.get_ydata().tolist() == [10.0, 21.0] and joint.get_label() == "mb-dfkd"
    assert legend(drawn[0]) == ["mb-dfkd", "lra-mb_exact", "teacher 90.00"]
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 10 and high > 90


def test_schemes_have_panels_and_missing_ones_say_so(runs, drawn, tmp_path):
    fabricate(runs, "dafl", 1, [10.0, 20.0])
    groups = run_folders.groups(run_folders.find([runs])[0])
    comparison_figures.replay_schemes(groups, tmp_path / "f.png")
    panels = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    assert list(panels) == ["memory bank", "generative replay", "no replay"]
    assert [text.get_text() for text in panels["generative replay"].texts] == ["no runs"]


def test_a_series_that_was_not_measured_is_said_to_be_missing(runs, drawn, tmp_path):
    fabricate(runs, "dafl", 1, [10.0, 20.0], extra={"early_agreement": 75.0})
    groups = run_folders.groups(run_folders.find([runs])[0])
    comparison_figures.alignment(groups, tmp_path / "a.png")
    assert legend(drawn[0])[-1] == "dafl: not measured"
    comparison_figures.forgetting(groups, tmp_path / "f.png")
    assert legend(drawn[1])[1:] == ["mb-dfkd: not measured", "lra-mb_exact: not measured"]
    del groups["dafl"]
    comparison_figures.forgetting(groups, tmp_path / "f.png")
    assert "not measured in any of the runs" in [t.get_text() for t in drawn[2].axes[0].texts]


def test_labels_name_method_gradient_and_objective():
    assert run_folders.label("mb-dfkd", "none") == "mb-dfkd"
    assert run_folders.label("lra-mb", "exact") == "lra-mb_exact"
    assert run_folders.label("lra-mb", "none") == "lra-mb_none"
    assert run_folders.label("lra-mb", "exact", "code") == "lra-mb_exact_code"
    assert run_folders.label("lra-mb-detached", "detached", "code") == "lra-mb-detached"
    assert run_folders.label("of-tomorrow", "none") == "of-tomorrow_none"


def test_runs_of_several_folders_are_gathered_and_differences_noted(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    fabricate(first, "mb-dfkd", 1, [10.0, 20.0])
    fabricate(second, "lra-mb", 1, [10.0, 20.0], teacher=91.0, **{"student.learning_rate": 0.5})
    fabricate(second, "mb-dfkd", 1, [10.0, 30.0])
    output = tmp_path / "output"
    report.write([first, second, second / "runs"], output)
    text = (output / "comparison.md").read_text()
    assert "differ in student.learning_rate: 0.05 (mb-dfkd); 0.5 (lra-mb_exact)." in text
    assert "differ in the teacher's accuracy: 90.0 (mb-dfkd); 91.0 (lra-mb_exact)." in text
    assert "mb-dfkd, seed 1, is there twice" in text
    assert rows(text, "Means")["mb-dfkd"][0] == "1"
    assert not (first / "report.html").exists()


def test_what_a_method_presets_is_no_difference(tmp_path):
    fabricate(tmp_path, "mb-dfkd", 1, [10.0, 20.0])
    fabricate(tmp_path, "dfq", 1, [10.0, 20.0])
    report.write([tmp_path])
    assert "Configurations differ" not in (tmp_path / "comparison.md").read_text()


def test_one_label_with_two_configurations_becomes_two(tmp_path):
    for part, capacity in (("a", 2), ("b", 5)):
        for seed in (1, 2):
            fields = {"replay.capacity": capacity}
            fabricate(tmp_path / part, "mb-dfkd", seed, [10.0, 20.0 + seed], **fields)
    means = rows(report.write([tmp_path]), "Means")
    assert list(means) == ["mb-dfkd replay.capacity=2", "mb-dfkd replay.capacity=5"]


def test_failed_runs_are_listed(runs):
    failed = runs / "runs" / "lra-mb_exact" / "seed9"
    names = {**method_names(tiny_config(seed=9)), "failure": "A loss | became non-finite."}
    results.write_json(failed / run_folders.FAILURE, names)
    text = report.write([runs])
    assert "| lra-mb_exact | 9 | A loss \\| became non-finite. |" in text
    assert rows(text, "Means")["lra-mb_exact"][0] == "4"
    last = read_csv(runs / "comparison.csv")[-1]
    assert (last["status"], last["final_accuracy"]) == ("failed", "")


def test_the_baseline_can_be_chosen(runs):
    assert "lra-mb_exact" not in rows(report.write([runs], baseline="lra-mb_exact"), "Paired")
    assert report.choose_baseline(["dafl", "mb-dfkd"], None) == "mb-dfkd"
    assert report.choose_baseline(["dafl", "lra-mb_exact"], None) == "dafl"
    with pytest.raises(UserError, match="'mb'; allowed are mb-dfkd, lra-mb_exact"):
        report.write([runs], baseline="mb")


def test_incomplete_and_damaged_folders(runs, tmp_path, capsys):
    (runs / "runs" / "mb-dfkd" / "seed3" / "metrics.jsonl").unlink()
    report.write([runs])
    assert (
        "has a summary but no metrics.jsonl; it is left out" in (runs / "comparison.md").read_text()
    )
    (runs / "runs" / "mb-dfkd" / "seed2" / "summary.json").write_text("{")
    assert report.main([str(runs)]) == 2
    error = capsys.readouterr().err
    assert "seed2/summary.json is not a JSON file" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name, words", [("nowhere", "is no folder"), ("empty", "no finished run")])
def test_nothing_to_report_is_one_sentence(tmp_path, capsys, name, words):
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_the_command_prints_the_tables(runs, capsys):
    assert report.main([str(runs), "--baseline=mb-dfkd"]) == 0
    assert "Paired differences to mb-dfkd" in capsys.readouterr().out
    assert json.loads((runs / "runs/mb-dfkd/seed1/summary.json").read_text())
