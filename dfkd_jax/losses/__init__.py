"""Distances, the generator's terms, and batch statistics seen from outside."""
