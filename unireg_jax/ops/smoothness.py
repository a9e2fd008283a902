"""Smoothness penalties of a displacement or velocity field, and smoothing."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unireg_jax.ops.stencil import (
    box_count,
    box_sum,
    central_difference,
    crop_interior,
    forward_difference,
    second_difference,
)
from unireg_jax.ops.warp import check_disp

_SPACE = (1, 2, 3)


def diffusion(disp: jax.Array) -> jax.Array:
    """Mean squared first difference of a field.

    1/3 sum_j mean_{x, i} (disp_i(x + e_j) - disp_i(x))^2

    For each axis j the mean runs over the differences that exist (one fewer than
    voxels along j) and over the three components; the three means are averaged. So a
    field disp = a x_0 along one component gives a^2 / 9.

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.

    Returns:
        [B] float32, no unit (voxels per voxel, squared).

    Raises:
        ValueError: wrong shape or dtype, or fewer than 2 voxels along an axis.
    """
    check_disp(disp, least=2)
    means = [
        jnp.mean(jnp.square(forward_difference(disp, axis)), axis=(1, 2, 3, 4))
        for axis in _SPACE
    ]
    return (means[0] + means[1] + means[2]) * (1.0 / 3.0)


def bending(disp: jax.Array) -> jax.Array:
    """Mean squared second difference of a field; zero for every affine field.

    mean_{x, i} sum_{j, k} (d^2 disp_i / d x_j d x_k)^2

    over interior voxels and the three components: second differences for j = k, central
    differences of central differences for j != k (each pair counts twice).

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.

    Returns:
        [B] float32, 1 / voxel^2.

    Raises:
        ValueError: wrong shape or dtype, or fewer than 3 voxels along an axis.
    """
    check_disp(disp, least=3)

    def pure(axis):
        others = tuple(other for other in _SPACE if other != axis)
        return jnp.square(second_difference(crop_interior(disp, others), axis))

    def mixed(one, two):
        (other,) = (axis for axis in _SPACE if axis not in (one, two))
        field = central_difference(crop_interior(disp, (other,)), one)
        return jnp.square(central_difference(field, two))

    energy = pure(1) + pure(2) + pure(3)
    energy = energy + 2.0 * (mixed(1, 2) + mixed(1, 3) + mixed(2, 3))
    return jnp.mean(energy, axis=(1, 2, 3, 4))


def box_mean(disp: jax.Array, edge: int) -> jax.Array:
    """Mean over the cube about every voxel, cut at the border.

    Three of them in a row come close to a Gaussian; one has the variance of a Gaussian
    of sqrt((edge^2 - 1) / 12) voxels.

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.
        edge: of the cube, odd, voxels.

    Returns:
        The same shape.

    Raises:
        ValueError: wrong shape or dtype, or an edge that is not odd.
    """
    check_disp(disp)
    if edge < 1 or edge % 2 == 0:
        raise ValueError(f"edge must be odd and positive, got {edge}; it has a centre")
    # Components beside each other along the last axis: windows of a whole row at once,
    # not of three values. A sum of slices would be fused with what it reads, and that
    # computed again for each of them.
    out = disp.reshape(*disp.shape[:3], -1)
    for axis in _SPACE:
        stride = disp.shape[4] if axis == 3 else 1
        out = box_sum(out, edge, axis, stride=stride)
        count = box_count(disp.shape[axis], edge)
        share = jnp.asarray(np.repeat(1.0 / count, stride), jnp.float32)
        out = out * lax.broadcast_in_dim(share, out.shape, (axis,))
    return out.reshape(disp.shape)
