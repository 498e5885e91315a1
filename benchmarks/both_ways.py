"""Convert public thin ResNets of CIFAR-10 both ways, as a layout and by `torch.export`.

    python -m benchmarks.both_ways resnet20-12fca82f.th resnet32-d509ac18.th

Prints the largest difference of the logits on 64 random images. Needs PyTorch.
"""

import contextlib
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import dfkd_jax
from dfkd_jax.convert import main as convert

NETWORK = "dfkd_jax.interchange.torch_code.thin_resnet:ThinResNet"


def difference(file: str) -> float:
    """Of the logits of the two teachers that a checkpoint gives."""
    named = re.match(r"resnet(\d+)", Path(file).name)
    if named is None:
        raise SystemExit(f"{file} is not called resnet20, -32, -44, -56 or -110.")
    ways = (f"--model=resnet{named[1]}", f"--module={NETWORK}(10, {named[1]})")
    images = np.random.default_rng(0).normal(size=(64, 32, 32, 3)).astype(np.float32)
    logits = []
    for way in ways:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            output = f"{folder}/teacher"
            if convert([file, way, "--dataset=cifar10", f"--output={output}"]):
                raise SystemExit(2)
            teacher = dfkd_jax.load_teacher(output)
        logits.append(np.asarray(jax.jit(teacher.network.apply)(teacher.variables, images)[0]))
    return float(np.abs(logits[0] - logits[1]).max())


def main(arguments: Sequence[str]) -> None:
    """Compare each checkpoint."""
    for file in arguments:
        print(f"{Path(file).name:28}{difference(file):.1e}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
