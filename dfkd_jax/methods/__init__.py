"""The methods of the field: one file each, and `table`, which finds them by name."""
