"""DICOM series: the same voxels as ITK at the same place, and every fault refused."""

import errno
import os

import numpy as np
import pytest

from unireg_jax.errors import LIMIT, USAGE, Note, UserError
from unireg_jax.imaging import dicom, nifti, orientation

pytest.importorskip("pydicom")

from tests import dicom_files  # noqa: E402  (needs pydicom)

SHAPE = (12, 9, 7)
FEET_FIRST_PRONE = (1, 0, 0, 0, -1, 0)
CORONAL = (1, 0, 0, 0, 0, -1)
CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"  # RT Structure Set Storage
REPORT = "1.2.840.10008.5.1.4.1.1.88.33"  # Comprehensive SR Storage
PRIVATE = "1.3.12.2.1107.5.9.1"  # of a maker of scanners
OBLIQUE = (1, 0, 0, 0, np.cos(0.2), np.sin(0.2))


@pytest.fixture
def hu():
    rng = np.random.default_rng(3)
    hu = rng.integers(-1000, 1500, SHAPE)
    hu[0, 0, 0], hu[-1, 0, 0] = -1000, 3000  # corners that tell the axes
    return hu


def _refusal(source, **options):
    with pytest.raises(UserError) as caught:
        dicom.read_series(source, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "turn", [dicom_files.HEAD_FIRST, FEET_FIRST_PRONE, CORONAL, OBLIQUE]
)
def test_read_series_agrees_with_itk(tmp_path, hu, turn):
    sitk = pytest.importorskip("SimpleITK")
    dicom_files.write_series(tmp_path / "s", hu, turn=turn)
    volume = dicom.read_series(tmp_path / "s")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    image = reader.Execute()
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    vox2world = np.eye(4)
    turned = np.array(image.GetDirection()).reshape(3, 3)
    vox2world[:3, :3] = turned @ np.diag(image.GetSpacing())
    vox2world[:3, 3] = image.GetOrigin()
    expected, expected_affine = orientation.reorient(array, vox2world)
    assert volume.data.dtype == np.int16
    np.testing.assert_array_equal(volume.data, expected)
    np.testing.assert_allclose(volume.vox2world, expected_affine, atol=1e-4)  # mm


def test_read_series_puts_voxels_where_dicom_says(tmp_path, hu):
    dicom_files.write_series(tmp_path, hu)
    volume = dicom.read_series(tmp_path)
    np.testing.assert_array_equal(volume.data, hu)  # head first, supine: LPS already
    np.testing.assert_allclose(np.diag(volume.vox2world), [2.5, 2.0, 3.0, 1])
    np.testing.assert_allclose(volume.vox2world[:3, 3], [-30, -20, 5])
    assert volume.native.shape == SHAPE and volume.path == str(tmp_path)
    nifti.write_like(tmp_path / "a.nii.gz", volume.data, volume)
    again = nifti.read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(again.data, hu)
    nifti.check_same_grid(volume, again)


def test_order_of_files_and_strangers_change_nothing(tmp_path, hu):
    paths = dicom_files.write_series(tmp_path / "a", hu)
    shuffled = tmp_path / "b"
    shuffled.mkdir()
    for k, path in enumerate(paths):
        (shuffled / f"{(k * 5) % 7}").write_bytes(path.read_bytes())  # no extension
    (shuffled / "notes.txt").write_text("phase 2")
    (shuffled / ".hidden").write_bytes(b"x")
    (shuffled / "DICOMDIR").write_bytes(b"x")
    expected, found = dicom.read_series(tmp_path / "a"), dicom.read_series(shuffled)
    np.testing.assert_array_equal(found.data, expected.data)
    np.testing.assert_array_equal(dicom.read_series(paths[::-1]).data, expected.data)


def test_slope_of_every_slice_counts(tmp_path, hu):
    def edit(item, k):
        item.RescaleSlope = 1 if k else 0.5

    dicom_files.write_series(tmp_path, hu, edit=edit)
    volume = dicom.read_series(tmp_path)
    assert volume.data.dtype == np.float32
    np.testing.assert_allclose(volume.data[..., 1:], hu[..., 1:])
    np.testing.assert_allclose(volume.data[..., 0], (hu[..., 0] + 1024) / 2 - 1024)


def test_rounded_positions_are_no_gap(tmp_path, hu):
    def edit(item, k):
        item.ImagePositionPatient[2] = round(5 + 1.75 * k, 1)

    dicom_files.write_series(tmp_path, hu, edit=edit)
    assert dicom.read_series(tmp_path).spacing_mm[2] == pytest.approx(1.75, abs=0.02)


def _set(tag, value, only=None):
    def edit(item, k):
        if only is None or k == only:
            setattr(item, tag, value)

    return edit


def _drop(tag):
    def edit(item, k):
        if k == 3:
            delattr(item, tag)

    return edit


def _compress(item, k):
    item.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70"
    item.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", True


@pytest.mark.parametrize(
    ("edit", "reason", "says"),
    [
        (_set("SeriesInstanceUID", "9.9", 2), "series_mixed", "9.9 in 1-003.dcm"),
        (_set("Modality", "MR"), "series_mixed", "expected Modality CT, got MR"),
        (_set("Modality", "SEG"), "series_mixed", "got SEG; export them as a label"),
        (_set("PixelSpacing", [1, 1], 4), "series_mixed", "PixelSpacing [2.0, 2.5]"),
        (_set("Rows", 8, 4), "series_mixed", "Rows 9"),
        (_set("ImagePositionPatient", [-30, -20, 11], 1), "slices", "1 repeated"),
        (_set("ImagePositionPatient", [-30, -20, 9], 1), "slices", "3 mm apart"),
        (_set("GantryDetectorTilt", 12), "gantry_tilt", "12 degrees"),
        (_set("RescaleType", "OD"), "scaling", "RescaleType OD"),
        (_drop("RescaleIntercept"), "scaling", "none in 1-004.dcm"),
        (_drop("ImagePositionPatient"), "orientation_unknown", "none in 1-004.dcm"),
        (_set("NumberOfFrames", 3, 0), "dims", "3 frames"),
        (_set("SamplesPerPixel", 3, 0), "dtype", "colours"),
        (_set("PixelData", b"\0" * 40, 0), "truncated", "whole pixel data"),
        (_set("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), "affine_singular", "[1"),
        (_compress, "transfer_syntax", "JPEG Lossless"),
    ],
)
def test_a_bad_series_is_refused(tmp_path, hu, edit, reason, says):
    dicom_files.write_series(tmp_path / "s", hu, edit=edit)
    error = _refusal(tmp_path / "s")
    assert (error.reason, says in str(error)) == (reason, True), str(error)
    assert "expected" in str(error) and "; " in str(error)


FAR = "-1e+06 to 1e+06"
NUMBERS = [
    ("RescaleSlope", "abc", "scaling", f"one number from {FAR}, got words"),
    ("RescaleSlope", "1\\2", "scaling", "got [1, 2]"),
    ("RescaleSlope", "nan", "scaling", "got nan"),
    ("RescaleSlope", "1e30", "scaling", "got 1e30"),
    ("RescaleIntercept", "abc", "scaling", "got words"),
    ("RescaleIntercept", "-1024\\0", "scaling", "got [-1024, 0]"),
    ("RescaleIntercept", "-inf", "scaling", "got -inf"),
    (
        "ImagePositionPatient",
        "0\\0\\nan",
        "affine_nonfinite",
        f"{FAR}, got [0, 0, nan]",
    ),
    ("ImagePositionPatient", "inf\\0\\5", "affine_nonfinite", "got [inf, 0, 5]"),
    ("ImagePositionPatient", "a\\b\\c", "affine_nonfinite", "3 numbers from"),
    ("ImagePositionPatient", "0\\5", "affine_nonfinite", "got [0, 5]"),
    ("ImagePositionPatient", "1e9\\0\\5", "affine_nonfinite", "got [1e9, 0, 5]"),
    ("PixelSpacing", "2", "spacing", "2 numbers from 0.01 to 100, got 2;"),
    ("PixelSpacing", "2,0\\2,0", "spacing", "got words"),
    ("PixelSpacing", "x\\y", "spacing", "got words"),
    ("PixelSpacing", "-2\\2", "spacing", "got [-2, 2]"),
    ("PixelSpacing", "nan\\nan", "spacing", "got [nan, nan]"),
    ("PixelSpacing", "0\\0", "spacing", "got [0, 0]"),
    ("ImageOrientationPatient", "1\\0\\0\\0\\1", "affine_nonfinite", "6 numbers"),
    ("ImageOrientationPatient", "a\\0\\0\\0\\1\\0", "affine_nonfinite", "got words"),
    ("ImageOrientationPatient", "nan\\0\\0\\0\\1\\0", "affine_nonfinite", "[nan"),
    ("NumberOfFrames", "abc", "dims", "got words"),
    ("NumberOfFrames", "1.5", "dims", "2.14748e+09, got 1.5"),
    ("Rows", "\t\0\t\0", "dims", "got [9, 9]"),
    ("GantryDetectorTilt", "abc", "gantry_tilt", "got words"),
    ("GantryDetectorTilt", "nan", "gantry_tilt", "got nan"),
]


def _with_numbers(folder, hu):
    """A series whose slices have every tag of NUMBERS."""

    def edit(item, k):
        item.NumberOfFrames, item.GantryDetectorTilt = 1, 0

    return dicom_files.write_series(folder, hu, edit=edit)


@pytest.mark.parametrize(("tag", "text", "reason", "says"), NUMBERS)
def test_a_tag_that_is_no_number_is_refused(tmp_path, hu, tag, text, reason, says):
    """pydicom makes numbers of text when it is asked for them, long after reading."""
    paths = _with_numbers(tmp_path, hu)
    dicom_files.respell(paths[0], tag, text)
    error = _refusal(tmp_path)
    assert error.reason == reason, str(error)
    assert f"1-001.dcm: {reason}: expected {tag} of " in str(error)
    assert says in str(error)
    assert str(error).endswith("; correct the tag, or export the series again")
    # Where a series is looked for, what places its slices counts.
    if reason in ("affine_nonfinite", "spacing", "dims"):
        with pytest.raises(UserError) as caught:
            dicom.find_series(tmp_path)
        assert str(caught.value) == str(error)


@pytest.mark.parametrize("tag", ["InstanceNumber", "AcquisitionNumber", "SeriesNumber"])
def test_a_number_that_orders_slices_is_asked_for_where_it_counts(tmp_path, hu, tag):
    paths = _with_numbers(tmp_path, hu)
    dicom_files.respell(paths[0], tag, "abc")
    np.testing.assert_array_equal(dicom.read_series(tmp_path).data, hu)
    with pytest.raises(UserError, match=f"slices: expected {tag} of one number"):
        dicom.find_series(tmp_path)


def test_a_number_that_is_empty_is_none(tmp_path, hu):
    paths = _with_numbers(tmp_path, hu)
    for tag in ("GantryDetectorTilt", "InstanceNumber"):
        dicom_files.respell(paths[0], tag, "")
    np.testing.assert_array_equal(dicom.read_series(tmp_path).data, hu)
    dicom_files.respell(paths[0], "RescaleSlope", "0")
    error = _refusal(tmp_path)
    assert error.reason == "scaling" and "RescaleSlope, got 0 in 1-001" in str(error)


@pytest.mark.parametrize("damaged", [0, 3, -1])
@pytest.mark.parametrize("bare", [False, True])
def test_a_damaged_slice_is_never_passed_over(tmp_path, hu, damaged, bare):
    """Nor the first and the last, whose lack leaves no gap."""
    paths = dicom_files.write_series(tmp_path, hu)
    if bare:  # named as the disks of scanners do
        paths = [
            path.rename(path.with_name(f"1.2.{k}")) for k, path in enumerate(paths)
        ]
    path, content = paths[damaged], paths[damaged].read_bytes()
    for size in (0, *range(1, len(content) - 2 * 12 * 9, 29)):
        path.write_bytes(content[:size])
        error = _refusal(tmp_path)
        reasons = ("truncated", "scaling") if size else ("empty",)
        assert error.reason in reasons and path.name in str(error), (size, str(error))
        try:
            (found,) = dicom.find_series(tmp_path)
        except UserError as caught:
            assert str(caught) == str(error)
        else:  # the place of the slice is there: it is refused when it is read
            assert len(found.paths) == len(paths)
    path.write_bytes(bytes(len(content)))  # of a disk that was full
    assert "got unknown binary data" in str(_refusal(tmp_path))
    path.write_text("<html>404</html>")
    if not bare:
        assert "1-00" in str(_refusal(tmp_path))


@pytest.mark.parametrize("kind", [CONTOURS, REPORT, PRIVATE])
def test_other_objects_beside_a_series_are_passed_over(tmp_path, hu, kind):
    def other(item, k):
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = kind
        for tag in ("Rows", "Columns", "PixelSpacing", "PixelData", "BitsAllocated"):
            del item[tag]

    dicom_files.write_series(tmp_path, hu[..., :1], prefix="sr-", edit=other)
    dicom_files.write_series(tmp_path, hu)
    (tmp_path / "mask.raw").write_bytes(bytes(999))
    (tmp_path / "log.txt").write_text("")
    np.testing.assert_array_equal(dicom.read_series(tmp_path).data, hu)
    (found,) = dicom.find_series(tmp_path)
    assert len(found.paths) == hu.shape[2]


def test_tags_of_no_known_kind_are_damage(tmp_path, hu):
    """pydicom finds out when they are asked for."""
    paths = dicom_files.write_series(tmp_path, hu)
    path, content = paths[-1], paths[-1].read_bytes()
    for old, new in (
        (b"\x08\0\x60\0CS", b"\x08\0\x60\0C?"),
        (b"\x28\0\x10\0US", b"\x28\0\x10\0QS"),
        (b"\x02\0\x02\0UI\x1a\0", b"\x02\0\x02\0UI\xff\0"),
    ):
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        for read in (dicom.read_series, dicom.find_series):
            with pytest.raises(UserError, match="1-007.dcm: truncated"):
                read(tmp_path)


def test_a_missing_slice_is_refused_by_name(tmp_path, hu):
    paths = dicom_files.write_series(tmp_path, hu)
    paths[3].unlink()
    error = _refusal(tmp_path)
    assert error.reason == "slices"
    assert "slices 3 mm apart, got 6 mm between 1-003.dcm and 1-005.dcm" in str(error)


def test_a_leaning_stack_is_refused(tmp_path, hu):
    dicom_files.write_series(tmp_path, hu, step_mm=(0, 0.6, 3.0))
    error = _refusal(tmp_path)
    assert error.reason == "gantry_tilt" and "11.3 degrees" in str(error)


def test_what_is_no_series_is_refused(tmp_path, hu):
    assert _refusal(tmp_path / "absent").reason == "not_found"
    (tmp_path / "text").mkdir()
    assert "an empty folder" in str(_refusal(tmp_path / "text"))
    (tmp_path / "text" / "a.txt").write_text("x" * 200)
    assert _refusal(tmp_path / "text").reason == "not_dicom"
    assert _refusal(tmp_path / "text" / "a.txt").reason == "not_a_file"
    dicom_files.write_series(tmp_path / "one", hu[..., :1])
    assert _refusal(tmp_path / "one").reason == "fov"
    dicom_files.write_series(tmp_path / "s", hu)
    error = _refusal(tmp_path / "s", max_voxels=100)
    assert (error.reason, error.exit_code) == ("too_large", LIMIT)


@pytest.mark.parametrize("fails", ["listdir", "stat"])
def test_a_folder_that_may_not_be_read_is_not_called_empty(
    tmp_path, hu, monkeypatch, fails
):
    dicom_files.write_series(tmp_path / "s", hu)
    real = getattr(os, fails)

    def refuse(path, **kwargs):
        if fails == "listdir" or os.fspath(path).endswith(".dcm"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, **kwargs)

    monkeypatch.setattr(os, fails, refuse)
    for read in (dicom.read_series, dicom.find_series):
        with pytest.raises(UserError, match="permission denied") as caught:
            read(tmp_path / "s")
        assert caught.value.reason == "permission"


def test_contours_are_no_scan_and_the_remedy_is_told(tmp_path, hu):
    def contours(item, k):
        item.Modality = "RTSTRUCT"
        item.SOPClassUID = item.file_meta.MediaStorageSOPClassUID = CONTOURS
        del item.Rows

    (path, *rest) = dicom_files.write_series(tmp_path / "s", hu, edit=contours)
    for other in rest:
        other.unlink()
    error = _refusal(tmp_path / "s")
    assert error.reason == "not_dicom"
    assert "got contours (RTSTRUCT); export them as a label map in NIfTI" in str(error)
    with pytest.raises(UserError, match="RTSTRUCT, SEG.* export as a label map"):
        nifti.read_image(path)


def test_an_export_of_nested_folders_is_told_what_to_name(tmp_path, hu, monkeypatch):
    for n in range(7):
        name = f"ST000001/SE00000{n}"
        dicom_files.write_series(
            tmp_path / name, hu[..., : n + 1], series=f"1.{n}", number=n
        )
    (tmp_path / "DICOMDIR").write_bytes(b"x")
    error = _refusal(tmp_path)
    assert error.reason == "not_dicom"
    # One slice is a localiser. Names of folders are for the terminal alone.
    assert "got none in the folder itself, 6 series below it; name" in str(error)
    (note,) = error.__notes__
    assert isinstance(note, Note) and note.startswith(
        "below it are ST000001/SE000001 (2 slices), ST000001/SE000002 (3 slices), "
    )
    assert note.endswith("SE000005 (6 slices) and 1 more")
    assert dicom.read_series(tmp_path / "ST000001/SE000005").data.shape[2] == 6
    # A home folder is not read through.
    monkeypatch.setattr(dicom, "_MOST_FILES", 30)
    assert "below it" not in str(_refusal(tmp_path))
    monkeypatch.setattr(dicom, "_MOST_FILES", 36)
    assert "below it" in str(_refusal(tmp_path))
    # A damaged file down there is not the mistake.

    def damaged(folder):
        raise UserError("truncated", "1-001.dcm")

    monkeypatch.setattr(dicom, "find_series", damaged)
    assert "an empty folder" in str(_refusal(tmp_path))


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom.importlib.util, "find_spec", lambda name: None)
    error = _refusal(tmp_path)
    assert (error.reason, error.exit_code) == ("not_installed", USAGE)
    assert "unireg-jax[dicom]" in str(error)


def test_find_series_splits_phases(tmp_path, hu):
    dicom_files.write_series(
        tmp_path / "a/pre", hu[..., :3], series="1.1", number=2, description="PRE"
    )
    # Two phases in one series, told apart by the acquisition …
    for n in (1, 2):
        dicom_files.write_series(
            tmp_path / "a/two",
            hu,
            series="1.2",
            number=3,
            acquisition=n + 1,
            first_instance=1 + 7 * (n - 1),
        )
    # … also when the second begins half a slice higher …
    for n in (1, 2):
        dicom_files.write_series(
            tmp_path / "a/shifted",
            hu[:10],
            series="1.6",
            number=5,
            acquisition=n,
            first_instance=1 + 7 * (n - 1),
            first_mm=(0, 0, 1.5 * n),
        )
    # … and by nothing but the order. Some scanners number every slice.
    for n in (0, 1):
        dicom_files.write_series(
            tmp_path / "a/order",
            hu + n,
            series="1.3",
            number=4,
            first_instance=1 + 7 * n,
            edit=lambda item, k: setattr(item, "AcquisitionNumber", k),
        )
    dicom_files.write_series(
        tmp_path / "a/numbered",
        hu,
        series="1.7",
        number=6,
        edit=lambda item, k: setattr(item, "AcquisitionNumber", k),
    )
    dicom_files.write_series(
        tmp_path / "a/scout",
        hu[..., :1],
        series="1.4",
        edit=_set("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    )
    dicom_files.write_series(
        tmp_path / "b", hu, series="1.5", edit=_set("Modality", "MR")
    )
    (tmp_path / "metadata.csv").write_text("a,b\n")
    found = dicom.find_series(tmp_path)
    assert [(s.number, s.part, s.description) for s in found] == [
        (2, 0, "PRE"),
        (3, 1, "CT"),
        (3, 2, "CT"),
        (4, 1, "CT"),
        (4, 2, "CT"),
        (5, 1, "CT"),
        (5, 2, "CT"),
        (6, 0, "CT"),
    ]
    assert [len(s.paths) for s in found] == [3, 7, 7, 7, 7, 7, 7, 7]
    np.testing.assert_array_equal(dicom.read_series(found[3].paths).data, hu)
    np.testing.assert_array_equal(dicom.read_series(found[4].paths).data, hu + 1)
    assert _refusal(tmp_path / "a/two").reason == "slices"
    assert {(s.patient, s.date) for s in found} == {("P1", "19971227")}
