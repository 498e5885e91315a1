"""The paper: `meta` has inner step and meta-gradient, `objectives` what the student descends.

`steps` and `epoch` are the algorithm as pure functions of `state`; `roles` is what a method is made
of; `agreement` measures student and teacher without data.
"""
