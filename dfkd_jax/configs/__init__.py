"""Configurations by data set: `default` has the fields of every run, with the paper's values.

The other files change what differs. Each defines `get_config(method)`.
"""
