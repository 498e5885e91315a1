"""Folders as finished runs leave them, without running anything, and reports read back."""

import csv

from dfkd_jax.comparison import run_folders
from dfkd_jax.run import records
from dfkd_jax.run.config import to_dict
from dfkd_jax.run.outputs import method_names
from dfkd_jax.runtime import files
from tests.helpers.tiny import tiny_config

MIB = 2**20


COST = {"seconds_per_student_step": 0.0125, "peak_memory_bytes": 300 * MIB}


def fabricate(root, method, seed, accuracies, teacher=90.0, extra=None, cost=COST, **fields):
    """The folder that a finished run leaves, with these accuracies (percent) over the epochs."""
    config = tiny_config(method, seed=seed, **fields)
    folder = root / "runs" / run_folders.method_label(method_names(config)) / f"seed{seed}"
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
    summary = {**records.summarize(history, teacher, method_names(config)), **cost}
    records.write_metrics(folder / "metrics.jsonl", history)
    files.write_json(folder / "config.json", to_dict(config))
    files.write_json(folder / "summary.json", summary)
    return folder


def rows(text, title):
    """The table below a heading of Markdown: row name → cells."""
    block = text.split(f"## {title}", 1)[1].split("##")[0]
    lines = [line for line in block.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
