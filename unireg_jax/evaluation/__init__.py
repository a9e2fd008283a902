"""Judges a registration: by labels, landmarks, and the map itself. No JAX."""
