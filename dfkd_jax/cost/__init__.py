"""What a step costs: time, operations and memory, and how they grow; against a peer in PyTorch.

`measure.Program` is the compiled steps of one configuration. Behind `python -m dfkd_jax.benchmark`.
"""
