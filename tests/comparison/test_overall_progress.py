import io

from rich.console import Console

from dfkd_jax.comparison.child_process import Outcome
from dfkd_jax.comparison.overall_progress import OverallProgress


def test_a_log_gets_a_line_for_each_run_with_the_time_left(tmp_path):
    out = io.StringIO()
    with OverallProgress(4, 1, Console(file=out, width=200)) as progress:
        progress.start("a, seed 1", tmp_path, 2)
        progress.poll()
        progress.finish("a, seed 1", 60.0, Outcome(True))
        progress.start("a, seed 2", tmp_path, 2)
        progress.finish("a, seed 2", 5.0, Outcome(False, "A loss became non-finite."))
    first, second = out.getvalue().splitlines()
    assert first == "run 2/4  a, seed 1  0:01:00  left 0:02:00  finished"
    assert second.startswith("run 3/4  a, seed 2")
    assert second.endswith("FAILED: A loss became non-finite.")


def test_a_terminal_gets_a_bar(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, _environ={"TERM": "xterm"})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with OverallProgress(2, 0, console) as progress:
        progress.start("a, seed 1", tmp_path, 3)
        progress.finish("a, seed 1", 60.0, Outcome(True))
    assert "a, seed 1  epoch 1/3" in out.getvalue() and "1/2" in out.getvalue()
