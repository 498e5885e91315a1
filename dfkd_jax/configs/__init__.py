"""Configurations by data set: `--config=digits`, or in a checkout `--config=configs/digits.py`."""
