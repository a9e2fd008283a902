"""Raw scans -> prepared arrays -> batches of pairs: numpy and grain, never jax."""
