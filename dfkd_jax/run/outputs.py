"""What a run leaves in its folder: metrics, TensorBoard scalars, figures, the summary.

Process 0 writes; in the others every call does nothing.
"""

import statistics
from typing import Any

import ml_collections
from rich.console import Console

from dfkd_jax.data import splits as data
from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.costs import Costs
from dfkd_jax.distillation.objectives import WITH_INNER_STEP
from dfkd_jax.distillation.state import DistillState
from dfkd_jax.run import collapse, records, samples
from dfkd_jax.run.progress import summary_table
from dfkd_jax.run.resume import Run
from dfkd_jax.run.setup import Algorithm
from dfkd_jax.runtime import files, processes
from dfkd_jax.runtime.devices import peak_memory

# Of the last epoch, beside the measures of the paper.
AGREEMENTS = (
    "generated_distance",
    "generated_class_share",
    "generated_spread",
    "memory_agreement",
    "memory_distance",
)


class Outputs:
    """The files of one run, open while it goes on."""

    def __init__(self, run: Run, teacher_accuracy: float | None) -> None:
        """Open them; lines of epochs that will be run again are dropped.

        Args:
          run: with the history of the epochs so far.
          teacher_accuracy: percent; None without data.
        """
        self._run, self._teacher_accuracy = run, teacher_accuracy
        self._tensorboard = None
        if processes.is_main():
            # A line may be there of an epoch whose checkpoint was not written, or was damaged.
            records.write_metrics(run.workdir / "metrics.jsonl", run.history)
            self._tensorboard = records.TensorBoard(
                run.workdir / "tensorboard", len(run.history) + 1
            )

    def record(self, record: dict[str, Any]) -> None:
        """One epoch's."""
        if self._tensorboard:
            records.append_metrics(self._run.workdir / "metrics.jsonl", record)
            self._tensorboard.write(record)

    def figures(
        self,
        algorithm: Algorithm,
        state: DistillState,
        teacher_variables: Any,
        spec: DatasetSpec,
    ) -> None:
        """Draw them from arrays of this process."""
        if self._tensorboard:
            # Here, as matplotlib takes a fifth of the time in which a command starts.
            from dfkd_jax.run.figures import learning_curve, measures, sample_grid

            workdir = self._run.workdir
            learning_curve(
                self._run.history,
                self._teacher_accuracy,
                workdir / "learning_curve.png",
                data.tested_split(self._run.config.dataset),
            )
            measures(self._run.history, workdir / "measures.png")
            panels = samples.panels(algorithm.parts, state, teacher_variables, spec)
            sample_grid(panels, workdir / "samples.png")

    def warnings(self, num_classes: int) -> dict[str, str]:
        """What the epochs so far show of a collapse; see `collapse.warnings`."""
        split = data.tested_split(self._run.config.dataset)
        return collapse.warnings(self._run.history, num_classes, split)

    def summary(
        self, student_steps: int, num_classes: int, costs: Costs, console: Console
    ) -> dict[str, Any]:
        """Write and show the summary of the finished run, whose epochs have so many steps."""
        history = self._run.history
        summary = records.summarize(history, self._teacher_accuracy, method_names(self._run.config))
        summary |= {f"final_{name}": history[-1].get(name) for name in AGREEMENTS}
        times = [record["seconds"] for record in history]
        # The first epoch compiles.
        summary["seconds_per_student_step"] = statistics.median(times[1:] or times) / student_steps
        summary |= costs._asdict() | _phases(history)
        summary["warnings"] = list(self.warnings(num_classes).values())
        summary["peak_memory_bytes"] = peak_memory()
        if self._tensorboard:
            files.write_json(self._run.workdir / "summary.json", summary)
        summary_table(summary, self._run.workdir, console)
        return summary

    def close(self) -> None:
        """Flush and close them."""
        if self._tensorboard:
            self._tensorboard.close()


def _phases(history: list[dict[str, Any]]) -> dict[str, float | None]:
    """Seconds of all epochs, compilation included; None where they cannot be told apart."""
    of_synthesis = [record.get("seconds_of_synthesis") for record in history]
    known = [seconds for seconds in of_synthesis if seconds is not None]
    if len(known) < len(history):
        return {"seconds_of_synthesis": None, "seconds_of_distillation": None}
    total = sum(record["seconds"] for record in history)
    return {
        "seconds_of_synthesis": sum(known),
        "seconds_of_distillation": total - sum(known),
    }


def method_names(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What tells this run from others."""
    return {
        "method": config.method,
        "replay": config.replay.kind,
        "objective": config.objective,
        # How the gradient of the retention term is taken, where there is an inner step.
        "gradient": config.meta.variant if config.objective in WITH_INNER_STEP else None,
        "dataset": data.tested_on(config),
        "teacher": config.teacher.model,
        "student": config.student.model,
        "seed": config.seed,
    }
