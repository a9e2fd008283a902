"""NRRD and MetaImage, read by SimpleITK: which of its readers, and whose voxels.

The header of such a file may name any file as its voxels. One that comes from elsewhere
must not pull another file of this machine into a result.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
_META_NAME = re.compile(rb"(?im)^\s*(ElementDataFile)\s*[=:]\s*(.*?)\s*$")
_META_LINE = re.compile(rb"(?m)^\s*(\w+)\s*=\s*(.*?)\s*$")
_META_SPACING = {b"elementspacing", b"elementsize"}
_META_TURN = {b"transformmatrix", b"rotation", b"orientation"}
_META_LPS = b"RAI"  # from where to where: x from right to left
_NRRD_NAME = re.compile(rb"(?im)^\s*data ?file\s*:\s*(.*?)\s*$")


class Image(NamedTuple):
    """What a file holds.

    Attributes:
        voxels: [X, Y, Z], or [X, Y, Z, C] of several components, axes as stored.
        vox2world: [4, 4] float64, voxel index -> LPS mm.
        told: further lines of the header.
    """

    voxels: np.ndarray
    vox2world: np.ndarray
    told: dict[str, str]


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
            does not read; `spacing`, `orientation_unknown` for a MetaImage that does
            not tell, which ITK takes for 1 mm and LPS; what `check` raises.
    """
    if importlib.util.find_spec("SimpleITK") is None:
        raise UserError(
            "not_installed",
            f"{shown(path)}: NRRD and MetaImage are read by SimpleITK, got none; run "
            "`pip install unireg-jax[itk]`, or convert the file to NIfTI",
            USAGE,
        )
    import SimpleITK as sitk  # an extra: only who reads these formats needs it

    nifti.check_file(path)
    check_own_voxels(path)
    if IMAGE_IO[Path(path).suffix.lower()] == "MetaImageIO":
        _check_meta_place(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(IMAGE_IO[Path(path).suffix.lower()])
    reader.SetFileName(os.fspath(path))
    try:
        reader.ReadImageInformation()
        size = reader.GetSize()
        check(size, reader.GetNumberOfComponents())
        image = reader.Execute()
        array = sitk.GetArrayFromImage(image)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1][-160:]
        raise bad_file(
            path,
            "not_nifti",
            "a whole NRRD or MetaImage file",
            f"none that ITK reads: {last}",
            "export it again, or convert it to NIfTI",
        ) from error
    components = array.shape[len(size) :]
    # ITK's arrays begin with the last axis, and end with the components.
    order = (*reversed(range(len(size))), *range(len(size), array.ndim))
    turn = np.array(image.GetDirection()).reshape(len(size), len(size))
    vox2world = np.eye(4)
    vox2world[:3, :3] = turn[:3, :3] * np.array(image.GetSpacing())[None, :3]
    vox2world[:3, 3] = image.GetOrigin()[:3]
    told = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    voxels = array.transpose(order).reshape(*size[:3], *components)
    return Image(voxels, vox2world, told)


def data_files(path: str | os.PathLike) -> list[Path]:
    """Names the files that a detached header may take its voxels from.

    Args:
        path: of the header.

    Returns:
        Those of its stem that lie beside a `.mhd` or `.nhdr`; none for other names.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    data = (path.with_suffix(ending) for ending in _DATA_ENDINGS)
    return [p for p in data if p.is_file()]


def check_own_voxels(path: str | os.PathLike) -> None:
    """Refuses a header that takes its voxels from a file of another name.

    Args:
        path: `.nrrd`, `.nhdr`, `.mha` or `.mhd`, a regular file.

    Raises:
        UserError: `path_escape`; `not_nifti` for a header that does not end.
    """
    with open(path, "rb") as file:
        head = file.read(_LARGEST_HEADER + 1)
    allowed = {os.fsencode(p.name) for p in data_files(path)}
    meta = IMAGE_IO[Path(path).suffix.lower()] == "MetaImageIO"
    if meta:
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


def _check_meta_place(path: str | os.PathLike) -> None:
    """Refuses a MetaImage that does not tell its spacing, or how it is turned."""
    with open(path, "rb") as file:
        head = file.read(_LARGEST_HEADER).partition(b"ElementDataFile")[0]
    told = {key.lower(): value for key, value in _META_LINE.findall(head)}
    if not _META_SPACING & told.keys():
        raise bad_file(
            path,
            "spacing",
            "a line ElementSpacing",
            "none",
            "add it, in mm: ElementSpacing = 0.9 0.9 2.5",
        )
    if not _META_TURN & told.keys() and told.get(b"anatomicalorientation") != _META_LPS:
        raise bad_file(
            path,
            "orientation_unknown",
            "a line TransformMatrix",
            "none",
            "add it: TransformMatrix = 1 0 0 0 1 0 0 0 1 if x runs to the patient's "
            "left, y to the back and z to the head",
        )
