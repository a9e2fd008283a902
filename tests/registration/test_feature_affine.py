"""Maps through matched points: outliers, degenerate sets, and a check on the images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline import synthetic
from unireg_jax.imaging import preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.models import features
from unireg_jax.models.features import Extractor
from unireg_jax.registration import feature_affine
from unireg_jax.registration.feature_affine import feature_align, fit_map
from unireg_jax.tasks import OUTSIDE_HU

TRUTH = np.array(
    [
        [1.04, 0.10, -0.03, 40.0],
        [-0.12, 0.95, 0.08, -25.0],
        [0.02, -0.05, 1.10, 310.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)


def through(matrix, points):
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def spread(count, seed=0):
    """Points of a body somewhere in the world, mm."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3)) * (120, 80, 150) + 500


def test_fit_map_of_exact_pairs_is_exact():
    points = spread(20)
    for robust in (False, True):
        fit = fit_map(points, through(TRUTH, points), robust=robust)
        np.testing.assert_allclose(fit.matrix, TRUTH, atol=1e-9)
        assert (fit.kind, fit.points, fit.close, fit.reason) == ("affine", 20, 20, "")
        assert fit.residual_mm < 1e-6


def test_fit_map_survives_more_wrong_pairs_than_right_ones():
    rng = np.random.default_rng(1)
    points = spread(400)
    moved = through(TRUTH, points) + rng.normal(size=points.shape) * 2.0
    moved[:260] = rng.permutation(moved)[:260]
    fit = fit_map(points, moved)
    gap = np.linalg.norm(through(fit.matrix - TRUTH, points), axis=1)
    # 140 good pairs with 2 mm of noise, and some of the wrong ones that lie near.
    assert fit.kind == "affine" and gap.mean() < 3.0
    assert 130 <= fit.close < 200
    plain = fit_map(points, moved, robust=False)
    assert np.linalg.norm(through(plain.matrix - TRUTH, points), axis=1).mean() > 10.0


LINE = np.linspace(0, 1, 30)[:, None] * (100.0, 40.0, 70.0)
PLANE = spread(30) * (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("points", "kind", "reason"),
    [
        (np.zeros((0, 3)), "identity", "translation: 1 points or more expected, got 0"),
        (spread(1), "translation", "rigid: 3 points or more expected, got 1"),
        (spread(3), "rigid", "affine: 4 points or more expected, got 3"),
        (PLANE, "rigid", "affine: the points of fixed lie on a plane"),
        (LINE, "translation", "rigid: the points of fixed lie on a line"),
        (np.ones((9, 3)), "translation", "rigid: the points of fixed lie on one spot"),
    ],
    ids=["none", "one", "three", "plane", "line", "spot"],
)
@pytest.mark.parametrize("robust", [False, True])
def test_fit_map_falls_back_where_points_cannot_bear_more(points, kind, reason, robust):
    turn = np.eye(4)
    turn[:2, :2] = [[0.96, -0.28], [0.28, 0.96]]
    turn[:3, 3] = 10.0, 20.0, 30.0
    if kind == "translation":
        turn[:3, :3] = np.eye(3)
    fit = fit_map(points, through(turn, points), robust=robust)
    assert fit.kind == kind and reason in fit.reason
    assert fit.points == len(points) and np.isfinite(fit.matrix).all()
    if kind != "identity":
        np.testing.assert_allclose(fit.matrix, turn, atol=1e-8)
        assert fit.residual_mm < 1e-6
    else:
        np.testing.assert_array_equal(fit.matrix, np.eye(4))


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        ((1.0, 1.0, -1.0), "affine: the map mirrors"),
        ((2.5, 1.0, 1.0), "affine: the map stretches by 1.00 to 2.50"),
        ((-1.0, -1.0, 1.0), "rigid: the map turns by 180 degrees"),
    ],
)
def test_fit_map_takes_no_implausible_map(scale, reason):
    points = spread(30)
    fit = fit_map(points, points * scale, robust=False)
    assert fit.kind != "affine" and reason in fit.reason


def test_fit_map_rejects():
    with pytest.raises(ValueError, match=r"must both be \(N, 3\) in mm"):
        fit_map(np.zeros((4, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="must be finite"):
        fit_map(np.zeros((4, 3)), np.full((4, 3), np.nan))


# --- from images --------------------------------------------------------------------

SHAPE, SPACING = (64, 48, 56), (6.0, 6.0, 6.0)


def describe(hu):
    return jax.jit(features.describe)(
        jnp.asarray(hu[None, ..., None]), Extractor("mind")
    )


def scans(matrix):
    """A phantom, and how it looks from a world where x lies at matrix @ x."""
    phantom = synthetic.phantom("headneck", shape=SHAPE, spacing_mm=SPACING, seed=3)
    place = np.diag([6.0, 6.0, 6.0, 1.0])
    shape = (56, 56, 64)
    place[:3, 3] = matrix[:3, 3] - (np.array(shape) - 1) / 2 * 6.0
    out = preprocess.resample(
        Volume(phantom.hu, phantom.vox2world),
        preprocess.Grid(shape, place),
        matrix=np.linalg.inv(matrix),
        fill=OUTSIDE_HU,
    )
    return phantom, (np.rint(out).astype(np.int16), place)


def align(phantom, moving, **kwargs):
    hu, place = moving
    return feature_align(
        describe(phantom.hu),
        describe(hu),
        phantom.hu,
        hu,
        fixed_vox2world=phantom.vox2world,
        moving_vox2world=place,
        **kwargs,
    )


def test_feature_align_recovers_a_known_affine():
    truth = np.eye(4)
    truth[:3, :3] = [[1.05, 0.05, 0.0], [-0.05, 1.05, 0.0], [0.0, 0.0, 0.97]]
    truth[:3, 3] = 150.0, -80.0, 60.0
    phantom, moving = scans(truth)
    found = align(phantom, moving)
    assert (found.kind, found.fit.kind, found.warning) == ("features", "affine", "")
    np.testing.assert_array_equal(found.matrix, found.fit.matrix)
    organs = np.argwhere(phantom.labels > 0)
    organs = through(phantom.vox2world, organs)
    gap = np.linalg.norm(through(found.matrix - truth, organs), axis=1)
    assert gap.mean() < 6.0  # half a voxel of the fine grid


def test_feature_align_of_nothing_falls_back_and_says_so():
    shift = np.eye(4)
    shift[:3, 3] = 90.0, 0.0, -60.0
    phantom, moving = scans(shift)
    found = align(phantom, moving, bodies=(phantom.hu > -500, moving[0] > 9999))
    assert found.fit.points == 0 and found.fit.kind == "identity"
    assert "translation: 1 points or more expected" in found.fit.reason
    assert found.warning


def test_feature_align_is_never_worse_than_a_plain_start(monkeypatch):
    shift = np.eye(4)
    shift[:3, 3] = 90.0, 0.0, -60.0
    phantom, moving = scans(shift)
    wrong = np.eye(4)
    wrong[:3, 3] = 300.0
    fit = feature_affine.Fit(wrong, "translation", 7, 1, 30.0, "made up")
    monkeypatch.setattr(feature_affine, "fit_map", lambda *_, **__: fit)
    found = align(phantom, moving)
    assert found.kind in ("middle", "com") and found.fit == fit
    assert f"less similar than {found.kind!r}" in found.warning
    np.testing.assert_array_equal(found.matrix[:3, :3], np.eye(3))
    assert np.abs(found.matrix[:3, 3] - shift[:3, 3]).max() < 20.0


def test_feature_align_does_not_warn_of_a_tie(monkeypatch):
    phantom, moving = scans(np.eye(4))
    near = np.eye(4)
    near[:3, 3] = 0.01
    fit = feature_affine.Fit(near, "translation", 70, 60, 1.0, "")
    monkeypatch.setattr(feature_affine, "fit_map", lambda *_, **__: fit)
    found = align(phantom, moving)
    assert found.kind == "none" and found.warning == ""


def test_coarse_align_follows_what_the_affine_leaves_without_the_outliers():
    shape, vox2world = (48, 40, 64), np.diag([4.0, 5.0, 3.0, 1.0])
    vox2world[:3, 3] = -90.0, 400.0, 20.0
    rng = np.random.default_rng(0)
    voxels = rng.uniform(0, np.array(shape) - 1, (700, 3))
    bend = 3.0 * np.sin(np.pi * voxels[:, [1, 2, 0]] / np.array(shape)[[1, 2, 0]])
    fixed = through(vox2world, voxels)
    moving = through(TRUTH @ vox2world, voxels + bend)
    moving[:200] += rng.normal(size=(200, 3)) * 80.0 + 60.0
    fit = feature_affine.Fit(TRUTH, "affine", 700, 500, 8.0, "")
    found = feature_affine.Alignment(TRUTH, "features", fit, "", fixed, moving)
    gaps = {}
    for within in (24.0, None):
        disp = feature_affine.coarse_align(
            found, vox2world, shape=shape, within_mm=within
        )
        assert disp.shape == (1, *shape, 3)
        index = np.rint(voxels[200:]).astype(int)
        got = np.asarray(disp[0])[tuple(index.T)]
        gaps[within] = np.abs(got - bend[200:]).mean()
    assert gaps[24.0] < 0.5 < gaps[None]  # voxels, of 1.9 on average
    # Nothing to go by: nothing moves.
    none = found._replace(fixed_mm=np.zeros((0, 3)), moving_mm=np.zeros((0, 3)))
    still = feature_affine.coarse_align(none, vox2world, shape=shape)
    np.testing.assert_array_equal(still, np.zeros((1, *shape, 3)))


def test_coarse_needs_matches_near_the_map():
    """One match beside the affine would move everything around it."""
    points = np.zeros((1, 3))
    fit = feature_affine.Fit(np.eye(4), "affine", 400, 300, 5.0, "")
    good = feature_affine.Alignment(np.eye(4), "features", fit, "", points, points)
    assert feature_affine.coarse_fault(good) == ""
    few = good._replace(fit=fit._replace(close=3))
    assert "50 matches or more within 12 mm" in feature_affine.coarse_fault(few)
    bare = good._replace(fit=fit._replace(kind="translation"))
    assert "affine or rigid map" in feature_affine.coarse_fault(bare)
