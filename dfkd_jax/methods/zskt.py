"""ZSKT: zero-shot knowledge transfer (Micaelli and Storkey, NeurIPS 2019).

Generator and student play for KL(T ‖ S): one raises it, the other lowers it. The student's loss has
an attention term as well: it should look where the teacher looks, see `dfkd_jax.losses.attention`.
Its weight is 250 in the source, for two WRN. Networks without batch norm need the weight 0.
"""

import ml_collections

from dfkd_jax.data.data_table import DatasetSpec
from dfkd_jax.distillation.roles import Method
from dfkd_jax.methods import adversarial_family
from dfkd_jax.runtime.axis import ONE, Axis
from dfkd_jax.runtime.fields import Field, at_least

FIELDS = {
    **adversarial_family.FIELDS,
    # 0 for runs of versions that did not have the term.
    "loss.attention": Field(0.0, at_least(0), "β, the student's attention to the teacher's maps"),
}

PRESETS = {
    "zskt": {
        **adversarial_family.NO_REPLAY,
        **adversarial_family.ONLY_ADVERSARIAL,
        "loss.distance": "kl",
        "loss.adversarial_form": "kl",
        "loss.adversarial_temperature": 1.0,
        "loss.attention": 250.0,
    }
}


def create(config: ml_collections.ConfigDict, spec: DatasetSpec, axis: Axis = ONE) -> Method:
    """The method of a configuration, see `dfkd_jax.methods.table`."""
    method = adversarial_family.create(config, spec, axis)
    return method._replace(attention=config.loss.attention)
