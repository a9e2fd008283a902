"""Maps between scans, against SimpleITK on the same files, and against themselves."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from tests import oracles
from unireg_jax.imaging import mapping, orientation, transforms
from unireg_jax.imaging.mapping import Field, Grid, Mapping
from unireg_jax.imaging.nifti import Volume

CENTER = np.array([12.0, -150.0, 730.0])


def place(shape, spacing, codes="LPS", angles=(0.0, 0.0, 0.0), center=CENTER):
    """[4, 4] LPS mm of a grid whose middle lies at `center`."""
    turn = nib.eulerangles.euler2mat(*angles) @ orientation.direction(codes)
    out = np.eye(4)
    out[:3, :3] = turn @ np.diag(spacing)
    out[:3, 3] = center - out[:3, :3] @ ((np.array(shape) - 1) / 2)
    return out


def grid(shape, spacing, codes="LPS", angles=(0.0, 0.0, 0.0), shift=(0.0, 0.0, 0.0)):
    return Grid(shape, place(shape, spacing, codes, angles, CENTER + np.array(shift)))


# Grids onto which scans are brought: none shares a voxel with that of the field.
GRIDS = {
    "straight": grid((21, 26, 19), (5.1, 4.3, 6.2)),
    "anisotropic": grid((40, 29, 9), (2.7, 3.9, 13.1)),
    "flipped": grid((22, 25, 18), (5.3, 4.1, 6.4), "RAI"),
    "permuted": grid((18, 23, 24), (6.4, 4.9, 4.7), "SLA"),
    "oblique": grid((23, 24, 20), (4.9, 4.6, 5.9), "LPS", (0.3, -0.2, 0.15)),
    "wider": grid((31, 30, 28), (6.7, 6.1, 7.3), "LPI", (-0.1, 0.1, 0.2), (40, -25, 9)),
    "aside": grid((20, 21, 22), (5.0, 4.4, 6.1), "LPS", (0, 0, 0), (55.3, 4.1, -61.7)),
}
FIELD_GRID = grid((24, 20, 17), (5.0, 5.5, 7.0), "LPS", (0.12, 0.05, -0.08))
MOVING_GRID = grid((31, 28, 25), (4.2, 4.4, 5.1), "RSA", (0.05, -0.1, 0.1), (9, -7, 5))


def positions(g):
    """[X, Y, Z, 3] LPS mm."""
    index = np.stack(np.meshgrid(*map(np.arange, g.shape), indexing="ij"), -1)
    return index @ g.vox2world[:3, :3].T + g.vox2world[:3, 3]


def waves(xyz, *, size=4.0, length=55.0):
    """A smooth displacement, mm, [..., 3]."""
    s = (xyz - CENTER) * (2 * np.pi / length)
    return size * np.stack(
        [
            np.sin(s[..., 1] + 0.3) + 0.7,
            np.cos(0.8 * s[..., 2]) * np.sin(0.6 * s[..., 0]),
            np.sin(0.7 * s[..., 0] - 0.5 * s[..., 1]) - 0.4,
        ],
        axis=-1,
    )


def hu(xyz):
    """A smooth body, HU."""
    s = xyz - CENTER - np.array([6.0, -4.0, 3.0])
    radius = np.square(s / [62, 51, 66]).sum(-1)
    ripple = 120 * np.sin(s[..., 0] / 17) * np.cos(s[..., 1] / 21 + s[..., 2] / 27)
    return -1000 + (1050 + ripple) / (1 + np.exp((radius - 1) * 4))


def turn(shift=(3.0, -5.0, 4.0), angles=(0.1, -0.06, 0.08), scale=1.06):
    """An affine about the middle of the scans, LPS mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = nib.eulerangles.euler2mat(*angles) * scale
    matrix[0, 1] += 0.03
    matrix[:3, 3] = CENTER - matrix[:3, :3] @ CENTER + shift
    return matrix


def field(g=FIELD_GRID, **options):
    return Field(waves(positions(g), **options).astype(np.float32), g.vox2world)


def scan(g=MOVING_GRID, dtype=np.float32):
    """The body on a grid, and the same as a SimpleITK image."""
    data = hu(positions(g))
    data = np.rint(data).astype(dtype) if np.dtype(dtype).kind in "iu" else data
    volume = Volume(data.astype(dtype), g.vox2world)
    return volume, oracles.itk_image(data.astype(np.float64), g.vox2world)


def resampled(image, g, transform, how=sitk.sitkLinear, outside=-1000.0):
    """By SimpleITK, [X, Y, Z]."""
    target = oracles.itk_image(np.zeros(g.shape), g.vox2world)
    return oracles.itk_array(sitk.Resample(image, target, transform, how, outside))


def scattered(count=200, reach=130.0):
    """Points inside and far outside the field's grid, LPS mm."""
    return CENTER + np.random.default_rng(0).uniform(-reach, reach, (count, 3))


def peer_points(transform, xyz):
    return np.array([transform.TransformPoint(p.tolist()) for p in xyz])


def peer_field(path):
    image = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    return sitk.DisplacementFieldTransform(image)


def write_1006(path, part):
    image = nib.Nifti1Image(
        (part.disp_mm * [-1, -1, 1])[:, :, :, None, :].astype("f4"),
        orientation.ras_from_lps(part.vox2world),
    )
    image.header["intent_code"] = 1006
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


SPELLED = {
    "1Warp.nii.gz": (lambda p: transforms.write_field(p, *field()), peer_field),
    "ras.nii": (lambda p: write_1006(p, field()), peer_field),
    "slicer.nrrd": (lambda p: transforms.write_nrrd(p, *field()), peer_field),
    "mixed.h5": (
        lambda p: transforms.write_parts(
            p, [turn(), tuple(field()), turn((0, 2, 0)), tuple(field(size=-2.0))]
        ),
        lambda p: sitk.ReadTransform(str(p)),
    ),
    "Composite.h5": (
        lambda p: transforms.write_composite(p, turn(), *field()),
        lambda p: sitk.ReadTransform(str(p)),
    ),
    "Affine.txt": (
        lambda p: transforms.write_affine_txt(p, turn(), center=(1.0, 2.0, 3.0)),
        lambda p: sitk.ReadTransform(str(p)),
    ),
}


# --- SimpleITK applies every file as we do ------------------------------------------


@pytest.mark.parametrize("name", SPELLED)
def test_every_spelling_moves_points_as_itk(tmp_path, name):
    write, peer = SPELLED[name]
    write(tmp_path / name)
    found = mapping.points(mapping.read(tmp_path / name), scattered())
    expected = peer_points(peer(tmp_path / name), scattered())
    # Within the field and beyond it; geometry in float32.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert np.abs(found - scattered()).max() > 3


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("where", GRIDS)
def test_every_spelling_warps_scans_as_itk(tmp_path, name, where):
    write, peer = SPELLED[name]
    write(tmp_path / name)
    volume, image = scan()
    mine = mapping.resample(
        mapping.read(tmp_path / name), volume, GRIDS[where], fill=-1000
    )
    expected = resampled(image, GRIDS[where], peer(tmp_path / name))
    assert np.ptp(expected) > 500
    np.testing.assert_allclose(mine, expected, rtol=0, atol=0.5)


@pytest.mark.parametrize("where", ["straight", "oblique", "wider"])
def test_nearest_picks_the_voxels_of_itk(where):
    volume, _ = scan()
    labels = (volume.data > -200).astype(np.uint8) + (volume.data > 40)
    whole = Mapping((field(), turn()))
    found = mapping.resample(
        whole, volume._replace(data=labels), GRIDS[where], interp="nearest"
    )
    peer = sitk.CompositeTransform(3)
    peer.AddTransform(_peer_affine(turn()))
    peer.AddTransform(_peer_field(field()))
    image = oracles.itk_image(labels.astype(np.float64), volume.vox2world)
    expected = resampled(image, GRIDS[where], peer, sitk.sitkNearestNeighbor, 0.0)
    assert found.dtype == np.uint8
    # A voxel in ten thousand may lie on a face between two, as float32 has it.
    assert (found != expected).mean() < 1e-4


@pytest.mark.parametrize("where", ["straight", "oblique", "wider"])
def test_label_gives_the_largest_trilinear_share_as_itk(where):
    volume, _ = scan()
    labels = np.digitize(volume.data, [-600, -100, 30, 90]).astype(np.int16) * 7
    found = mapping.resample(
        Mapping((field(),)), volume._replace(data=labels), GRIDS[where], interp="label"
    )
    image = sitk.Cast(oracles.itk_image(labels, volume.vox2world), sitk.sitkInt16)
    how = sitk.sitkLabelLinear
    expected = resampled(image, GRIDS[where], _peer_field(field()), how, 0)
    assert len(np.unique(expected)) == 5
    # Equal shares are the exception; ITK breaks the tie by other rounding.
    assert (found != expected).mean() < 1e-3


def _peer_field(part):
    image = oracles.itk_image(
        part.disp_mm.astype(np.float64), part.vox2world, vector=True
    )
    return sitk.DisplacementFieldTransform(image)


def _peer_affine(matrix):
    peer = sitk.AffineTransform(3)
    peer.SetMatrix(matrix[:3, :3].ravel().tolist())
    peer.SetTranslation(matrix[:3, 3].tolist())
    return peer
