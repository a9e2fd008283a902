"""Self-similarity descriptors: a learning-free feature map for CT and MR.

M. Heinrich et al., "Towards Realtime Multimodal Fusion for Image-Guided Interventions
Using Self-Similarities", MICCAI 2013.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def mind_ssc(volume: jax.Array, *, radius: int = 1, dilation: int = 2) -> jax.Array:
    """MIND self-similarity context: 12 patch distances around each voxel.

    ssd_k(p) = mean over the patch at p of (v(. + s_k) - v(. + t_k))^2, where s_k, t_k
    are `dilation` times two of the six unit vectors, at right angles to each other;
    out_k = exp(-(ssd_k - min_j ssd_j) / var), var = mean_k(ssd_k - min_j ssd_j)
    clamped to [0.001, 1000] times its mean over the volume.

    Both shifts and patches repeat the edge value at the border. Unchanged by
    v -> a v + b up to rounding.

    Args:
        volume: [B, X, Y, Z, 1] float, any intensity unit.
        radius: half edge of the patch, voxels; the patch has (2 radius + 1)^3.
        dilation: distance of the six neighbours, voxels.

    Returns:
        [B, X, Y, Z, 12] float32 in [0, 1], at least one channel 1 in every voxel.
        Channels in the order of `offset_pairs`.

    Raises:
        ValueError: volume, radius or dilation are not as above.

    Deviates from the public PyTorch code of convexAdam in the order of the channels,
    in taking the volume mean per example, and in giving 1 for a constant volume where
    that gives NaN.
    """
    if volume.ndim != 5 or volume.shape[-1] != 1:
        raise ValueError(
            f"volume must be (B, X, Y, Z, 1), got {volume.shape}; one channel, last"
        )
    if not jnp.issubdtype(volume.dtype, jnp.floating):
        raise ValueError(
            f"volume must be float intensities, got {volume.dtype}; "
            "cast or window it first"
        )
    if radius < 1 or dilation < 1:
        raise ValueError(
            f"radius and dilation must be >= 1 voxel, got {radius} and {dilation}; "
            "1 and 2 are the usual choice"
        )
    image = volume[..., 0].astype(jnp.float32)
    padded = _pad_edge(image, dilation)
    starts = dilation * (1 + jnp.asarray(offset_pairs(), jnp.int32))
    first = np.int32(0)  # of one type with the others, in x64 too

    def patch_distance(pair):
        s, t = (
            lax.dynamic_slice(padded, (first, *start), image.shape) for start in pair
        )
        return _patch_mean((s - t) ** 2, radius)

    # One channel after another takes half the time and memory of 12 side by side, and
    # keeps the box sums on contiguous volumes.
    ssd = lax.map(patch_distance, starts)
    distance = ssd - jnp.min(ssd, axis=0, keepdims=True)
    return jnp.moveaxis(jnp.exp(-distance / _local_variance(distance)), 0, -1)


def offset_pairs() -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Lists the 12 pairs of unit vectors at right angles, in channel order.

    Returns:
        Pairs (s, t) of (x, y, z) steps, both sorted; times `dilation` they are voxels.
    """
    units = sorted(
        tuple(sign if axis == k else 0 for k in range(3))
        for axis in range(3)
        for sign in (-1, 1)
    )
    return [
        (s, t)
        for s, t in itertools.combinations(units, 2)
        if sum(a * b for a, b in zip(s, t, strict=True)) == 0
    ]


def _patch_mean(volume, radius):
    """Mean over (2 radius + 1)^3 voxels, edge repeated, one axis after another."""
    edge = 2 * radius + 1
    volume = _pad_edge(volume, radius)
    for axis in (1, 2, 3):
        size = [1, 1, 1, 1]
        size[axis] = edge
        volume = lax.reduce_window(volume, 0.0, lax.add, size, (1, 1, 1, 1), "VALID")
    return volume / edge**3


def _local_variance(distance):
    """Mean over channels, clamped around its mean over the volume, never 0."""
    variance = jnp.mean(distance, axis=0, keepdims=True)
    level = jnp.mean(variance, axis=(0, 2, 3, 4), keepdims=True)
    level = jnp.broadcast_to(level, variance.shape)
    clamped = jnp.clip(variance, 0.001 * level, 1000.0 * level)
    # A constant volume has level 0: distances are 0 too, and any divisor gives 1.
    safe = jnp.where(clamped > 0.0, clamped, 1.0)
    return jnp.broadcast_to(safe, distance.shape)


def _pad_edge(volume, width):
    """Repeats the edge of [B, X, Y, Z] by `width` voxels along X, Y and Z."""
    return jnp.pad(volume, ((0, 0), *((width, width),) * 3), mode="edge")
