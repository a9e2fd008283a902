"""Reads and writes NIfTI volumes with their geometry; refuses what it cannot trust.

A file is read whole, to the end of its stream so that the checksum is verified, and
never memory-mapped: a file cut short while mapped kills the process. Inside, axes are
LPS+ and the world is LPS mm; results go back to the file's own grid.
"""

import contextlib
import gzip
import itertools
import math
import os
import stat
import struct
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip

from unireg_jax.errors import FAILED, LIMIT, STORAGE, UserError, bad_file, shown
from unireg_jax.imaging import orientation

INTENT_DISPVECT = 1006  # displacements, RAS mm
INTENT_VECTOR = 1007  # any vector; ITK and ANTs keep displacements in LPS mm in it

_BLOCK = 1 << 24  # bytes per read: bounds the copy that gzip makes
EXACT = 1 << 24  # whole numbers up to here are the same in float32
_TRAILING = 1 << 16  # bytes read beyond the voxels before giving up
_EXTENSIONS = 1 << 26  # largest believable gap between header and voxels
_OF_INTENSITIES = ("constant:", "hu_range:", "padding:")  # `intensity_warnings`
_PADDED = 0.01  # share of one value that no tissue has
_DEFLATE = 1032  # no deflate stream expands further
_LOOKS = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull`"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"%PDF", "a PDF document"),
    (b"NRRD", "an NRRD image; convert it to NIfTI"),
    (b"ObjectType", "a MetaImage; convert it to NIfTI"),
    (b"\x89HDF", "an HDF5 file"),
    (b"BZh", "a bzip2 stream; unpack it"),
    (b"\xfd7zXZ", "an xz stream; unpack it"),
)
_REMEDIES = {
    "not_found": "check the path",
    "permission": "ask its owner for read access",
    "truncated": "copy or download the file again",
    "empty": "copy the file again",
    "nonfinite": "replace them with air (-1000 HU)",
    "label_value": "pass the label map, not an image or a probability map",
    "not_a_file": "name one .nii or .nii.gz",
    "orientation_unknown": "set it with a tool that knows how the patient lay",
    "dims": "rewrite the file",
    "offset": "rewrite the file",
    "scaling": "rewrite the file",
    "too_large": "crop or resample the volume",
    "dtype": "save it as int16 or float32",
    "units": "convert the geometry to mm",
    "affine_nonfinite": "rewrite the geometry",
    "affine_singular": "rewrite the geometry",
    "spacing": "rewrite the geometry",
    "fov": "pass a whole 3-D scan",
    "orientation_conflict": "find out which side is left and set both alike",
    "checksum": "the file is damaged: copy or download it again",
    "trailing_data": "the header does not describe this file: rewrite it",
}
_EXIT_CODES = {"too_large": LIMIT, "storage": STORAGE}  # else FAILED


class Native(NamedTuple):
    """The grid of a file as stored, before the axes were brought to LPS+.

    Attributes:
        shape: (X, Y, Z) voxels as stored.
        vox2world: [4, 4] float64, stored voxel index -> LPS mm.
    """

    shape: tuple[int, int, int]
    vox2world: np.ndarray


class Volume(NamedTuple):
    """A volume on LPS+ axes together with what is needed to write in its own grid.

    Attributes:
        data: [X, Y, Z] int16 or float32 (HU or any intensity), or uint8/uint16 labels.
        vox2world: [4, 4] float64, voxel index -> LPS mm.
        header: nibabel header of the source, None for a volume that has no file.
        path: where it came from, None for a volume that has no file.
        native: the source's own grid, None for a volume that has no file.
        warnings: one line each, `reason: what was seen`.
    """

    data: np.ndarray
    vox2world: np.ndarray
    header: Any = None
    path: str | None = None
    native: Native | None = None
    warnings: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edge lengths along the array axes, mm."""
        return orientation.spacing_mm(self.vox2world)


def told_of(
    volumes: Mapping[str, Volume | None], *, intensities: bool = True
) -> list[str]:
    """Collects what readers warned of.

    Args:
        volumes: name -> Volume, or None.
        intensities: also of values that are no Hounsfield units.

    Returns:
        `name: reason: what was seen`, one line each.
    """
    return [
        f"{name}: {line}"
        for name, volume in volumes.items()
        for line in (() if volume is None else volume.warnings)
        if intensities or not line.startswith(_OF_INTENSITIES)
    ]


class _Stored(NamedTuple):
    """What one file holds: header, array as stored, RAS affine, warnings."""

    header: Any
    array: np.ndarray
    affine: np.ndarray
    warnings: list[str]


# --- reading ------------------------------------------------------------------------


def read_image(path: str | os.PathLike, *, max_voxels: int = 2**29) -> Volume:
    """Reads an intensity image, rescaled, on LPS+ axes.

    data = scl_slope * stored + scl_inter

    Args:
        path: `.nii` or `.nii.gz`, NIfTI-1 or -2, either byte order.
        max_voxels: refuse larger images before anything is allocated.

    Returns:
        Volume; data int16 when stored as whole numbers that fit, else float32.

    Raises:
        UserError: the file is not a readable 3-D image; reason says why.
    """
    return _image(_load(path, last=(), max_voxels=max_voxels), path)


def take_image(image: nib.Nifti1Pair, name: str, *, max_voxels: int = 2**29) -> Volume:
    """Takes an image that nibabel holds as `read_image` takes its file.

    Args:
        image: NIfTI-1 or -2, loaded or made of an array; left as it is.
        name: for messages.
        max_voxels: refuse larger images before any voxel is read.

    Returns:
        Volume of the stored values, of an array those that it has; without a path.

    Raises:
        UserError: as `read_image`.
    """
    # A copy: where the affine was changed, the header follows.
    header = type(image)(image.dataobj, image.affine, image.header).header
    shape = _check_dims(header, name, (), max_voxels)
    try:
        if nib.is_proxy(image.dataobj):
            _check_dtype(header, name)
            header["scl_slope"] = image.dataobj.slope
            header["scl_inter"] = image.dataobj.inter
            array = image.dataobj.get_unscaled()
        else:
            array = image.dataobj
            header["scl_slope"], header["scl_inter"] = 1, 0
            header.set_data_dtype(array.dtype)
            _check_dtype(header, name)
    except nib.spatialimages.HeaderDataError as error:
        expected = "whole or real numbers of 8 to 64 bits"
        raise _fault("dtype", name, expected, str(array.dtype)) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        got, remedy = str(error).partition("\n")[0][:120], "load its file again"
        raise _fault(
            "storage", name, "voxels to be read", got, remedy=remedy
        ) from error
    warnings: list[str] = []
    affine = _check_affine(header, name, shape, warnings)
    _check_scaling(header, name, warnings)
    stored = _Stored(header, np.asarray(array).reshape(shape), affine, warnings)
    return _image(stored, name)._replace(path=None)


def read_labels(path: str | os.PathLike, *, max_voxels: int = 2**29) -> Volume:
    """Reads a label map on LPS+ axes.

    Args:
        path: as in `read_image`; whole numbers, 0 is background.
        max_voxels: refuse larger images before anything is allocated.

    Returns:
        Volume; data uint8 when all ids are below 256, else uint16.

    Raises:
        UserError: as `read_image`, or `label_value` for halves, negatives, NaN or ids
            above 65535.
    """
    stored = _load(path, last=(), max_voxels=max_voxels)
    array = _rescale(stored, path)
    if array.dtype == np.float32:
        # NaN fails the comparison with itself, infinity the range below.
        whole = bool((array == np.rint(array)).all())
    else:
        whole = True
    low, high = (array.min(), array.max()) if whole else (np.nan, np.nan)
    if not (whole and low >= 0 and high <= 65535):
        got = f"{low:g} to {high:g}" if whole else "fractions or NaN"
        raise _fault("label_value", path, "whole label ids from 0 to 65535", got)
    labels = array.astype(np.uint8 if high < 256 else np.uint16)
    return _volume(stored, labels, path, [])


def check_same_grid(a: Volume, b: Volume, *, tolerance_mm: float = 0.05) -> None:
    """Refuses two volumes that do not lie on the same grid.

    The eight corner voxels are compared in the world, so that shape, spacing, direction
    and origin count together. The storage order of the axes does not matter.

    Args:
        a: Volume, such as an image.
        b: Volume, such as its labels.
        tolerance_mm: largest distance of corresponding corners, mm.

    Raises:
        UserError: `grid_mismatch`; `mirrored` when one is the other's mirror image,
            as where RAS was taken for LPS.
    """
    first, path = shown(a.path or "the volume"), b.path or "the volume"
    remedy = f"resample it onto the grid of {first} (nearest neighbour for labels)"
    if a.data.shape != b.data.shape:
        raise bad_file(
            path,
            "grid_mismatch",
            f"shape {a.data.shape} on LPS axes",
            str(b.data.shape),
            remedy,
        )
    gap = _corner_distance(a.vox2world, b.vox2world, a.data.shape)
    if gap > tolerance_mm:
        if axes := _mirrored_axes(a, b, tolerance_mm):
            raise bad_file(
                path,
                "mirrored",
                f"the grid of {first}",
                f"its mirror image along {axes} of the world",
                "RAS and LPS were mixed up: export the labels again from the image",
            )
        raise bad_file(
            path,
            "grid_mismatch",
            f"corners within {tolerance_mm} mm of those of {first}",
            f"{gap:.3g} mm",
            remedy,
        )


def _mirrored_axes(a: Volume, b: Volume, tolerance_mm: float) -> str:
    """World axes along which b's grid is the mirror image of a's, "" if it is none."""
    last = np.array(a.data.shape) - 1
    middles = [v.vox2world[:3, :3] @ (last / 2) + v.vox2world[:3, 3] for v in (a, b)]
    for signs in ((-1, -1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)):
        turn = np.array(signs)[:, None] * b.vox2world[:3, :3]
        # Both are stored towards LPS: mirrored axes run backwards.
        gaps = [
            np.minimum(
                np.linalg.norm((turn - a.vox2world[:3, :3])[:, i]),
                np.linalg.norm((turn + a.vox2world[:3, :3])[:, i]),
            )
            for i in range(3)
        ]
        moved = np.linalg.norm(signs * middles[1] - middles[0])
        if moved <= tolerance_mm and (gaps * last).max() <= tolerance_mm:
            return " and ".join(n for n, s in zip("xyz", signs, strict=True) if s < 0)
    return ""


def read_vectors(
    path: str | os.PathLike, *, frames: bool = True, max_voxels: int = 2**29
) -> tuple[Any, np.ndarray, Native]:
    """Reads a vector image as stored, with no turn of axes or components.

    Args:
        path: `.nii` or `.nii.gz`.
        frames: True for (X, Y, Z, 1, 3), as ITK; False for (X, Y, Z, 3), as Learn2Reg.
        max_voxels: refuse larger images before anything is allocated.

    Returns:
        header (nibabel), vectors [X, Y, Z, 3] float32 in the file's own frame, and the
        stored grid; without frames the header's is not looked at.

    Raises:
        UserError: as `read_image`; `ndim` when the shape is another.
    """
    last = (1, 3) if frames else (3,)
    stored = _load(path, last=last, max_voxels=max_voxels)
    vectors = _rescale(stored, path).astype(np.float32, copy=False)
    vox2world = orientation.lps_from_ras(stored.affine)
    return stored.header, vectors, Native(vectors.shape[:3], vox2world)


def _image(stored: _Stored, path: str | os.PathLike) -> Volume:
    """Rescaled, on LPS+ axes."""
    array = _rescale(stored, path)
    if array.dtype == np.float32 and not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise _fault("nonfinite", path, "finite voxels", f"{count} NaN or infinite")
    return _volume(stored, array, path, intensity_warnings(array))


def _volume(
    stored: _Stored, array: np.ndarray, path: str | os.PathLike, extra: list[str]
) -> Volume:
    """Turns a stored array to LPS+ axes."""
    vox2world = orientation.lps_from_ras(stored.affine)
    data, turned = orientation.reorient(array, vox2world)
    return Volume(
        data=data,
        vox2world=turned,
        header=stored.header,
        path=os.fspath(path),
        native=Native(array.shape, vox2world),
        warnings=tuple(stored.warnings + extra),
    )


def _fault(
    reason: str, path: str | os.PathLike, expected: str, got: str, *, remedy: str = ""
) -> UserError:
    """One line: what, where, expected, got, remedy."""
    remedy = remedy or _REMEDIES[reason]
    code = _EXIT_CODES.get(reason, FAILED)
    return bad_file(path, reason, expected, got, remedy, code)


def _load(
    path: str | os.PathLike, *, last: tuple[int, ...], max_voxels: int
) -> _Stored:
    """Header, voxels and affine of one file, each checked before it is used.

    `last` is the shape after X, Y, Z; () also takes any number of axes of length 1.
    """
    size = check_file(path)
    try:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if gzipped else file
            return _load_stream(stream, path, size, gzipped, last, max_voxels)
    except EOFError as error:
        raise _fault(
            "truncated", path, "a whole gzip stream", "its end too early"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _fault("checksum", path, "an intact gzip stream", str(error)) from error
    except FileNotFoundError as error:
        raise _not_found(path) from error
    except PermissionError as error:
        raise permission_error(path) from error
    except OSError as error:
        raise _fault(
            "storage",
            path,
            "a readable file",
            error.strerror or str(error),
            remedy="check the disk or the network share",
        ) from error


def _not_found(path: str | os.PathLike) -> UserError:
    return _fault("not_found", path, "a file", "nothing")


def permission_error(path: str | os.PathLike) -> UserError:
    """Makes the UserError `permission` for a file that may not be read.

    Args:
        path: the file.

    Returns:
        UserError, to be raised by the caller.
    """
    return _fault("permission", path, "a readable file", "permission denied")


def check_file(path: str | os.PathLike) -> int:
    """Refuses what is no regular file; nothing is opened, so no FIFO can block.

    Args:
        path: file to be read.

    Returns:
        Its size in bytes, above 0.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`, `empty`.
    """
    try:
        status = os.stat(path)
    except PermissionError as error:
        raise permission_error(path) from error
    except (OSError, ValueError) as error:  # absent, link loop, name too long, NUL
        raise _not_found(path) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
        raise _fault("not_a_file", path, "a file", kind)
    if status.st_size == 0:
        raise _fault("empty", path, "a file with content", "0 bytes")
    return status.st_size


def _load_stream(
    stream: BinaryIO,
    path: str | os.PathLike,
    size: int,
    gzipped: bool,
    last: tuple[int, ...],
    max_voxels: int,
) -> _Stored:
    """As `_load`, once the file is open."""
    header = _read_header(stream, path, gzipped)
    shape = _check_dims(header, path, last, max_voxels)
    dtype = _check_dtype(header, path)
    warnings: list[str] = []
    offset = _check_offset(header, path, warnings)
    # Learn2Reg's voxels lie on the grid of the scans, whatever this header says.
    affine = np.eye(4)
    if last != (3,):
        affine = _check_affine(header, path, shape, warnings)
    _check_scaling(header, path, warnings)

    shape += last[-1:]
    wanted = math.prod(shape) * dtype.itemsize
    # Nothing is allocated for voxels that the file cannot hold.
    if offset + wanted > size * (_DEFLATE if gzipped else 1):
        raise _truncated(path, offset + wanted, f"a file of {size} bytes")
    gap = offset - header.sizeof_hdr
    between = _read_exactly(stream, gap)
    if len(between) < gap:
        raise _truncated(path, offset, "its end before the voxels")
    _check_extensions(between, header.endianness, warnings)
    raw = _read_exactly(stream, wanted)
    if raw.size < wanted:
        raise _truncated(path, wanted, f"{raw.size} bytes of voxels")
    _drain(stream, path, warnings)
    array = raw.view(dtype).reshape(shape, order="F")
    return _Stored(header, array, affine, warnings)


def _truncated(path: str | os.PathLike, wanted: int, got: str) -> UserError:
    return _fault("truncated", path, f"{wanted} bytes", got)


def _read_header(stream: BinaryIO, path: str | os.PathLike, gzipped: bool) -> Any:
    """nibabel header of a single-file NIfTI-1 or -2; else says what the file is."""
    block = stream.read(348)
    if not block:
        raise _fault("empty", path, "a NIfTI file", "no bytes")
    nifti = False
    for order in "<>":
        sizeof = struct.unpack(order + "i", block[:4].ljust(4, b"\0"))[0]
        if sizeof in (348, 540):
            nifti = True
            break
    if not nifti:
        looks = looks_like(block)
        reason = "name_mismatch" if block[:2] == b"\x1f\x8b" else "not_nifti"
        raise _fault(
            reason,
            path,
            "a NIfTI file",
            looks,
            remedy="pass the file of the CT volume itself",
        )
    block += stream.read(sizeof - len(block)) if sizeof > len(block) else b""
    if len(block) < sizeof:
        raise _truncated(path, sizeof, f"{len(block)} bytes of header")
    magic = block[344:348] if sizeof == 348 else block[4:8]
    if magic in (b"ni1\0", b"ni2\0"):
        raise _fault(
            "name_mismatch",
            path,
            "header and voxels in one file",
            "the header of an .hdr/.img pair",
            remedy="convert the pair to one .nii.gz",
        )
    if magic not in (b"n+1\0", b"n+2\0"):
        raise _fault(
            "orientation_unknown",
            path,
            "the NIfTI mark n+1 or n+2",
            "an ANALYZE header, which has no orientation",
        )
    _check_name(path, gzipped)
    kind = nib.Nifti1Header if sizeof == 348 else nib.Nifti2Header
    return kind(block, endianness=order, check=False)


def _check_name(path: str | os.PathLike, gzipped: bool) -> None:
    """The ending must agree with the content: other tools go by the ending."""
    name = os.fspath(path).lower()
    wanted = ".nii.gz" if gzipped else ".nii"
    if not name.endswith(wanted):
        content = "gzipped NIfTI" if gzipped else "NIfTI that is not gzipped"
        raise _fault(
            "name_mismatch",
            path,
            f"a name that ends in {wanted}",
            f"{content} under another name",
            remedy=f"rename the file to end in {wanted}",
        )


def looks_like(block: bytes) -> str:
    """Says in words what the first bytes of a file belong to.

    Args:
        block: its first 132 bytes or more, or all it has.

    Returns:
        Such as "a PNG picture".
    """
    if block[:2] == b"\x1f\x8b":
        return "a gzip stream inside a gzip stream; unpack it once"
    for magic, words in _LOOKS:
        if block.startswith(magic):
            return words
    if block[128:132] == b"DICM":
        return (
            "a DICOM file; of a scan pass the folder of its series, segmentations "
            "(RTSTRUCT, SEG) export as a label map in NIfTI"
        )
    text = block.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page, probably an error message of a download"
    if text.startswith(b"<?xml"):
        return "an XML document"
    if text.startswith((b"{", b"[")) and block[:4].isascii() and min(block[:4]) > 8:
        return "a JSON document"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in block):
        return "text"
    return f"unknown binary data that begin with {block[:4].hex(' ')}"


def _check_dims(
    header: Any, path: str | os.PathLike, last: tuple[int, ...], max_voxels: int
) -> tuple[int, ...]:
    """(X, Y, Z) as Python ints, which cannot overflow."""
    dim = [int(n) for n in header["dim"]]
    expected = f"shape {('X', 'Y', 'Z', *last)}".replace("'", "")
    remedy = "save one field as ITK does" if last else "pass one 3-D volume"
    if not 3 <= dim[0] <= 7:
        raise _fault("ndim", path, expected, f"dim[0] = {dim[0]}", remedy=remedy)
    shape = tuple(dim[1 : dim[0] + 1])
    if min(shape) < 1:
        got = f"{shape}"
        raise _fault("dims", path, "axes of 1 voxel or more", got)
    if shape[3:] != last and (last or math.prod(shape[3:]) != 1):
        raise _fault("ndim", path, expected, f"shape {shape}", remedy=remedy)
    voxels = dim[1] * dim[2] * dim[3]
    if voxels > max_voxels:
        raise _fault(
            "too_large",
            path,
            f"at most {max_voxels} voxels",
            f"{voxels} {tuple(dim[1:4])}",
        )
    return dim[1], dim[2], dim[3]


def _check_dtype(header: Any, path: str | os.PathLike) -> np.dtype:
    """Storage type, in the byte order of the file; real numbers only."""
    code, bits = int(header["datatype"]), int(header["bitpix"])
    expected = "whole or real numbers of 8 to 64 bits"
    try:
        dtype = header.get_data_dtype()
        name = nib.nifti1.data_type_codes.label[code]
    except (KeyError, nib.spatialimages.HeaderDataError) as error:
        raise _fault("dtype", path, expected, f"code {code}") from error
    if dtype.kind not in "iuf" or not 1 <= dtype.itemsize <= 8:
        raise _fault("dtype", path, expected, f"{name} (code {code})")
    if bits != 8 * dtype.itemsize:
        got = f"{bits} bits for {name}"
        raise _fault("dtype", path, f"{8 * dtype.itemsize} bits", got)
    return dtype


def _check_offset(header: Any, path: str | os.PathLike, warnings: list[str]) -> int:
    """Byte at which the voxels begin; extensions before it are skipped unread."""
    offset = float(header["vox_offset"])
    first = header.sizeof_hdr + 4
    if not first <= offset <= first + _EXTENSIONS:  # NaN fails as well
        raise _fault(
            "offset", path, f"voxels from byte {first} on", f"vox_offset = {offset:g}"
        )
    if offset != int(offset):
        warnings.append(f"offset: vox_offset is {offset:g}, read as {int(offset)}")
    return int(offset)


def _check_extensions(between: np.ndarray, order: str, warnings: list[str]) -> None:
    """Warns when the sizes of the extensions do not lead to the first voxel.

    `between` is what lies between header and voxels: a flag of 4 bytes, then
    extensions that each begin with their size. Their content is never looked at.
    """
    if not between[0]:
        return
    place = 4
    while place + 8 <= between.size:
        size = int.from_bytes(
            between[place : place + 4].tobytes(),
            "little" if order == "<" else "big",
            signed=True,
        )
        if size < 16 or size % 16 or place + size > between.size:
            warnings.append(f"offset: a header extension of {size} bytes, skipped")
            return
        place += size
    if place == 4:
        warnings.append("offset: header extensions are announced, none is there")


def _check_scaling(header: Any, path: str | os.PathLike, warnings: list[str]) -> None:
    """Slope and intercept must be usable; slope 0 means none."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0:
        return
    if not np.isfinite(slope):
        warnings.append(f"scaling: scl_slope is {slope}, read as none")
    elif not np.isfinite(inter) or max(abs(slope), abs(inter)) > 1e6:
        raise _fault(
            "scaling",
            path,
            "a finite slope and intercept below 1e6",
            f"{slope:g} and {inter:g}",
        )


def _check_affine(
    header: Any,
    path: str | os.PathLike,
    shape: tuple[int, int, int],
    warnings: list[str],
) -> np.ndarray:
    """Voxel -> RAS mm: the sform if its code is set, else the qform."""
    units = int(header["xyzt_units"]) & 7
    if units not in (0, 2):
        got = {1: "metres", 3: "microns"}.get(units, f"code {units}")
        raise _fault("units", path, "millimetres", got)
    _check_pixdim(header, path)
    forms = _forms(header)
    if not forms:
        raise _fault(
            "orientation_unknown",
            path,
            "an sform or qform with a code above 0",
            "both codes 0",
        )
    affine = forms[0]
    if int(header["sform_code"]) <= 0 and (header["pixdim"][1:4] < 0).any():
        raise _fault(
            "orientation_conflict",
            path,
            "positive spacings (pixdim) beside a qform",
            _mm(np.asarray(header["pixdim"][1:4], np.float64)),
        )
    if int(header["qform_code"]) > 0 and float(header["pixdim"][0]) not in (-1, 0, 1):
        warnings.append(
            f"orientation_conflict: qfac is {float(header['pixdim'][0]):g}, read as 1"
        )
    warnings += check_axes(path, affine)
    check_extent(path, shape, np.linalg.norm(affine[:3, :3], axis=0))
    if len(forms) == 2:
        _compare_forms(forms, path, shape, warnings)
    warnings += spacing_warnings("pixdim", header["pixdim"][1:4], affine)
    return affine


def _forms(header: Any) -> list[np.ndarray]:
    """The affines that are set, the one in force first; NaN where undefined."""
    forms = []
    if int(header["sform_code"]) > 0:
        affine = np.eye(4)
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            affine[row] = header[name]
        forms.append(affine)
    if int(header["qform_code"]) > 0:
        forms.append(_qform(header))
    return forms


def _qform(header: Any) -> np.ndarray:
    """Affine of the quaternion; a qfac that is not -1 counts as 1, as in niftilib.

    The fourth number a is 0 below nibabel's threshold: 3 eps of the stored precision.
    """
    b, c, d = (float(header[f"quatern_{letter}"]) for letter in "bcd")
    affine = np.eye(4)
    length = b * b + c * c + d * d
    if not length <= 1 + 1e-5:  # NaN fails as well
        affine[:3, :3] = np.nan
        return affine
    # A half turn has a = 0; the rounding of b, c, d would make up to 6e-4 of it.
    rest = 1 - length
    a = np.sqrt(rest) if rest >= abs(header.quaternion_threshold) else 0.0
    turn = nib.quaternions.quat2mat([a, b, c, d])
    zooms = np.asarray(header["pixdim"][1:4], np.float64).copy()
    if float(header["pixdim"][0]) == -1:
        zooms[2] *= -1
    affine[:3, :3] = turn * zooms[None, :]
    affine[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
    return affine


def _check_pixdim(header: Any, path: str | os.PathLike) -> None:
    """Zero and NaN spacings refuse even beside an sform: other readers use them."""
    pixdim = np.asarray(header["pixdim"][1:4], np.float64)
    if not np.isfinite(pixdim).all() or (pixdim == 0).any():
        raise _fault(
            "spacing", path, "spacings (pixdim) of 0.01 to 100 mm", _mm(pixdim)
        )


def _mm(lengths: np.ndarray) -> str:
    """Three lengths in words."""
    return " x ".join(f"{length:.4g}" for length in lengths) + " mm"


def check_axes(path: str | os.PathLike, affine: np.ndarray) -> list[str]:
    """Refuses a grid that spans no volume, or lies nowhere near a patient.

    Args:
        path: file, for the message.
        affine: [4, 4] float, voxel index -> mm of any world.

    Returns:
        No or one line, `orientation_conflict: …`, of axes that are not perpendicular.

    Raises:
        UserError: `affine_nonfinite`, `affine_singular`.
    """
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e6:
        raise _fault(
            "affine_nonfinite",
            path,
            "finite numbers within 1 km",
            f"{np.array2string(affine[:3].ravel(), precision=4, max_line_width=999)}",
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :3] / np.where(spacing > 0, spacing, 1.0)
    if abs(np.linalg.det(cosines)) < 1e-3:
        raise _fault(
            "affine_singular",
            path,
            "three independent axes",
            f"directions with determinant {np.linalg.det(cosines):.2g}",
        )
    shear = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if shear <= 1e-4:
        return []
    return [
        f"orientation_conflict: axes are not perpendicular (cosine {shear:.2g}); "
        "not every tool can hold this geometry"
    ]


def spacing_warnings(name: str, told: np.ndarray, affine: np.ndarray) -> list[str]:
    """Warns where the spacing that a header tells is not that of its affine.

    Args:
        name: what tells it.
        told: [3] voxel edge lengths, mm.
        affine: [4, 4] float, voxel index -> mm; in force.

    Returns:
        No or one line, `spacing: …`.
    """
    told, spacing = np.asarray(told, np.float64), orientation.spacing_mm(affine)
    if np.allclose(told, spacing, rtol=1e-3, atol=0):
        return []
    words = f"{_mm(told)} differs from the affine's {_mm(spacing)}"
    return [f"spacing: {name} {words}"]


def check_extent(
    path: str | os.PathLike, shape: tuple[int, int, int], spacing: np.ndarray
) -> None:
    """Refuses voxels and fields of view that are not those of a body.

    Args:
        path: file or folder, for the message.
        shape: (X, Y, Z) voxels.
        spacing: [3] voxel edge lengths, mm.

    Raises:
        UserError: `spacing`, `fov`.
    """
    if spacing.min() < 0.01 or spacing.max() > 100:
        raise _fault("spacing", path, "spacings of 0.01 to 100 mm", _mm(spacing))
    extent = spacing * np.array(shape)
    if min(shape) < 2 or extent.min() < 10 or extent.max() > 3000:
        raise _fault(
            "fov",
            path,
            "2 slices or more and 10 mm to 3 m along each axis",
            f"{shape} voxels, {_mm(extent)}",
        )


def _compare_forms(
    forms: list[np.ndarray],
    path: str | os.PathLike,
    shape: tuple[int, int, int],
    warnings: list[str],
) -> None:
    """Two affines of different handedness refuse; a shift warns."""
    sform, qform = forms
    if not np.isfinite(qform).all():
        warnings.append("orientation_conflict: the qform is not finite, sform used")
        return
    if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        raise _fault(
            "orientation_conflict",
            path,
            "sform and qform of the same handedness",
            "mirrored ones",
        )
    gap = _corner_distance(sform, qform, shape)
    if gap > 0.1:
        warnings.append(
            f"orientation_conflict: sform and qform differ by {gap:.3g} mm, sform used"
        )


def _corner_distance(
    a: np.ndarray, b: np.ndarray, shape: tuple[int, int, int]
) -> float:
    """Largest distance in mm between corresponding corner voxels of two grids."""
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape))))
    gaps = corners @ (a - b)[:3, :3].T + (a - b)[:3, 3]
    return float(np.linalg.norm(gaps, axis=1).max())


def _read_exactly(stream: BinaryIO, count: int) -> np.ndarray:
    """Up to `count` bytes; fewer only at the end of the stream."""
    buffer = np.empty(count, np.uint8)
    view, filled = memoryview(buffer), 0
    while filled < count:
        got = stream.readinto(view[filled : min(count, filled + _BLOCK)])
        if not got:
            return buffer[:filled]
        filled += got
    return buffer


def _drain(stream: BinaryIO, path: str | os.PathLike, warnings: list[str]) -> None:
    """Reads on to the end, where gzip verifies length and CRC; bounds the work."""
    extra = 0
    try:
        while block := stream.read(_TRAILING):
            extra += len(block)
            trailing_warnings(path, extra)
    except gzip.BadGzipFile as error:
        # Raised after an intact member when what follows is no gzip member.
        if not str(error).startswith("Not a gzipped file"):
            raise
        extra += 1
    warnings += trailing_warnings(path, extra)


def trailing_warnings(path: str | os.PathLike, extra: int) -> list[str]:
    """Warns of bytes after the voxels, and refuses many.

    Args:
        path: file, for the message.
        extra: bytes.

    Returns:
        No or one line, `trailing_data: …`.

    Raises:
        UserError: `trailing_data`, of more than 64 KiB.
    """
    if extra > _TRAILING:
        raise _fault(
            "trailing_data",
            path,
            "the end of the file after the voxels",
            f"more than {_TRAILING} bytes",
        )
    return ["trailing_data: bytes after the voxels were ignored"] if extra else []


def _rescale(stored: _Stored, path: str | os.PathLike) -> np.ndarray:
    """Stored values times slope plus intercept, int16 if exact, else float32."""
    array = stored.array
    slope = float(stored.header["scl_slope"])
    inter = float(stored.header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        slope, inter = 1.0, 0.0
    if array.dtype.kind in "iu" and slope == 1 and inter == int(inter):
        low, high = int(array.min()) + int(inter), int(array.max()) + int(inter)
        if -32768 <= low and high <= 32767:
            if inter == 0:
                return array.astype(np.int16)
            return (array.astype(np.int64) + int(inter)).astype(np.int16)
    if slope == 1 and inter == 0:
        with np.errstate(over="ignore", invalid="ignore"):
            out = array.astype(np.float32)  # overflow becomes inf: refused later
        if array.dtype.kind in "iu" and max(abs(low), abs(high)) > EXACT:
            if changed := np.count_nonzero(out.astype(np.float64) != array):
                raise _fault(
                    "dtype",
                    path,
                    f"whole numbers up to {EXACT}",
                    f"{changed} that are larger",
                    remedy="renumber the ids to 65535 at most",
                )
        return out
    out = np.empty(array.shape, np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(array.shape[-1]):  # slice by slice: float64 for one only
            out[..., k] = array[..., k].astype(np.float64) * slope + inter
    return out


def intensity_warnings(array: np.ndarray) -> list[str]:
    """Warns when the values do not look like Hounsfield units.

    Args:
        array: [X, Y, Z] numbers.

    Returns:
        No or one line, `constant: …`, `hu_range: …` or `padding: …`.
    """
    step = tuple(slice(None, None, max(1, n // 64)) for n in array.shape)
    sample = array[step]
    parts = np.percentile(sample, (0.1, 50, 95, 99.9))
    low, middle, dense, high = (float(v) for v in parts)
    if low == high and array.min() == array.max():
        return [f"constant: every voxel is {low:g}"]
    # One voxel in twenty above 800 HU is no bone: the sign of air was turned.
    if low > -500 or high < 0 or middle > 700 or dense > 800:
        seen = f"0.1 %, 50 % and 99.9 % at {low:g}, {middle:g} and {high:g}"
        return [f"hu_range: not Hounsfield units? {seen}; air should be near -1000"]
    # Tissue is noisy: no value of it stands out among its neighbours.
    values, counts = np.unique(sample, return_counts=True)
    at = int(np.searchsorted(values, 0))
    filled, near = 0.0, counts[max(0, at - 1) : at + 2]
    if at < len(values) and values[at] == 0:
        filled = counts[at] / sample.size
    if filled > _PADDED and counts[at] > 10 * np.delete(near, min(at, 1)).mean():
        return [
            f"padding: {100 * filled:.0f} % of the voxels are exactly 0 HU, as tools "
            "fill what they add: they count as body; fill with -1000"
        ]
    return []


# --- writing ------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it when the block ends well.

    The file appears under its final name whole and flushed to disk, or not at all.

    Args:
        path: final name; an existing file is replaced.

    Yields:
        Path in the same folder of a new, empty file, which the block must fill.

    Raises:
        UserError: `storage`: disk full, no such folder, read-only, rename lost.
    """
    path = Path(path)
    temp = path.parent / f".unireg-{uuid.uuid4().hex}.tmp"
    try:
        # Exclusively: whatever waits under the name, a link say, is not written to.
        os.close(os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temp
        _sync(temp)
        os.replace(temp, path)
        _sync(path.parent)
    except OSError as error:
        raise _fault(
            "storage",
            path,
            "to write the file",
            error.strerror or str(error),
            remedy="check that the folder exists, is writable and has space",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


def _sync(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_volume(
    path: str | os.PathLike, data: np.ndarray, vox2world: np.ndarray, *, dtype=None
) -> None:
    """Writes an array on any grid, axes in the order given.

    Args:
        path: `.nii` or `.nii.gz`.
        data: [X, Y, Z] numbers or bool.
        vox2world: [4, 4] float, voxel index -> LPS mm; stored in float32.
        dtype: storage type; by default data's, float64 as float32, bool as uint8.

    Raises:
        ValueError: not 3-D, values that dtype cannot hold, or a wrong name.
        UserError: `storage`.
    """
    if data.ndim != 3:
        raise ValueError(f"data must be (X, Y, Z), got {data.shape}; drop other axes")
    header = nib.Nifti1Header()
    set_geometry(header, vox2world)
    write_array(path, data, header, dtype=dtype)


def write_like(
    path: str | os.PathLike, data: np.ndarray, volume: Volume, *, dtype=None
) -> None:
    """Writes a result in the grid of the file that `volume` was read from.

    Affine, codes, spacings and units are those of the source, bit for bit; free text is
    left behind.

    Args:
        path: `.nii` or `.nii.gz`.
        data: [X, Y, Z] on volume's LPS+ axes, numbers or bool.
        volume: the image that gives the grid; without a header, its own grid is used.
        dtype: storage type; by default data's, float64 as float32, bool as uint8.

    Raises:
        ValueError: data's shape is not volume's, values that dtype cannot hold.
        UserError: `storage`.
    """
    if data.shape != volume.data.shape:
        raise ValueError(
            f"data must be {volume.data.shape} on LPS+ axes, got {data.shape}; "
            "resample it onto the volume first"
        )
    if volume.header is None:
        return write_volume(path, data, volume.vox2world, dtype=dtype)
    header = clean_header(volume.header)
    return write_array(path, to_native(data, volume), header, dtype=dtype)


def to_native(array: np.ndarray, volume: Volume) -> np.ndarray:
    """Brings an array from volume's LPS+ axes to the order of its file.

    Args:
        array: [X, Y, Z, ...] on volume's grid; vector components stay as they are.
        volume: the image that gives the grid.

    Returns:
        [X', Y', Z', ...] on `volume.native`, or the array itself without a file.

    Raises:
        ValueError: array is not on volume's grid.
    """
    if array.shape[:3] != volume.data.shape:
        raise ValueError(
            f"array must begin with {volume.data.shape}, got {array.shape}; "
            "resample it onto the volume first"
        )
    if volume.native is None:
        return array
    return orientation.restore(array, volume.vox2world, volume.native.vox2world)


def set_geometry(header: Any, vox2world: np.ndarray) -> None:
    """Sets both forms of a fresh header, code 1, in mm.

    Args:
        header: nibabel header, changed in place.
        vox2world: [4, 4] float, voxel index -> LPS mm.
    """
    affine = orientation.ras_from_lps(vox2world)
    header.set_data_shape((1, 1, 1))
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    header.set_xyzt_units("mm")


def clean_header(header: Any) -> Any:
    """Copies a header's geometry, and nothing that the source said in words.

    Args:
        header: nibabel header of the source.

    Returns:
        Copy with the same affines, codes, spacings and units; texts, scaling, display
        range and intent are cleared.
    """
    header = header.copy()
    for name in ("descrip", "aux_file", "intent_name"):
        header[name] = b""
    for name in ("cal_min", "cal_max", "scl_inter", "intent_code"):
        header[name] = 0
    for name in ("intent_p1", "intent_p2", "intent_p3"):
        header[name] = 0
    for name in ("slice_start", "slice_end", "slice_duration", "slice_code", "toffset"):
        header[name] = 0
    if "db_name" in header.keys():  # NIfTI-1 only
        header["db_name"] = b""
        header["data_type"] = b""
    return header


def write_array(
    path: str | os.PathLike, array: np.ndarray, header: Any, *, dtype=None
) -> None:
    """Writes an array under a header whose geometry is already right.

    Args:
        path: `.nii` or `.nii.gz`.
        array: [X, Y, Z] or [X, Y, Z, 1, 3], axes in file order.
        header: nibabel header; dims, type, scaling and offset are set here.
        dtype: storage type; by default array's, float64 as float32, bool as uint8.

    Raises:
        ValueError: values that dtype cannot hold, or a wrong name.
        UserError: `storage`.
    """
    name = os.fspath(path)
    if not name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"path must end in .nii or .nii.gz, got {shown(path)}; rename")
    dtype = _storage_dtype(array, dtype)
    if array.size == 0:
        raise ValueError(f"array must hold voxels, got shape {array.shape}; check it")
    _check_fits(array, dtype)
    header = header.copy()
    header["dim"] = [array.ndim, *array.shape, *[1] * (7 - array.ndim)]
    header.set_data_dtype(dtype)
    header["vox_offset"] = header.sizeof_hdr + 4
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["magic"] = header.single_magic
    ordered = dtype.newbyteorder(header.endianness)
    with atomic_path(path) as temp, open(temp, "wb") as file:
        if name.lower().endswith(".gz"):
            with packing(file) as packed:
                _write_stream(packed, array, header, ordered)
        else:
            _write_stream(file, array, header, ordered)
        file.flush()


def packing(file: BinaryIO) -> BinaryIO:
    """A stream that is compressed into a file as gzip.

    Args:
        file: open for writing; its owner closes it.

    Returns:
        To be written to and closed. No name and no time are in it: equal data give
        equal bytes.
    """
    # Some six times as fast as zlib's lowest level, files as small.
    return igzip.GzipFile("", "wb", 2, file, mtime=0)


def _write_stream(
    stream: BinaryIO, array: np.ndarray, header: Any, dtype: np.dtype
) -> None:
    """Header, no extensions, voxels with the first axis fastest."""
    stream.write(header.binaryblock + b"\0\0\0\0")
    for behind in np.ndindex(array.shape[:1:-1]):  # plane by plane: no large copy
        block = array[(..., *reversed(behind))]
        if dtype.kind in "iu" and array.dtype.kind == "f":
            block = np.rint(block)
        stream.write(block.astype(dtype).tobytes(order="F"))


def _storage_dtype(array: np.ndarray, dtype: Any) -> np.dtype:
    """The type on disk."""
    if dtype is None:
        dtype = {"b": np.uint8, "f": np.float32}.get(array.dtype.kind, array.dtype)
    dtype = np.dtype(dtype)
    if dtype.kind not in "iuf" or not 1 <= dtype.itemsize <= 8 or dtype == np.float16:
        raise ValueError(
            f"dtype must be whole or real numbers, got {dtype}; use int16 or float32"
        )
    return dtype


def _check_fits(array: np.ndarray, dtype: np.dtype) -> None:
    """No value may change its meaning on the way to the file."""
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("array must be finite, got NaN or infinity; mend it first")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if np.rint(low) < limits.min or np.rint(high) > limits.max:
            raise ValueError(
                f"array must fit {dtype}, got {low} to {high}; choose a wider dtype"
            )
