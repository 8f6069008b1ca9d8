"""The NequIP family of networks: what SevenNet and NequIP have in common."""
