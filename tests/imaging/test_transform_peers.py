"""ANTs and nitransforms apply our files as we do; skips where they are absent."""

import numpy as np
import pytest

from tests.imaging import test_mapping as made
from unireg_jax.imaging import mapping, nifti, orientation
from unireg_jax.imaging.mapping import Mapping

SCANS = ("fixed", "moving")


@pytest.fixture
def pair(tmp_path):
    """Fixed and moving scans with axes of their own, and a map of two parts."""
    volumes = []
    for name, g, codes in (
        ("fixed", made.GRIDS["oblique"], "RAI"),
        ("moving", made.MOVING_GRID, "SPR"),
    ):
        data = made.hu(made.positions(g)).astype(np.float32)
        data, vox2world = orientation.reorient(data, g.vox2world, codes)
        nifti.write_volume(tmp_path / f"{name}.nii.gz", data, vox2world)
        volumes.append(nifti.read_image(tmp_path / f"{name}.nii.gz"))
    return *volumes, Mapping((made.field(), made.turn()))


@pytest.mark.parametrize(
    ("name", "to"),
    [("a_Composite.h5", "itk"), ("a_1Warp.nii.gz", "ants"), ("b.nii.gz", "nifti1006")],
)
def test_ants_warps_as_we_do(tmp_path, pair, name, to):
    ants = pytest.importorskip("ants")
    fixed, moving, whole = pair
    path = str(tmp_path / name)
    mapping.write(path, whole, to, fixed=None if to == "itk" else fixed)
    scans = [
        ants.image_read(str(tmp_path / f"{n}.nii.gz")) for n in ("fixed", "moving")
    ]
    found = ants.apply_transforms(
        *scans, transformlist=[path], interpolator="linear", defaultvalue=-1000
    )
    ours = mapping.resample(
        mapping.read(path), moving, mapping.grid_of(fixed), fill=-1000
    )
    ours = nifti.to_native(ours, fixed)
    assert np.ptp(ours) > 500
    np.testing.assert_allclose(found.numpy(), ours, rtol=0, atol=0.5)


def test_ants_lists_transforms_in_our_order(tmp_path, pair):
    ants = pytest.importorskip("ants")
    fixed, moving, whole = pair
    field, affine = whole.parts
    paths = [str(tmp_path / "w.nii.gz"), str(tmp_path / "a.txt")]
    mapping.write(paths[0], Mapping((field,)))
    mapping.write(paths[1], Mapping((affine,)))
    scans = [
        ants.image_read(str(tmp_path / f"{n}.nii.gz")) for n in ("fixed", "moving")
    ]
    found = ants.apply_transforms(*scans, transformlist=paths, defaultvalue=-1000)
    ours = mapping.resample(whole, moving, mapping.grid_of(fixed), fill=-1000)
    ours = nifti.to_native(ours, fixed)
    np.testing.assert_allclose(found.numpy(), ours, rtol=0, atol=0.5)


def test_ants_reads_its_own_affine_from_our_reader(tmp_path):
    ants = pytest.importorskip("ants")
    peer = ants.create_ants_transform(
        transform_type="AffineTransform",
        matrix=made.turn()[:3, :3],
        translation=(1.0, -2.0, 3.0),
        center=(10.0, 20.0, -30.0),
    )
    path = str(tmp_path / "a_0GenericAffine.mat")
    ants.write_transform(peer, path)
    points = made.scattered(9)
    expected = [ants.apply_ants_transform_to_point(peer, p.tolist()) for p in points]
    found = mapping.points(mapping.read(path), points)
    np.testing.assert_allclose(found, expected, atol=1e-3)  # float32 in ANTs


def test_nitransforms_moves_points_as_we_do(tmp_path, pair):
    nonlinear = pytest.importorskip("nitransforms.nonlinear")
    fixed, _, whole = pair
    path = str(tmp_path / "a_1Warp.nii.gz")
    mapping.write(path, whole, "ants", fixed=fixed)
    peer = nonlinear.DenseFieldTransform.from_filename(path, fmt="itk")
    xyz = made.positions(mapping.grid_of(fixed))[2:-2:3, 2:-2:3, 2:-2:3].reshape(-1, 3)
    ras = xyz * (-1, -1, 1)
    found = peer.map(ras) * (-1, -1, 1)
    expected = mapping.points(mapping.read(path), xyz)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
