"""A configuration as plain values, and the comparison of two of them."""

import json
from typing import Any

import ml_collections

# Fields of earlier versions, and what there is in their place.
RENAMED = {
    "meta.objective": "config.objective: for 'paper' lra or joint, for 'code' lra_concatenated or "
    "concatenated",
}

# A run may go on with other values of these: they do not change what it computes.
FREE_FIELDS = (
    "checkpoint_every",
    "loop",
    "dataset.data_dir",
    "parallel.devices",
    "parallel.mapping",
)


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The configuration as plain JSON values, references resolved."""
    return json.loads(config.to_json())


def differences(stored: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields that differ, as "field: stored → current", apart from `FREE_FIELDS`."""
    found = []
    for key in sorted(stored.keys() | current.keys()):
        field = prefix + key
        a, b = stored.get(key), current.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, field + ".")
        elif a != b and field not in FREE_FIELDS:
            found.append(f"{field}: {a!r} → {b!r}")
    return found
