"""One process of several: two epochs in float64, the state of the end to a file.

`python -m tests.helpers.float64_epochs OUTPUT METHOD MAPPING COORDINATOR NUM_PROCESSES PROCESS_ID`
"""

import sys

import jax
import numpy as np

from dfkd_jax.runtime import processes


def main(output, method, mapping, coordinator, count, index):
    """Processes must find each other before anything touches JAX's devices."""
    jax.config.update("jax_enable_x64", True)
    processes.start("auto", coordinator, int(count), int(index))
    from tests.helpers.devices import FIELDS, on, start
    from tests.helpers.tiny import tiny_config

    some = on(jax.device_count(), mapping)
    algorithm, state, teacher = start(tiny_config(method, **FIELDS), some)
    for _ in range(2):
        state, _ = algorithm.epoch(state, teacher)
    state = some.local(state.replace(key=()))
    if processes.is_main():
        np.savez(output, *map(np.asarray, jax.tree.leaves(state)))


if __name__ == "__main__":
    main(*sys.argv[1:])
