"""Finite differences and box sums, of which no border value is made up."""

import jax
import numpy as np
from jax import lax


def forward_difference(field: jax.Array, axis: int) -> jax.Array:
    """Differences of neighbours along one axis, at the half-way points.

    out[i] = field[i + 1] - field[i]

    Args:
        field: any shape, floating.
        axis: array axis to difference.

    Returns:
        As field, one shorter along `axis`; unit of field per voxel.

    Raises:
        ValueError: fewer than 2 values along the axis.
    """
    size = _size(field, axis, 2)
    upper = lax.slice_in_dim(field, 1, size, axis=axis)
    return upper - lax.slice_in_dim(field, 0, size - 1, axis=axis)


def central_difference(field: jax.Array, axis: int) -> jax.Array:
    """Central differences along one axis, at its interior points.

    out[i] = (field[i + 2] - field[i]) / 2, the derivative at i + 1

    Args:
        field: any shape, floating.
        axis: array axis to difference.

    Returns:
        As field, two shorter along `axis`; unit of field per voxel.

    Raises:
        ValueError: fewer than 3 values along the axis.
    """
    size = _size(field, axis, 3)
    upper = lax.slice_in_dim(field, 2, size, axis=axis)
    return (upper - lax.slice_in_dim(field, 0, size - 2, axis=axis)) * 0.5


def second_difference(field: jax.Array, axis: int) -> jax.Array:
    """Second differences along one axis, at its interior points.

    out[i] = field[i + 2] - 2 field[i + 1] + field[i], the second derivative at i + 1

    Args:
        field: any shape, floating.
        axis: array axis to difference.

    Returns:
        As field, two shorter along `axis`; unit of field per voxel squared.

    Raises:
        ValueError: fewer than 3 values along the axis.
    """
    _size(field, axis, 3)
    return forward_difference(forward_difference(field, axis), axis)


def box_sum(volume: jax.Array, window: int, axis: int, *, stride: int = 1) -> jax.Array:
    """Sums over a window along one axis, cut at the border.

    Args:
        volume: any shape, floating.
        window: odd, voxels.
        axis: array axis.
        stride: entries from one voxel to the next along it.

    Returns:
        As volume; `box_count` says how many voxels each sum holds.
    """
    size, dilation = [1] * volume.ndim, [1] * volume.ndim
    pads, half = [(0, 0)] * volume.ndim, window // 2 * stride
    size[axis], dilation[axis], pads[axis] = window, stride, (half, half)
    ones = (1,) * volume.ndim
    return lax.reduce_window(
        volume, 0.0, lax.add, size, ones, pads, window_dilation=dilation
    )


def box_count(size: int, window: int) -> np.ndarray:
    """Voxels in the window about each of `size` voxels, cut at the border: [size]."""
    index, half = np.arange(size), window // 2
    return np.minimum(index, half) + np.minimum(index[::-1], half) + 1


def crop_interior(field: jax.Array, axes: tuple[int, ...], *, width: int = 1):
    """Drops `width` entries at both ends of each of the given axes.

    Args:
        field: any shape and dtype.
        axes: array axes to crop.
        width: entries dropped per side.

    Returns:
        As field, 2 width shorter along each of `axes`.

    Raises:
        ValueError: nothing would be left along an axis.
    """
    for axis in axes:
        size = _size(field, axis, 2 * width + 1)
        field = lax.slice_in_dim(field, width, size - width, axis=axis)
    return field


def _size(field, axis, least):
    size = field.shape[axis]
    if size < least:
        raise ValueError(
            f"field must have at least {least} values along axis {axis}, "
            f"got shape {field.shape}"
        )
    return size
