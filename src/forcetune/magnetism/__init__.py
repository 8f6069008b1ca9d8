"""The spin-aware layer."""
