"""Labelled images and their facts: to train and test teachers, and to test students."""
