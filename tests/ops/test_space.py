"""Voxel <-> mm conversions against SimpleITK, and landmarks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import analytic, oracles
from unireg_jax.ops import space as ops
from unireg_jax.ops.warp import inside, warp


def _vox2world():
    """Oblique, unequal spacing, far origin: every mix-up of axes shows."""
    matrix = np.eye(4)
    rotation = analytic.rotation(0.4, 2) @ analytic.rotation(-0.3, 0)
    matrix[:3, :3] = rotation @ np.diag([0.8, 1.5, 2.5])
    matrix[:3, 3] = [-120.0, 35.5, 410.25]
    return matrix


def test_disp_to_mm_by_hand():
    matrix = np.diag([2.0, 3.0, -5.0, 1.0])
    matrix[:3, 3] = [100.0, 200.0, 300.0]  # vectors do not feel the origin
    disp = jnp.ones((1, 2, 2, 2, 3))
    expected = np.broadcast_to([2.0, 3.0, -5.0], disp.shape)
    np.testing.assert_array_equal(ops.disp_to_mm(disp, matrix), expected)
    back = ops.disp_from_mm(expected.astype(np.float32), matrix)
    np.testing.assert_allclose(back, disp, rtol=1e-6)  # thirds


def test_identity_changes_nothing():
    disp = analytic.random_disp((5, 6, 7))
    np.testing.assert_array_equal(ops.disp_to_mm(disp, np.eye(4)), disp)
    np.testing.assert_array_equal(ops.disp_from_mm(disp, np.eye(4)), disp)


def test_disp_to_mm_equals_matrix_product():
    disp = analytic.random_disp((5, 6, 7), batch=2)
    matrix = _vox2world()
    expected = disp.astype(np.float64) @ matrix[:3, :3].T
    np.testing.assert_allclose(ops.disp_to_mm(disp, matrix), expected, atol=1e-6)
    back = ops.disp_from_mm(ops.disp_to_mm(disp, matrix), matrix)
    np.testing.assert_allclose(back, disp, atol=1e-6)


def test_disp_to_mm_warps_as_simpleitk_does():
    shape, matrix = (9, 6, 7), _vox2world()
    volume, disp = analytic.noise(shape), analytic.random_disp(shape)
    disp_mm = np.asarray(ops.disp_to_mm(disp, matrix))
    expected = oracles.itk_warp(volume[0, ..., 0], disp_mm[0], matrix)
    # Voxels that point at the rim within float32 may fall to either side for ITK.
    shrunk = disp + np.sign(disp) * np.float32(1e-4)
    kept = np.asarray(inside(shrunk)[0])
    assert kept.mean() > 0.5
    out = np.asarray(warp(volume, disp)[0, ..., 0])
    # Vectors in float32 at 4 mm, image slopes of a few units per voxel.
    np.testing.assert_allclose(out[kept], expected[kept], atol=2e-5)


def test_points_equal_simpleitk():
    matrix = _vox2world()
    image = oracles.itk_image(np.zeros((9, 6, 7)), matrix)
    points = np.random.default_rng(0).uniform(-2, 9, (11, 3)).astype(np.float32)
    expected = [
        image.TransformContinuousIndexToPhysicalPoint(p.tolist()) for p in points
    ]
    out = ops.points_to_world(points, matrix)
    np.testing.assert_allclose(out, expected, atol=1e-4)  # float32 at 400 mm
    back = ops.points_to_voxel(np.asarray(expected, np.float32), matrix)
    np.testing.assert_allclose(back, points, atol=1e-4)


def test_conversions_eager_equals_jit():
    points = np.random.default_rng(0).uniform(0, 9, (4, 3)).astype(np.float32)
    matrix = _vox2world().astype(np.float32)
    functions = (
        ops.points_to_world,
        ops.points_to_voxel,
        ops.disp_to_mm,
        ops.disp_from_mm,
    )
    for function in functions:
        compiled = jax.jit(function)(points, matrix)
        np.testing.assert_allclose(compiled, function(points, matrix), rtol=1e-5)


def test_warp_points_by_hand():
    disp = np.zeros((2, 3, 4, 3), np.float32)
    disp[1, 1, 2] = [4.0, -2.0, 8.0]
    points = jnp.array([[1.0, 1.0, 2.0], [0.5, 1.0, 2.0], [0.0, 0.0, 0.0]])
    expected = [[5.0, -1.0, 10.0], [2.5, 0.0, 6.0], [0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(ops.warp_points(points, disp), expected)


def test_warp_points_finds_the_landmark_of_the_moving_image():
    # A bright voxel of moving shows in warped where x + disp(x) meets it.
    moving = np.zeros((1, 9, 8, 7, 1), np.float32)
    moving[0, 5, 2, 4] = 1.0
    disp = analytic.shift_disp((9, 8, 7), (2.0, -1.0, 1.0))
    warped = np.asarray(warp(moving, disp))[0, ..., 0]
    point = np.argwhere(warped == 1.0).astype(np.float32)
    np.testing.assert_array_equal(ops.warp_points(point, disp[0]), [[5.0, 2.0, 4.0]])


def test_rejects_bad_shapes():
    points, disp = jnp.zeros((4, 3)), jnp.zeros((5, 6, 7, 3))
    with pytest.raises(ValueError, match=r"vox2world must be \(4, 4\), got \(3, 3\)"):
        ops.disp_to_mm(disp, np.eye(3))
    with pytest.raises(ValueError, match=r"disp_mm must be \(..., 3\) in mm"):
        ops.disp_from_mm(jnp.zeros((3, 5, 6, 7)), np.eye(4))
    with pytest.raises(ValueError, match=r"points must be \(N, 3\) in voxels"):
        ops.points_to_world(points[None], np.eye(4))
    with pytest.raises(ValueError, match=r"points_mm must be \(N, 3\) in mm"):
        ops.points_to_voxel(points[:, :2], np.eye(4))
    with pytest.raises(ValueError, match=r"disp must be \(X, Y, Z, 3\).*one field"):
        ops.warp_points(points, disp[None])
