"""UniReg in JAX: one network that registers CT of any body region, led by a task."""
