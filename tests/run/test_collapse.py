"""A run that has collapsed says so; the measures it is seen by."""

import io

import pytest
from rich.console import Console

from dfkd_jax import report
from dfkd_jax.run import collapse, records
from dfkd_jax.run.collapse import at_most_chance, warnings
from dfkd_jax.run.train import run
from dfkd_jax.runtime import files
from tests.helpers.fabricated import fabricate
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize(
    ("classes", "bound"), [(2, 52.5), (10, 14.5), (100, 1.5), (1000, 0.15), (12, 12.5)]
)
def test_chance_is_near_guessing_for_few_classes_and_for_many(classes, bound):
    assert at_most_chance(classes) == pytest.approx(bound)


def history(accuracies, shares=(30.0,) * 9):
    return [
        {"epoch": i + 1, "student_accuracy": a, "generated_class_share": s}
        for i, (a, s) in enumerate(zip(accuracies, shares, strict=False))
    ]


def test_a_student_is_at_chance_after_three_such_epochs_in_a_row():
    assert warnings(history([10.0, 11.0]), 10) == {}
    assert warnings(history([10.0, 11.0, 15.0]), 10) == {}
    assert warnings(history([10.0, 11.0, 10.5, 30.0]), 10) == {}
    assert warnings(history([None, None, None]), 10) == {}
    assert warnings([], 10) == {}
    found = warnings(history([90.0, 10.0, 11.25, 9.0]), 10, "validation")
    assert found == {
        "student": "The student is at chance: its validation accuracy was at most 11.25 % in the "
        "3 epochs up to epoch 4, where guessing among 10 classes gives 10.00 %."
    }


def test_a_generator_has_collapsed_while_its_last_images_are_of_one_class():
    accuracies = [50.0, 60.0]
    assert warnings(history(accuracies, [100.0, 98.9]), 10) == {}
    assert warnings(history(accuracies, [100.0, None]), 10) == {}
    assert warnings([{"epoch": 1}], 10) == {}  # of an earlier version
    (sentence,) = warnings(history(accuracies, [30.0, 99.6]), 10).values()
    assert sentence.startswith("The generator has collapsed: in epoch 2 the teacher puts 100 %")


def test_the_report_repeats_what_a_summary_warns_of(tmp_path):
    folder = fabricate(tmp_path, "mb-dfkd", 1, [10.0, 10.0])
    summary = files.read_json(folder / "summary.json")
    files.write_json(folder / "summary.json", {**summary, "warnings": ["It has collapsed."]})
    fabricate(tmp_path, "mb-dfkd", 2, [10.0, 90.0])
    report.write([tmp_path])
    text = (tmp_path / "comparison.md").read_text()
    assert text.count("It has collapsed.") == 1 and "mb-dfkd, seed 1: It has" in text


@pytest.mark.slow
@pytest.mark.parametrize("rate, balance", [(1.0, -5.0), (1e-3, 5.0)])
def test_a_run_whose_images_are_all_alike_says_so_once(tmp_path, rate, balance):
    """A generator's rate that is far too high, and a class balance that asks for one class."""
    fields = {"generator.learning_rate": rate, "loss.information_entropy": balance}
    fields |= {"batch_size": 32, "teacher.epochs": 6, "generator.latent_dim": 16, "epochs": 3}
    fields |= {"loss.one_hot": 1.0, "loss.activation": 0.0, "iterations_per_epoch": 20}
    console = Console(file=io.StringIO(), width=100)
    summary = run(tiny_config("mb-dfkd", **fields), tmp_path, console)
    (*_, last) = records.read_metrics(tmp_path / "metrics.jsonl")
    share, out = last["generated_class_share"], console.file.getvalue()
    assert 10 <= share <= 100 and last["generated_spread"] >= 0
    assert files.read_json(tmp_path / "summary.json")["warnings"] == summary["warnings"]
    said = [sentence for sentence in summary["warnings"] if "generator has collapsed" in sentence]
    assert len(said) == (balance < 0)
    if balance < 0:
        assert share >= collapse.SHARE
        assert out.count("Warning: The generator has collapsed") == 2  # once, and in the summary
        assert out.rindex("Warning: ") > out.index("student, final")
    else:
        assert share < 90 and "generator has collapsed" not in out
