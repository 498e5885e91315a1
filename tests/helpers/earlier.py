"""Files as earlier versions wrote them."""

import orbax.checkpoint as ocp

from dfkd_jax.run.teacher import OLD_WEIGHTS


def save_weights(folder, variables):
    """Of a teacher: a folder of orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / OLD_WEIGHTS).absolute(), variables, force=True)
