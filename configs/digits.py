"""The embedded 8×8 digits: a whole run in a minute, without a download."""

from dfkd_jax.configs.digits import get_config

__all__ = ["get_config"]
