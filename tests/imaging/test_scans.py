"""One reader for every kind of scan: the same voxels in the same places."""

import gzip
import importlib.util
import re
import tracemalloc
import zlib

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
