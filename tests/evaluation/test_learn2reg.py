"""The challenge's own numbers against its rules written out."""

import math

import numpy as np
import pytest

from tests import oracles
from unireg_jax.evaluation import learn2reg

SHAPE = (14, 12, 10)
PEER = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")


def field(seed=0, size=0.8):
    rng = np.random.default_rng(seed)
    return rng.normal(0, size, (*SHAPE, 3))


@pytest.mark.parametrize("masked", [False, True])
def test_sdlogj_equals_the_challenge(masked):
    disp = field()
    mask = np.random.default_rng(1).random(SHAPE) < 0.5 if masked else None
    every = np.ones(SHAPE, bool) if mask is None else mask
    got = learn2reg.scores(disp, mask=mask)["mean"]
    expected = oracles.sdlogj_l2r(disp[None], every[None])[0]
    assert got["sdlogj_l2r"] == pytest.approx(expected, abs=1e-12)


def test_folds_are_never_found():
    x = np.arange(SHAPE[0])[:, None, None]
    disp = np.zeros((*SHAPE, 3))
    disp[..., 0] = -9.0 * x  # determinant -8, -5 after the 3
    assert learn2reg.scores(disp)["mean"]["folds_l2r"] == 0


def test_tre_is_zero_displacement_outside_the_grid():
    disp = np.zeros((*SHAPE, 3))
    disp[..., 1] = 2.0
    fixed = np.array([[5.0, 5, 5], [20.0, 5, 5]])
    moving = fixed + [0, 2, 1]
    got = learn2reg.scores(
        disp, fixed_points=fixed, moving_points=moving, moving_spacing_mm=(1, 3, 2)
    )
    # The spline of a constant is the constant; mm of the moving scan.
    assert got["mean"]["tre_mm_l2r"] == pytest.approx((2 + math.hypot(6, 2)) / 2)


def test_tre_uses_cubic_splines():
    x = np.arange(SHAPE[0], dtype=float)
    disp = np.zeros((*SHAPE, 3))
    disp[..., 0] = (0.01 * x**3)[:, None, None]
    fixed = np.array([[6.5, 5, 5]])
    moving = fixed + [0.01 * 6.5**3, 0, 0]
    got = learn2reg.scores(disp, fixed_points=fixed, moving_points=moving)
    # A cubic is met up to the mirrored border; a linear look-up misses by 0.05 voxels.
    assert got["mean"]["tre_mm_l2r"] < 0.005


@PEER
def test_labels_absent_in_one_scan_leave_the_mean():
    pytest.importorskip("surface_distance")
    fixed, moving = np.zeros((2, *SHAPE), np.uint8)
    fixed[2:6, 2:6, 2:6] = 1
    moving[3:7, 2:6, 2:6] = 1
    fixed[9, 9, 8] = 2
    moving[9, 9, 2] = 3
    disp = np.zeros((*SHAPE, 3))
    got = learn2reg.scores(disp, fixed_labels=fixed, moving_labels=moving)
    assert got["labels"]["1"]["dsc_l2r"] == got["mean"]["dsc_l2r"] == 0.75
    assert got["labels"]["2"]["dsc_l2r"] is None
    assert got["undefined"]["hd95_voxel_l2r"] == {
        "2": "absent in moving",
        "3": "absent in fixed",
    }
    # One voxel apart on two faces, together more than 5 % of the surface.
    assert got["labels"]["1"]["hd95_voxel_l2r"] == 1.0


@PEER
def test_labels_lost_by_the_warp_are_told_apart():
    pytest.importorskip("surface_distance")
    fixed = np.zeros(SHAPE, np.uint8)
    fixed[2:6, 2:6, 2:6] = 1
    disp = np.full((*SHAPE, 3), 100.0)
    got = learn2reg.scores(disp, fixed_labels=fixed, moving_labels=fixed)
    assert got["labels"]["1"] == {"dsc_l2r": 0.0, "hd95_voxel_l2r": None}
    assert "infinite" in got["undefined"]["hd95_voxel_l2r"]["1"]


def test_voxel_displacement_holds_the_change_of_grid():
    rng = np.random.default_rng(0)
    fixed = np.diag([2.0, 3.0, 4.0, 1.0])
    moving = np.diag([1.0, 2.0, 5.0, 1.0])
    moving[:3, 3] = [7, -8, 9]
    disp_mm = rng.normal(0, 5, (*SHAPE, 3)).astype(np.float32)
    got = learn2reg.voxel_displacement(disp_mm, fixed, moving)
    x = np.array([3, 4, 5])
    world = fixed[:3, :3] @ x + disp_mm[3, 4, 5]
    expected = (world - moving[:3, 3]) / [1, 2, 5] - x
    np.testing.assert_allclose(got[3, 4, 5], expected, atol=1e-6)


def test_scores_of_small_grids_are_undefined():
    got = learn2reg.scores(np.zeros((4, 5, 6, 3)))
    assert got["mean"] == {"sdlogj_l2r": None, "folds_l2r": None}


def test_scores_reject():
    with pytest.raises(ValueError, match="in voxels"):
        learn2reg.scores(np.zeros((3, 4, 5, 6)))
    with pytest.raises(ValueError, match="mask must be"):
        learn2reg.scores(np.zeros((5, 6, 7, 3)), mask=np.ones((5, 6, 6), bool))
