"""One reader for every kind of scan: the same voxels in the same places."""

import gzip
import importlib.util
import re
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from tests import dicom_files
from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.imaging import itk_files, nifti, scans

SHAPE = (13, 11, 9)
SPACING = (2.5, 2.0, 3.0)
# Columns are the directions of the stored axes: oblique, and L and S reversed.
TURN = np.array([[-0.96, 0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, -1.0]])


@pytest.fixture
def image():
    """An ITK image and its voxels [X, Y, Z]."""
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 300, SHAPE).astype(np.int16)
    image = sitk.GetImageFromArray(np.ascontiguousarray(hu.T))
    image.SetSpacing(SPACING)
    image.SetOrigin((12.5, -40.0, 300.0))
    image.SetDirection(TURN.ravel())
    return image, hu


def save(image, path):
    sitk.WriteImage(image, str(path), useCompression="nrrd" in path.name)
    return path


ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")


def save_packed(image, folder, ending):
    """A compressed file of ITK; its header, and the file of its voxels."""
    path = folder / f"scan{ending}"
    sitk.WriteImage(image, str(path), useCompression=True)
    data = {".nhdr": ".raw.gz", ".mhd": ".zraw"}
    return path, path.with_suffix(data.get(ending, ending))


def change(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd", ".nii.gz"])
def test_every_format_gives_the_same_volume(tmp_path, image, ending):
    image, hu = image
    volume = scans.read_scan(save(image, tmp_path / f"scan{ending}"))
    assert volume.data.dtype == np.int16
    assert volume.native.shape == SHAPE
    # The point of a stored voxel, as ITK says, holds its value.
    for voxel in ((0, 0, 0), (3, 7, 2), (12, 10, 8)):
        point = image.TransformIndexToPhysicalPoint(voxel)
        at = np.linalg.inv(volume.vox2world) @ [*point, 1.0]
        # NIfTI keeps its geometry in float32.
        np.testing.assert_allclose(at, np.rint(at), atol=1e-4)
        assert volume.data[tuple(np.rint(at[:3]).astype(int))] == hu[voxel]
    np.testing.assert_allclose(volume.spacing_mm, SPACING, rtol=1e-6)


def same(taken, read):
    """What an image gives is what its file gives."""
    assert taken.data.dtype == read.data.dtype and taken.path is None
    np.testing.assert_array_equal(taken.data, read.data)
    np.testing.assert_array_equal(taken.vox2world, read.vox2world)
    np.testing.assert_array_equal(taken.native.vox2world, read.native.vox2world)
    assert taken.native.shape == read.native.shape
    assert taken.warnings == read.warnings


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, ">i4", np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("scaling", [(1, 0), (0, 0), (1, -1024), (0.5, 3.25)])
def test_image_of_nibabel_is_read_as_its_file(tmp_path, image, ending, dtype, scaling):
    image, hu = image
    hu = np.abs(hu) if np.dtype(dtype).kind == "u" else hu
    path = save(image, tmp_path / f"scan{ending}")
    header = nib.load(path).header.as_byteswapped("<>"[np.dtype(dtype).str[0] == ">"])
    header.set_data_shape((*SHAPE, 1))  # a time axis of one frame
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = scaling
    header["vox_offset"] = 352
    content = header.binaryblock + b"\0\0\0\0" + hu.astype(dtype).tobytes(order="F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    loaded = nib.load(path)
    same(scans.take_image(loaded, "fixed"), scans.read_scan(path))
    loaded.get_fdata()  # what nibabel keeps of it changes nothing
    same(scans.take_image(loaded, "fixed"), scans.read_scan(path))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_image_of_nibabel_made_of_an_array_is_read_as_its_file(tmp_path, image, kind):
    path = save(image[0], tmp_path / "scan.nii.gz")
    loaded = nib.load(path)
    for array in (image[1], image[1].astype(np.float32) / 7, image[1].astype(float)):
        made = kind(array, loaded.affine)
        nib.save(made, tmp_path / "made.nii")
        same(scans.take_image(made, "fixed"), scans.read_scan(tmp_path / "made.nii"))
    # The values of the array count, not what a header of int16 would make of them.
    made = nib.Nifti1Image(image[1] / 7, loaded.affine, loaded.header)
    taken = scans.take_image(made, "fixed")
    assert taken.data.dtype == np.float32
    np.testing.assert_array_equal(
        nifti.to_native(taken.data, taken), (image[1] / 7).astype(np.float32)
    )
    # An affine that was changed in place is the one in force.
    made.affine[:3, 3] += 10
    before = made.header.binaryblock
    moved = scans.take_image(made, "fixed").native.vox2world - taken.native.vox2world
    np.testing.assert_allclose(moved[:3, 3], (-10, -10, 10), atol=1e-4)
    assert made.header.binaryblock == before


def test_image_of_nibabel_is_refused_as_its_file(tmp_path, image):
    path = save(image[0], tmp_path / "scan.nii")
    hu, place = image[1], nib.load(path).affine
    for made, reason in (
        (nib.Nifti1Image(hu, None), "orientation_unknown"),
        (nib.Nifti1Image(np.where(hu > 0, np.nan, 1.0), place), "nonfinite"),
        (nib.Nifti1Image(hu.astype(complex), place), "dtype"),
        (nib.Nifti1Image(hu > 0, place, nib.load(path).header), "dtype"),
        (nib.Nifti1Image(np.stack([hu, hu], -1), place), "ndim"),
        (nib.Nifti1Image(hu, np.diag([1e-3, 1, 1, 1])), "spacing"),
    ):
        with pytest.raises(UserError, match=f"fixed: {reason}: expected") as caught:
            scans.take_image(made, "fixed")
        assert caught.value.reason == reason
    with pytest.raises(UserError, match="at most 8 voxels"):
        scans.take_image(nib.load(path), "fixed", max_voxels=8)
    loaded = nib.load(path)
    path.unlink()
    with pytest.raises(UserError, match="fixed: storage: .*; load its file again"):
        scans.take_image(loaded, "fixed")


def test_image_of_simpleitk_is_read_as_its_file(tmp_path, image):
    image = image[0]
    halves = sitk.Cast(image, sitk.sitkFloat64) + 0.5
    deep = sitk.JoinSeries(image)  # of one frame
    for held in (image, halves, deep):
        path = save(held, tmp_path / "scan.mha")
        same(scans.take_image(held, "fixed"), scans.read_scan(path))
    vectors = sitk.Compose(image, image)
    complex_ = sitk.RealAndImaginaryToComplex(halves, halves)
    for held in (image[:, :, 3], vectors, complex_):
        with pytest.raises(UserError, match="fixed: ndim: expected one 3-D volume"):
            scans.take_image(held, "fixed")
    image.SetSpacing((1e-3, 1, 1))
    with pytest.raises(UserError, match="fixed: spacing"):
        scans.take_image(image, "fixed")


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_results_go_back_to_the_stored_grid(tmp_path, image, ending):
    image, hu = image
    volume = scans.read_scan(save(image, tmp_path / f"scan{ending}"))
    nifti.write_like(tmp_path / "out.nii.gz", volume.data, volume)
    back = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back).T, hu)
    np.testing.assert_allclose(back.GetDirection(), image.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(back.GetOrigin(), image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(back.GetSpacing(), SPACING, rtol=1e-6)


def test_dicom_series_is_a_scan_like_any_other(tmp_path, image):
    _, hu = image
    dicom_files.write_series(tmp_path / "series", hu)
    volume = scans.read_scan(tmp_path / "series")
    nifti.write_like(tmp_path / "out.nii.gz", volume.data, volume)
    back = scans.read_scan(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(back.data, volume.data)
    np.testing.assert_allclose(back.vox2world, volume.vox2world, atol=1e-4)
    assert [p.suffix for p in scans.files_of(tmp_path / "series")] == [".dcm"] * 9


def test_files_of_a_series_are_its_slices(tmp_path, image):
    """Notes and thumbnails that come and go make it no other scan."""
    folder = tmp_path / "series"
    dicom_files.write_series(folder, image[1])
    before = scans.files_of(folder)
    (folder / "complete.txt").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"x" * 300)
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")  # nor the index of a disc
    before[0].rename(folder / "1.2.840.7")  # a bare UID
    named = {p.name for p in scans.files_of(folder)}
    assert named == {p.name for p in before[1:]} | {"1.2.840.7"}
    scans.read_scan(folder)
    (folder / "cut.dcm").write_bytes(b"")  # named as a slice: reading says what it is
    assert (folder / "cut.dcm") in scans.files_of(folder)


def test_files_of_a_header_include_its_voxels(tmp_path, image):
    path = save(image[0], tmp_path / "scan.mhd")
    assert [p.name for p in scans.files_of(path)] == ["scan.mhd", "scan.raw"]
    assert scans.files_of("scan.nii.gz")[0].name == "scan.nii.gz"


def test_values_keep_their_meaning(tmp_path, image):
    halves = sitk.Cast(image[0], sitk.sitkFloat64) + 0.5
    volume = scans.read_scan(save(halves, tmp_path / "halves.mha"))
    assert volume.data.dtype == np.float32
    # A file of fractions stays one, as in NIfTI: soft masks have whole values, too.
    whole = sitk.Cast(image[0], sitk.sitkFloat32)
    assert scans.read_scan(save(whole, tmp_path / "w.mha")).data.dtype == np.float32
    labels = sitk.GetImageFromArray(np.arange(9 * 11 * 13).reshape(9, 11, 13) % 300)
    labels.SetSpacing(SPACING)
    found = scans.read_labels(save(labels, tmp_path / "labels.nrrd"))
    assert found.data.dtype == np.uint16 and found.data.max() == 299


def test_vectors_of_one_number_are_a_scan(tmp_path, image):
    path = save(image[0], tmp_path / "scan.mha")
    expected = scans.read_scan(path).data
    change(path, b"MET_SHORT", b"MET_SHORT_ARRAY")
    np.testing.assert_array_equal(scans.read_scan(path).data, expected)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda i: sitk.Cast(i, sitk.sitkFloat32) / 0.0, "nonfinite"),
        (lambda i: sitk.Cast(i, sitk.sitkFloat64) * 1e306, "nonfinite"),
        (lambda i: sitk.Compose(i, i, i), "ndim"),
        (lambda i: i[:, :, 3], "ndim"),
        (lambda i: i[:, :, 3:4], "fov"),
    ],
)
def test_read_scan_refuses(tmp_path, image, spoil, reason):
    path = save(spoil(image[0]), tmp_path / "scan.mha")
    with pytest.raises(UserError) as error:
        scans.read_scan(path)
    assert error.value.reason == reason
    assert str(path) in str(error.value)


@pytest.mark.parametrize("space", [None, "scanner-xyz", "right-anterior-superior"])
def test_nrrd_says_how_the_patient_lay(tmp_path, space):
    """ITK takes none, and a scanner's, for LPS."""
    lines = ["NRRD0005", "type: int16", "dimension: 3", "sizes: 12 10 8"]
    lines += ["endian: little", "encoding: raw"]
    if space:
        directions = "space directions: (2,0,0) (0,2,0) (0,0,3)"
        lines += [f"space: {space}", directions]
    path = tmp_path / "scan.nrrd"
    path.write_bytes(("\n".join(lines) + "\n\n").encode() + bytes(2 * 12 * 10 * 8))
    if space == "right-anterior-superior":
        assert scans.read_labels(path).native.vox2world[0, 0] == -2
        return
    for read in (scans.read_scan, scans.read_labels):
        with pytest.raises(UserError, match=f"got {space or 'none'}") as error:
            read(path)
        assert error.value.reason == "orientation_unknown"


@pytest.mark.parametrize(
    ("old", "new", "reason", "match"),
    [
        (rb"space directions.*\n", b"", "spacing", "three axes, got 'none'"),
        (rb"\(-2.*\)\n", b"none none none\n", "spacing", "got 'none none none'"),
        (rb"\(-2\S*\)", b"none", "spacing", "got 'none "),
        (rb"\(-2\S*\)", b"(nan,nan,NaN)", "spacing", "got '.nan,nan,NaN. "),
        (rb"\n\n", b'\nspace units: "m" "m" "m"\n\n', "units", "in mm, got 'm'; conv"),
        (rb"\n\n", b'\nSpaceUnits: "mm" "mm" "um"\n\n', "units", "in mm, got 'um'"),
        (rb"\n\n", b'\nspace units: "mm" "" "mm"\n\n', None, None),
        (rb"space directions", b"SpaceDirections", None, None),
    ],
)
def test_nrrd_says_its_spacing_in_mm(tmp_path, image, old, new, reason, match):
    """ITK takes no direction for 1 mm, and any unit for mm."""
    path = save(image[0], tmp_path / "scan.nrrd")
    expected = scans.read_scan(path).vox2world
    header, end, voxels = path.read_bytes().partition(b"\n\n")
    header, count = re.subn(old, new, header + end, count=1)
    assert count == 1
    path.write_bytes(header + voxels)
    if reason is None:
        np.testing.assert_array_equal(scans.read_scan(path).vox2world, expected)
        return
    for read in (scans.read_scan, scans.read_labels):
        with pytest.raises(UserError, match=match) as error:
            read(path)
        assert error.value.reason == reason


TURNED = "TransformMatrix = -1 0 0 0 1 0 0 0 1"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("TransformMatrix = 1 0 0 0 1 0 0 0 1", "spacing"),
        (f"elementspacing = 2 2 3\n{TURNED}", "spacing"),
        ("ElementSpacing = 2 2 3", "orientation_unknown"),
        (f"ElementSpacing = 2 2 3\n{TURNED.lower()}", "orientation_unknown"),
        ("ElementSpacing = 2 2 3\nAnatomicalOrientation = ???", "orientation_unknown"),
        ("ElementSpacing = 2 2 3\nAnatomicalOrientation = RAI", None),
        (f"ElementSpacing = 2 2 3\n{TURNED}", None),
        (f"Name =\nElementSize : 2 2 3\n{TURNED}\nDistanceUnits = mm", None),
    ],
)
def test_metaimage_says_its_spacing_and_how_it_is_turned(tmp_path, lines, reason):
    """ITK takes what is not told for 1 mm and LPS."""
    path = tmp_path / "scan.mhd"
    text = f"ObjectType = Image\nNDims = 3\nDimSize = 12 10 8\n{lines}\n"
    path.write_text(text + "ElementType = MET_SHORT\nElementDataFile = scan.raw\n")
    (tmp_path / "scan.raw").write_bytes(bytes(2 * 12 * 10 * 8))
    if reason is None:
        place = scans.read_labels(path).native.vox2world
        np.testing.assert_array_equal(abs(np.diag(place)[:3]), (2, 2, 3))
        assert np.sign(place[0, 0]) == (-1 if "= -1" in lines else 1)
        return
    for read in (scans.read_scan, scans.read_labels):
        with pytest.raises(UserError, match=", got none; add it") as error:
            read(path)
        assert error.value.reason == reason


@pytest.mark.parametrize("count", ["193", "3e3"])
def test_metaimage_of_too_many_axes_is_refused(tmp_path, image, count):
    """Of more than ten MetaIO dies by a signal."""
    path = save(image[0], tmp_path / "scan.mha")
    change(path, b"NDims = 3", f"NDims = {count}".encode())
    with pytest.raises(UserError, match=f"NDims from 1 to 10, got '{count}'") as error:
        scans.read_scan(path)
    assert error.value.reason == "ndim"


def test_metaimage_in_other_units_is_refused(tmp_path, image):
    path = save(image[0], tmp_path / "scan.mha")
    change(path, b"NDims", b"DistanceUnits = um\nNDims")
    with pytest.raises(UserError, match="lengths in mm, got 'um'") as error:
        scans.read_scan(path)
    assert error.value.reason == "units"


HEADER = {
    "NDims": "3",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "12 -40 300",
    "ElementSpacing": "2 3 4",
    "DimSize": "12 10 8",
    "ElementType": "MET_SHORT",
}


def save_meta(path, voxels=bytes(2 * 12 * 10 * 8), data="LOCAL", **change):
    """A MetaImage of other lines than ITK writes; None leaves one out."""
    lines = {**HEADER, **change, "ElementDataFile": data}
    text = "".join(f"{k} = {v}\n" for k, v in lines.items() if v is not None)
    path.write_bytes(text.encode() + (voxels if data == "LOCAL" else b""))
    if data != "LOCAL":
        (path.parent / data).write_bytes(voxels)
    return path


def save_nrrd(path, voxels=bytes(2 * 12 * 10 * 8), **change):
    """An NRRD, likewise."""
    lines = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "12 10 8",
        "space directions": "(2,0,0) (0,3,0) (0,0,4)",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(12,-40,300)",
    }
    lines |= {key.replace("_", " "): value for key, value in change.items()}
    text = "".join(f"{k}: {v}\n" for k, v in lines.items() if v is not None)
    path.write_bytes(b"NRRD0004\n" + text.encode() + b"\n" + voxels)
    return path


def refused(path):
    """By both readers, for one reason and in the same words."""
    words = set()
    for read in (scans.read_scan, scans.read_labels):
        with pytest.raises(UserError) as error:
            read(path)
        words.add((error.value.reason, str(error.value)))
    ((reason, text),) = words
    return reason, text


@pytest.mark.parametrize(
    ("line", "value", "reason", "says"),
    [
        ("Offset", "abc 0 0", "affine_nonfinite", "Offset of 3 finite numbers, got 'a"),
        ("Offset", "nan 0 0", "affine_nonfinite", "got 'nan 0 0'; correct that line"),
        ("Offset", "1,5 2,5 3,5", "affine_nonfinite", "got '1,5 2,5 3,5'"),
        ("Offset", "5 5", "affine_nonfinite", "3 finite numbers, got '5 5'"),
        ("Offset", "5 5 5 5", "affine_nonfinite", "got '5 5 5 5'"),
        ("Offset", "1_0 5 5", "affine_nonfinite", "got '1_0 5 5'"),
        ("Offset", "1e400 0 0", "affine_nonfinite", "got '1e400 0 0'"),
        ("Offset", "", "affine_nonfinite", "got ''"),
        ("Offset", "1e9 0 0", "affine_nonfinite", "finite numbers within 1 km"),
        ("Position", "x", "affine_nonfinite", "Position of 3"),
        ("Origin", "1 2 3", "orientation_conflict", "Offset and Origin to agree"),
        ("Rotation", "0 1 0 1 0 0 0 0 1", "orientation_conflict", "and Rotation to"),
        ("TransformMatrix", "1 0 0 0 x 0 0 0 1", "affine_nonfinite", "Matrix of 9"),
        ("TransformMatrix", "1 0 0", "affine_nonfinite", "of 9 finite numbers"),
        (
            "TransformMatrix",
            "1 0 0 0 1 0 0 1 0",
            "affine_singular",
            "three independent",
        ),
        ("ElementSpacing", "2 2", "spacing", "ElementSpacing of 3 finite numbers"),
        ("ElementSpacing", "1,5 1,5 2,5", "spacing", "got '1,5 1,5 2,5'"),
        ("ElementSpacing", "nan 2 2", "spacing", "got 'nan 2 2'"),
        ("ElementSpacing", "0 2 2", "spacing", "ElementSpacing above 0, got '0 2 2'"),
        ("ElementSpacing", "-2 2 2", "orientation_conflict", "above 0, got '-2 2 2'"),
    ],
)
def test_metaimage_tells_its_place_in_numbers(tmp_path, line, value, reason, says):
    """ITK takes words for 0, and the next line for what is missing."""
    found, text = refused(save_meta(tmp_path / "scan.mha", **{line: value}))
    assert found == reason and says in text, text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("line", ["Offset", "Position", "Origin"])
@pytest.mark.parametrize("value", ["12 -40 300", "+12.\t-4.0e1  300.0"])
def test_metaimage_tells_its_place_under_any_name(tmp_path, line, value):
    path = save_meta(tmp_path / "scan.mha", **{"Offset": None, line: value})
    volume = scans.read_labels(path)
    np.testing.assert_array_equal(volume.native.vox2world[:3, 3], (12, -40, 300))
    assert not volume.warnings


@pytest.mark.parametrize(
    ("line", "value", "reason", "says"),
    [
        ("space origin", "(abc,0,0)", "affine_nonfinite", "origin of 3 finite numbers"),
        ("space origin", "(nan,0,0)", "affine_nonfinite", "got 'nan 0 0'"),
        ("space origin", "(0,0)", "affine_nonfinite", "got '0 0'"),
        ("space origin", "(1e9,0,0)", "affine_nonfinite", "within 1 km"),
        ("space directions", "(2,0,0) (0,3,0) (0,0,x)", "affine_nonfinite", "'0 0 x'"),
        ("space directions", "(2,0) (0,3,0) (0,0,4)", "affine_nonfinite", "got '2 0'"),
        ("space directions", "(2,0,0) (0,3,0) (0,3,0)", "affine_singular", "three ind"),
        ("space directions", "(2,0,0) (0,3,0) (0,0,0)", "affine_singular", "three ind"),
    ],
)
def test_nrrd_tells_its_place_in_numbers(tmp_path, line, value, reason, says):
    found, text = refused(save_nrrd(tmp_path / "scan.nrrd", **{line: value}))
    assert found == reason and says in text, text


@pytest.mark.parametrize(
    ("save", "change", "warning"),
    [
        (save_meta, {"Offset": None}, "orientation_unknown: no Offset, read as 0 0 0"),
        (save_nrrd, {"space origin": None}, "orientation_unknown: no space origin, "),
        (
            save_meta,
            {"TransformMatrix": "1 0.3 0 0 1 0 0 0 1"},
            "orientation_conflict: axes are not perpendicular (cosine 0.29)",
        ),
        (
            save_nrrd,
            {"space directions": "(2,0,0) (0.6,2,0) (0,0,4)"},
            "orientation_conflict: axes are not perpendicular (cosine 0.29)",
        ),
        (
            save_meta,
            {"TransformMatrix": "2 0 0 0 2 0 0 0 2"},
            "spacing: ElementSpacing 2 x 3 x 4 mm differs from the affine's 4 x 6 x 8",
        ),
        (save_meta, {"ElementSize": "5 5 5"}, None),
        (save_meta, {"CenterOfRotation": "1 1 1"}, None),
    ],
)
def test_odd_places_of_itk_files_are_warned_of(tmp_path, save, change, warning):
    """As of NIfTI; what SimpleITK holds of the file is warned of, too."""
    path = save(tmp_path / f"scan{'.mha' if save == save_meta else '.nrrd'}", **change)
    found = scans.read_labels(path).warnings
    if warning is None:
        assert not found
        return
    assert any(line.startswith(warning) for line in found), found
    assert set(found) <= set(scans.read_scan(path).warnings)
    if "perpendicular" in warning:
        taken = scans.take_image(sitk.ReadImage(str(path)), "fixed")
        assert any(line.startswith(warning) for line in taken.warnings)


def test_image_of_simpleitk_far_from_any_patient_is_refused(image):
    image = image[0]
    image.SetOrigin((1e9, 0, 0))
    with pytest.raises(UserError, match="fixed: affine_nonfinite: .* within 1 km"):
        scans.take_image(image, "fixed")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("extra", [1, 1 << 16, (1 << 16) + 1])
def test_bytes_after_the_voxels_are_told_as_of_nifti(
    tmp_path, image, ending, packed, extra
):
    path = tmp_path / f"scan{ending}"
    sitk.WriteImage(image[0], str(path), useCompression=packed)
    data = max(scans.files_of(path), key=lambda p: p.stat().st_size)
    expected = scans.read_scan(path)
    assert not [w for w in expected.warnings if "trailing" in w]
    data.write_bytes(data.read_bytes() + b"x" * extra)
    if extra > 1 << 16:
        with pytest.raises(UserError, match="trailing_data: .* more than 65536 bytes"):
            scans.read_scan(path)
        return
    volume = scans.read_scan(path)
    np.testing.assert_array_equal(volume.data, expected.data)
    assert volume.warnings[0] == "trailing_data: bytes after the voxels were ignored"


def test_fewer_voxels_than_are_there_are_told(tmp_path):
    """A size that was changed by hand."""
    voxels = bytes(2 * 12 * 10 * 80)
    for path, size in (
        (save_meta(tmp_path / "a.mha", voxels, DimSize="12 10 70"), 70),
        (save_nrrd(tmp_path / "a.nrrd", voxels, sizes="12 10 70"), 70),
    ):
        volume = scans.read_labels(path)
        assert volume.data.shape[2] == size
        assert volume.warnings[0].startswith("trailing_data")
    voxels = bytes(2 * 12 * 10 * 400)
    for path in (
        save_meta(tmp_path / "a.mha", voxels, DimSize="12 10 70"),
        save_nrrd(tmp_path / "a.nrrd", voxels, sizes="12 10 70"),
    ):
        assert refused(path)[0] == "trailing_data"


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_that_a_header_skips_are_counted(tmp_path, packed):
    voxels = np.arange(12 * 10 * 8, dtype="<i2").tobytes()
    stored = zlib.compress(voxels) if packed else voxels
    told = {"CompressedData": str(packed), "CompressedDataSize": str(len(stored))}
    told = told if packed else {}

    def read(stored, skip, save=save_meta, **change):
        name = "scan.mhd" if save == save_meta else "scan.nrrd"
        volume = scans.read_labels(save(tmp_path / name, stored, **change, **skip))
        back = nifti.to_native(volume.data, volume)
        assert back.astype("<i2").tobytes(order="F") == voxels
        return volume.warnings

    apart = {"data": "scan.raw", **told}
    gap = b"x" * 77
    assert not read(gap + stored, {"HeaderSize": "77"}, **apart)
    assert read(gap + stored + b"y", {"HeaderSize": "77"}, **apart)
    path = save_meta(tmp_path / "s.mhd", stored, "s.raw", HeaderSize="77", **told)
    assert refused(path)[0] in ("truncated", "checksum")
    if packed:
        return
    assert not read(gap + stored, {"HeaderSize": "-1"}, **apart)
    assert not read(gap + stored, {"byte skip": "77"}, save_nrrd)
    assert not read(gap + stored, {"byte skip": "-1"}, save_nrrd)
    assert read(gap + stored + b"y", {"byte skip": "77"}, save_nrrd)
    path = save_nrrd(tmp_path / "s.nrrd", stored, byte_skip="77")
    assert refused(path)[0] == "truncated"


@pytest.mark.parametrize(
    ("save", "change", "says"),
    [
        (
            save_meta,
            {"HeaderSize": "100"},
            "HeaderSize of 0 beside ElementDataFile = L",
        ),
        (save_meta, {"HeaderSize": "abc"}, "HeaderSize of bytes, or -1, got 'abc'"),
        (save_meta, {"HeaderSize": "-2"}, "got '-2'"),
        (save_nrrd, {"byte_skip": "1e2"}, "byte skip of bytes, or -1, got '1e2'"),
        (save_nrrd, {"line_skip": "3"}, "line skip of 0, got '3'"),
    ],
)
def test_where_the_voxels_begin_is_told_in_bytes(tmp_path, save, change, says):
    """MetaIO counts from the first byte of the header itself."""
    path = save(tmp_path / f"scan{'.mha' if save == save_meta else '.nrrd'}", **change)
    reason, text = refused(path)
    assert reason == "offset" and says in text, text


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_voxels_that_are_not_there_are_named(tmp_path, image, ending):
    path = save(image[0], tmp_path / f"scan{ending}")
    (data,) = set(scans.files_of(path)) - {path}
    data.unlink()
    reason, text = refused(path)
    assert reason == "not_found"
    assert f"{path}: not_found: expected its voxels beside it in {data.name}" in text
    data.write_bytes(b"")
    assert refused(path)[0] == "empty"
    data.unlink()
    data.mkdir()
    assert refused(path)[0] == "not_a_file"


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_a_label_map_given_as_a_scan_is_told(tmp_path, ending):
    """And no scan is: CT of water and air alone, CT that adds 1024, an MR image."""
    shape = (20, 18, 16)
    ball = np.sum((np.indices(shape) - 8) ** 2, axis=0) < 36
    noise = np.random.default_rng(0).integers(0, 900, shape)
    for values, told in (
        (3 * ball, True),
        (3.0 * ball, True),
        (40_000 * ball, True),
        (0.5 * ball, False),
        (np.where(ball, 40, -1000), False),
        (np.where(ball, 900 + noise, 24), False),
        (np.where(ball, noise, 0), False),
    ):
        image = sitk.GetImageFromArray(values)
        image.SetSpacing((2.0, 3.0, 4.0))
        warnings = scans.read_scan(save(image, tmp_path / f"s{ending}")).warnings
        assert any(w.startswith("label_value") for w in warnings) == told, warnings


def test_read_scan_refuses_more_voxels_than_allowed(tmp_path, image):
    path = save(image[0], tmp_path / "scan.nrrd")
    with pytest.raises(UserError, match="at most 1000 voxels") as error:
        scans.read_scan(path, max_voxels=1000)
    assert error.value.exit_code == errors.LIMIT


@pytest.mark.parametrize("ending", ENDINGS)
def test_read_scan_refuses_a_file_that_is_cut_short(tmp_path, image, ending):
    path = tmp_path / f"scan{ending}"
    sitk.WriteImage(image[0], str(path))
    data = path.with_suffix(".raw") if ending in (".nhdr", ".mhd") else path
    data.write_bytes(data.read_bytes()[:-700])
    with pytest.raises(UserError, match="2574 bytes of voxels, got 1874") as error:
        scans.read_scan(path)
    assert error.value.reason == "truncated"
    path.write_bytes(b"no image at all\n" * 9)
    with pytest.raises(UserError, match="whole NRRD or MetaImage"):
        scans.read_scan(path)


def test_what_itk_says_is_told_without_the_errno_of_another_call(tmp_path, image):
    path = save(image[0], tmp_path / "scan.mha")
    change(path, b"DimSize = 13 11 9\n", b"")
    with pytest.raises(UserError, match="none that ITK reads: File cannot") as error:
        scans.read_scan(path)
    assert error.value.reason == "not_nifti"
    assert not re.search(r"Success|0x", str(error.value))


# --- compressed voxels --------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_type_that_itk_compresses_is_read(tmp_path, image, ending):
    types = (sitk.sitkInt8, sitk.sitkUInt8, sitk.sitkUInt16, sitk.sitkInt32)
    types += (sitk.sitkUInt32, sitk.sitkInt64, sitk.sitkUInt64)
    types += (sitk.sitkFloat32, sitk.sitkFloat64)
    values = sitk.Cast(image[0] + 1000, sitk.sitkFloat64) / 16
    for kind in types:
        path, _ = save_packed(sitk.Cast(values, kind), tmp_path, ending)
        peer = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T
        back = scans.read_scan(path)
        np.testing.assert_array_equal(nifti.to_native(back.data, back), peer)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda b: b[:-3] + bytes([b[-3] ^ 4]) + b[-2:], {"checksum"}),
        # What a bit does to the symbols is chance: one more or less is another length.
        (
            lambda b: b[:-900] + bytes([b[-900] ^ 4]) + b[-899:],
            {"checksum", "truncated", "trailing_data"},
        ),
        (lambda b: b[:-300], {"truncated"}),
        (lambda b: b[:-2], {"truncated"}),
    ],
)
def test_damaged_compressed_voxels_are_refused(tmp_path, image, ending, spoil, reason):
    """ITK takes most of them for whole."""
    path, data = save_packed(image[0], tmp_path, ending)
    scans.read_scan(path)
    data.write_bytes(spoil(data.read_bytes()))
    with pytest.raises(UserError) as error:
        scans.read_scan(path)
    assert error.value.reason in reason


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("size", "reason", "match"),
    [
        (b"13 11 10", "truncated", "stream of 2860 bytes, got its end after 2574"),
        (b"13 11 8", "trailing_data", "stream of 2288 bytes, got more"),
    ],
)
def test_compressed_voxels_of_another_number_are_refused(
    tmp_path, image, ending, size, reason, match
):
    path, _ = save_packed(image[0], tmp_path, ending)
    change(path, b" 13 11 9\n", b" " + size + b"\n")
    with pytest.raises(UserError, match=match) as error:
        scans.read_scan(path)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("line", "got"),
    [(b"", "none"), (b"CompressedDataSize = 9999\n", "9999")],
)
def test_metaimage_says_how_much_is_compressed(tmp_path, image, line, got):
    """ITK takes the compressed bytes for voxels where the size is not told."""
    for ending in (".mha", ".mhd"):
        path, _ = save_packed(image[0], tmp_path, ending)
        told = re.sub(rb"CompressedDataSize = \d+\n", line, path.read_bytes())
        path.write_bytes(told)
        if ending == ".mhd" and not line:  # all of the other file
            hu = scans.read_scan(path).data
            np.testing.assert_array_equal(np.sort(hu.flat), np.sort(image[1].flat))
            continue
        with pytest.raises(
            UserError, match=f"CompressedDataSize = .* got '{got}';"
        ) as e:
            scans.read_scan(path)
        assert e.value.reason == "truncated"


@pytest.mark.parametrize("told", ["{:.2e}", "1"])
def test_another_size_of_the_compressed_voxels_is_refused(tmp_path, image, told):
    """ITK inflates as much as is told; as older writers spell it, too."""
    path, _ = save_packed(image[0], tmp_path, ".mha")
    (size,) = re.findall(rb"CompressedDataSize = (\d+)", path.read_bytes())
    line = b"CompressedDataSize = "
    change(path, line + size, line + f"{float(size):.8e}".encode())
    scans.read_scan(path)
    other = told.format(float(size) + 300).encode()
    change(path, line + f"{float(size):.8e}".encode(), line + other)
    with pytest.raises(
        UserError, match=f"Size = {size.decode()}, .*; correct"
    ) as error:
        scans.read_scan(path)
    assert error.value.reason == "truncated"


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr"])
@pytest.mark.parametrize("skip", ["0", "352", "-1"])
def test_bytes_that_an_nrrd_skips_lie_in_its_stream(tmp_path, image, ending, skip):
    path, data = save_packed(image[0], tmp_path, ending)
    expected = scans.read_scan(path).data
    header, gap, packed = data.read_bytes().partition(b"\n\n")
    if ending == ".nhdr":
        header, gap, packed = b"", b"", data.read_bytes()
    more = b"" if skip == "0" else b"x" * 352
    data.write_bytes(header + gap + gzip.compress(more + gzip.decompress(packed)))
    change(path, b"encoding: gzip\n", f"encoding: gzip\nbyte skip: {skip}\n".encode())
    np.testing.assert_array_equal(scans.read_scan(path).data, expected)


def test_joined_gzip_streams_are_read(tmp_path, image):
    path, data = save_packed(image[0], tmp_path, ".nhdr")
    voxels = gzip.decompress(data.read_bytes())
    expected = scans.read_scan(path).data
    data.write_bytes(gzip.compress(voxels[:999]) + gzip.compress(voxels[999:]))
    np.testing.assert_array_equal(scans.read_scan(path).data, expected)


def test_a_bomb_is_not_inflated(tmp_path, image):
    path, data = save_packed(image[0], tmp_path, ".mhd")
    data.write_bytes(zlib.compress(bytes(1 << 28)))
    told = re.search(rb"CompressedDataSize = \d+", path.read_bytes())
    change(path, told[0], b"CompressedDataSize = %d" % data.stat().st_size)
    tracemalloc.start()
    with pytest.raises(UserError, match="got more"):
        scans.read_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23


def test_voxels_that_may_not_be_read_are_told(tmp_path, image, monkeypatch):
    path = save(image[0], tmp_path / "scan.mha")

    def fail(*args, **kwargs):
        raise PermissionError

    # Root may read everything, so the refusal of the system is played.
    monkeypatch.setattr(itk_files, "open", fail, raising=False)
    with pytest.raises(UserError, match="got permission denied"):
        scans.read_scan(path)


def test_labels_of_halves_are_refused(tmp_path, image):
    halves = sitk.Cast(image[0], sitk.sitkFloat32) + 0.5
    with pytest.raises(UserError, match="fractions"):
        scans.read_labels(save(halves, tmp_path / "l.mha"))


def test_without_simpleitk_one_line_names_the_extra(tmp_path, image, monkeypatch):
    path = save(image[0], tmp_path / "scan.nrrd")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n: None if n == "SimpleITK" else find(n)
    )
    with pytest.raises(UserError, match=r"unireg-jax\[itk\]") as error:
        scans.read_scan(path)
    assert (error.value.reason, error.value.exit_code) == ("not_installed", 2)


def test_absent_files_are_named(tmp_path):
    for name in ("a.nrrd", "a.mha", "a.nii.gz"):
        with pytest.raises(UserError) as error:
            scans.read_scan(tmp_path / name)
        assert error.value.reason == "not_found"
