"""The doctor: what may be wrong with data, found by looking at them and by comparison with a model."""
