"""Real CT: reading, body mask, network grid. Skips where no scans are at hand."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from unireg_jax.imaging import nifti, orientation, points, preprocess
from unireg_jax.tasks import OUTSIDE_HU

HEADNECK = "headneck_openkbp/images/case_0013.nii.gz"
CHEST = "chest_lidc0001/ct.nii.gz"
LUNG = "lung_elastix/baseline.nii.gz"
LIVER = "liver_multiphase/liver_hcc007_t1/pvp.nii.gz"
THICK = "liver_multiphase/liver_hcc007_t1/pre.nii.gz"
ABDOMEN = "abdomen_chaos/ct.nii.gz"
# Share of the scan that is body, read off pictures of the masks.
BODY = {
    HEADNECK: (0.22, 0.30),
    CHEST: (0.55, 0.65),
    LUNG: (0.85, 0.95),
    LIVER: (0.66, 0.76),
    THICK: (0.66, 0.76),
    ABDOMEN: (0.66, 0.76),
}


def load(data_root, name):
    path = data_root / name
    if not path.is_file():
        pytest.skip(f"no {name} among the real scans")
    return nifti.read_image(path)


@pytest.mark.parametrize("name", BODY)
def test_real_scan_agrees_with_simpleitk(data_root, name):
    volume = load(data_root, name)
    assert volume.warnings == () and volume.data.dtype == np.int16
    assert orientation.axis_codes(volume.vox2world) == "LPS"
    peer = sitk.ReadImage(str(data_root / name))
    array = sitk.GetArrayFromImage(peer).transpose(2, 1, 0)
    np.testing.assert_array_equal(nifti.to_native(volume.data, volume), array)
    last = [n - 1 for n in peer.GetSize()]
    native = volume.native.vox2world
    np.testing.assert_allclose(
        native[:3, :3] @ last + native[:3, 3],
        peer.TransformIndexToPhysicalPoint(last),
        atol=1e-2,  # float32 forms, more than a metre from the origin
    )


@pytest.mark.parametrize("name", BODY)
def test_real_scan_body_mask_and_network_grid(data_root, name):
    volume = load(data_root, name)
    mask = preprocess.body_mask(volume)
    low, high = BODY[name]
    assert low < mask.mean() < high
    # All bone is body, but for the table and what is fixed to it.
    bone = volume.data > 300
    assert (mask & bone).sum() > 0.98 * bone.sum()

    spec = preprocess.PreprocessSpec()
    grid = preprocess.network_grid(volume, spec)
    assert grid.shape == (192, 192, 160)
    image = preprocess.prepare_image(volume, grid, spec)
    scanned = image != OUTSIDE_HU
    assert image[scanned].min() >= -1000 and image[scanned].max() <= 3071
    assert scanned.mean() > 0.2
    # The middle of the grid lies in the middle of the body, whatever its table.
    body = preprocess.prepare_labels(volume._replace(data=mask.view(np.uint8)), grid)
    for axis in range(3):
        seen = np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))
        middle = (grid.shape[axis] - 1) / 2
        # In voxels of 2 mm; the largest voxels are 10 mm.
        assert abs((seen[0] + seen[-1]) / 2 - middle) <= 4
    # Where the whole scan fits, resampling keeps the mean HU of the body.
    extent = np.array(volume.data.shape) * volume.spacing_mm
    if (extent <= np.array(spec.shape) * spec.spacing_mm).all():
        before = np.clip(volume.data, -1000, 3071)[mask].mean()
        after = image[body.astype(bool) & scanned].mean()
        assert after == pytest.approx(before, abs=15)


def test_real_labels_lie_on_the_grid_of_their_image(data_root):
    image = load(data_root, HEADNECK)
    folder = data_root / "headneck_openkbp"
    labels = nifti.read_labels(folder / "labels" / "case_0013.nii.gz")
    nifti.check_same_grid(image, labels)
    names = json.loads((folder / "labels.json").read_text())
    assert labels.data.dtype == np.uint8
    assert set(np.unique(labels.data)) - {0} <= set(map(int, names))
    assert (preprocess.body_mask(image) & (labels.data > 0)).sum() > 0.99 * (
        labels.data > 0
    ).sum()


def test_real_landmarks_lie_inside_the_lung(data_root):
    path = data_root / "lung_elastix" / "landmarks.csv"
    if not path.is_file():
        pytest.skip("no landmarks among the real scans")
    pairs = points.read_points(path)
    assert pairs.fixed.shape == pairs.moving.shape == (17, 3)
    for name, spots in (("baseline", pairs.fixed), ("followup", pairs.moving)):
        mask = nifti.read_labels(data_root / "lung_elastix" / f"{name}_lungmask.nii.gz")
        to_voxel = np.linalg.inv(mask.vox2world)
        index = np.rint(spots @ to_voxel[:3, :3].T + to_voxel[:3, 3]).astype(int)
        assert mask.data[tuple(index.T)].mean() > 0.9


def test_real_scan_goes_back_to_its_own_file(data_root, tmp_path):
    volume = load(data_root, ABDOMEN)
    nifti.write_like(tmp_path / "out.nii.gz", volume.data, volume)
    ours = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    theirs = sitk.ReadImage(str(data_root / ABDOMEN))
    np.testing.assert_array_equal(
        sitk.GetArrayViewFromImage(ours), sitk.GetArrayViewFromImage(theirs)
    )
    assert ours.GetOrigin() == theirs.GetOrigin()
    assert ours.GetDirection() == theirs.GetDirection()
    assert ours.GetSpacing() == theirs.GetSpacing()
