"""Helpers that know nothing of potentials: files, parsing, downloads, processes."""
