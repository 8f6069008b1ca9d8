"""Examining frames before they are trained on: everything that can be seen without a model."""
