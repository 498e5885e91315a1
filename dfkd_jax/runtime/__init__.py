"""Devices, processes, random keys, files and errors: what knows nothing of distillation."""
