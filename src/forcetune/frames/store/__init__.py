"""Frames that stay on disk, for sets larger than memory."""
