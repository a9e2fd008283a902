"""Voxels <-> millimetres for fields and landmarks: the only unit converter.

World coordinates are LPS millimetres; `vox2world` is the 4 x 4 affine of one grid,
voxel index -> world, acting on column vectors.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unireg_jax.ops.warp import sample


def disp_to_mm(disp: jax.Array, vox2world: jax.Array | np.ndarray) -> jax.Array:
    """Converts displacement vectors from voxels of a grid to world millimetres.

    disp_mm = R disp, R the linear part of vox2world

    Args:
        disp: [..., 3] float32, voxels.
        vox2world: [4, 4], voxel -> mm, of the grid whose voxels disp counts.

    Returns:
        [..., 3] float32, mm.

    Raises:
        ValueError: wrong shape.
    """
    _check_vectors("disp", disp, "in voxels")
    return _multiply(disp, _linear(vox2world, disp.dtype))


def disp_from_mm(disp_mm: jax.Array, vox2world: jax.Array | np.ndarray) -> jax.Array:
    """Converts displacement vectors from world millimetres to voxels of a grid.

    disp = R^-1 disp_mm, R the linear part of vox2world

    Args:
        disp_mm: [..., 3] float32, mm.
        vox2world: [4, 4], voxel -> mm, of the grid whose voxels disp counts.

    Returns:
        [..., 3] float32, voxels.

    Raises:
        ValueError: wrong shape.
    """
    _check_vectors("disp_mm", disp_mm, "in mm")
    return _multiply(disp_mm, _inverse(_linear(vox2world, disp_mm.dtype)))


def points_to_world(points: jax.Array, vox2world: jax.Array | np.ndarray) -> jax.Array:
    """Maps voxel positions to world positions.

    points_mm = vox2world (points, 1)

    Args:
        points: [N, 3] float32, voxels.
        vox2world: [4, 4], voxel -> mm.

    Returns:
        [N, 3] float32, mm.

    Raises:
        ValueError: wrong shape.
    """
    _check_points("points", points, "in voxels")
    linear = _linear(vox2world, points.dtype)
    return _multiply(points, linear) + _origin(vox2world, points.dtype)


def points_to_voxel(
    points_mm: jax.Array, vox2world: jax.Array | np.ndarray
) -> jax.Array:
    """Maps world positions to voxel positions.

    points = R^-1 (points_mm - t), vox2world = [R t]

    Args:
        points_mm: [N, 3] float32, mm.
        vox2world: [4, 4], voxel -> mm.

    Returns:
        [N, 3] float32, voxels.

    Raises:
        ValueError: wrong shape.
    """
    _check_points("points_mm", points_mm, "in mm")
    inverse = _inverse(_linear(vox2world, points_mm.dtype))
    return _multiply(points_mm - _origin(vox2world, points_mm.dtype), inverse)


def warp_points(points: jax.Array, disp: jax.Array) -> jax.Array:
    """Moves landmarks of the fixed image to where the field says they are in moving.

    out = points + disp(points), disp sampled linearly

    Landmarks go along with the pull-back: no inverse is needed.

    Args:
        points: [N, 3] float32, voxels of disp's grid.
        disp: [X, Y, Z, 3] float32, voxels.

    Returns:
        [N, 3] float32, voxels.

    Raises:
        ValueError: wrong shape or dtype.
    """
    _check_points("points", points, "in voxels")
    if disp.ndim != 4 or disp.shape[-1] != 3:
        raise ValueError(
            f"disp must be (X, Y, Z, 3) in voxels, got {disp.shape}; one field only"
        )
    return points + sample(disp[None], points[None])[0]


def _multiply(vectors, matrix):
    """Multiplies [..., 3] vectors by a 3 x 3 matrix, in full precision."""
    return jnp.einsum("...j,ij->...i", vectors, matrix, precision=lax.Precision.HIGHEST)


def _inverse(matrix):
    """Inverts a 3 x 3 matrix by cofactors: its rows are cross products of columns."""
    a, b, c = matrix[:, 0], matrix[:, 1], matrix[:, 2]
    cofactors = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)])
    return cofactors / jnp.sum(a * cofactors[0])


def _linear(vox2world, dtype):
    return _affine(vox2world, dtype)[:3, :3]


def _origin(vox2world, dtype):
    return _affine(vox2world, dtype)[None, :3, 3]


def _affine(vox2world, dtype):
    if vox2world.shape != (4, 4):
        raise ValueError(f"vox2world must be (4, 4), got {vox2world.shape}")
    return jnp.asarray(vox2world).astype(dtype)


def _check_vectors(name, vectors, unit):
    if vectors.ndim < 1 or vectors.shape[-1] != 3:
        raise ValueError(
            f"{name} must be (..., 3) {unit}, got {vectors.shape}; components go last"
        )


def _check_points(name, points, unit):
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"{name} must be (N, 3) {unit}, got {points.shape}")
