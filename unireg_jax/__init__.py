"""UniReg in JAX: one network that registers CT of any body region, steered by a task."""
