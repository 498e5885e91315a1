"""The 8×8 digits that scikit-learn embeds: a whole run in a minute, without a download."""

from dfkd_jax.configs.digits import get_config

__all__ = ["get_config"]
