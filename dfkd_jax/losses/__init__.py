"""Distances of the student, terms of the generator (`terms`), and batch-norm statistics.

Pure functions of logits, features and statistics; each names its source.
"""
