"""Frames: axis codes, RAS+ <-> LPS+, axis order."""

import itertools
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from tests.grids import ALL_CODES, oblique
from unireg_jax.imaging import orientation


def test_imaging_imports_no_jax():
    code = (
        "import sys\n"
        "from unireg_jax.imaging import nifti, orientation, points, preprocess\n"
        "from unireg_jax.imaging import surface, transforms\n"
        "assert not {'jax', 'flax', 'torch'} & set(sys.modules), 'not host-only'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lps_from_ras_flips_x_and_y_rows():
    ras = np.arange(1.0, 17.0).reshape(4, 4)
    lps = orientation.lps_from_ras(ras)
    np.testing.assert_array_equal(lps[:2], -ras[:2])
    np.testing.assert_array_equal(lps[2:], ras[2:])
    np.testing.assert_array_equal(orientation.ras_from_lps(lps), ras)


def test_axis_codes_identity_is_lps():
    # The unit affine of ITK: x to the left, y to the back, z to the head.
    assert orientation.axis_codes(np.diag([1.0, 2.0, 3.0, 1.0])) == "LPS"
    assert orientation.axis_codes(np.diag([-1.0, -2.0, 3.0, 1.0])) == "RAS"


@pytest.mark.parametrize("codes", ALL_CODES)
def test_axis_codes_agree_with_nibabel(codes):
    data = np.zeros((5, 6, 7), np.int16)
    _, vox2world = orientation.reorient(data, oblique(), codes)
    ras = orientation.ras_from_lps(vox2world)
    assert "".join(nib.aff2axcodes(ras)) == codes == orientation.axis_codes(vox2world)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_reorient_moves_no_voxel_in_the_world(codes):
    shape = (5, 6, 7)
    data = np.arange(np.prod(shape)).reshape(shape)
    turned, vox2world = orientation.reorient(data, oblique(), codes)
    index = np.argwhere(np.ones(shape, bool))
    world = index @ oblique()[:3, :3].T + oblique()[:3, 3]
    back = np.linalg.solve(vox2world[:3, :3], (world - vox2world[:3, 3]).T).T
    place = np.rint(back).astype(int)
    np.testing.assert_allclose(back, place, atol=1e-9)  # float64 affines
    np.testing.assert_array_equal(turned[tuple(place.T)], data.ravel())
    assert turned.flags.c_contiguous


def _at_45_degrees():
    """Affines with an axis as near to one world axis as to another, LPS mm."""
    turns = itertools.product((0.0, 45.0, -45.0), (0.0, 45.0, 90.0), (45.0, 225.0))
    for number, degrees in enumerate(turns):
        turn = nib.eulerangles.euler2mat(*np.deg2rad(degrees))
        for order in itertools.permutations(range(3)):
            affine = np.eye(4)
            affine[:3, :3] = (turn @ np.diag([2.0, -3.0, 4.0]))[:, order]
            affine[:3, 3] = (5, -7, number)
            yield affine.astype(np.float32).astype(float)  # as a file has them


def test_restore_gives_back_what_was_stored():
    data = np.random.default_rng(0).normal(size=(5, 6, 7, 3)).astype(np.float32)
    for stored in (oblique(), *_at_45_degrees()):
        turned, vox2world = orientation.reorient(data, stored)
        back = orientation.restore(turned, vox2world, stored)
        np.testing.assert_array_equal(back, data)
        assert back.flags.c_contiguous


def test_restore_refuses_another_grid():
    for other in (np.diag([1.0, 2.0, 1.0, 1.0]), np.diag([0.3, 0.3, 0.3, 1.0])):
        with pytest.raises(ValueError, match="by the order of axes alone"):
            orientation.restore(np.zeros((5, 6, 7)), np.eye(4), other)


def test_reorient_keeps_vector_components():
    data = np.random.default_rng(0).normal(size=(5, 6, 7, 3))
    turned, vox2world = orientation.reorient(data, np.diag([1.0, 2.0, 3.0, 1.0]), "RAI")
    np.testing.assert_array_equal(turned, data[::-1, ::-1, ::-1])
    np.testing.assert_array_equal(np.diag(vox2world), [-1, -2, -3, 1])
    np.testing.assert_array_equal(vox2world[:3, 3], [4, 10, 18])


@pytest.mark.parametrize("codes", ALL_CODES)
def test_direction_has_its_codes(codes):
    vox2world = np.eye(4)
    vox2world[:3, :3] = orientation.direction(codes)
    assert orientation.axis_codes(vox2world) == codes


def test_spacing_mm_are_column_lengths():
    assert orientation.spacing_mm(oblique()) == pytest.approx((3.0, 2.5, 4.0))


@pytest.mark.parametrize("codes", ["LPP", "LP", "XYZ", "lps", "LPSR", "LRS"])
def test_check_codes_rejects(codes):
    with pytest.raises(ValueError, match="one each of L/R, P/A, I/S"):
        orientation.reorient(np.zeros((5, 6, 7)), np.eye(4), codes)


def test_reorient_rejects_two_axes_and_small_affine():
    with pytest.raises(ValueError, match=r"data must be \(X, Y, Z, ...\)"):
        orientation.reorient(np.zeros((5, 6)), np.eye(4))
    with pytest.raises(ValueError, match=r"must be \(4, 4\), got \(3, 3\)"):
        orientation.axis_codes(np.eye(3))
