"""One run: configuration, teacher, training loop, checkpoints, and what it leaves."""
