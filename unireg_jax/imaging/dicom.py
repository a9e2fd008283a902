"""Reads a CT series from DICOM files; refuses what is no regular stack of slices.

Nothing is guessed: a missing slice, a slice twice, a tilted gantry or two series in one
folder end in one line that says so. Needs pydicom, the extra `dicom`.

DICOM's world is LPS mm. Voxel [i, j, k] is column i and row j of slice k:

    world = ImagePositionPatient(k) + i * column spacing * row direction
                                    + j * row spacing * column direction
"""

import importlib.util
import itertools
import os
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unireg_jax.errors import FAILED, LIMIT, USAGE, Note, UserError, bad_file, shown
from unireg_jax.imaging import nifti, orientation
from unireg_jax.imaging.nifti import Native, Volume

_GAP_MM = 0.15  # scanners round positions to 0.1 mm
_DRIFT = 1e-3  # sideways over along the normal: 0.06 degrees
_MOST_FILES = 10_000  # looked at below a folder that holds no slices itself
_MOST_NAMED = 5  # series of them that a message names
# What to do with segmentations in DICOM, which are not read.
_AS_LABELS = "export them as a label map in NIfTI or NRRD, as 3D Slicer does"
_TAGS = (
    "SOPClassUID",
    "Modality",
    "ImageType",
    "PatientID",
    "StudyInstanceUID",
    "StudyDate",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "AcquisitionNumber",
    "InstanceNumber",
    "NumberOfFrames",
    "SamplesPerPixel",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
    "BitsAllocated",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "GantryDetectorTilt",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
)
# What pydicom and its decoders raise for a file that is not whole.
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    struct.error,
)
_RESCALE = ("RescaleSlope", "RescaleIntercept")
# Of every image, in this order: the last stands behind what places a slice.
_OF_IMAGE = ("SeriesInstanceUID", "Rows", "Columns", "BitsAllocated")
# How many numbers, from where to where, and the reason that refuses others.
_NUMBERS = {
    "SeriesNumber": (1, -(2**31), 2**31, "slices"),
    "AcquisitionNumber": (1, -(2**31), 2**31, "slices"),
    "InstanceNumber": (1, -(2**31), 2**31, "slices"),
    "NumberOfFrames": (1, 0, 2**31, "dims"),
    "SamplesPerPixel": (1, 0, 65535, "dims"),
    "Rows": (1, 0, 65535, "dims"),
    "Columns": (1, 0, 65535, "dims"),
    "PixelSpacing": (2, 0.01, 100, "spacing"),
    "ImageOrientationPatient": (6, -2, 2, "affine_nonfinite"),
    "ImagePositionPatient": (3, -1e6, 1e6, "affine_nonfinite"),
    "GantryDetectorTilt": (1, -360, 360, "gantry_tilt"),
    "RescaleSlope": (1, -1e6, 1e6, "scaling"),
    "RescaleIntercept": (1, -1e6, 1e6, "scaling"),
}
_SAME = (
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImageOrientationPatient",
)


class Series(NamedTuple):
    """One stack of CT slices among the files of a folder.

    Attributes:
        patient: PatientID.
        study: StudyInstanceUID.
        date: StudyDate, YYYYMMDD, or "".
        number: SeriesNumber, 0 when it has none.
        description: SeriesDescription, or "".
        part: 1, 2, … when a series holds several stacks (contrast phases), else 0.
        paths: files, by slice position.
    """

    patient: str
    study: str
    date: str
    number: int
    description: str
    part: int
    paths: tuple[str, ...]


def find_series(folder: str | os.PathLike) -> list[Series]:
    """Finds the CT series below a folder; only headers are read.

    A series whose slices are no even stack is split by AcquisitionNumber where that
    gives stacks without repetition, else by the order of InstanceNumber: contrast
    phases often share a series. Hidden files, files that are not DICOM, other
    modalities, localisers and single slices are passed over.

    Args:
        folder: searched with all folders below.

    Returns:
        Series by patient, date, study, number and part; empty when there is none.

    Raises:
        UserError: `not_installed`, exit code 2, without pydicom; `not_a_file`; of a
            damaged file `empty`, `truncated`; of a slice whose tags are no such numbers
            `affine_nonfinite`, `spacing`, `dims`, `slices`.
    """
    _require_pydicom()
    groups: dict[str, list[tuple[str, Any]]] = {}
    for path in _files(folder, deep=True):
        header = _header(path)
        if header is not None and _is_slice(header):
            groups.setdefault(str(header.SeriesInstanceUID), []).append((path, header))
    found = []
    for slices in groups.values():
        stacks = [s for s in _stacks(slices) if len(s) > 1]
        for part, stack in enumerate(stacks, 1):
            first = stack[0][1]
            found.append(
                Series(
                    str(first.get("PatientID", "")),
                    str(first.get("StudyInstanceUID", "")),
                    str(first.get("StudyDate", "")),
                    _whole(first, "SeriesNumber"),
                    str(first.get("SeriesDescription", "")),
                    part if len(stacks) > 1 else 0,
                    tuple(path for path, _ in stack),
                )
            )
    return sorted(found)


def read_series(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    max_voxels: int = 2**29,
) -> Volume:
    """Reads one CT series as HU on LPS+ axes.

    hu = RescaleSlope * stored + RescaleIntercept, slice by slice

    Args:
        source: folder that holds the slices of one series and no other DICOM image, or
            the files of the slices in any order.
        max_voxels: refuse larger series before any pixel is read.

    Returns:
        Volume; data int16 when every value is a whole number that fits, else float32.

    Raises:
        UserError: `not_installed`, exit code 2; `not_dicom` (no DICOM image),
            `series_mixed` (several series, grids or modalities), `slices` (a slice is
            missing or there twice), `gantry_tilt`, `transfer_syntax` (compression that
            no installed package reads), `affine_nonfinite`, `spacing`, `scaling`,
            `dims`, `empty`, `truncated`, `not_found`.
    """
    _require_pydicom()
    where, paths = _sources(source)
    slices = _headers(where, paths)
    _check_series(where, slices)
    slices, vox2world = _geometry(where, slices)
    first = slices[0][1]
    shape = (_whole(first, "Columns"), _whole(first, "Rows"), len(slices))
    if shape[0] * shape[1] * shape[2] > max_voxels:
        raise _fault(
            "too_large",
            where,
            f"at most {max_voxels} voxels",
            f"{shape}",
            "crop or resample the series",
        )
    array = np.empty(shape, np.float32, order="F")
    for k, (path, header) in enumerate(slices):
        slope, intercept = (_numbers(header, tag) for tag in _RESCALE)
        array[:, :, k] = _pixels(path, shape[:2]) * slope + intercept
    if not np.isfinite(array).all():
        raise _fault(
            "nonfinite", where, "finite HU", "NaN or infinity", "mend RescaleSlope"
        )
    whole = (array == np.rint(array)).all()
    if whole and -32768 <= array.min() and array.max() <= 32767:
        array = array.astype(np.int16)
    data, turned = orientation.reorient(array, vox2world)
    return Volume(
        data=data,
        vox2world=turned,
        path=os.fspath(where),
        native=Native(shape, vox2world),
        warnings=tuple(nifti.intensity_warnings(data)),
    )


# --- files ---


def _require_pydicom() -> None:
    if importlib.util.find_spec("pydicom") is None:
        raise UserError(
            "not_installed",
            "DICOM: package pydicom expected, got none; run "
            "`pip install unireg-jax[dicom]`",
            USAGE,
        )


def _fault(reason: str, where: Any, expected: str, got: str, remedy: str) -> UserError:
    code = LIMIT if reason == "too_large" else FAILED
    return bad_file(where, reason, expected, got, remedy, code)


def _sources(
    source: str | os.PathLike | Sequence[str | os.PathLike],
) -> tuple[str, list[str]]:
    """The name for messages, and the files."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source), list(_files(source, deep=False))
    paths = [os.fspath(path) for path in source]
    if not paths:
        raise ValueError("source must name at least one file, got none; pass a folder")
    return os.path.dirname(paths[0]) or ".", paths


def _files(folder: str | os.PathLike, *, deep: bool) -> Iterable[str]:
    """Regular files that are not hidden, in order."""
    if not os.path.isdir(folder):
        there = os.path.exists(folder)
        raise _fault(
            "not_a_file" if there else "not_found",
            folder,
            "a folder of DICOM files",
            "a file" if there else "nothing",
            "check the path",
        )
    pattern = "**/*" if deep else "*"
    try:
        os.listdir(folder)  # glob finds nothing where it may not look
        for path in sorted(Path(folder).glob(pattern)):
            hidden = any(p.startswith(".") for p in path.relative_to(folder).parts)
            if not hidden and not _is_index(path) and path.is_file():
                yield os.fspath(path)
    except PermissionError as error:
        raise nifti.permission_error(folder) from error


def _header(path: str) -> Any | None:
    """The tags of _TAGS, or None when the file is not DICOM."""
    import pydicom  # an extra: only who reads DICOM needs it

    try:
        if os.path.getsize(path) == 0:
            if not any(_named_as_slice(path)):
                return None
            remedy = "copy it again, or remove it"
            raise _fault("empty", path, "a file with content", "0 bytes", remedy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what counts, an error comes
            header = pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=list(_TAGS)
            )
            for part in (header.file_meta, header):
                list(part)  # pydicom decodes nothing before
    except pydicom.errors.InvalidDicomError:
        _check_stranger(path)
        return None
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except FileNotFoundError as error:
        raise _fault(
            "not_found", path, "a file", "nothing", "check the path"
        ) from error
    except (*_DAMAGED, pydicom.errors.BytesLengthException) as error:
        raise _fault(
            "truncated",
            path,
            "a whole DICOM file",
            _short(error),
            "copy or export it again",
        ) from error
    absent = [tag for tag in _OF_IMAGE if tag not in header]
    if absent and _may_be_image(header):
        expected, remedy = "a whole DICOM image", "copy or export it again"
        raise _fault("truncated", path, expected, f"no {absent[0]}", remedy)
    return header


def _may_be_image(header: Any) -> bool:
    """Unless its class is another: contours, a report, something of a maker's own."""
    kinds = (
        header.file_meta.get("MediaStorageSOPClassUID"),
        header.get("SOPClassUID"),
    )
    # Only a damaged file has several; only one cut short has nothing but the class.
    names = [getattr(kind, "name", "Image Storage") for kind in kinds if kind]
    whole = names and (len(header) or not names[0][:1].isdecimal())
    return not whole or any("Image Storage" in name for name in names)


def _check_stranger(path: str) -> None:
    """Refuses a file that is not DICOM and was: by its name, or a preamble of zeros."""
    with open(path, "rb") as file:
        head = file.read(132)
    surely, perhaps = _named_as_slice(path)
    if surely or perhaps and not any(head[:128]):
        raise _fault(
            "truncated",
            path,
            "a whole DICOM file",
            nifti.looks_like(head),
            "copy or export it again, or remove it",
        )


def may_be_slice(path: str | os.PathLike) -> bool:
    """Says whether a file of a series counts, which notes and thumbnails do not.

    Args:
        path: of a file.

    Returns:
        Whether it begins as DICOM does, or is named as a slice, whatever is in it.
    """
    if _is_index(path):
        return False
    if _named_as_slice(os.fspath(path))[0]:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return True  # reading it says what is wrong


def _is_index(path: str | os.PathLike) -> bool:
    """Whether a file lists those of a disc."""
    return os.path.basename(path).upper() == "DICOMDIR"


def _named_as_slice(path: str) -> tuple[bool, bool]:
    """Whether a file has the name of a slice; and one that a slice may have."""
    ending = Path(path).suffix.lower()
    bare = not ending or ending[1:].isdecimal()  # as that of a UID
    return ending in (".dcm", ".dicom", ".ima"), bare


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _is_slice(header: Any) -> bool:
    """Whether a file is one slice of a CT."""
    return (
        header.get("Modality") == "CT"
        and "LOCALIZER" not in (header.get("ImageType") or ())
        and "SeriesInstanceUID" in header
        and len(_numbers(header, "ImagePositionPatient")) > 0
        and len(_numbers(header, "ImageOrientationPatient")) > 0
        and len(_numbers(header, "PixelSpacing")) > 0
        and (_whole(header, "NumberOfFrames") or 1) == 1
    )


def _stacks(slices: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Splits the slices of a series into the stacks of one grid that it holds."""
    by_grid: dict[tuple, list] = {}
    for item in sorted(slices, key=lambda s: (_whole(s[1], "InstanceNumber"), s[0])):
        tags = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient")
        numbers = np.concatenate([_numbers(item[1], tag) for tag in tags])
        by_grid.setdefault(tuple(numbers.round(3)), []).append(item)
    return [stack for same in by_grid.values() for stack in _split(same)]


def _split(slices: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Slices by height: all of them, or by acquisition, or by how often they repeat."""

    def height(item: tuple[str, Any]) -> float:
        return float(_normal(item[1]) @ _numbers(item[1], "ImagePositionPatient"))

    by_acquisition: dict[int, list] = {}
    by_height: dict[float, list] = {}
    for item in slices:
        by_acquisition.setdefault(_whole(item[1], "AcquisitionNumber"), []).append(item)
        by_height.setdefault(round(height(item), 2), []).append(item)
    gaps = np.diff(sorted(height(item) for item in slices))
    even = not gaps.size or np.abs(gaps - np.median(gaps)).max() <= _GAP_MM
    numbers = [_whole(s[1], "AcquisitionNumber") for s in sorted(slices, key=height)]
    # Two phases may interleave to one even stack: then the numbers go to and fro.
    even &= len(list(itertools.groupby(numbers))) == len(by_acquisition)
    parts = [by_acquisition[number] for number in sorted(by_acquisition)]
    copies = max(len(same) for same in by_height.values())
    if even and copies == 1:
        stacks = [slices]
    elif min(len(part) for part in parts) > 1 and all(
        len({round(height(item), 2) for item in part}) == len(part) for part in parts
    ):
        stacks = parts
    else:
        stacks = [
            [same[n] for same in by_height.values() if n < len(same)]
            for n in range(copies)
        ]
    return [sorted(stack, key=height) for stack in stacks]


def _whole(header: Any, tag: str) -> int:
    """The number of a tag, 0 where it has none."""
    return int(sum(_numbers(header, tag)))


def _numbers(header: Any, tag: str) -> np.ndarray:
    """Those of a tag of _NUMBERS, none where it is absent or empty."""
    count, low, high, reason = _NUMBERS[tag]
    value = header.get(tag)
    if value is None:
        return np.empty(0)
    try:
        values = np.atleast_1d(np.asarray(value, np.float64))
    except (TypeError, ValueError, OverflowError):
        values = np.empty(0)
    broken = reason in ("dims", "slices") and not (values == np.rint(values)).all()
    if values.size != count or broken or not np.all((low <= values) & (values <= high)):
        several = f"{count} numbers" if count > 1 else "one number"
        raise _fault(
            reason,
            header.filename,
            f"{tag} of {several} from {low:g} to {high:g}",
            _value(header, tag) if values.size else "words",  # perhaps of a patient
            "correct the tag, or export the series again",
        )
    return values


def _headers(where: str, paths: Sequence[str]) -> list[tuple[str, Any]]:
    """(file, tags) of every DICOM file; refuses what cannot be part of a stack."""
    slices, others = [], set()
    for path in paths:
        header = _header(path)
        if header is None:
            continue
        if any(tag not in header for tag in _OF_IMAGE):
            others.add(str(header.get("Modality")))  # no image: a report, contours
            continue
        slices.append((path, header))
    if slices:
        return slices
    got = f"{len(paths)} other files" if paths else "an empty folder"
    remedy, below = "name the folder that holds the .dcm files itself", []
    if "RTSTRUCT" in others:
        got, remedy = "contours (RTSTRUCT)", _AS_LABELS
    elif below := _below(where):
        got = f"none in the folder itself, {len(below)} series below it"
        remedy = "name the folder of one series"
    error = _fault("not_dicom", where, "the slices of one CT series", got, remedy)
    if below:
        # Folders may be named after patients: for the terminal, not for journals.
        error.add_note(_told(where, below))
    raise error


def _below(where: str) -> list[Series]:
    """Series below a folder; none where they are not found soon."""
    below = Path(where).glob("*/**/*") if os.path.isdir(where) else ()
    if len(list(itertools.islice(below, _MOST_FILES + 1))) > _MOST_FILES:
        return []
    try:
        return find_series(where)
    except UserError:  # of one file, which nobody asked for
        return []


def _told(where: str, found: list[Series]) -> Note:
    """Names the folders of some series."""
    named = [
        f"{os.path.dirname(os.path.relpath(series.paths[0], where))} "
        f"({len(series.paths)} slices)"
        for series in found[:_MOST_NAMED]
    ]
    more = f" and {len(found) - _MOST_NAMED} more" * (len(found) > _MOST_NAMED)
    return Note(f"below it are {', '.join(named)}{more}")


# --- checks ---


def _check_series(where: str, slices: list[tuple[str, Any]]) -> None:
    """All slices are of one CT series on one grid, with their rescaling."""
    first_path, first = slices[0]
    modalities = sorted({str(h.get("Modality", "none")) for _, h in slices})
    remedy = "give one series a folder of its own"
    if modalities != ["CT"]:
        remedy = _AS_LABELS if modalities == ["SEG"] else remedy
        raise _fault(
            "series_mixed", where, "Modality CT", ", ".join(modalities), remedy
        )
    for path, header in slices:
        name = os.path.basename(path)
        if (frames := _whole(header, "NumberOfFrames")) > 1:
            got = f"{frames} frames in {name}"
            raise _fault(
                "dims", where, "one slice per file", got, "export single-frame CT"
            )
        if _whole(header, "SamplesPerPixel") > 1:
            got = f"colours in {name}"
            raise _fault(
                "dtype", where, "one value per pixel", got, "pass the CT, no picture"
            )
        for tag in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"):
            if not _numbers(header, tag).size:
                got = f"none in {name}"
                raise _fault("orientation_unknown", where, tag, got, remedy)
        for tag in _RESCALE:
            values = _numbers(header, tag)
            if not values.size or tag == "RescaleSlope" and values[0] == 0:
                got = f"{_value(header, tag)} in {name}"
                raise _fault("scaling", where, tag, got, "export the series again")
        if str(header.get("RescaleType") or "HU") not in ("HU", "US"):
            got = f"RescaleType {header.RescaleType} in {name}"
            raise _fault("scaling", where, "Hounsfield units", got, remedy)
        for tag in _SAME:
            if not _equal(header, first, tag):
                got = f"{_value(header, tag)} in {name}"
                expected = (
                    f"{tag} {_value(first, tag)} as in {os.path.basename(first_path)}"
                )
                raise _fault("series_mixed", where, expected, got, remedy)


def _equal(a: Any, b: Any, tag: str) -> bool:
    """Whether a tag of two headers agrees; numbers to 1e-4."""
    if tag not in _NUMBERS:
        return a.get(tag) == b.get(tag)
    a, b = _numbers(a, tag), _numbers(b, tag)
    return a.size == b.size and np.allclose(a, b, rtol=0, atol=1e-4)


def _value(header: Any, tag: str) -> str:
    value = header.get(tag)
    return "none" if value is None else shown(str(value)[:64])


def _normal(header: Any) -> np.ndarray:
    """Unit vector along which slices are stacked."""
    turn = _numbers(header, "ImageOrientationPatient")
    return np.cross(turn[:3], turn[3:])


def _geometry(
    where: str, slices: list[tuple[str, Any]]
) -> tuple[list[tuple[str, Any]], np.ndarray]:
    """Slices by position, and voxel -> LPS mm."""
    first = slices[0][1]
    turn = _numbers(first, "ImageOrientationPatient")
    right, down = turn[:3], turn[3:]
    if not np.allclose(
        [right @ right, down @ down, right @ down], [1, 1, 0], atol=1e-3
    ):
        raise _fault(
            "affine_singular",
            where,
            "ImageOrientationPatient of two perpendicular unit vectors",
            _value(first, "ImageOrientationPatient"),
            "export the series again",
        )
    normal = _normal(first)
    places = np.array([_numbers(h, "ImagePositionPatient") for _, h in slices])
    order = np.argsort(places @ normal, kind="stable")
    slices, places = [slices[i] for i in order], places[order]
    if len(slices) < 2:
        raise _fault(
            "fov", where, "2 slices or more", "1", "pass a whole series, no localiser"
        )
    heights = places @ normal
    _check_slices(where, slices, np.diff(heights))
    step = (places[-1] - places[0]) / (len(slices) - 1)
    _check_tilt(where, first, step, normal)
    rows_mm, columns_mm = _numbers(first, "PixelSpacing")
    vox2world = np.eye(4)
    vox2world[:3, :3] = np.stack([right * columns_mm, down * rows_mm, step], axis=1)
    vox2world[:3, 3] = places[0]
    shape = (_whole(first, "Columns"), _whole(first, "Rows"), len(slices))
    nifti.check_extent(where, shape, np.array(orientation.spacing_mm(vox2world)))
    return slices, vox2world


def _check_slices(where: str, slices: list[tuple[str, Any]], gaps: np.ndarray) -> None:
    """Every slice once, at equal distances."""
    names = [os.path.basename(path) for path, _ in slices]
    usual = float(np.median(gaps))
    twice = np.flatnonzero(gaps < max(1e-3, 0.01 * usual))
    if twice.size:
        k = int(twice[0])
        raise _fault(
            "slices",
            where,
            "every slice position once",
            f"{len(twice)} repeated, the first in {names[k]} and {names[k + 1]}",
            "split the phases (AcquisitionNumber) into folders, or remove the copies",
        )
    uneven = np.flatnonzero(np.abs(gaps - usual) > _GAP_MM)
    if uneven.size:
        k = int(uneven[0])
        raise _fault(
            "slices",
            where,
            f"slices {usual:.4g} mm apart",
            f"{gaps[k]:.4g} mm between {names[k]} and {names[k + 1]}"
            + (f" and {len(uneven) - 1} more such gaps" if len(uneven) > 1 else ""),
            "copy the missing slices",
        )


def _check_tilt(where: str, header: Any, step: np.ndarray, normal: np.ndarray) -> None:
    """The stack leans neither by its positions nor by what the scanner says."""
    along = float(step @ normal)
    aside = float(np.linalg.norm(step - along * normal))
    degrees = float(np.degrees(np.arctan2(aside, along)))
    leans = aside > _DRIFT * along
    told = abs(sum(_numbers(header, "GantryDetectorTilt")))
    upright = np.abs(normal).max() > 1 - 1e-6
    # Upright slices of a tilted gantry: their positions hide the tilt. Oblique ones
    # that are stacked along their own normal are a proper grid.
    if leans or (told > 0.05 and upright):
        raise _fault(
            "gantry_tilt",
            where,
            "slices stacked along their normal",
            f"a tilt of {degrees if leans else told:.3g} degrees",
            "resample the series to an upright grid first",
        )


# --- pixels ---


def _pixels(path: str, shape: tuple[int, int]) -> np.ndarray:
    """One slice, [columns, rows] float64 as stored."""
    import pydicom

    try:
        item = pydicom.dcmread(path)
        syntax = item.file_meta.TransferSyntaxUID
        decoder = pydicom.pixels.get_decoder(syntax) if syntax.is_compressed else None
        if decoder is not None and not decoder.is_available:
            raise NotImplementedError(str(syntax.name))
        stored = item.pixel_array
    except NotImplementedError as error:
        raise _fault(
            "transfer_syntax",
            path,
            "pixels that pydicom can decode",
            _short(error),
            "decompress the files, or `pip install pylibjpeg[all]`",
        ) from error
    except (*_DAMAGED, pydicom.errors.BytesLengthException) as error:
        raise _fault(
            "truncated",
            path,
            "whole pixel data",
            _short(error),
            "copy or export it again",
        ) from error
    if stored.shape != shape[::-1]:
        raise _fault(
            "dims", path, f"{shape[::-1]} pixels", f"{stored.shape}", "export it again"
        )
    return stored.astype(np.float64).T
