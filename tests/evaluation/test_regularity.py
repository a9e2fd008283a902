"""Determinants, folds and turned volume of fields with known answers."""

import math

import numpy as np
import pytest

from tests.evaluation import slow
from unireg_jax.evaluation import regularity

SHAPE = (9, 8, 7)
ANGLE = np.deg2rad(20)
TURN = np.array(
    [
        [np.cos(ANGLE), -np.sin(ANGLE), 0],
        [np.sin(ANGLE), np.cos(ANGLE), 0],
        [0, 0, 1],
    ]
)
PLACE = np.eye(4)
PLACE[:3, :3] = TURN @ np.diag([0.8, 1.5, 2.5])
PLACE[:3, 3] = [10, -20, 300]
# float32 vectors of some voxels, differences of which give the determinant.
CLOSE = {"abs": 2e-5}


def positions(shape=SHAPE):
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return np.stack(axes, axis=-1).astype(float)


def in_mm(disp):
    return (disp @ PLACE[:3, :3].T).astype(np.float32)


def scores(disp, **kwargs):
    return regularity.field_scores(in_mm(disp), PLACE, **kwargs)


def linear(matrix):
    """Displacement of x -> matrix @ x, voxels."""
    return positions() @ (np.array(matrix) - np.eye(3)).T


@pytest.mark.parametrize(
    ("matrix", "detj"),
    [
        (np.eye(3), 1.0),
        (np.diag([2.0, 1.0, 0.5]), 1.0),
        (np.diag([1.2, 0.9, 1.1]), 1.188),
        ([[1, 0.7, 0], [0, 1, -0.3], [0, 0, 1]], 1.0),
        (TURN, 1.0),
        (TURN @ np.diag([1.5, 1.0, 1.0]), 1.5),
    ],
)
def test_field_scores_of_linear_maps(matrix, detj):
    disp = linear(matrix)
    found = regularity.jacobian_determinant(in_mm(disp), PLACE)
    assert found.shape == tuple(n - 2 for n in SHAPE)
    np.testing.assert_allclose(found, detj, atol=2e-5)
    got = scores(disp, mask=np.ones(SHAPE, bool))
    for name in ("sdlogj", "fold_percent", "nd_percent", "ndv_percent"):
        for ending in ("", "_whole"):
            assert got[name + ending] == pytest.approx(0, **CLOSE)
    assert got["sdlogj_l2r"] == pytest.approx(0, **CLOSE)


@pytest.mark.parametrize(
    ("matrix", "volume"),
    [
        (np.diag([-1.0, 1.0, 1.0]), 1.0),
        (np.diag([-1.0, -1.0, -1.0]), 1.0),
        (np.diag([1.0, -0.5, 3.0]), 1.5),
        (np.diag([1.0, 1.0, 0.0]), 0.0),  # flat
    ],
)
def test_field_scores_of_mirrors(matrix, volume):
    got = scores(linear(matrix))
    assert got["fold_percent_whole"] == got["nd_percent_whole"] == 100
    assert got["ndv_percent_whole"] == pytest.approx(100 * volume, abs=2e-3)


@pytest.mark.parametrize("count", range(20))
def test_fold_share_is_exact(count):
    """`count` of the planes run backwards along x, by -0.5 voxels each."""
    shape, turned = (24, 5, 6), count
    slope = np.where(np.arange(24) < turned, -0.5, 1.0)
    x = np.concatenate([[0], np.cumsum(slope[:-1])])
    disp = np.zeros((*shape, 3))
    disp[..., 0] = (x - np.arange(24))[:, None, None]
    got = scores(disp)
    # Interior voxels 1 ... 22: central differences see -0.5 where both sides run
    # backwards, 0.25 at the turn; a tetrahedron is turned where either side is.
    assert got["fold_percent_whole"] == pytest.approx(100 * max(0, turned - 1) / 22)
    assert got["nd_percent_whole"] == pytest.approx(100 * turned / 22)
    # Half the tetrahedra at a voxel, less or more, lie on either side: all in all each
    # interval between planes counts once, at the first one half.
    halves = sum(slope[i - 1] < 0 for i in range(1, 23))
    halves += sum(slope[i] < 0 for i in range(1, 23))
    assert got["ndv_percent_whole"] == pytest.approx(
        100 * 0.5 * halves / 2 / 22, abs=2e-3
    )


def test_a_thrown_voxel_hides_from_central_differences():
    disp = np.zeros((*SHAPE, 3))
    disp[4, 4, 3] = [30, 0, 0]
    here = (3, 3, 2)  # in the interior
    detj = regularity.jacobian_determinant(in_mm(disp), PLACE)
    folded, volume = regularity.digital_folds(in_mm(disp), PLACE)
    assert detj[here] == pytest.approx(1, abs=1e-5)
    assert folded[here] and volume[here] > 1


@pytest.mark.parametrize("seed", range(40))
def test_digital_folds_equal_the_oracle(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(3, (6, 7, 6)))
    disp = rng.normal(0, rng.choice([0.1, 0.4, 1.5]), (*shape, 3))
    mm = in_mm(disp)
    detj = regularity.jacobian_determinant(mm, PLACE)
    folded, volume = regularity.digital_folds(mm, PLACE)
    for v, expected in slow.jacobian(disp).items():
        i = tuple(n - 1 for n in v)
        # Products of three float32 differences of some voxels.
        assert detj[i] == pytest.approx(expected, abs=1e-4)
    for v, found in slow.tetrahedra(disp).items():
        i = tuple(n - 1 for n in v)
        assert folded[i] == (min(found) <= 0)
        expected = -sum(d for d in found if d < 0) / 12
        assert volume[i] == pytest.approx(expected, abs=1e-4)


def test_tetrahedra_fill_space_twice():
    """Volumes of all cubes of a map that does not fold add up to what it covers."""
    shape = (6, 7, 5)
    rng = np.random.default_rng(0)
    disp = np.zeros((*shape, 3))
    disp[2:-2, 2:-2, 2:-2] = rng.normal(0, 0.1, (2, 3, 1, 3))
    total = sum(sum(found) for found in slow.tetrahedra(disp).values()) / 12
    # Displacements end before the border: the interior as a whole keeps its volume.
    assert total == pytest.approx(4 * 5 * 3, abs=1e-9)


@pytest.mark.parametrize("slab", [1, 64, 10**9])
def test_slabs_change_nothing(slab, monkeypatch):
    disp = in_mm(np.random.default_rng(0).normal(0, 0.5, (*SHAPE, 3)))
    expected = [regularity.jacobian_determinant(disp, PLACE)]
    expected += regularity.digital_folds(disp, PLACE)
    monkeypatch.setattr(regularity, "_SLAB_VOXELS", slab)
    found = [regularity.jacobian_determinant(disp, PLACE)]
    found += regularity.digital_folds(disp, PLACE)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_field_scores_follow_their_masks():
    disp = np.zeros((*SHAPE, 3))
    disp[5:, ..., 0] = (-2.0 * np.arange(4))[:, None, None]
    mask = np.zeros(SHAPE, bool)
    mask[6:] = True
    got = scores(disp, mask=mask, l2r_mask=mask)
    assert got["fold_percent"] == 100.0
    assert 0 < got["fold_percent_whole"] < 100
    # Within the mask the determinant is -1 throughout.
    assert got["sdlogj"] == pytest.approx(0, **CLOSE)
    assert got["sdlogj_l2r"] == pytest.approx(0, **CLOSE)
    assert scores(disp)["sdlogj_l2r"] > 0.1


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 1, 1), (3, 3, 3), (4, 9, 9)])
def test_field_scores_of_small_grids_are_undefined(shape):
    got = scores(np.zeros((*shape, 3)), mask=np.ones(shape, bool))
    assert got["max_mm"] == 0
    assert math.isnan(got["sdlogj_l2r"])
    assert "fewer than 5" in regularity.field_reason("sdlogj_l2r", shape)
    small = min(shape) < 3
    names = ("sdlogj", "fold_percent", "nd_percent", "ndv_percent")
    assert all(math.isnan(got[name]) == small for name in names)
    if small:
        assert "fewer than 3" in regularity.field_reason("sdlogj", shape)


def test_field_scores_of_an_empty_mask_are_undefined():
    mask = np.zeros(SHAPE, bool)
    mask[0] = True  # on the border: no determinant
    got = scores(np.zeros((*SHAPE, 3)), mask=mask, l2r_mask=mask)
    for name in ("sdlogj", "fold_percent", "nd_percent", "ndv_percent", "sdlogj_l2r"):
        assert math.isnan(got[name])
    assert "no voxel inside" in regularity.field_reason("sdlogj", SHAPE)
    assert got["sdlogj_whole"] == 0


def test_field_scores_reject():
    disp = np.zeros((*SHAPE, 3), np.float32)
    with pytest.raises(ValueError, match="channels last"):
        regularity.field_scores(np.moveaxis(disp, -1, 0), PLACE)
    with pytest.raises(ValueError, match="l2r_mask must be"):
        regularity.field_scores(disp, PLACE, l2r_mask=np.ones((9, 8, 6), bool))
