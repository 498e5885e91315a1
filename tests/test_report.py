import json

import numpy as np
import pytest

from dfkd_jax import report
from dfkd_jax.comparison import run_folders
from dfkd_jax.run import records
from dfkd_jax.run.outputs import method_names
from dfkd_jax.runtime import files
from dfkd_jax.runtime.errors import UserError
from tests.helpers.fabricated import MIB, fabricate, read_csv, rows
from tests.helpers.tiny import tiny_config


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing them takes most of the time; test_comparison_figures.py looks at them."""
    monkeypatch.setattr(report, "FIGURES", {})


@pytest.fixture
def runs(tmp_path):
    """mb-dfkd with seeds 1, 2, 3 and lra-mb with seeds 1, 2, 3, 4; final: 20, 21, 22 and more."""
    for seed in (1, 2, 3):
        fabricate(tmp_path, "mb-dfkd", seed, [10.0, 19.0 + seed])
    for seed in (1, 2, 3, 4):
        fabricate(tmp_path, "lra-mb", seed, [10.0, 19.0 + 2 * seed])
    return tmp_path


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
        "0.150 ± 0.000",
        "–",
        "0.01250",
        "300",
        *["–"] * 6,  # of runs of earlier versions
    ]
    assert means["lra-mb_exact"][0] == "4"
    # Common seeds 1, 2, 3: differences of the final accuracy 1, 2, 3 and of μ half of that.
    differences = rows(text, "Paired differences to mb-dfkd")
    assert list(differences) == ["lra-mb_exact"]
    count, mean, variance, best, final, alignment, early = differences["lra-mb_exact"]
    assert count == "3"
    assert mean == "+1.00 [-0.24, +2.24], p = 0.074"
    assert final == best == "+2.00 [-0.48, +4.48], p = 0.074"
    assert (alignment, early) == ("+0.000 [+0.000, +0.000], p = 1.000", "–")
    # σ² of lra-mb: 30.25, 42.25, 56.25; differences 5.25, 12, 20.25.
    assert variance.startswith("+12.50 [")
    assert text in (runs / "comparison.md").read_text()


def test_an_interval_without_zero_is_marked(tmp_path):
    for seed, gain in ((1, 2.0), (2, 2.1), (3, 1.9)):
        fabricate(tmp_path, "mb-dfkd", seed, [50.0, 50.0])
        fabricate(tmp_path, "lra-mb", seed, [50.0, 50.0 + gain])
    text = report.write([tmp_path])
    final = rows(text, "Paired differences")["lra-mb_exact"][4]
    # s = 0.1: 2 ± 4.302653 · 0.1 / √3
    assert final == "+2.00 [+1.75, +2.25], p < 0.001 \\*"
    assert '<td class="marked">+2.00 [+1.75' in (tmp_path / "report.html").read_text()


def test_one_seed_has_no_interval(tmp_path):
    fabricate(tmp_path, "mb-dfkd", 1, [10.0, 20.0])
    fabricate(tmp_path, "dafl", 1, [10.0, 30.0])
    text = report.write([tmp_path])
    assert rows(text, "Means")["mb-dfkd"][1] == "15.00 ± –"
    assert rows(text, "Paired")["dafl"] == ["1", "+5.00", "+75.00", "+10.00", "+10.00", "–", "–"]


def test_one_label_alone_has_nothing_to_compare_with(tmp_path):
    fabricate(tmp_path, "dafl", 1, [10.0, 20.0])
    assert "Nothing to compare with." in report.write([tmp_path])


def test_measures_that_a_run_lacks_are_absent(tmp_path):
    folder = fabricate(tmp_path, "mb-dfkd", 1, [10.0, 20.0])
    summary = files.read_json(folder / "summary.json")
    del summary["seconds_per_student_step"], summary["peak_memory_bytes"]
    summary["final_accuracy"] = None
    files.write_json(folder / "summary.json", summary)
    assert rows(report.write([tmp_path]), "Means")["mb-dfkd"][-11:] == [
        *("–", "0.150 ± –"),
        *["–"] * 9,
    ]


def test_costs_are_means_over_seeds_and_not_compared(tmp_path):
    for seed, seconds, mib in ((1, 0.01, 100), (2, 0.02, 200), (3, 0.06, 600)):
        cost = {"seconds_per_student_step": seconds, "peak_memory_bytes": mib * MIB}
        cost |= {"generated_images": 1000 * seed, "seconds_of_synthesis": 30.0 * seed}
        for method in ("mb-dfkd", "dafl"):
            fabricate(tmp_path, method, seed, [10.0, 20.0], cost=cost)
    text = report.write([tmp_path])
    assert rows(text, "Means")["dafl"][-8:] == [
        *("0.03000", "300"),
        *("2.0", "–", "–", "–"),  # thousands of images
        *("60", "–"),
    ]
    assert "memory" not in text.split("## Paired")[1]
    summary = read_csv(tmp_path / "comparison_summary.csv")[0]
    assert float(summary["seconds_per_student_step"]) == pytest.approx(0.03)
    assert float(summary["peak_memory_bytes"]) == pytest.approx(300 * MIB)


def test_what_is_remembered_is_compared_too(tmp_path):
    """The mean alignment of the epochs that replayed, and the last early agreement."""
    for method, alignments, early in (
        ("mb-dfkd", [None, 0.1, 0.2], [90.0, 80.0, 70.0]),
        ("lra-mb", [None, 0.2, 0.5], [90.0, 80.0, 85.0]),
    ):
        for seed in (1, 2):
            folder = fabricate(tmp_path, method, seed, [10.0, 20.0, 30.0])
            history = records.read_metrics(folder / "metrics.jsonl")
            for record, cosine, percent in zip(history, alignments, early, strict=True):
                record |= {"gradient_alignment": cosine, "early_agreement": percent + seed}
            records.write_metrics(folder / "metrics.jsonl", history)
    text = report.write([tmp_path])
    # Of two seeds 1 apart: s = 1/√2, ± 12.706 / √2 · s
    assert rows(text, "Means")["lra-mb_exact"][5:7] == ["0.350 ± 0.000", "86.50 ± 6.35"]
    alignment, early = rows(text, "Paired")["lra-mb_exact"][-2:]
    assert alignment.startswith("+0.200 [+0.200, +0.200], p < 0.001")
    assert early.startswith("+15.00 [+15.00, +15.00]")


def test_labels_are_explained(tmp_path):
    for method in ("mb-dfkd", "mb-dfkd-concatenated", "lra-mb-detached", "lra-mb", "dafl"):
        fabricate(tmp_path, method, 1, [10.0, 20.0])
    report.write([tmp_path])
    text = (tmp_path / "comparison.md").read_text().split("## Labels")[1]
    for name in ("mb-dfkd-concatenated", "lra-mb-detached"):
        assert (
            f"**{name}**: memory bank; joint replay in one pass over [x̂; x̂_m], which is what the "
            "authors' code computes for MB-DFKD and PRE-DFKD, and in effect for LRA too" in text
        )
    assert "**mb-dfkd**: memory bank; L_acq(θ) + λ L_ret(θ), a pass for each batch." in text
    assert "**lra-mb_exact**: memory bank; L_acq(θ) + λ L_ret(θ'); its gradient ∇[L_acq" in text
    assert "**dafl**: no replay; L_acq(θ); with the losses of dafl." in text
    page = (tmp_path / "report.html").read_text()
    assert "<dt>lra-mb-detached</dt><dd>memory bank; joint replay in one pass" in page


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


def test_labels_name_method_gradient_and_objective():
    assert run_folders.label("mb-dfkd", None, "joint") == "mb-dfkd"
    assert run_folders.label("mb-dfkd", None, "concatenated") == "mb-dfkd_concatenated"
    assert run_folders.label("lra-mb", "exact", "lra") == "lra-mb_exact"
    assert run_folders.label("lra-mb", "detached", "lra") == "lra-mb_detached"
    objective = "lra_concatenated"
    assert run_folders.label("lra-mb", "exact", objective) == "lra-mb_exact_lra_concatenated"
    assert run_folders.label("lra-mb-detached", "detached", objective) == "lra-mb-detached"
    assert run_folders.label("of-tomorrow", None, "joint") == "of-tomorrow"


def test_runs_of_earlier_versions_have_todays_labels(tmp_path):
    """Their summaries have the objectives paper and code, and a gradient "none"."""
    earlier = {
        "lra-mb_exact": {"method": "lra-mb", "gradient": "exact", "objective": "paper"},
        "mb-dfkd": {"method": "mb-dfkd", "gradient": "none", "objective": "paper"},
        "lra-mb-detached": {
            "method": "lra-mb-detached",
            "gradient": "detached",
            "objective": "code",
        },
        "no-replay": {
            "method": "no-replay",
            "gradient": "none",
            "objective": "paper",
            "replay": "none",
        },
    }
    for label, names in earlier.items():
        folder = fabricate(tmp_path / label, names["method"], 1, [10.0, 20.0])
        summary = {**files.read_json(folder / "summary.json"), **names}
        files.write_json(folder / "summary.json", summary)
    runs, _ = run_folders.find([tmp_path])
    assert {run.label for run in runs} == set(earlier)


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


def test_one_label_with_several_configurations_becomes_several_in_order(tmp_path):
    """Numbers by size: 5 is before 20, 1e-05 before 0.01."""
    for part, fields in (
        ("a", {"replay.capacity": 20}),
        ("b", {"replay.capacity": 5}),
        ("c", {"replay.capacity": 5, "meta.inner_lr": 1e-5}),
        ("d", {"replay.capacity": 5, "meta.inner_lr": 0.01}),
    ):
        for seed in (1, 2):
            fabricate(tmp_path / part, "mb-dfkd", seed, [10.0, 20.0 + seed], **fields)
    fabricate(tmp_path, "lra-mb", 1, [10.0, 20.0])
    means = rows(report.write([tmp_path]), "Means")
    assert [name.replace("replay.", "").replace("meta.", "") for name in means] == [
        "mb-dfkd inner_lr=1e-05 capacity=5",
        "mb-dfkd inner_lr=0.01 capacity=5",
        "mb-dfkd inner_lr=0.1 capacity=5",
        "mb-dfkd inner_lr=0.1 capacity=20",
        "lra-mb_exact",
    ]


def test_a_field_that_older_runs_lack_is_none_there(tmp_path):
    fabricate(tmp_path / "new", "mb-dfkd", 1, [10.0, 20.0], **{"generator.final_learning_rate": 0})
    for part, keep in (("old", False), ("none", True)):
        folder = fabricate(tmp_path / part, "mb-dfkd", 2, [10.0, 20.0])
        config = files.read_json(folder / "config.json")
        if not keep:
            del config["generator"]["final_learning_rate"]
        files.write_json(folder / "config.json", config)
        text = report.write([tmp_path / "new", tmp_path / part])
        name = "mb-dfkd generator.final_learning_rate="
        assert list(rows(text, "Means")) == [f"{name}0.0", f"{name}None"]


def test_two_teachers_make_two_labels(tmp_path):
    for part in ("a", "b"):
        fabricate(tmp_path / part, "mb-dfkd", 1, [10.0, 20.0], **{"teacher.checkpoint": part})
    means = rows(report.write([tmp_path]), "Means")
    assert list(means) == ["mb-dfkd teacher.checkpoint=a", "mb-dfkd teacher.checkpoint=b"]


def test_failed_runs_are_listed(runs):
    failed = runs / "runs" / "lra-mb_exact" / "seed9"
    names = {**method_names(tiny_config(seed=9)), "failure": "A loss | became non-finite."}
    files.write_json(failed / run_folders.FAILURE, names)
    text = report.write([runs])
    assert "| lra-mb_exact | 9 | A loss \\| became non-finite. |" in text
    assert rows(text, "Means")["lra-mb_exact"][0] == "4"
    last = read_csv(runs / "comparison.csv")[-1]
    assert (last["status"], last["final_accuracy"]) == ("failed", "")


def test_the_baseline_can_be_chosen(runs):
    assert "lra-mb_exact" not in rows(report.write([runs], baseline="lra-mb_exact"), "Paired")
    assert report.choose_baseline(["dafl", "mb-dfkd"], None) == "mb-dfkd"
    assert report.choose_baseline(["dafl", "lra-mb_exact"], None) == "dafl"
    varied = ["mb-dfkd replay.capacity=5", "mb-dfkd replay.capacity=20"]
    assert report.choose_baseline(varied, "mb-dfkd replay.capacity=20") == varied[1]
    assert report.choose_baseline(varied, "mb-dfkd_replay.capacity=20") == varied[1]
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
