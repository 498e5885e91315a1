"""The methods of the field: one file each, and `table`, which finds them by name.

What a file defines is said in `table`. `adversarial_family` is what most of them share.
"""
