"""MAD: momentum adversarial distillation (Do et al., NeurIPS 2022).

The student learns from a generator φ and from its exponential moving average ψ (0.95),

    L_acq on x̂ from φ  +  λ L_ret on x̂_m from ψ,

so MAD is joint replay of a slowly moving generator, and `--config.objective=lra` puts the paper's
objective on top. The generator is told its classes, x̂ = G(z + e_y), and descends

    −mean |T − S| + CE(T(x̂), y) + bn · BN.

There is no public code. What the paper leaves open is chosen so: d is the L1 distance of logits, as
of the other adversarial methods here; z and e_y add up; the average moves after every update.
"""

import ml_collections

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.roles import Method
from dfkd_jax.methods import adversarial_family
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.fields import Field, at_least
from dfkd_jax.synthesis import adversarial

FIELDS = {
    **adversarial_family.FIELDS,
    "loss.target": Field(1.0, at_least(0), "CE(T(x̂), y) to the classes that G is told"),
}

PRESETS = {
    "mad": {
        **adversarial_family.ONLY_ADVERSARIAL,
        "replay.kind": "momentum",
        "objective": "joint",
        "loss.adversarial_form": "l1",
        "loss.target": 1.0,
        "loss.batch_norm": 1.0,
    }
}


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Method:
    """The method of a configuration, see `dfkd_jax.methods.table`."""
    synthesizer = adversarial.create(config, spec, axis, conditional=True)
    return adversarial_family.compose(config, spec, synthesizer, axis)
