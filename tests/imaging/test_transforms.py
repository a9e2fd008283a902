"""Displacement fields and affines: what ITK reads is what we meant."""

import concurrent.futures
import io
import os
import struct
import subprocess
import sys
import zipfile

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from tests.grids import ALL_CODES, oblique, positions
from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.imaging import itk_files, nifti, orientation, transforms
from unireg_jax.imaging.grids import Grid

SHAPE = (5, 6, 7)
SPACING = (3.0, 2.5, 4.0)


def world(vox2world, shape=SHAPE):
    """[X, Y, Z, 3] LPS mm of every voxel."""
    return positions(Grid(shape, vox2world))


LINEAR = np.array([[0.05, -0.02, 0.01], [0.03, 0.02, -0.04], [-0.01, 0.06, 0.03]])


def displacement(points):
    """A linear map of LPS mm, which linear interpolation keeps exactly."""
    return points @ LINEAR.T + np.array([3.0, -5.0, 7.0])


def affine():
    matrix = np.eye(4)
    matrix[:3, :3] = nib.eulerangles.euler2mat(-0.1, 0.25, 0.4) * 1.1
    matrix[0, 1] += 0.07
    matrix[:3, 3] = (12.0, -30.0, 5.0)
    return matrix


def grid(codes):
    """Shape and affine of the oblique grid stored along `codes`."""
    data, vox2world = orientation.reorient(np.zeros(SHAPE), oblique(), codes)
    return data.shape, vox2world


def sitk_field(path):
    image = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    return sitk.DisplacementFieldTransform(image)


def inner_points(count=20):
    """Points between the voxels of the oblique grid, LPS mm."""
    index = np.random.default_rng(0).uniform(0.1, np.array(SHAPE) - 1.1, (count, 3))
    return index @ oblique()[:3, :3].T + oblique()[:3, 3]


def source(folder, codes, order="<"):
    """A fixed image stored along `codes`, read back."""
    shape, vox2world = grid(codes)
    values = np.linspace(-1000, 500, 210).round().reshape(shape).astype("i2")
    nifti.write_volume(folder / "fixed.nii", values, vox2world)
    return nifti.read_image(folder / "fixed.nii")


# --- fields -------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ALL_CODES)
def test_write_field_is_applied_by_simpleitk(tmp_path, codes):
    shape, vox2world = grid(codes)
    disp_mm = displacement(world(vox2world, shape)).astype(np.float32)
    transforms.write_field(tmp_path / "a_1Warp.nii.gz", disp_mm, vox2world)
    peer = sitk_field(tmp_path / "a_1Warp.nii.gz")
    for point in inner_points():
        moved = np.array(peer.TransformPoint(point.tolist()))
        # float32 sform and vectors
        np.testing.assert_allclose(moved, point + displacement(point), atol=1e-4)


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP", "AIR"])
def test_write_field_like_uses_the_fixed_file_grid(tmp_path, codes):
    fixed = source(tmp_path, codes)
    disp_mm = displacement(world(fixed.vox2world)).astype(np.float32)
    path = tmp_path / "a_1Warp.nii.gz"
    transforms.write_field(path, disp_mm, fixed.vox2world, like=fixed)
    header = nib.load(path).header
    assert header["intent_code"] == 1007
    assert header.get_data_shape() == (*fixed.native.shape, 1, 3)
    for name in ("srow_x", "srow_y", "srow_z", "quatern_b", "sform_code", "qform_code"):
        assert header[name].tobytes() == fixed.header[name].tobytes()
    peer = sitk_field(path)
    for point in inner_points():
        moved = np.array(peer.TransformPoint(point.tolist()))
        np.testing.assert_allclose(moved, point + displacement(point), atol=1e-4)
    image = sitk.ReadImage(str(path))
    assert image.GetSize() == sitk.ReadImage(str(tmp_path / "fixed.nii")).GetSize()
    again, vox2world = transforms.read_field(path)
    np.testing.assert_array_equal(again, disp_mm)
    np.testing.assert_array_equal(vox2world, fixed.vox2world)


def by_hand(folder, vectors, vox2world, intent, name="hand.nii.gz"):
    """A 5-D field file, made without the writer under test."""
    image = nib.Nifti1Image(
        vectors[:, :, :, None, :].astype("f4"), orientation.ras_from_lps(vox2world)
    )
    image.header["intent_code"] = intent
    image.header.set_xyzt_units("mm")
    nib.save(image, folder / name)
    return folder / name


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP"])
@pytest.mark.parametrize("intent, flip", [(1007, (1, 1, 1)), (1006, (-1, -1, 1))])
def test_read_field_intents_mean_what_itk_reads(tmp_path, codes, intent, flip):
    shape, vox2world = grid(codes)
    known = displacement(world(vox2world, shape))
    path = by_hand(tmp_path, known * flip, vox2world, intent)
    disp_mm, lps = transforms.read_field(path)
    assert orientation.axis_codes(lps) == "LPS" and disp_mm.dtype == np.float32
    expected = displacement(world(lps))
    np.testing.assert_allclose(disp_mm, expected, atol=1e-4)  # float32
    peer = sitk_field(path)
    for point in inner_points(5):
        moved = np.array(peer.TransformPoint(point.tolist()))
        np.testing.assert_allclose(moved, point + displacement(point), atol=1e-4)


@pytest.mark.parametrize("name", ["NREG_TRANS", "Mapping"])
def test_read_field_refuses_what_other_tools_call_a_vector(tmp_path, name):
    image = nib.Nifti1Image(np.zeros((12, 10, 11, 1, 3), "f4"), np.diag([2, 2, 2, 1]))
    image.header.set_xyzt_units("mm")
    image.header.set_intent(1007, name=name)
    nib.save(image, tmp_path / "f.nii.gz")
    with pytest.raises(UserError, match=f"intent name {name}") as error:
        transforms.read_field(tmp_path / "f.nii.gz")
    assert error.value.reason == "schema"


def test_read_l2r_takes_a_file_that_does_not_say_where_it_lies(tmp_path):
    disp = np.random.default_rng(0).normal(size=(12, 10, 11, 3)).astype("f4")
    nib.save(nib.Nifti1Image(disp, None), tmp_path / "f.nii.gz")
    nib.save(nib.Nifti1Image(disp, np.diag([2, 2, 2, 1])), tmp_path / "g.nii.gz")
    place = np.diag([2.0, 3.0, 2.0, 1.0])
    found = [transforms.read_l2r(tmp_path / f"{n}.nii.gz", place) for n in "fg"]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][0], disp * [2, 3, 2], rtol=1e-6)


@pytest.mark.parametrize("intent", [1006, 2006, 2009])
def test_read_l2r_refuses_millimetres_and_fsl(tmp_path, intent):
    image = nib.Nifti1Image(np.zeros((12, 10, 11, 3), "f4"), np.diag([2, 2, 2, 1]))
    image.header.set_xyzt_units("mm")
    image.header["intent_code"] = intent
    nib.save(image, tmp_path / "f.nii.gz")
    with pytest.raises(UserError, match=f"{intent}: mm, or a transform of FSL"):
        transforms.read_l2r(tmp_path / "f.nii.gz", np.eye(4))


def test_read_field_of_simpleitk_file(tmp_path):
    vectors = displacement(world(oblique()))
    image = sitk.GetImageFromArray(vectors.transpose(2, 1, 0, 3), isVector=True)
    image.SetSpacing(SPACING)
    image.SetOrigin(oblique()[:3, 3].tolist())
    image.SetDirection((oblique()[:3, :3] / np.array(SPACING)).ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "peer.nii.gz"))
    disp_mm, vox2world = transforms.read_field(tmp_path / "peer.nii.gz")
    np.testing.assert_allclose(disp_mm, vectors, atol=1e-5)  # float32
    np.testing.assert_allclose(vox2world, oblique(), atol=1e-4)


@pytest.mark.parametrize(
    "change, reason, match",
    [
        (lambda v: v * np.nan, "field_nonfinite", "finite vectors, got NaN"),
        (lambda v: v * 1e7, "field_range", "within 1 km, got .* unit of the field"),
        (lambda v: v[..., :2], "ndim", r"\(X, Y, Z, 1, 3\), got shape \(5, 6, 7, 1, 2"),
    ],
)
def test_read_field_refuses_bad_vectors(tmp_path, change, reason, match):
    vectors = change(displacement(world(oblique())))
    path = by_hand(tmp_path, vectors, oblique(), 1007)
    with pytest.raises(UserError, match=match) as caught:
        transforms.read_field(path)
    assert (caught.value.reason, caught.value.exit_code) == (reason, errors.FAILED)


def test_read_field_refuses_other_layouts(tmp_path):
    vectors = displacement(world(oblique()))
    path = by_hand(tmp_path, vectors, oblique(), 0)
    with pytest.raises(UserError, match="1007 .* or 1006 .* got 0") as caught:
        transforms.read_field(path)
    assert caught.value.reason == "dtype"
    affine_ras = orientation.ras_from_lps(oblique())
    nib.save(nib.Nifti1Image(vectors, affine_ras), tmp_path / "four.nii")
    with pytest.raises(UserError, match=r"got shape \(5, 6, 7, 3\)") as caught:
        transforms.read_field(tmp_path / "four.nii")
    assert caught.value.reason == "ndim"


@pytest.mark.parametrize(
    "disp_mm, match",
    [
        (np.zeros((3, 5, 6, 7)), r"must be \(X, Y, Z, 3\) in mm, got \(3, 5, 6, 7\)"),
        (np.zeros((1, 5, 6, 7, 3)), "no batch"),
        (np.full((*SHAPE, 3), np.nan), "finite and within 1 km, got nan"),
        (np.full((*SHAPE, 3), 1e7), "finite and within 1 km"),
    ],
)
def test_write_field_rejects(tmp_path, disp_mm, match):
    with pytest.raises(ValueError, match=match):
        transforms.write_field(tmp_path / "a.nii.gz", disp_mm, oblique())
    assert list(tmp_path.iterdir()) == []


def test_write_field_rejects_other_grid_than_like(tmp_path):
    fixed = source(tmp_path, "RAI")
    disp_mm = np.zeros((*SHAPE, 3))
    with pytest.raises(ValueError, match="vox2world must be that of like"):
        transforms.write_field(tmp_path / "a.nii", disp_mm, np.eye(4), like=fixed)
    with pytest.raises(ValueError, match="array must begin with"):
        transforms.write_field(
            tmp_path / "a.nii", disp_mm[:, :, 1:], fixed.vox2world, like=fixed
        )
    with pytest.raises(ValueError, match="vox2world must be a finite invertible"):
        transforms.write_field(tmp_path / "a.nii", disp_mm, np.zeros((4, 4)))


# --- affines ------------------------------------------------------------------------


@pytest.mark.parametrize("center", [(0.0, 0.0, 0.0), (10.0, -20.0, 35.5)])
def test_write_affine_txt_is_applied_by_simpleitk(tmp_path, center):
    path = tmp_path / "a_0GenericAffine.txt"
    transforms.write_affine_txt(path, affine(), center=center)
    peer = sitk.ReadTransform(str(path))
    for point in inner_points(5):
        expected = affine()[:3, :3] @ point + affine()[:3, 3]
        moved = peer.TransformPoint(point.tolist())
        np.testing.assert_allclose(moved, expected, atol=1e-10)  # float64
    np.testing.assert_allclose(transforms.read_affine(path), affine(), atol=1e-12)


def test_read_affine_of_simpleitk_file(tmp_path):
    peer = sitk.AffineTransform(3)
    peer.SetMatrix(affine()[:3, :3].ravel().tolist())
    peer.SetTranslation([1.0, 2.0, 3.0])
    peer.SetCenter([10.0, -20.0, 35.5])
    sitk.WriteTransform(peer, str(tmp_path / "peer.tfm"))
    matrix = transforms.read_affine(tmp_path / "peer.tfm")
    for point in inner_points(5):
        expected = peer.TransformPoint(point.tolist())
        moved = matrix[:3, :3] @ point + matrix[:3, 3]
        np.testing.assert_allclose(moved, expected, atol=1e-10)  # float64


HEAD = "#Insight Transform File V1.0\nTransform: AffineTransform_double_3_3\n"


@pytest.mark.parametrize(
    "content, reason, match",
    [
        (b"", "empty", "0 bytes"),
        (b"1 0 0 0\n", "schema", "an ITK transform .* got text"),
        (b"\x89PNG\xff", "schema", "got a PNG picture"),
        (HEAD.replace("Affine", "Euler3D"), "schema", "Euler3DTransform_double_3_3"),
        (HEAD.replace("3_3", "2_2"), "schema", "AffineTransform_double_2_2"),
        (HEAD + HEAD, "schema", "got 2 transforms"),
        (HEAD + "Parameters: 1 0 0\nFixedParameters: 0 0 0\n", "schema", "3 and 3 num"),
        (HEAD + "Parameters: a b\n", "schema", "no numbers"),
        (HEAD + "Parameters:" + " nan" * 12, "affine_nonfinite", "finite parameters"),
        (HEAD + "Parameters:" + " 0" * 12, "affine_singular", "determinant 0"),
    ],
)
def test_read_affine_refuses(tmp_path, content, reason, match):
    path = tmp_path / "a.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=match) as caught:
        transforms.read_affine(path)
    assert (caught.value.reason, caught.value.exit_code) == (reason, errors.FAILED)


def test_read_affine_of_every_spelling_is_the_same(tmp_path):
    rigid = sitk.Euler3DTransform()
    rigid.SetRotation(0.1, -0.2, 0.3)
    rigid.SetTranslation([1.0, 2.0, 3.0])
    rigid.SetCenter([10.0, -20.0, 35.5])
    scaled = sitk.AffineTransform(3)
    scaled.SetMatrix((np.diag([1.1, 0.9, 1.0])).ravel().tolist())
    both = sitk.CompositeTransform([scaled, rigid])  # the last one acts first
    spelled = {"e.txt": rigid, "e.tfm": rigid, "e.h5": rigid, "e.mat": rigid}
    for name, peer in {**spelled, "c.h5": both}.items():
        sitk.WriteTransform(peer, str(tmp_path / name))
        matrix = transforms.read_affine(tmp_path / name)
        for point in inner_points(5):
            expected = peer.TransformPoint(point.tolist())
            moved = matrix[:3, :3] @ point + matrix[:3, 3]
            np.testing.assert_allclose(moved, expected, atol=1e-9)


def test_read_affine_refuses_fields(tmp_path):
    disp, place = np.zeros((3, 4, 5, 3), np.float32), np.eye(4)
    transforms.write_field(tmp_path / "w.nii.gz", disp, place)
    transforms.write_composite(tmp_path / "c.h5", affine(), disp, place)
    for name in ("w.nii.gz", "c.h5"):
        with pytest.raises(UserError, match="affines alone .* field; name an affine"):
            transforms.read_affine(tmp_path / name)


def test_read_affine_refuses_absent(tmp_path):
    with pytest.raises(UserError, match="got nothing") as caught:
        transforms.read_affine(tmp_path / "no.txt")
    assert caught.value.reason == "not_found"


def test_write_affine_txt_rejects(tmp_path):
    for bad in (np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.nan), affine().T):
        with pytest.raises(ValueError, match=r"affine must be a finite invertible"):
            transforms.write_affine_txt(tmp_path / "a.txt", bad)


# --- composite ----------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["LPS", "RAS", "RAI", "SLP", "AIR", "PSR", "LAS"])
def test_write_composite_is_applied_by_simpleitk(tmp_path, codes):
    shape, vox2world = grid(codes)
    disp_mm = displacement(world(vox2world, shape)).astype(np.float32)
    path = tmp_path / "a_Composite.h5"
    transforms.write_composite(path, affine(), disp_mm, vox2world)
    peer = sitk.ReadTransform(str(path))
    for point in inner_points():
        moved = point + displacement(point)  # the field acts first
        moved = affine()[:3, :3] @ moved + affine()[:3, 3]
        got = peer.TransformPoint(point.tolist())
        np.testing.assert_allclose(got, moved, atol=1e-4)  # float32 vectors


def test_write_composite_like_uses_the_fixed_file_grid(tmp_path):
    fixed = source(tmp_path, "SRA")
    disp_mm = displacement(world(fixed.vox2world)).astype(np.float32)
    path = tmp_path / "a_Composite.h5"
    transforms.write_composite(path, affine(), disp_mm, fixed.vox2world, like=fixed)
    peer = sitk.ReadTransform(str(path))
    image = sitk.ReadImage(str(tmp_path / "fixed.nii"))
    with h5py.File(path) as file:
        numbers = file["TransformGroup/2/TransformFixedParameters"][()]
    expected = [*image.GetSize(), *image.GetOrigin(), *image.GetSpacing()]
    np.testing.assert_allclose(numbers[:9], expected, atol=1e-4)  # float32 forms
    np.testing.assert_allclose(numbers[9:], image.GetDirection(), atol=1e-5)
    for point in inner_points():
        moved = point + displacement(point)
        moved = affine()[:3, :3] @ moved + affine()[:3, 3]
        got = peer.TransformPoint(point.tolist())
        np.testing.assert_allclose(got, moved, atol=1e-3)  # float32 forms


def test_write_composite_has_the_layout_of_itk(tmp_path):
    def tree(path):
        found = {}
        with h5py.File(path) as file:
            file["TransformGroup"].visititems(
                lambda name, item: found.update(
                    {name: (getattr(item, "shape", None), getattr(item, "dtype", None))}
                )
            )
            kinds = [file[f"TransformGroup/{n}/TransformType"][0] for n in range(3)]
        return found, kinds

    disp_mm = displacement(world(oblique()))
    transforms.write_composite(tmp_path / "a.h5", affine(), disp_mm, oblique())
    peer = sitk.ReadTransform(str(tmp_path / "a.h5"))
    sitk.WriteTransform(peer, str(tmp_path / "peer.h5"))
    assert tree(tmp_path / "a.h5") == tree(tmp_path / "peer.h5")
    with h5py.File(tmp_path / "a.h5") as ours, h5py.File(tmp_path / "peer.h5") as itk:
        for n in (1, 2):
            for name in ("TransformParameters", "TransformFixedParameters"):
                key = f"TransformGroup/{n}/{name}"
                np.testing.assert_allclose(ours[key][()], itk[key][()], atol=1e-12)


def test_write_composite_compresses_large_fields(tmp_path):
    shape = (11, 12, 13)
    disp_mm = np.zeros((*shape, 3), np.float32)
    disp_mm[3, 4, 5] = (1.0, 2.0, 3.0)
    transforms.write_composite(tmp_path / "a.h5", np.eye(4), disp_mm, oblique())
    peer = sitk.ReadTransform(str(tmp_path / "a.h5"))
    point = oblique()[:3, :3] @ (3, 4, 5) + oblique()[:3, 3]
    expected = point + (1.0, 2.0, 3.0)
    np.testing.assert_allclose(peer.TransformPoint(point.tolist()), expected, atol=1e-9)
    assert (tmp_path / "a.h5").stat().st_size < 8 * disp_mm.size


def test_write_composite_slab_by_slab_is_the_same_file(tmp_path, monkeypatch):
    disp = np.random.default_rng(0).normal(size=(5, 6, 7, 3)).astype(np.float32)
    vox2world = np.diag([1.0, 2.0, 3.0, 1.0])
    transforms.write_composite(tmp_path / "one.h5", np.eye(4), disp, vox2world)
    monkeypatch.setattr(transforms.itk_containers, "_SLAB_NUMBERS", 2 * 5 * 6 * 3)
    transforms.write_composite(tmp_path / "many.h5", np.eye(4), disp, vox2world)
    # Chunks that end within a slab, the last one beyond the field.
    monkeypatch.setattr(transforms.itk_containers, "_CHUNK", 4 * 5 * 7)
    transforms.write_composite(tmp_path / "chunks.h5", np.eye(4), disp, vox2world)
    for name in ("one.h5", "many.h5", "chunks.h5"):
        (found, place), _ = transforms.read_parts(tmp_path / name)
        np.testing.assert_array_equal(found, disp)
        np.testing.assert_array_equal(place, vox2world)
        peer = sitk.ReadTransform(str(tmp_path / name))
        moved = peer.TransformPoint((4.0, 10.0, 18.0))
        np.testing.assert_allclose(moved, disp[4, 5, 6] + (4, 10, 18), atol=1e-12)


def test_write_composite_lets_no_damaged_number_pass(tmp_path):
    disp = np.zeros((3, 4, 5, 3), np.float32)
    path = tmp_path / "a.h5"
    transforms.write_composite(path, affine(), disp, np.diag([1.0, 2.0, 3.0, 1.0]))
    content = path.read_bytes()
    for number in (affine()[0, 1], 2.0, 3.0):  # of the affine, and two spacings
        at = content.index(struct.pack("<d", number))
        damaged = bytearray(content)
        damaged[at + 6] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            transforms.read_parts(path)


def test_write_composite_from_several_threads(tmp_path):
    disp_mm = displacement(world(oblique())).astype(np.float32)
    paths = [tmp_path / f"{i}.h5" for i in range(8)]

    def write(path):
        transforms.write_composite(path, affine(), disp_mm, oblique())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, paths))
    assert len({path.read_bytes() for path in paths}) == 1


def test_writers_on_a_full_disk_fail_with_storage_and_leave_nothing(tmp_path):
    # A size limit acts as a full disk does. In a process of its own: HDF5 written
    # straight to such a file ends the process.
    code = """
import resource, sys
import numpy as np
from unireg_jax.errors import STORAGE, UserError
from unireg_jax.imaging import nifti, transforms
field = np.random.default_rng(0).normal(size=(15, 16, 17, 3))
grid = np.diag([2.0, 2.5, 3.0, 1.0])
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
for name, write in {
    "a.h5": lambda p: transforms.write_composite(p, np.eye(4), field, grid),
    "a.nii.gz": lambda p: transforms.write_field(p, field, grid),
    "a.npz": lambda p: transforms.write_l2r(p, field, grid),
    "a.nii": lambda p: nifti.write_volume(p, field[..., 0], grid),
}.items():
    try:
        write(sys.argv[1] + "/" + name)
    except UserError as error:
        assert error.reason == "storage" and error.exit_code == STORAGE, error
        assert "File too large" in str(error), error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path], check=True)
    assert list(tmp_path.iterdir()) == []


def test_write_composite_rejects(tmp_path):
    sheared = oblique()
    sheared[0, 1] += 0.5
    field = np.zeros((*SHAPE, 3))
    with pytest.raises(ValueError, match="perpendicular axes, got a shear"):
        transforms.write_composite(tmp_path / "a.h5", affine(), field, sheared)
    with pytest.raises(ValueError, match="must end in .h5"):
        transforms.write_composite(tmp_path / "a.nii", affine(), field, oblique())
    with pytest.raises(ValueError, match="affine must be a finite invertible"):
        transforms.write_composite(tmp_path / "a.h5", np.eye(3), field, oblique())
    with pytest.raises(UserError, match="folder exists") as caught:
        transforms.write_composite(tmp_path / "x" / "a.h5", affine(), field, oblique())
    assert caught.value.exit_code == errors.STORAGE
    assert list(tmp_path.iterdir()) == []


# --- Learn2Reg ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disp_1_2.nii.gz", "disp_1_2.npz"])
@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP"])
def test_l2r_round_trip(tmp_path, codes, name):
    fixed = source(tmp_path, codes)
    moving = orientation.reorient(
        np.zeros((6, 5, 8)), oblique(origin=(5, 6, 7)), "AIR"
    )[1]
    disp_mm = displacement(world(fixed.vox2world)).astype(np.float32)
    for options in ({}, {"moving_vox2world": moving}):
        transforms.write_l2r(
            tmp_path / name, disp_mm, fixed.vox2world, like=fixed, **options
        )
        again, vox2world = transforms.read_l2r(
            tmp_path / name, fixed.native.vox2world, **options
        )
        np.testing.assert_allclose(again, disp_mm, atol=1e-4)  # float32 voxels
        np.testing.assert_allclose(vox2world, fixed.vox2world, atol=1e-12)


def test_write_l2r_warps_stored_arrays_as_the_challenge_does(tmp_path):
    # Both images as stored, axes against each other: index + disp, order 1.
    fixed = source(tmp_path, "RAI")
    moving_shape = (14, 16, 12)
    moving = np.diag([5.0, -6.0, 7.0, 1.0])
    moving[:3, 3] = (-60.0, 50.0, -130.0)
    ramp = np.array([1.0, 10.0, 100.0])
    stored = world(moving, moving_shape) @ ramp
    disp_mm = displacement(world(fixed.vox2world)).astype(np.float32)
    transforms.write_l2r(
        tmp_path / "disp.nii.gz",
        disp_mm,
        fixed.vox2world,
        moving_vox2world=moving,
        like=fixed,
    )
    disp = nib.load(tmp_path / "disp.nii.gz").get_fdata()
    assert disp.shape == (*fixed.native.shape, 3)
    index = world(np.eye(4), fixed.native.shape) + disp
    warped = ndimage.map_coordinates(stored, np.moveaxis(index, -1, 0), order=1)
    points = world(fixed.native.vox2world, fixed.native.shape)
    expected = (points + displacement(points)) @ ramp
    np.testing.assert_allclose(warped, expected, atol=2e-2)  # float32 voxels x 100


def test_read_l2r_refuses(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((3, 5, 6, 7), np.float32))
    np.savez(tmp_path / "b.npz", np.full((*SHAPE, 3), np.nan))
    np.savez(tmp_path / "f.npz", np.full((*SHAPE, 3), 1e300))  # no float32
    (tmp_path / "c.npz").write_bytes(b"PK\3\4 torn")
    (tmp_path / "d.npz").write_bytes(struct.pack("<d", 1.0))
    cases = (
        ("a.npz", "ndim", r"shape \(X, Y, Z, 3\), got float32 \(3, 5, 6, 7\)"),
        ("b.npz", "field_nonfinite", "finite vectors"),
        ("f.npz", "field_nonfinite", "finite vectors"),
        ("c.npz", "truncated", "write it again"),
        ("d.npz", "truncated", "write it again"),
        ("e.npz", "not_found", "got nothing"),
    )
    for name, reason, match in cases:
        with pytest.raises(UserError, match=match) as caught:
            transforms.read_l2r(tmp_path / name, oblique())
        assert caught.value.reason == reason


def npz(header, method=zipfile.ZIP_STORED):
    """An archive of one array of 24 numbers under any header."""
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("arr_0.npy", head + bytes(96))
    return stream.getvalue()


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2, 2, 3), }\n"


@pytest.mark.parametrize(
    "content, match",
    [
        (npz(GOOD.replace("(2, 2, 2, 3), }", "(2, 2, 2, 3)")), "EOF in multi-line"),
        (npz(GOOD.replace("(2,", "(True,")), "TypeError|bool|integer"),
        (npz("(" * 5000), "write it again"),
        (npz(GOOD, zipfile.ZIP_LZMA).replace(b"]\0\0", b"\xff\0\0"), "write it again"),
        (None, "encrypted"),
        (None, "compression method"),
    ],
)
def test_read_l2r_refuses_whatever_an_archive_holds(tmp_path, content, match):
    if content is None:  # the flag, or the number of a method, in both its headers
        encrypted = match == "encrypted"
        changed = bytearray(npz(GOOD))
        place = changed.index(b"PK\1\2")
        for at in (6, place + 8) if encrypted else (8, place + 10):
            changed[at] = 1 if encrypted else 99
        content = bytes(changed)
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        transforms.read_l2r(path, oblique())
    assert caught.value.reason == "truncated" and "\n" not in str(caught.value)


def test_read_l2r_survives_every_flipped_bit_of_the_beginning(tmp_path):
    path = tmp_path / "a.npz"
    transforms.write_l2r(path, np.ones((2, 3, 4, 3)), oblique())
    good = path.read_bytes()
    refused = 0
    for place in range(min(300, len(good))):
        for bit in range(8):
            path.write_bytes(flipped(good, place, bit))
            try:
                transforms.read_l2r(path, oblique())
            except UserError:
                refused += 1
    assert refused > 1000


def flipped(content, place, bit):
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


# --- transform files of any parts ---------------------------------------------------

CENTRE = [10.0, -20.0, 35.5]


def peers():
    """SimpleITK's linear transforms, none of them trivial."""
    euler = sitk.Euler3DTransform(CENTRE, 0.2, -0.3, 0.5, (4.0, 5.0, -6.0))
    zyx = sitk.Euler3DTransform(CENTRE, 0.2, -0.3, 0.5, (4.0, 5.0, -6.0))
    zyx.SetComputeZYX(True)
    versor = sitk.VersorRigid3DTransform()
    versor.SetCenter(CENTRE)
    versor.SetRotation((0.6, 0.0, 0.8), 0.7)
    versor.SetTranslation((1.0, 2.0, 3.0))
    similar = sitk.Similarity3DTransform()
    similar.SetCenter(CENTRE)
    similar.SetRotation((0.0, 0.6, -0.8), 0.5)
    similar.SetTranslation((1.0, 2.0, 3.0))
    similar.SetScale(1.3)
    turn = sitk.VersorTransform((0.0, 0.6, 0.8), 0.4, CENTRE)
    scale = sitk.ScaleTransform(3, (1.1, 0.9, 1.4))
    scale.SetCenter(CENTRE)
    return {
        "translation": sitk.TranslationTransform(3, (1.0, -2.0, 3.0)),
        "scale": scale,
        "euler": euler,
        "euler_zyx": zyx,
        "versor": turn,
        "rigid": versor,
        "similarity": similar,
        "identity": sitk.Transform(3, sitk.sitkIdentity),
    }


@pytest.mark.parametrize("ending", ["tfm", "txt", "h5"])
@pytest.mark.parametrize("name", peers())
def test_read_parts_turns_linear_kinds_into_affines(tmp_path, name, ending):
    path = tmp_path / f"a.{ending}"
    sitk.WriteTransform(peers()[name], str(path))
    assert transforms.spelling(path) == "itk"
    (matrix,) = transforms.read_parts(path)
    for point in inner_points(5):
        expected = peers()[name].TransformPoint(point.tolist())
        moved = matrix[:3, :3] @ point + matrix[:3, 3]
        np.testing.assert_allclose(moved, expected, atol=1e-9)  # float64


@pytest.mark.parametrize("ending", ["tfm", "h5"])
def test_read_parts_of_a_composite_gives_the_order_of_action(tmp_path, ending):
    known = [peers()[name] for name in ("similarity", "euler", "translation")]
    whole = sitk.CompositeTransform(3)
    for peer in known:  # the last one added acts first
        whole.AddTransform(peer)
    sitk.WriteTransform(whole, str(tmp_path / f"a.{ending}"))
    point = inner_points(1)[0]
    expected = np.array(whole.TransformPoint(point.tolist()))
    for matrix in transforms.read_parts(tmp_path / f"a.{ending}"):
        point = matrix[:3, :3] @ point + matrix[:3, 3]
    np.testing.assert_allclose(point, expected, atol=1e-9)


@pytest.mark.parametrize("name", ["a.h5", "a.tfm"])
def test_read_parts_of_a_field_file_of_simpleitk(tmp_path, name):
    vectors = displacement(world(oblique()))
    image = sitk.GetImageFromArray(vectors.transpose(2, 1, 0, 3), isVector=True)
    image.SetSpacing(SPACING)
    image.SetOrigin(oblique()[:3, 3].tolist())
    image.SetDirection((oblique()[:3, :3] / np.array(SPACING)).ravel().tolist())
    peer = sitk.DisplacementFieldTransform(image)
    sitk.WriteTransform(peer, str(tmp_path / name))
    ((disp_mm, vox2world),) = transforms.read_parts(tmp_path / name)
    assert disp_mm.dtype == np.float32
    np.testing.assert_allclose(disp_mm, vectors, atol=1e-5)  # float32
    np.testing.assert_allclose(vox2world, oblique(), atol=1e-9)


def test_read_parts_of_a_large_field_as_text(tmp_path):
    """More text than any affine has."""
    vectors = np.random.default_rng(0).normal(size=(14, 13, 12, 3))
    image = sitk.GetImageFromArray(vectors.transpose(2, 1, 0, 3), isVector=True)
    path = tmp_path / "a.tfm"
    sitk.WriteTransform(sitk.DisplacementFieldTransform(image), str(path))
    assert path.stat().st_size > 1 << 16
    ((disp_mm, _),) = transforms.read_parts(path)
    np.testing.assert_array_equal(disp_mm, vectors.astype(np.float32))


def test_read_parts_refuses_text_beyond_its_limit(tmp_path):
    path = tmp_path / "a.tfm"
    path.write_text(HEAD)
    os.truncate(path, (1 << 26) + 1)
    with pytest.raises(UserError, match="bytes of text, got 67108865; save") as caught:
        transforms.read_parts(path)
    assert (caught.value.reason, caught.value.exit_code) == ("too_large", errors.LIMIT)


def mat(name, numbers, kind=0):
    """A matrix as MATLAB 4 wrote it, one column."""
    head = struct.pack("<5i", kind, len(numbers), 1, 0, len(name) + 1)
    values = np.array(numbers, "<f8" if kind == 0 else "<f4").tobytes()
    return head + name.encode() + b"\0" + values


@pytest.mark.parametrize("kind", [0, 10])
def test_read_parts_of_ants_mat(tmp_path, kind):
    path = tmp_path / "a_0GenericAffine.mat"
    numbers = [*affine()[:3, :3].ravel(), 1.0, 2.0, 3.0]
    content = mat("AffineTransform_double_3_3", numbers, kind)
    path.write_bytes(content + mat("fixed", CENTRE, kind))
    (matrix,) = transforms.read_parts(path)
    peer = sitk.ReadTransform(str(path))
    for point in inner_points(5):
        expected = peer.TransformPoint(point.tolist())
        moved = matrix[:3, :3] @ point + matrix[:3, 3]
        # float32 numbers, as SimpleITK reads them too
        np.testing.assert_allclose(moved, expected, atol=1e-9 if kind == 0 else 1e-4)


def bspline():
    return sitk.BSplineTransformInitializer(
        sitk.Image(20, 20, 20, sitk.sitkUInt8), [3] * 3
    )


@pytest.mark.parametrize(
    "make, reason, match",
    [
        (
            lambda p: sitk.WriteTransform(bspline(), str(p)),
            "schema",
            "BSplineTransform_double_3_3 of 648 .* sample other kinds",
        ),
        (
            lambda p: sitk.WriteTransform(sitk.AffineTransform(2), str(p)),
            "schema",
            "AffineTransform_double_2_2",
        ),
        (
            lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n torn"),
            "schema",
            "expected an ITK",
        ),
        (lambda p: h5py.File(p, "w").close(), "schema", "TransformGroup"),
    ],
)
def test_read_parts_refuses_what_is_no_map(tmp_path, make, reason, match):
    make(tmp_path / "a.h5")
    with pytest.raises(UserError, match=match) as caught:
        transforms.read_parts(tmp_path / "a.h5")
    assert (caught.value.reason, caught.value.exit_code) == (reason, errors.FAILED)


@pytest.mark.parametrize(
    "number, name, value, reason",
    [
        (2, "TransformParameters", np.nan, "field_nonfinite"),
        (2, "TransformParameters", 2e6, "field_range"),
        (1, "TransformParameters", np.inf, "affine_nonfinite"),
        (1, "TransformParameters", 0.0, "affine_singular"),
        (2, "TransformFixedParameters", 7.0, "schema"),
        (2, "TransformFixedParameters", np.nan, "schema"),
        (2, "TransformFixedParameters", -1.0, "schema"),
    ],
)
def test_read_parts_refuses_bad_numbers(tmp_path, number, name, value, reason):
    path = tmp_path / "a.h5"
    transforms.write_composite(
        path, affine(), displacement(world(oblique())), oblique()
    )
    with h5py.File(path, "r+") as file:
        numbers = file[f"TransformGroup/{number}/{name}"]
        numbers[: 9 if value == 0 else 3] = value
    with pytest.raises(UserError) as caught:
        transforms.read_parts(path)
    assert caught.value.reason == reason


AFFINE, RIGID = "AffineTransform", "VersorRigid3DTransform"


@pytest.mark.parametrize(
    "kind, numbers, match",
    [
        (AFFINE, "1 0 0 0 1 0 0 0 1 1e30 0 0", "within 1e.06 .1 km., got 1e.30"),
        (AFFINE, "1e30 0 0 0 1 0 0 0 1 0 0 0", "within 1e.06 .1 km., got 1e.30"),
        (AFFINE, "1e300 0 0 0 1e300 0 0 0 1 1e308 0 0", "within .*, got inf"),
        ("TranslationTransform", "0 -2e6 0", "within .*, got 2e.06"),
        ("ScaleTransform", "1 1 1e7", "within .*, got 1e.07"),
        (RIGID, "5 0 0 0 0 0", "versor of length 1 at most, got 5"),
        (RIGID, "0.8 0.8 0 0 0 0", "versor of length 1 at most, got 1.131"),
        ("VersorTransform", "1e200 0 0", "versor of length 1 at most, got inf"),
    ],
)
def test_read_parts_refuses_affines_beyond_reason(tmp_path, kind, numbers, match):
    path = tmp_path / "a.txt"
    fixed = "FixedParameters: 1e9 0 0" if "e308" in numbers else ""
    path.write_text(
        "#Insight Transform File V1.0\n"
        f"Transform: {kind}_double_3_3\nParameters: {numbers}\n{fixed}\n"
    )
    with pytest.raises(UserError, match=match) as caught:
        transforms.read_parts(path)
    assert (caught.value.reason, caught.value.exit_code) == (
        "field_range",
        errors.FAILED,
    )


@pytest.mark.parametrize(
    "grid, reason",
    [
        ("1e300 1e300 1 0 0 0 1 1 1 1 0 0 0 1 0 0 0 1", "schema"),
        ("1 1 1 0 0 0 1e300 1 1 1e300 0 0 0 1 0 0 0 1", "affine_singular"),
        ("1 1 1 0 0 0 1 1 1 1e200 1e200 0 1e200 -1e200 0 0 0 1", "affine_singular"),
    ],
)
def test_read_parts_refuses_grids_beyond_numbers(tmp_path, grid, reason):
    path = tmp_path / "a.txt"
    path.write_text(
        "#Insight Transform File V1.0\n"
        "Transform: DisplacementFieldTransform_double_3_3\n"
        f"Parameters: 1 2 3\nFixedParameters: {grid}\n"
    )
    with pytest.raises(UserError) as caught:
        transforms.read_parts(path)
    assert caught.value.reason == reason


def test_read_parts_takes_a_half_turn_whose_versor_is_rounded(tmp_path):
    # 1 / sqrt(3) rounded up: the length is 1.0000003.
    path = tmp_path / "a.txt"
    path.write_text(
        "#Insight Transform File V1.0\nTransform: VersorTransform_double_3_3\n"
        "Parameters: 0.5773505 0.5773505 0.5773505\n"
    )
    (matrix,) = transforms.read_parts(path)
    half = np.full((3, 3), 2 / 3) - np.eye(3)
    np.testing.assert_allclose(matrix[:3, :3], half, atol=1e-6)  # seven digits


def test_read_parts_refuses_damage_that_stops_the_library(tmp_path):
    """One flipped bit each. In a process of its own: HDF5 stayed there, or crashed."""
    path = tmp_path / "a_Composite.h5"
    field = displacement(world(oblique())).astype(np.float32)
    transforms.write_composite(path, affine(), field, oblique())
    good = path.read_bytes()
    heap = good.index(b"GCOL")  # size at 8; the first string's number at 16, size at 24
    text = good.index(b"\x19\x01\x00\x00\x10\x00\x00\x00")  # type of the strings
    assert good[heap + 24] == len("CompositeTransform_double_3_3")
    damages = {
        "checksum": ((heap + 24, 7), (heap + 26, 0), (heap + 31, 7), (heap + 9, 0)),
        "schema": ((text + 1, 0), (text + 1, 1), (text + 1, 3)),
    }
    names = []
    for reason, bits in damages.items():
        for number, (place, bit) in enumerate(bits):
            names.append(f"{reason}_{number}.h5")
            (tmp_path / names[-1]).write_bytes(flipped(good, place, bit))
    code = """
import os, sys
from unireg_jax.errors import UserError
from unireg_jax.imaging import mapping
for path in sys.argv[1:]:
    try:
        mapping.read(path)
    except UserError as error:
        reason = os.path.basename(path).partition("_")[0]
        assert error.reason == reason, (path, str(error))
    else:
        sys.exit(path)
"""
    words = [sys.executable, "-c", code, *(tmp_path / name for name in names)]
    # Its imports take seconds; what HDF5 did took for ever.
    run = subprocess.run(words, timeout=120, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_read_parts_looks_at_heaps_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.h5"
    transforms.write_composite(path, np.eye(4), np.ones((5, 6, 7, 3)), oblique())
    good, head = path.read_bytes(), b"GCOL\x01\0\0\0"
    # Chance, as it may stand among a field's numbers: longer than what follows.
    path.write_bytes(good + head + b"\xff" * 40)
    assert len(transforms.read_parts(path)) == 2
    # More strings than there can be transforms, all of them right.
    strings = struct.pack("<HHIQ", 1, 1, 0, 0) * 70_000
    size = struct.pack("<Q", 16 + len(strings))
    path.write_bytes(good + head + size + strings)
    with pytest.raises(UserError, match="at most 65536 strings") as caught:
        transforms.read_parts(path)
    assert caught.value.reason == "checksum"
    # Across the blocks in which a large file is looked through.
    path.write_bytes(flipped(good, good.index(b"GCOL") + 24, 7))
    for size in (7, 8, 9):
        monkeypatch.setattr(transforms.heaps, "_BLOCK", size)
        with pytest.raises(UserError, match="in a heap of strings at byte"):
            transforms.read_parts(path)


def test_write_parts_rejects():
    with pytest.raises(ValueError, match="one or more, got none"):
        transforms.write_parts("a.h5", [])


# --- NRRD ---------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP"])
def test_write_nrrd_is_read_by_itk(tmp_path, codes):
    fixed = source(tmp_path, codes)
    disp_mm = displacement(world(fixed.vox2world)).astype(np.float32)
    path = tmp_path / "a.nrrd"
    transforms.write_nrrd(path, disp_mm, fixed.vox2world, like=fixed)
    peer = sitk_field(path)
    for point in inner_points():
        moved = np.array(peer.TransformPoint(point.tolist()))
        np.testing.assert_allclose(moved, point + displacement(point), atol=1e-4)
    image = sitk.ReadImage(str(path))
    # The word by which Slicer knows that the field leads from fixed to moving.
    assert image.GetMetaData("displacement field type") == "resampling"
    assert image.GetSize() == fixed.native.shape
    assert transforms.spelling(path) == "itk_image"
    again, vox2world = transforms.read_itk_image(path)
    np.testing.assert_array_equal(again, disp_mm)
    np.testing.assert_allclose(vox2world, fixed.vox2world, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_read_itk_image_of_simpleitk_file(tmp_path, name, packed):
    vectors = displacement(world(oblique()))
    image = sitk.GetImageFromArray(vectors.transpose(2, 1, 0, 3), isVector=True)
    image.SetSpacing(SPACING)
    image.SetOrigin(oblique()[:3, 3].tolist())
    image.SetDirection((oblique()[:3, :3] / np.array(SPACING)).ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / name), useCompression=packed)
    assert transforms.spelling(tmp_path / name) == "itk_image"
    disp_mm, vox2world = transforms.read_itk_image(tmp_path / name)
    np.testing.assert_allclose(disp_mm, vectors, atol=1e-5)  # float32
    np.testing.assert_allclose(vox2world, oblique(), atol=1e-9)


def test_read_itk_image_refuses(tmp_path):
    disp_mm = displacement(world(oblique()))
    transforms.write_nrrd(tmp_path / "a.nrrd", disp_mm, oblique())
    content = (tmp_path / "a.nrrd").read_bytes()
    sitk.WriteImage(sitk.Image(5, 6, 7, sitk.sitkInt16), str(tmp_path / "i.nrrd"))
    for change, reason, match in (
        ((b":=resampling", b":=modelling"), "schema", "a resampling field, got mod"),
        ((b"left-posterior", b"right-anterior"), "schema", "vectors in LPS, got right"),
        (
            (b"space: left-posterior", b"SPACE: right-anterior"),
            "schema",
            "vectors in LPS, got right",
        ),
        (
            (b"space: left-posterior-superior", b"space dimension: 3"),
            "schema",
            "vectors in LPS, got none",
        ),
        ((b"\n\n", b'\nspace units: "m" "m" "m"\n\n'), "units", "in mm, got 'm'"),
        (
            (b"encoding: gzip", b"encoding: raw!"),
            "not_nifti",
            "none that ITK reads",
        ),
    ):
        (tmp_path / "b.nrrd").write_bytes(content.replace(*change, 1))
        with pytest.raises(UserError, match=match) as caught:
            transforms.read_itk_image(tmp_path / "b.nrrd")
        assert caught.value.reason == reason
    with pytest.raises(UserError, match="3-D of 1") as caught:
        transforms.read_itk_image(tmp_path / "i.nrrd")
    assert caught.value.reason == "ndim"
    beyond = sitk.GetImageFromArray(np.full((7, 6, 5, 3), 1e300), isVector=True)
    sitk.WriteImage(beyond, str(tmp_path / "f.mha"))
    with pytest.raises(UserError) as caught:
        transforms.read_itk_image(tmp_path / "f.mha")
    assert caught.value.reason == "field_nonfinite"


def test_read_itk_image_names_its_extra(tmp_path, monkeypatch):
    transforms.write_nrrd(tmp_path / "a.nrrd", np.zeros((*SHAPE, 3)), oblique())
    (tmp_path / "a.field").write_bytes((tmp_path / "a.nrrd").read_bytes())
    with pytest.raises(UserError, match="a name in .nrrd, .nhdr") as caught:
        transforms.spelling(tmp_path / "a.field")
    assert caught.value.reason == "name_mismatch"
    monkeypatch.setattr(itk_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"unireg-jax\[itk\]") as caught:
        transforms.read_itk_image(tmp_path / "a.nrrd")
    assert (caught.value.reason, caught.value.exit_code) == ("not_installed", 2)


# --- telling them apart -------------------------------------------------------------


def test_spelling_goes_by_content_not_by_name(tmp_path):
    disp_mm = displacement(world(oblique()))
    transforms.write_field(tmp_path / "a.nii.gz", disp_mm, oblique())
    transforms.write_l2r(tmp_path / "b.nii.gz", disp_mm, oblique())
    transforms.write_l2r(tmp_path / "b.nii", disp_mm, oblique())
    transforms.write_l2r(tmp_path / "c.npz", disp_mm, oblique())
    big = nib.Nifti2Image(disp_mm, orientation.ras_from_lps(oblique()))
    nib.save(big, tmp_path / "d.nii")
    transforms.write_composite(tmp_path / "e.h5", affine(), disp_mm, oblique())
    (tmp_path / "e.h5").rename(tmp_path / "e.transform")
    for name, kind in (
        ("a.nii.gz", "nifti"),
        ("b.nii.gz", "l2r"),
        ("b.nii", "l2r"),
        ("c.npz", "l2r"),
        ("d.nii", "l2r"),
        ("e.transform", "itk"),
    ):
        assert transforms.spelling(tmp_path / name) == kind, name
    assert len(transforms.read_parts(tmp_path / "e.transform")) == 2
    (tmp_path / "torn.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:60])
    assert transforms.spelling(tmp_path / "torn.nii.gz") == "nifti"  # its reader says


@pytest.mark.parametrize(
    "content, match",
    [
        (b"1 0 0 0\n0 1 0 0\n", "got text"),
        (b"\x89PNG\r\n", "got a PNG picture"),
        (b"<html>", "an HTML page"),
        (b"\0\1\2\3", "unknown binary data"),
    ],
)
def test_spelling_refuses_what_is_no_transform(tmp_path, content, match):
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        transforms.spelling(tmp_path / "a.h5")
    assert (caught.value.reason, caught.value.exit_code) == ("schema", errors.FAILED)


@pytest.mark.parametrize(
    "name, content, match",
    [
        (
            "T.0.txt",
            '(Transform "AffineTransform")\n',
            "got elastix .*`transformix -def",
        ),
        (
            "T.1.txt",
            '(CompressResultImage "false")\n(Size 9 9)\n(Transform "EulerTransform")\n',
            "name its deformationField",
        ),
        ("greedy.mat", "1 0 0 -2.5\n0 1 0 3e1\n0 0 1 0\n0 0 0 1\n", "RAS mm"),
        ("c3d.txt", "1 0 0 -2.5\n0 1 0 3e1\n0 0 1 0\n0 0 0 1\n", "-oitk out.txt`"),
        ("flirt.mat", "1.00000  0  0  4  \n0 1 0 3\n0 0 1 0\n0 0 0 1  \n", "-fsl2ras"),
    ],
)
def test_affines_of_other_tools_are_refused_with_a_way_out(
    tmp_path, name, content, match
):
    (tmp_path / name).write_text(content)
    for read in (transforms.spelling, transforms.read_affine):
        with pytest.raises(UserError, match=match) as caught:
            read(tmp_path / name)
        assert caught.value.reason == "schema"
        assert caught.value.exit_code == errors.FAILED


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP"])
def test_write_field_1006_is_turned_by_itk(tmp_path, codes):
    fixed = source(tmp_path, codes)
    disp_mm = displacement(world(fixed.vox2world)).astype(np.float32)
    path = tmp_path / "a.nii.gz"
    transforms.write_field(path, disp_mm, fixed.vox2world, like=fixed, intent=1006)
    assert nib.load(path).header["intent_code"] == 1006
    stored = nib.load(path).get_fdata()[2, 3, 4, 0]
    here = fixed.native.vox2world @ (2, 3, 4, 1)
    np.testing.assert_allclose(stored, displacement(here[:3]) * (-1, -1, 1), atol=1e-4)
    peer = sitk_field(path)
    for point in inner_points(5):
        moved = np.array(peer.TransformPoint(point.tolist()))
        np.testing.assert_allclose(moved, point + displacement(point), atol=1e-4)
    np.testing.assert_array_equal(transforms.read_field(path)[0], disp_mm)
    with pytest.raises(ValueError, match="1007 .* or 1006"):
        transforms.write_field(path, disp_mm, fixed.vox2world, intent=0)
