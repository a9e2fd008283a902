"""Deformed copies of scans: the field is known both ways; breathing moves the liver."""

import numpy as np
import pytest

from data_pipeline import deformed, fields, synthetic
from unireg_jax.imaging import nifti
from unireg_jax.tasks import OUTSIDE_HU

GRID = dict(shape=(48, 38, 40), spacing_mm=(8.0, 7.0, 8.0))
SPACING = GRID["spacing_mm"]


@pytest.fixture(scope="module")
def scan():
    return synthetic.phantom("chest", **GRID, seed=2)


def _deform(scan, seed, **options):
    options = dict(breathing=True) | options
    rng = np.random.default_rng(seed)
    return deformed.deform(scan.hu, scan.labels, spacing_mm=SPACING, rng=rng, **options)


def _dice(a, b):
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


@pytest.mark.parametrize("breathing", (False, True))
def test_deform_knows_the_field_both_ways(scan, breathing):
    made = _deform(scan, 1, breathing=breathing)
    assert made.fixed.dtype == np.int16 and made.fixed_labels.dtype == np.uint8
    np.testing.assert_array_equal(made.moving, scan.hu)
    length = np.linalg.norm(made.disp_fm * SPACING, axis=-1)
    assert 2 < length.mean() < 20
    for a, b in ((made.disp_fm, made.disp_mf), (made.disp_mf, made.disp_fm)):
        missed = fields.residual_mm(a, b, SPACING)
        # Linear sampling of the field at voxels of 8 mm.
        assert np.nanmax(missed) < 1.0 and np.nanmean(missed) < 0.1
        assert fields.determinant(a).min() > 0.2


def test_deform_field_maps_moving_onto_fixed_and_back(scan):
    made = _deform(scan, 2)
    valid = made.fixed != OUTSIDE_HU
    there = fields.warp(made.moving, made.disp_fm)
    error = np.abs(there - made.fixed)[valid & (made.fixed > -900)]
    assert error.mean() < 25  # noise of at most 14 HU, gain and shift
    back = fields.warp(made.fixed_labels, made.disp_mf, order=0)
    for name in ("lung_left", "liver", "heart"):
        i = scan.label_names.index(name) + 1
        # Twice nearest neighbour costs a rim of a voxel.
        assert _dice(back == i, made.moving_labels == i) > 0.85, name


def test_deform_breathing_moves_the_diaphragm_most(scan):
    base, made = (_deform(scan, 0, breathing=b).disp_fm for b in (False, True))
    moved = np.abs((made - base)[..., 2]) * SPACING[2]
    liver = scan.labels == scan.label_names.index("liver") + 1
    spine = scan.labels == scan.label_names.index("spine") + 1
    assert moved[liver].mean() > 2 * moved[spine].mean()
    assert moved[liver].mean() > 3


def test_deform_depends_on_its_generator_alone(scan):
    first, again, other = (_deform(scan, seed) for seed in (5, 5, 6))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert np.abs(first.disp_fm - other.disp_fm).max() > 0.3


def test_deform_keeps_what_is_outside_the_scan_outside(scan):
    hu = scan.hu.copy()
    hu[:, :, :10] = OUTSIDE_HU
    made = deformed.deform(
        hu, None, spacing_mm=SPACING, rng=np.random.default_rng(0), breathing=False
    )
    assert (made.fixed[:, :, :6] == OUTSIDE_HU).all()
    kept = made.fixed[made.fixed != OUTSIDE_HU]
    assert kept.min() >= -1000 and not made.fixed_labels.any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(hu=np.zeros((8, 9), np.int16)), "hu must be"),
        (dict(hu=np.zeros((8, 1, 7), np.int16)), "hu must be"),
        (dict(hu=np.zeros((8, 9, 7), np.float32)), "hu must be"),
        (dict(labels=np.zeros((8, 9, 8), np.uint8)), "labels must be"),
        (dict(strength=0.0), "strength must be positive"),
    ],
)
def test_deform_rejects_bad_arguments(change, match):
    arguments = dict(
        hu=np.zeros((8, 9, 7), np.int16),
        labels=None,
        spacing_mm=SPACING,
        rng=np.random.default_rng(0),
        breathing=False,
    )
    with pytest.raises(ValueError, match=match):
        deformed.deform(**arguments | change)


def test_deform_of_a_real_chest_does_not_fold(data_root):
    scan = nifti.read_image(data_root / "chest_lidc0001" / "ct.nii.gz")
    hu = np.ascontiguousarray(scan.data[::3, ::3, ::3]).astype(np.int16)
    spacing = tuple(3 * s for s in scan.spacing_mm)
    made = deformed.deform(
        hu, None, spacing_mm=spacing, rng=np.random.default_rng(0), breathing=True
    )
    missed = fields.residual_mm(made.disp_fm, made.disp_mf, spacing)
    # Linear sampling at voxels of 6 mm; 0.1 mm at the scan's own 2 mm.
    assert np.nanmax(missed) < 0.8 and np.nanmean(missed) < 0.05
    assert fields.determinant(made.disp_fm).min() > 0.2
