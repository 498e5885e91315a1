import resource
import sys
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from dfkd_jax.distillation.costs import Costs
from dfkd_jax.run.outputs import Outputs
from dfkd_jax.run.resume import Run
from dfkd_jax.runtime import files
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize(
    "seconds, per_step",
    # The median of 2, 3 and 4 over 6 steps: the first epoch compiles. Alone it has to do.
    [([9.0, 2.0, 4.0, 3.0], 0.5), ([9.0], 1.5)],
)
def test_the_summary_holds_what_the_run_cost(tmp_path, monkeypatch, seconds, per_step):
    history = [{"epoch": i, "seconds": value} for i, value in enumerate(seconds, start=1)]
    outputs = Outputs(Run(tiny_config(), tmp_path, None, history), teacher_accuracy=None)

    def summary(memory_stats):
        device = SimpleNamespace(memory_stats=lambda: memory_stats)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return outputs.summary(6, 10, Costs(1, 2, 3, 4), Console(quiet=True))

    found = summary({"peak_bytes_in_use": 123, "bytes_in_use": 45})
    assert (found["seconds_per_student_step"], found["peak_memory_bytes"]) == (per_step, 123)
    assert files.read_json(tmp_path / "summary.json") == found
    costs = [found[name] for name in Costs._fields]
    assert costs == [1, 2, 3, 4]
    assert found["seconds_of_synthesis"] is found["seconds_of_distillation"] is None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    of_process = summary(None)["peak_memory_bytes"] / (1 if sys.platform == "darwin" else 1024)
    assert before <= of_process <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outputs.close()


def test_synthesis_and_distillation_are_told_apart_where_they_were_timed(tmp_path):
    history = [
        {"epoch": i, "seconds": 3.0, "seconds_of_synthesis": value}
        for i, value in enumerate((1.0, 0.5), start=1)
    ]
    outputs = Outputs(Run(tiny_config(), tmp_path, None, history), teacher_accuracy=None)
    found = outputs.summary(6, 10, Costs(1, 2, 3, 4), Console(quiet=True))
    outputs.close()
    assert (found["seconds_of_synthesis"], found["seconds_of_distillation"]) == (1.5, 4.5)
