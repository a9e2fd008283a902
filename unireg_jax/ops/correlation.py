"""Local feature correlation: how well each voxel matches its neighbours' features."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Feature values handled at once: bounds the scratch to some 20 MiB whatever the maps.
_CHUNK_ELEMENTS = 2**20


def correlation(
    fixed: jax.Array, moving: jax.Array, *, radius: int = 1, eps: float = 1e-4
) -> jax.Array:
    """Cosine of every fixed feature with the moving features around it.

    out[b, p, k] = <f(p), m(p + o_k)> / (max(|f(p)|, eps) max(|m(p + o_k)|, eps)),
    o_k the k-th of `offsets`; m repeats its edge.          UniReg, Table 7 (27 offsets)

    Works on a few slices and one offset at a time: no shifted copy of the maps exists.

    Args:
        fixed: [B, X, Y, Z, C] float, features of any norm.
        moving: [B, X, Y, Z, C] float, on the same grid.
        radius: largest offset along each axis, voxels of that grid.
        eps: smallest norm divided by; a zero feature gives cosine 0.

    Returns:
        [B, X, Y, Z, (2 radius + 1)^3] float32 in [-1, 1], summed in float32.

    Raises:
        ValueError: shapes, dtypes or radius are not as above.
    """
    _check_features(fixed, moving, radius)
    # vmap keeps the batch an axis of its own: split over devices, no example moves.
    return jax.vmap(lambda f, m: _correlate(f, m, radius, eps))(fixed, moving)


def offsets(radius: int = 1) -> list[tuple[int, int, int]]:
    """Lists the offsets in channel order: row-major over X, Y, Z.

    Args:
        radius: largest offset along each axis, voxels.

    Returns:
        (2 radius + 1)^3 triples (x, y, z) in voxels; the middle one is (0, 0, 0).
    """
    return list(itertools.product(range(-radius, radius + 1), repeat=3))


def _correlate(fixed, moving, radius, eps):
    """One example, [X, Y, Z, C] -> [X, Y, Z, (2 radius + 1)^3]."""
    offset_starts = radius + jnp.asarray(offsets(radius), jnp.int32)
    first = np.int32(0)  # of one type with the others, in x64 too
    size = _chunk_size(fixed.shape)

    def correlate_chunk(start):
        f = lax.dynamic_slice_in_dim(fixed, start, size).astype(jnp.float32)
        # The slices before and after too, the edge slice repeated.
        index = start + jnp.arange(-radius, size + radius)
        m = jnp.take(moving, index, axis=0, mode="clip").astype(jnp.float32)
        scale_f = _inverse_norm(f, eps)
        m, scale_m = (_pad_edge(a, radius) for a in (m, _inverse_norm(m, eps)))

        def at_offset(offset):
            near, scale = (
                lax.dynamic_slice(a, (*offset, first), (*f.shape[:3], a.shape[3]))
                for a in (m, scale_m)
            )
            # Norms go onto the result: two maps instead of two normalised copies.
            return jnp.sum(f * near, axis=-1) * (scale * scale_f)[..., 0]

        return jnp.moveaxis(lax.map(at_offset, offset_starts), 0, -1)

    chunks = lax.map(correlate_chunk, jnp.arange(0, fixed.shape[0], size))
    return chunks.reshape(*fixed.shape[:3], len(offset_starts))


def _chunk_size(shape):
    """Slices handled at once, a divisor of X."""
    most = max(1, _CHUNK_ELEMENTS // math.prod(shape[1:]))
    return max(n for n in range(1, min(most, shape[0]) + 1) if shape[0] % n == 0)


def _pad_edge(slices, width):
    """Repeats the edge along Y and Z."""
    pad = (width, width)
    return jnp.pad(slices, ((0, 0), pad, pad, (0, 0)), mode="edge")


def _inverse_norm(features, eps):
    """1 / max(|features|, eps) of float32 features; the channel axis becomes 1."""
    squares = jnp.sum(features**2, axis=-1, keepdims=True)
    return lax.rsqrt(jnp.maximum(squares, eps * eps))


def _check_features(fixed, moving, radius):
    """Same shape [B, X, Y, Z, C], float; radius at least 1."""
    if fixed.ndim != 5:
        raise ValueError(
            f"fixed must be (B, X, Y, Z, C), got {fixed.shape}; add the batch axis"
        )
    if moving.shape != fixed.shape:
        raise ValueError(
            f"moving must be {fixed.shape} as fixed, got {moving.shape}; "
            "resize both feature maps to one grid first"
        )
    for name, features in (("fixed", fixed), ("moving", moving)):
        if not jnp.issubdtype(features.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be float features, got {features.dtype}; cast it first"
            )
    if radius < 1:
        raise ValueError(f"radius must be >= 1 voxel, got {radius}; 1 is the paper's")
