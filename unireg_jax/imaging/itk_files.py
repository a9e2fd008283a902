"""NRRD and MetaImage, read by SimpleITK: which of its readers, and whose voxels.

The header of such a file may name any file as its voxels. One that comes from elsewhere
must not pull another file of this machine into a result.
"""

import importlib.util
import math
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unireg_jax.errors import USAGE, UserError, bad_file, shown
from unireg_jax.imaging import nifti

# By name, not by content: ITK has readers for dozens of formats nobody asked for.
IMAGE_IO = {
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
_DATA_ENDINGS = (".raw", ".zraw", ".raw.gz", ".img")
_LARGEST_HEADER = 1 << 16  # bytes
_META_NAME = re.compile(rb"(?im)^\s*(ElementDataFile)\s*[=:][ \t]*(.*?)\s*$")
_META_LINE = re.compile(rb"(?m)^\s*(\w+)[ \t]*[=:][ \t]*(.*?)\s*$")
_META_END = re.compile(rb"(?m)^\s*ElementDataFile[ \t]*[=:].*\n?")
_META_NDIMS = re.compile(r"[1-9]|10")  # more, and MetaIO writes beyond its arrays
_META_SPACING = ("ElementSpacing", "ElementSize")  # the first counts
_META_TURN = ("TransformMatrix", "Rotation", "Orientation")
_META_ORIGIN = ("Offset", "Position", "Origin")
_META_LPS = "RAI"  # from where to where: x from right to left
_META_TRUE = ("T", "t", "1")  # first letters
_NRRD_NAME = re.compile(rb"(?im)^\s*data ?file\s*:[ \t]*(.*?)\s*$")
_NRRD_LINE = re.compile(rb"(?m)^([^:\r\n]+): [ \t]*(.*?)\s*$")
_NRRD_END = re.compile(rb"\r?\n\r?\n")
_NRRD_VECTOR = re.compile(r"(?i)\([^()n]+\)")  # of numbers, none of them NaN
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_SKIP = re.compile(r"-1|\d{1,9}")
_NOWHERE = "orientation_unknown: no {}, read as 0 0 0 mm: where is the patient?"
_BLOCK = 1 << 20  # bytes inflated at once
_WBITS = {"gzip": 31, "gz": 31, "zlib": 47}  # the last one takes gzip, as MetaIO


class Image(NamedTuple):
    """What a file holds.

    Attributes:
        voxels: [X, Y, Z], or [X, Y, Z, C] of several components, axes as stored.
        vox2world: [4, 4] float64, voxel index -> LPS mm.
        told: further lines of the header.
        space: that an NRRD names, in small letters, or "none"; "lps" of a MetaImage.
        warnings: one line each, `reason: what was seen`.
    """

    voxels: np.ndarray
    vox2world: np.ndarray
    told: dict[str, str]
    space: str
    warnings: tuple[str, ...]


class _Header(NamedTuple):
    """Lines of a header, the file of its voxels, and where they begin there.

    `skip` bytes from `start` on are no voxels; -1: all before the last of them.
    MetaIO tells small letters from capitals, NRRD does not, and skips the spaces that
    a name may have: "spacedirections".
    """

    lines: dict[str, str]
    data: Path
    start: int
    skip: int


def read(
    path: str | os.PathLike, check: Callable[[tuple[int, ...], int], None]
) -> Image:
    """Reads one volume.

    Args:
        path: `.nrrd`, `.nhdr`, `.mha` or `.mhd`.
        check: called with the size, three axes or more, of which only three may be
            longer than 1, and the number of components, before any voxel is read;
            raises for what is not wanted.

    Returns:
        Image.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`, `empty`, `path_escape`;
            `not_installed`, exit code 2, without SimpleITK; `not_nifti` for what ITK
            does not read; `spacing`, `orientation_unknown` for a file that does not
            tell, which ITK takes for 1 mm and LPS; `spacing`, `affine_nonfinite` for
            no numbers, which it takes for 0; `orientation_conflict` for a spacing
            below 0, or two lines that differ; `affine_singular`; `units` other than
            mm; `ndim` of more than ten axes; `truncated`, `checksum`, `trailing_data`,
            `offset` for other voxels than the header says, of which ITK takes some for
            whole; what `check` raises.
    """
    check_installed(path)
    import SimpleITK as sitk  # an extra: only who reads these formats needs it

    nifti.check_file(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(IMAGE_IO[Path(path).suffix.lower()])
    reader.SetFileName(os.fspath(path))
    try:
        check_own_voxels(path)
        header = _header(path)
        check_place = _check_meta_place if _is_meta(path) else _check_nrrd_place
        warnings = check_place(path, header.lines)
        reader.ReadImageInformation()
        size, components = reader.GetSize(), reader.GetNumberOfComponents()
        check(size, components)
        item = sitk.Image((1, 1, 1), reader.GetPixelID()).GetSizeOfPixelComponent()
        wanted = math.prod(size) * components * item
        warnings += _check_voxels(path, header, wanted)
        image = reader.Execute()
        voxels, vox2world = placed(image)
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except RuntimeError as error:
        # The last line is errno's: that of an earlier call where none failed here.
        said = str(error).strip().removesuffix("\nReason: Success").splitlines()[-1]
        raise bad_file(
            path,
            "not_nifti",
            "a whole NRRD or MetaImage file",
            f"none that ITK reads: {said.rpartition('): ')[2][-160:]}",
            "export it again, or convert it to NIfTI",
        ) from error
    # A key of other bytes than UTF-8 is listed, and cannot be asked for.
    keys = [key for key in image.GetMetaDataKeys() if key.isprintable()]
    told = {key: image.GetMetaData(key) for key in keys}
    space = "lps" if _is_meta(path) else header.lines.get("space", "none").lower()
    return Image(voxels, vox2world, told, space, tuple(warnings))


def placed(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """Takes voxels and place from an image that SimpleITK holds.

    Args:
        image: SimpleITK.Image of three axes or more, of which only three may be longer
            than 1.

    Returns:
        Voxels [X, Y, Z], or [X, Y, Z, C] of several components, and vox2world [4, 4]
        float64, voxel index -> LPS mm.
    """
    import SimpleITK as sitk  # an extra, there if such an image is

    size, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    array = sitk.GetArrayFromImage(image)
    # ITK's arrays begin with the last axis, and end with the components.
    order = (*reversed(range(len(size))), *range(len(size), array.ndim))
    turn = np.array(image.GetDirection()).reshape(len(size), len(size))
    vox2world = np.eye(4)
    vox2world[:3, :3] = turn[:3, :3] * np.array(image.GetSpacing())[None, :3]
    vox2world[:3, 3] = image.GetOrigin()[:3]
    shape = size[:3] if components == 1 else (*size[:3], components)
    return array.transpose(order).reshape(shape), vox2world


def check_installed(path: str | os.PathLike) -> None:
    """Refuses a file that SimpleITK has to read, without SimpleITK.

    Args:
        path: of the file, for the message.

    Raises:
        UserError: `not_installed`, exit code 2.
    """
    if importlib.util.find_spec("SimpleITK") is None:
        raise UserError(
            "not_installed",
            f"{shown(path)}: NRRD and MetaImage are read by SimpleITK, got none; run "
            "`pip install unireg-jax[itk]`, or convert the file to NIfTI",
            USAGE,
        )


def data_files(path: str | os.PathLike) -> list[Path]:
    """Names the files that a detached header may take its voxels from.

    Args:
        path: of the header.

    Returns:
        Those of its stem that lie beside a `.mhd` or `.nhdr`; none for other names.
    """
    return [p for p in _beside(path) if p.is_file()]


def _beside(path: str | os.PathLike) -> list[Path]:
    """Where the voxels of a detached header may be."""
    path = Path(path)
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    return [path.with_suffix(ending) for ending in _DATA_ENDINGS]


def check_own_voxels(path: str | os.PathLike) -> None:
    """Refuses a header that takes its voxels from a file of another name.

    Args:
        path: `.nrrd`, `.nhdr`, `.mha` or `.mhd`, a regular file.

    Raises:
        UserError: `path_escape`; `not_nifti` for a header that does not end; of the
            file with the voxels `not_found`, `not_a_file`, `permission`, `empty`.
    """
    with open(path, "rb") as file:
        head = file.read(_LARGEST_HEADER + 1)
    allowed = {os.fsencode(p.name): p for p in _beside(path)}
    if _is_meta(path):
        found = _META_NAME.findall(head)
        ends = any(key == b"ElementDataFile" for key, _ in found)
        named = [name for _, name in found if name.upper() != b"LOCAL"]
    else:
        header, blank, _ = head.replace(b"\r\n", b"\n").partition(b"\n\n")
        ends = bool(blank) or len(head) <= _LARGEST_HEADER
        named = _NRRD_NAME.findall(header)
    if not ends:
        raise bad_file(
            path,
            "not_nifti",
            "a whole NRRD or MetaImage file",
            f"no end of a header in its first {_LARGEST_HEADER} bytes",
            "export it again",
        )
    if foreign := [name for name in named if name not in allowed]:
        raise bad_file(
            path,
            "path_escape",
            "its voxels within, or beside it in a file of the same name ending in "
            f"{', '.join(_DATA_ENDINGS)}",
            ascii(foreign[0].decode("latin-1")[:80]),
            "save it as one file, .nrrd or .mha",
        )
    for data in (allowed[name] for name in named):
        if not os.path.lexists(data):
            expected = f"its voxels beside it in {shown(data.name)}"
            remedy = "copy that file, too"
            raise bad_file(path, "not_found", expected, "nothing", remedy)
        nifti.check_file(data)


def _is_meta(path: str | os.PathLike) -> bool:
    return IMAGE_IO[Path(path).suffix.lower()] == "MetaImageIO"


def _header(path: str | os.PathLike) -> _Header:
    """Of a file that `check_own_voxels` lets pass."""
    path, meta = Path(path), _is_meta(path)
    with open(path, "rb") as file:
        head = file.read(_LARGEST_HEADER + 1)
    end = (_META_END if meta else _NRRD_END).search(head)
    start = end.end() if end else len(head)
    found = (_META_LINE if meta else _NRRD_LINE).findall(head[:start])
    lines = {os.fsdecode(key): os.fsdecode(value) for key, value in found}
    if not meta:
        lines = {key.lower().replace(" ", ""): lines[key] for key in lines}
    name = lines.get("ElementDataFile" if meta else "datafile", "LOCAL")
    if name.upper() == "LOCAL":
        return _Header(lines, path, start, _skip(path, lines, within=True))
    return _Header(lines, path.with_name(name), 0, _skip(path, lines, within=False))


def _skip(path: Path, lines: dict[str, str], *, within: bool) -> int:
    """Bytes to be skipped; ITK takes any word for a number."""
    for name in ("HeaderSize",) if _is_meta(path) else ("line skip", "byte skip"):
        text = lines.get(name.replace(" ", ""), "0")
        if name == "line skip" and text != "0":
            expected = f"{name} of 0"
        elif not _SKIP.fullmatch(text):
            expected = f"{name} of bytes, or -1"
        elif name == "HeaderSize" and within and int(text) > 0:
            # MetaIO counts from the first byte of the header itself.
            expected = f"{name} of 0 beside ElementDataFile = LOCAL"
        else:
            continue
        raise bad_file(path, "offset", expected, ascii(text[:40]), "export it again")
    return int(text)


def _check_meta_place(path: str | os.PathLike, lines: dict[str, str]) -> list[str]:
    """Refuses a MetaImage that does not tell its spacing, or how it is turned."""
    if not _META_NDIMS.fullmatch(ndims := lines.get("NDims", "3")):
        got = ascii(ndims[:40])
        raise bad_file(path, "ndim", "NDims from 1 to 10", got, "export it again")
    name = next((name for name in _META_SPACING if name in lines), None)
    if name is None:
        raise bad_file(
            path,
            "spacing",
            "a line ElementSpacing",
            "none",
            "add it, in mm: ElementSpacing = 0.9 0.9 2.5",
        )
    told = any(name in lines for name in _META_TURN)
    if not told and lines.get("AnatomicalOrientation") != _META_LPS:
        raise bad_file(
            path,
            "orientation_unknown",
            "a line TransformMatrix",
            "none",
            "add it: TransformMatrix = 1 0 0 0 1 0 0 0 1 if x runs to the patient's "
            "left, y to the back and z to the head",
        )
    _check_units(path, {lines.get("DistanceUnits", "mm")} - {"?"})
    if (axes := int(ndims)) < 3:
        return []  # `check` refuses it
    spacing = _numbers(path, "spacing", name, lines[name], axes)
    if spacing.min() <= 0:
        reason = "orientation_conflict" if spacing.min() < 0 else "spacing"
        got = ascii(lines[name][:80])
        raise bad_file(path, reason, f"{name} above 0", got, "correct that line")
    turn = _told(path, lines, _META_TURN, axes * axes)
    turn = np.eye(axes) if turn is None else turn.reshape(axes, axes).T
    origin = _told(path, lines, _META_ORIGIN, axes)
    affine = _affine(turn * spacing, origin)
    return [
        *([_NOWHERE.format("Offset")] if origin is None else []),
        *nifti.check_axes(path, affine),
        *nifti.spacing_warnings(name, spacing[:3], affine),
    ]


def _check_nrrd_place(path: str | os.PathLike, lines: dict[str, str]) -> list[str]:
    """Refuses an NRRD whose axes have no direction in its space."""
    _check_units(path, set(re.findall('"(.*?)"', lines.get("spaceunits", ""))) - {""})
    if "space" not in lines:
        return []  # whoever has to know the patient refuses it
    directions = lines.get("spacedirections", "none")
    vectors = _NRRD_VECTOR.findall(directions)
    if (axes := len(vectors)) < 3:
        raise bad_file(
            path,
            "spacing",
            "space directions of three axes",
            ascii(directions[:80]),
            "add them, in mm: space directions: (0.9,0,0) (0,0.9,0) (0,0,2.5)",
        )
    columns = [_vector(path, "space directions", v, axes) for v in vectors]
    origin = lines.get("spaceorigin")
    if origin is not None:
        origin = _vector(path, "space origin", origin, axes)
    nowhere = [_NOWHERE.format("space origin")] if origin is None else []
    affine = _affine(np.stack(columns, axis=1), origin)
    return nowhere + nifti.check_axes(path, affine)


def _affine(columns: np.ndarray, origin: np.ndarray | None) -> np.ndarray:
    """[4, 4] of the first three of the axes."""
    affine = np.eye(4)
    affine[:3, :3] = columns[:3, :3]
    affine[:3, 3] = 0 if origin is None else origin[:3]
    return affine


def _told(
    path: str | os.PathLike, lines: dict[str, str], names: tuple[str, ...], count: int
) -> np.ndarray | None:
    """What a MetaImage tells under one of these names, of which MetaIO takes any."""
    found = {
        name: _numbers(path, "affine_nonfinite", name, lines[name], count)
        for name in names
        if name in lines
    }
    values = list(found.values())
    if any((other != values[0]).any() for other in values[1:]):
        expected = f"{' and '.join(found)} to agree"
        got = "different numbers"
        raise bad_file(
            path, "orientation_conflict", expected, got, "keep the one that is true"
        )
    return values[0] if values else None


def _vector(path: str | os.PathLike, name: str, text: str, count: int) -> np.ndarray:
    """An NRRD's (x,y,z)."""
    inner = text.removeprefix("(").removesuffix(")").replace(",", " ")
    return _numbers(path, "affine_nonfinite", name, inner, count)


def _numbers(
    path: str | os.PathLike, reason: str, name: str, text: str, count: int
) -> np.ndarray:
    """[count] float64; ITK takes words for 0, and the next line for what is missing."""
    words = text.split()
    values = np.array([float(w) for w in words if _NUMBER.fullmatch(w)])
    if not len(words) == len(values) == count or not np.isfinite(values).all():
        expected = f"{name} of {count} finite numbers"
        raise bad_file(path, reason, expected, ascii(text[:80]), "correct that line")
    return values


def _check_units(path: str | os.PathLike, units: set[str]) -> None:
    """Refuses lengths in other units, which ITK takes for mm."""
    if other := sorted(units - {"mm"}):
        got = ascii(other[0][:40])
        raise bad_file(
            path, "units", "lengths in mm", got, "convert the geometry to mm"
        )


def _check_voxels(path: str | os.PathLike, header: _Header, wanted: int) -> list[str]:
    """Refuses voxels that are damaged or not all there, some of which ITK lets pass."""
    encoding, skip = _encoding(path, header.lines), header.skip
    if encoding in ("raw", "zlib"):  # else what is skipped lies in the stream
        header = header._replace(start=header.start + max(skip, 0))
    there = max(header.data.stat().st_size - header.start, 0)
    if encoding == "raw":
        if there < wanted:
            raise _truncated(path, f"{wanted} bytes of voxels", str(there))
        used = there if skip < 0 else wanted
    elif encoding in _WBITS:
        used = _check_stream(path, header, encoding, wanted)
        if encoding == "zlib":
            _check_told_size(path, header, used)
    else:
        return []
    return nifti.trailing_warnings(path, there - used)


def _encoding(path: str | os.PathLike, lines: dict[str, str]) -> str:
    """raw, a key of _WBITS, or another, whose voxels are left to ITK."""
    if not _is_meta(path):
        return lines.get("encoding", "").lower()
    if lines.get("BinaryData", "True")[:1] not in _META_TRUE:
        return "text"
    return "zlib" if lines.get("CompressedData", "")[:1] in _META_TRUE else "raw"


def _check_told_size(path: str | os.PathLike, header: _Header, size: int) -> None:
    """Refuses another length of the stream than it has: ITK inflates what it says."""
    told = header.lines.get("CompressedDataSize", "none")
    if told == "none" and header.data != Path(path):
        return  # all of a file of its own
    try:
        same = float(told) == size  # older writers: 1.23457e+06
    except ValueError:
        same = False
    if not same:
        raise bad_file(
            path,
            "truncated",
            f"CompressedDataSize = {size}, the bytes of the stream",
            ascii(told[:40]),
            "correct that line",
        )


def _check_stream(
    path: str | os.PathLike, header: _Header, encoding: str, wanted: int
) -> int:
    """Inflates all, block by block, to the checksum at its end; gives bytes read."""
    least, most = wanted, wanted
    if encoding != "zlib":  # what NRRD skips lies in the stream
        skip = header.skip
        least, most = wanted + max(skip, 0), wanted + (skip if skip >= 0 else _BLOCK)
    stream, count = zlib.decompressobj(_WBITS[encoding]), 0
    try:
        with open(header.data, "rb") as file:
            file.seek(header.start)
            while count <= most and not stream.eof:
                block = stream.unconsumed_tail or file.read(_BLOCK)
                if not block:
                    break
                count += len(stream.decompress(block, _BLOCK))
                if stream.eof and encoding != "zlib" and count < least:
                    # Streams may be joined; the next begins where this one ended.
                    file.seek(-len(stream.unused_data), os.SEEK_CUR)
                    stream = zlib.decompressobj(_WBITS[encoding])
            size = file.tell() - header.start - len(stream.unused_data)
    except zlib.error as error:
        raise bad_file(
            path,
            "checksum",
            f"an intact {encoding} stream",
            str(error),
            "the file is damaged: copy or download it again",
        ) from error
    expected = f"a whole {encoding} stream of {wanted} bytes"
    if count > most:
        remedy = "the header does not describe this file: export it again"
        raise bad_file(path, "trailing_data", expected, "more", remedy)
    if count < least or not stream.eof:
        raise _truncated(path, expected, f"its end after {count}")
    return size


def _truncated(path: str | os.PathLike, expected: str, got: str) -> UserError:
    remedy = "copy or download the file again"
    return bad_file(path, "truncated", expected, got, remedy)
