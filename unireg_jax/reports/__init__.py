"""Pages to look at: one file per case, one index per batch; no network, no JAX."""
