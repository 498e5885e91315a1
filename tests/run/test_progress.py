import io

import pytest
from rich.console import Console

from dfkd_jax.run import progress

RECORD = {
    "epoch": 3,
    "student_accuracy": 91.25,
    "acquisition_loss": 0.412,
    "retention_loss": 0.388,
    "generator_loss": -1.2,
    "gradient_alignment": 0.31,
    "steps_per_second": 512.3,
}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_log_has_one_plain_line_per_epoch(capsys, clock, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some CI services set it
    with progress.Progress(40, 2, "student") as shown:
        clock.now += 1.946
        shown.update(RECORD)
    assert capsys.readouterr().out == (
        "epoch 3/40  accuracy 91.25 %  L_acq 0.412  L_ret 0.388  L_gen -1.20  alignment +0.31  "
        "512 steps/s  left 0:01:12\n"
    )


def test_what_was_not_measured_is_a_dash(capsys):
    with progress.Progress(4) as shown:
        shown.update({"student_accuracy": 10.0, "retention_loss": None})
    line = capsys.readouterr().out
    assert line.startswith("epoch 1/4  accuracy 10.00 %  L_acq –  L_ret –  L_gen –  alignment –")


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_nothing_is_shown_as_a_number_that_is_none(capsys, value):
    with progress.Progress(4) as shown:
        shown.update({**dict.fromkeys(RECORD, value), "epoch": 1})
    keys = ("teacher_accuracy", "final_accuracy", "max_accuracy", "mean_accuracy")
    keys += ("accuracy_variance", "epochs", "seconds")
    for name in ("final_agreement", "final_generated_distance", "final_memory_agreement"):
        progress.summary_table({**dict.fromkeys(keys, value), name: value})
    progress.summary_table({})
    out = capsys.readouterr().out
    assert "accuracy – %" in out and "time                – " in out
    numbers = ("nan", "None", "inf,", "inf ", "0:00:00", "0.00")
    assert not [word for word in numbers if word in out.split("left 0:00:00", 1)[1]]


def test_without_data_agreement_and_distance_are_shown(capsys):
    with progress.Progress(4, fields=progress.student_fields(data=False)) as shown:
        measured = {"generated_agreement": 87.5, "generated_distance": 0.25}
        measured["generated_class_share"] = 24.6
        shown.update({**RECORD, "student_accuracy": None, **measured})
    line = capsys.readouterr().out
    assert (
        "epoch 3/4  agreement 87.50 %  one class 25 %  distance 0.250  L_acq 0.412" in line
        and "accuracy" not in line
    )
    assert progress.student_fields(data=True) == progress.STUDENT_FIELDS


def test_a_teacher_shows_its_own_fields(capsys):
    with progress.Progress(2, fields=progress.TEACHER_FIELDS) as shown:
        shown.update({"epoch": 1, "teacher_accuracy": 98.0, "loss": 0.05})
    assert "epoch 1/2  accuracy 98.00 %  loss 0.050  left" in capsys.readouterr().out


def test_time_left_is_not_misled_by_compilation(capsys, clock):
    with progress.Progress(10) as shown:
        for seconds in (500, 2, 2):
            clock.now += seconds
            shown.update({})
    assert capsys.readouterr().out.splitlines()[-1].endswith("left 0:00:14")


def test_messages_are_printed_as_they_are(capsys):
    message = "resumed from [bold]runs/a[/bold] " + "x" * 200
    with progress.Progress(1) as shown:
        shown.log(message)
    assert capsys.readouterr().out == message + "\n"


def test_a_terminal_shows_a_bar_and_keeps_messages():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={})
    with progress.Progress(40, 2, "student [a]", console=console) as shown:
        shown.log("a message")
        shown.update(RECORD)
    out = console.file.getvalue()
    assert "student [a]" in out and "3/40" in out
    assert "accuracy 91.25 %" in out and "a message" in out
    assert "\x1b[?25h" in out  # the cursor is shown again


def test_a_failure_ends_the_bar_and_is_not_swallowed():
    console = Console(file=io.StringIO(), force_terminal=True, _environ={})
    with pytest.raises(RuntimeError), progress.Progress(4, console=console):
        raise RuntimeError
    assert "\x1b[?25h" in console.file.getvalue()


def test_a_quiet_console_prints_nothing(capsys):
    console = Console(quiet=True)
    with progress.Progress(4, console=console) as shown:
        shown.update(RECORD)
        shown.log("hello")
    progress.summary_table({}, "runs/a", console)
    assert capsys.readouterr().out == ""


def test_the_summary_without_data_names_the_agreement(capsys):
    agreement = {"mean": 80.0, "max": 95.0, "final": 90.0}
    summary = {f"{name}_agreement": value for name, value in agreement.items()}
    summary |= {"teacher_accuracy": None, "final_accuracy": None, "agreement_variance": 4.0}
    memory = {"final_memory_agreement": 99.5, "final_memory_distance": None}
    summary |= {"final_generated_distance": 0.125, "final_generated_class_share": 25.0}
    progress.summary_table({**summary, **memory, "warnings": ["It has collapsed."]})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1] == "Warning: It has collapsed."
    assert lines[:8] == [
        "teacher no data to test on",
        "agreement, final 90.00 %",
        "agreement, max 95.00 %",
        "mean over epochs μ 80.00 %",
        "variance σ² 4.00 %²",
        "in one class, final 25.00 %",
        "distance, final 0.125",
        "in memory, final 99.50 %, distance –",
    ]


def test_the_summary_names_the_numbers_and_the_folder(capsys):
    summary = {
        "method": "ours-1",
        "replay": "memory_bank",
        "gradient": "exact",
        "teacher_accuracy": 99.0,
        "mean_accuracy": 80.0,
        "accuracy_variance": 12.5,
        "max_accuracy": 97.5,
        "final_accuracy": None,
        "epochs": 40,
        "seconds": 3700.2,
    }
    folder = "runs/" + "long/" * 40
    progress.summary_table(summary, folder)
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        "method ours-1 · memory_bank · exact",
        "teacher 99.00 %",
        "student, final – %",
        "student, max 97.50 %",
        "mean over epochs μ 80.00 %",
        "variance σ² 12.50 %²",
        "epochs 40",
        "time 1:01:40",
        f"files in {folder}",
    ]
