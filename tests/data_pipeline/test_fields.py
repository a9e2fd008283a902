"""Random fields: both ways undo each other, no folds, exact warps."""

import numpy as np
import pytest
from scipy import ndimage

from data_pipeline import fields

# Never cubic: a swapped axis must fail.
SHAPE, SPACING = (34, 26, 30), (3.0, 4.0, 3.5)


def _flow(seed, rms_mm=5.0):
    knots, knot_mm = fields.coarse_grid(SHAPE, SPACING)
    velocity = fields.random_velocity(
        np.random.default_rng(seed), knots, knot_mm, scale_mm=28.0, rms_mm=rms_mm
    )
    return fields.flow(velocity, knot_mm, shape=SHAPE, spacing_mm=SPACING)


def test_coarse_grid_has_the_volumes_corners():
    knots, knot_mm = fields.coarse_grid(SHAPE, SPACING)
    extent = (np.array(SHAPE) - 1) * SPACING
    np.testing.assert_allclose((np.array(knots) - 1) * knot_mm, extent)
    assert (knot_mm <= 6).all()
    assert fields.coarse_grid((40, 30, 20), (9, 9, 9))[0] == (40, 30, 20)


def test_random_velocity_has_the_size_asked_for():
    made = fields.random_velocity(
        np.random.default_rng(1), (50, 40, 45), (6, 5, 6), scale_mm=12.0, rms_mm=3.0
    )
    assert made.shape == (50, 40, 45, 3) and made.dtype == np.float32
    # Some 100 independent patches per component.
    np.testing.assert_allclose(np.sqrt((made**2).mean((0, 1, 2))), 3.0, rtol=0.15)


@pytest.mark.parametrize("seed", range(4))
def test_flow_both_ways_undo_each_other(seed):
    disp_fm, disp_mf = _flow(seed)
    assert disp_fm.shape == disp_mf.shape == (*SHAPE, 3)
    assert disp_fm.dtype == disp_mf.dtype == np.float32
    length = np.linalg.norm(disp_fm * SPACING, axis=-1)
    assert length.mean() > 4  # mm: there is something to undo
    for there, back in ((disp_fm, disp_mf), (disp_mf, disp_fm)):
        missed = fields.residual_mm(there, back, SPACING)
        # Linear sampling of a field that bends over 28 mm, voxels of 4 mm.
        assert np.nanmax(missed) < 0.5 and np.nanmean(missed) < 0.05
        assert fields.determinant(there).min() > 0.2


def test_flow_of_a_constant_is_a_shift():
    knots, knot_mm = fields.coarse_grid(SHAPE, SPACING)
    velocity = np.zeros((*knots, 3), np.float32) + np.float32((3.0, -4.0, 7.0))
    disp_fm, disp_mf = fields.flow(velocity, knot_mm, shape=SHAPE, spacing_mm=SPACING)
    expected = np.broadcast_to((1.0, -1.0, 2.0), (*SHAPE, 3))
    np.testing.assert_allclose(disp_fm, expected, atol=1e-4)  # float32 splines
    np.testing.assert_allclose(disp_mf, -expected, atol=1e-4)


def test_flow_rejects_a_velocity_of_another_grid():
    with pytest.raises(ValueError, match="velocity must be"):
        fields.flow(
            np.zeros((5, 6, 7, 3), np.float32),
            (6, 6, 6),
            shape=SHAPE,
            spacing_mm=(3,) * 3,
        )


def test_determinant_of_a_scaling_is_its_volume():
    disp = np.stack(np.indices((5, 6, 7)), -1) * (0.5, -0.2, 0.1)
    np.testing.assert_allclose(fields.determinant(disp), 1.5 * 0.8 * 1.1)


def test_warp_integer_shift_is_exact():
    volume = np.random.default_rng(0).integers(-1000, 999, (5, 6, 7)).astype(np.int16)
    disp = np.zeros((5, 6, 7, 3), np.float32) + np.float32((1, 0, -2))
    moved = np.pad(volume, ((0, 1), (0, 0), (2, 0)), "edge")[1:, :, :-2]
    for order, dtype in ((0, np.int16), (1, np.float32)):
        out = fields.warp(volume, disp, order=order)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, moved)


def test_flow_is_smooth_between_its_knots():
    """Cubic splines: the same as SciPy's zoom of the coarse field."""
    coarse = np.random.default_rng(0).standard_normal((6, 5, 7, 3)).astype(np.float32)
    out = fields._refined(coarse, (17, 13, 20))
    zoom = (17 / 6, 13 / 5, 20 / 7, 1)
    expected = ndimage.zoom(coarse, zoom, order=3, mode="nearest")
    np.testing.assert_allclose(out, expected, atol=1e-5)  # float32 sums of 7
