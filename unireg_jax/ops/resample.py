"""Changing the resolution of volumes and fields. Only here do vectors get rescaled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unireg_jax.ops.warp import check_disp, working_dtype


def resize_volume(volume: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Resizes by trilinear interpolation with aligned corners.

    out[b, i, c] = volume[b, i (n_in - 1) / (n_out - 1), c] on every axis

    First and last voxel centres coincide. No smoothing: to shrink without aliasing use
    `downsample_mean`. The derivative is a product with one small matrix per axis, so
    that the gradient is another such product and holds no scatter.

    Args:
        volume: [B, X, Y, Z, C] floating.
        shape: (X', Y', Z'), the new grid; an axis of one voxel takes the first.

    Returns:
        [B, X', Y', Z', C], dtype of volume.

    Raises:
        ValueError: wrong shape or dtype.
    """
    _check_volume(volume)
    shape = _check_shape(shape)
    out = _interpolate(volume.astype(working_dtype(volume)), shape, False)
    return out.astype(volume.dtype)


def resize_disp(disp: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Resizes a displacement and rescales its vectors to voxels of the new grid.

    out_k(i) = (n_out_k - 1) / (n_in_k - 1) disp_k(i (n_in - 1) / (n_out - 1))

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels of its own grid; or a velocity.
        shape: (X', Y', Z'), the new grid, at least 2 voxels along each axis.

    Returns:
        [B, X', Y', Z', 3] float32, voxels of the new grid.

    Raises:
        ValueError: wrong shape or dtype, or an axis of one voxel.
    """
    check_disp(disp)
    shape = _check_shape(shape)
    if min(*shape, *disp.shape[1:4]) < 2:
        raise ValueError(
            "disp and shape must have at least 2 voxels along each axis, "
            f"got {disp.shape} and {shape}"
        )
    sizes = zip(shape, disp.shape[1:4], strict=True)
    scale = jnp.asarray([(out - 1) / (size - 1) for out, size in sizes], disp.dtype)
    scale = scale[None, None, None, None]
    # Scaled on whichever grid has fewer voxels.
    if np.prod(shape) > np.prod(disp.shape[1:4]):
        return resize_volume(disp * scale, shape)
    return resize_volume(disp, shape) * scale


def upsample_disp(disp: jax.Array, factor: int) -> jax.Array:
    """Refines a displacement to a grid of `factor` times as many voxels.

    out_k(i) = factor disp_k((i + 1/2) / factor - 1/2) on every axis

    Trilinear between the centres of blocks of factor^3 voxels, the grid of
    `downsample_disp`; beyond the outer centres the edge value holds.

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels of its own grid.
        factor: edge of a block in voxels of the new grid.

    Returns:
        [B, f X, f Y, f Z, 3] float32, voxels of the new grid.

    Raises:
        ValueError: wrong shape or dtype, or factor below 1.
    """
    check_disp(disp)
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    if factor == 1:
        return disp
    shape = tuple(factor * size for size in disp.shape[1:4])
    return _interpolate(disp * factor, shape, True)


def downsample_disp(disp: jax.Array, factor: int) -> jax.Array:
    """Averages blocks of a displacement and rescales to voxels of the new grid.

    out = downsample_mean(disp, factor) / factor

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels; X, Y, Z multiples of the factor.
        factor: edge of a block in voxels.

    Returns:
        [B, X/f, Y/f, Z/f, 3] float32, voxels of the new grid, whose voxel i has its
        centre at f i + (f - 1) / 2.

    Raises:
        ValueError: wrong shape or dtype, or a size that is no multiple.
    """
    check_disp(disp)
    return downsample_mean(disp, factor) * (1.0 / factor)


def downsample_mean(volume: jax.Array, factor: int | tuple[int, int, int]) -> jax.Array:
    """Averages blocks of voxels.

    out[b, i, c] = mean of volume[b, f i ... f i + f - 1, c] on every axis

    The centre of output voxel i lies at f i + (f - 1) / 2, half a block away from the
    grid of `resize_volume`: do not mix the two within one field.

    Args:
        volume: [B, X, Y, Z, C] floating; X, Y, Z multiples of the factor.
        factor: block edge in voxels, for all axes or per axis.

    Returns:
        [B, X/f, Y/f, Z/f, C], dtype of volume.

    Raises:
        ValueError: wrong shape or dtype, or a size that is no multiple.
    """
    _check_volume(volume)
    fx, fy, fz = (factor,) * 3 if isinstance(factor, int) else factor
    batch, x, y, z, channels = volume.shape
    if min(fx, fy, fz) < 1 or x % fx or y % fy or z % fz:
        raise ValueError(
            f"volume must have multiples of {(fx, fy, fz)} voxels, "
            f"got {volume.shape[1:4]}; pad or crop it first"
        )
    blocks = volume.reshape(batch, x // fx, fx, y // fy, fy, z // fz, fz, channels)
    mean = jnp.mean(blocks, axis=(2, 4, 6), dtype=working_dtype(volume))
    return mean.astype(volume.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _interpolate(volume, shape, blocks):
    """Blends the two neighbours along each axis: eight gathers in one loop."""
    axes = [axis for axis in (3, 2, 1) if volume.shape[axis] != shape[axis - 1]]
    for axis in axes:
        low, fraction = _neighbours(volume.shape[axis], shape[axis - 1], blocks)
        high = np.minimum(low + 1, volume.shape[axis] - 1)
        if axis != axes[-1]:
            pair = ((low, 1.0 - fraction), (high, fraction))
            lower, upper = (_weighted(volume, axis, *half) for half in pair)
            volume = lower + upper
        else:
            # As in ops/warp.py: without a reduction, XLA:CPU stores all eight gathers
            # where the result is read twice.
            weights = np.stack([1.0 - fraction, fraction])
            pair = _weighted(volume, axis, np.stack([low, high]), weights)
            volume = jnp.sum(pair, axis=axis)
    return volume


def _weighted(volume, axis, index, weights):
    """Takes entries along an axis, each with its weight; index may have any rank."""
    taken = jnp.take(volume, index, axis=axis, mode="clip")
    axes = tuple(range(axis, axis + index.ndim))
    weights = jnp.asarray(weights, volume.dtype)
    return taken * lax.broadcast_in_dim(weights, taken.shape, axes)


@_interpolate.defjvp
def _interpolate_jvp(shape, blocks, primals, tangents):
    """The tangent by matrices: their transpose holds no scatter."""
    (volume,), (volume_dot,) = primals, tangents
    for axis, size in enumerate(shape, start=1):
        if volume_dot.shape[axis] != size:
            volume_dot = _interpolate_axis(volume_dot, axis, size, blocks)
    return _interpolate(volume, shape, blocks), volume_dot


def _interpolate_axis(volume, axis, size, blocks=False):
    """Multiplies one spatial axis by its interpolation matrix."""
    matrix = jnp.asarray(_matrix(volume.shape[axis], size, blocks), volume.dtype)
    # Highest precision: matrix units would round displacements to ten bits.
    out = jnp.tensordot(
        volume, matrix, axes=((axis,), (1,)), precision=lax.Precision.HIGHEST
    )
    return jnp.moveaxis(out, -1, axis)


def _matrix(size_in, size_out, blocks):
    """Linear interpolation as a [size_out, size_in] matrix."""
    low, fraction = _neighbours(size_in, size_out, blocks)
    position = (low + fraction)[:, None]
    return np.maximum(1.0 - np.abs(position - np.arange(size_in)[None]), 0.0)


def _neighbours(size_in, size_out, blocks):
    """Lower neighbour of every output voxel, and the distance from it in [0, 1].

    The outer voxel centres coincide or, with `blocks`, the outer faces.
    """
    if blocks:
        position = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
        position = np.clip(position, 0.0, size_in - 1)
    else:
        position = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
    low = np.clip(np.floor(position).astype(np.int32), 0, max(size_in - 2, 0))
    return low, np.clip(position - low, 0.0, 1.0)


def _check_volume(volume):
    if volume.ndim != 5:
        raise ValueError(
            f"volume must be (B, X, Y, Z, C), got {volume.shape}; "
            "batch goes first, channels go last"
        )
    if not jnp.issubdtype(volume.dtype, jnp.floating):
        raise ValueError(f"volume must be floating, got {volume.dtype}; cast it first")


def _check_shape(shape):
    shape = tuple(shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (X, Y, Z), each at least 1, got {shape}")
    return shape
