"""Frozen features behind one interface, and the correlation the backbone joins.

A backend maps windowed images to a fine map at 1/2 and a coarse map at 1/4 or below.
Both are resized to 1/2, normalised, concatenated and correlated over 27 offsets
(UniReg, section 4.3 and Table 7).
"""

import jax
import jax.numpy as jnp

from unireg_jax.models.features import mind, none
from unireg_jax.ops import correlation, resample

FEATURES = {"mind": mind.extract, "none": none.extract}


def describe(image: jax.Array, *, backend: str) -> jax.Array:
    """Fine and coarse maps of one image, normalised and concatenated at 1/2.

    Args:
        image: [B, X, Y, Z, 1] float32 in [-1, 1]; X, Y, Z multiples of 4.
        backend: row of FEATURES.

    Returns:
        [B, X/2, Y/2, Z/2, C] float32; each half has unit length at every voxel.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in FEATURES:
        raise ValueError(f"backend must be one of {sorted(FEATURES)}, got {backend!r}")
    fine, coarse = FEATURES[backend](image)
    coarse = resample.resize_volume(coarse, fine.shape[1:4])
    return jnp.concatenate([_normalize(fine), _normalize(coarse)], axis=-1)


def match(fixed: jax.Array, moving: jax.Array, *, backend: str) -> jax.Array:
    """Correlation of two images' features, without gradient.

    Args:
        fixed: [B, X, Y, Z, 1] float32 in [-1, 1].
        moving: as fixed, pre-aligned on the fixed grid.
        backend: row of FEATURES.

    Returns:
        [B, X/2, Y/2, Z/2, 27] float32, cosine at offsets -1, 0, 1, row-major.
    """
    fixed, moving = jax.lax.stop_gradient((fixed, moving))
    corr = correlation.correlation(
        describe(fixed, backend=backend), describe(moving, backend=backend)
    )
    return jax.lax.stop_gradient(corr)


def _normalize(features: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.broadcast_to(jnp.maximum(norm, 1e-6), features.shape)
