"""Labelled images and their facts: `data_table` and `data_specs` say what a data set is.

`splits.load` reads one, whole, as uint8. No student is trained on them.
"""
