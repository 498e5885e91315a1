"""The command of a small run, and the records that it leaves."""

import sys

from dfkd_jax.run import records
from tests.helpers.tiny import TINY

EPOCHS = 4


def command(workdir, *flags, method="lra-mb", **fields):
    fields = {**TINY, "epochs": EPOCHS, **fields}
    return [
        sys.executable,
        "-m",
        "dfkd_jax.main",
        f"--config=configs/digits.py:{method}",
        f"--workdir={workdir}",
        *[f"--config.{name}={value}" for name, value in fields.items()],
        *flags,
    ]


def without_seconds(path):
    every = records.read_metrics(path)
    return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in every]
