"""The paper: meta-gradient, objectives, steps, and an epoch of them."""
