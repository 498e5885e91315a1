"""Classifiers, generator and encoder, their layers and convolutions."""
