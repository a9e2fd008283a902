"""One way into the package for scans of every kind: NIfTI, NRRD, MetaImage, DICOM.

NIfTI needs nothing more; NRRD and MetaImage need SimpleITK (the extra `itk`), a folder
of DICOM slices pydicom (the extra `dicom`). Whatever it came from, a volume has LPS+
axes, and its results go back to the grid that was stored.
"""

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from unireg_jax.errors import FAILED, LIMIT, UserError, bad_file
from unireg_jax.imaging import dicom, itk_files, nifti, orientation
from unireg_jax.imaging.nifti import Native, Volume

ITK_ENDINGS = tuple(itk_files.IMAGE_IO)
_LPS = "left-posterior-superior"  # of what ITK has brought there


def read_scan(path: str | os.PathLike, *, max_voxels: int = 2**29) -> Volume:
    """Reads an intensity image, HU for a CT, on LPS+ axes.

    Args:
        path: `.nii`, `.nii.gz`; `.nrrd`, `.nhdr`, `.mha`, `.mhd`; or a folder with the
            slices of one DICOM series.
        max_voxels: refuse larger images before any voxel is read.

    Returns:
        Volume; data int16 when stored as whole numbers that fit (DICOM: when they
        are such), else float32. Its header is that of the NIfTI file, or one made for
        the stored grid. A label map in place of an image is warned of, `label_value`.

    Raises:
        UserError: what `nifti.read_image` and `dicom.read_series` raise;
            `not_installed`, exit code 2, without the package that reads the format.
    """
    return _told_labels(_read_image(path, max_voxels))


def is_image(scan: Any) -> bool:
    """Says whether nibabel, as NIfTI, or SimpleITK holds a scan.

    Args:
        scan: anything.

    Returns:
        Whether `take_image` takes it.
    """
    # By name: an image is there only if its package is.
    of_itk = type(scan).__module__.partition(".")[0] == "SimpleITK"
    return isinstance(scan, nib.Nifti1Pair) or of_itk and hasattr(scan, "GetDirection")


def take_image(image: Any, name: str, *, max_voxels: int = 2**29) -> Volume:
    """Takes an image of nibabel or SimpleITK as `read_scan` takes its file.

    Args:
        image: see `is_image`; left as it is.
        name: for messages.
        max_voxels: refuse larger images before any voxel is read.

    Returns:
        Volume, as of the file; without a path.

    Raises:
        UserError: as `read_scan`.
    """
    if isinstance(image, nib.Nifti1Pair):
        return _told_labels(nifti.take_image(image, name, max_voxels=max_voxels))
    parts = 2 if "complex" in image.GetPixelIDTypeAsString() else 1
    parts *= image.GetNumberOfComponentsPerPixel()
    _check_shape(name, image.GetSize(), parts, max_voxels)
    array, vox2world = itk_files.placed(image)
    warnings = nifti.check_axes(name, vox2world)
    _check_extent(name, array, vox2world)
    volume = _itk_image(name, array, vox2world, warnings)
    return _told_labels(volume._replace(path=None))


def _told_labels(volume: Volume) -> Volume:
    """With a warning where an image looks like a label map."""
    if like_labels(volume.data):
        line = f"label_value: whole values from 0 to {volume.data.max()}, most of them "
        line += "0: a label map? pass the scan itself"
        return volume._replace(warnings=(*volume.warnings, line))
    return volume


def _read_image(path: str | os.PathLike, max_voxels: int) -> Volume:
    """Of whatever kind."""
    if os.path.isdir(path):
        return _with_header(dicom.read_series(path, max_voxels=max_voxels))
    if not _is_itk(path):
        return nifti.read_image(path, max_voxels=max_voxels)
    return _itk_image(path, *_read_itk(path, max_voxels))


def _itk_image(path, array: np.ndarray, vox2world: np.ndarray, warnings) -> Volume:
    """Of ITK's voxels."""
    array = _narrowed(path, array)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise _fault(
            "nonfinite",
            path,
            "finite voxels",
            f"{count} NaN or infinite",
            "replace them with air (-1000 HU)",
        )
    return _volume(
        path, array, vox2world, [*warnings, *nifti.intensity_warnings(array)]
    )


def read_labels(path: str | os.PathLike, *, max_voxels: int = 2**29) -> Volume:
    """Reads a label map on LPS+ axes.

    Args:
        path: NIfTI, NRRD or MetaImage of whole numbers, 0 is background.
        max_voxels: refuse larger images before any voxel is read.

    Returns:
        Volume; data uint8 when all ids are below 256, else uint16.

    Raises:
        UserError: as `read_scan`; `label_value` for halves, negatives, NaN or ids above
            65535.
    """
    if not _is_itk(path):
        return nifti.read_labels(path, max_voxels=max_voxels)
    array, vox2world, warnings = _read_itk(path, max_voxels)
    whole = bool((array == np.rint(array)).all())
    low, high = (array.min(), array.max()) if whole else (np.nan, np.nan)
    if not (whole and low >= 0 and high <= 65535):
        raise _fault(
            "label_value",
            path,
            "whole label ids from 0 to 65535",
            f"{low:g} to {high:g}" if whole else "fractions or NaN",
            "pass the label map, not an image or a probability map",
        )
    labels = array.astype(np.uint8 if high < 256 else np.uint16)
    return _volume(path, labels, vox2world, warnings)


def read_grid(path: str | os.PathLike) -> Volume:
    """Reads geometry and header of a scan, and keeps none of its voxels.

    Args:
        path: as of `read_scan`.

    Returns:
        Volume; data of its shape, 0 throughout, that takes no memory.

    Raises:
        UserError: as `read_scan`.
    """
    return without_voxels(read_scan(path))


def without_voxels(volume: Volume) -> Volume:
    """Gives the same geometry and header, so that the voxels' memory can go."""
    none = np.broadcast_to(np.uint8(0), volume.data.shape)
    return volume._replace(data=none)


def like_labels(data: np.ndarray, *, background: float = 0.5) -> bool:
    """Says whether voxels look like a label map rather than an image.

    Args:
        data: [X, Y, Z] numbers, HU for a CT.
        background: at least this share of a label map is 0.

    Returns:
        Whether they are few whole ids from 0 on: a CT has negative values, an image of
        another kind many.
    """
    sample = data[tuple(slice(None, None, max(1, n // 64)) for n in data.shape)]
    ids = np.unique(sample)
    whole = 1 < ids.size < 150 and bool((ids == np.rint(ids)).all())
    return bool(whole and data.min() == 0 and (sample == 0).mean() >= background)


def files_of(path: str | os.PathLike) -> list[Path]:
    """Names the files that a scan is made of, for digests.

    Args:
        path: as `read_scan` takes it.

    Returns:
        The file itself; with a `.mhd` or `.nhdr` also the data file of its stem that
        lies beside it; of a folder, its DICOM files that are not hidden, by name, or
        all where none is DICOM.
    """
    path = Path(path)
    if os.path.isdir(path):
        files = sorted(
            p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")
        )
        return [p for p in files if dicom.may_be_slice(p)] or files
    return [path, *itk_files.data_files(path)]


def _is_itk(path: str | os.PathLike) -> bool:
    return os.fspath(path).lower().endswith(ITK_ENDINGS)


def _with_header(volume: Volume) -> Volume:
    """Adds a header for the stored grid, so that results are written on it."""
    header = nib.Nifti1Header()
    nifti.set_geometry(header, volume.native.vox2world)
    return volume._replace(header=header)


def _volume(path, array, vox2world, warnings) -> Volume:
    data, turned = orientation.reorient(array, vox2world)
    native = Native(array.shape, vox2world)
    return _with_header(
        Volume(data, turned, None, os.fspath(path), native, tuple(warnings))
    )


def _read_itk(path, max_voxels) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Voxels [X, Y, Z] as stored, voxel -> LPS mm, and warnings."""

    def check(size: tuple[int, ...], components: int) -> None:
        _check_shape(path, size, components, max_voxels)

    image = itk_files.read(path, check)
    # ITK takes what tells no space, or one of a scanner, for LPS.
    space = image.told.get("NRRD_space", "none")
    if Path(path).suffix.lower() in (".nrrd", ".nhdr") and space != _LPS:
        raise _fault(
            "orientation_unknown",
            path,
            "a space of the patient such as left-posterior-superior",
            space,
            "set it with a tool that knows how the patient lay",
        )
    _check_extent(path, image.voxels, image.vox2world)
    return np.ascontiguousarray(image.voxels), image.vox2world, image.warnings


def _check_extent(path, array: np.ndarray, vox2world: np.ndarray) -> None:
    spacing = np.array(orientation.spacing_mm(vox2world))
    nifti.check_extent(path, array.shape, spacing)


def _check_shape(path, size, components, max_voxels) -> None:
    """One 3-D volume of numbers, not too many of them."""
    if components != 1 or len(size) < 3 or any(n != 1 for n in size[3:]):
        raise _fault(
            "ndim",
            path,
            "one 3-D volume of numbers",
            f"{'x'.join(map(str, size))} with {components} values per voxel",
            "extract one frame",
        )
    if np.prod([float(n) for n in size]) > max_voxels:
        raise _fault(
            "too_large",
            path,
            f"at most {max_voxels} voxels",
            "x".join(map(str, size)),
            "crop or resample the volume",
        )


def _narrowed(path, array: np.ndarray) -> np.ndarray:
    """int16 of whole numbers that fit, else float32, as of NIfTI."""
    whole = array.dtype.kind in "iu"
    if whole and array.min() >= -32768 and array.max() <= 32767:
        return array.astype(np.int16)
    with np.errstate(over="ignore"):  # infinite, and refused as such
        out = array.astype(np.float32)
    if whole and (changed := np.count_nonzero(out.astype(np.float64) != array)):
        raise _fault(
            "dtype",
            path,
            f"whole numbers up to {nifti.EXACT}",
            f"{changed} that are larger",
            "renumber the ids to 65535 at most",
        )
    return out


def _fault(reason, path, expected, got, remedy) -> UserError:
    code = LIMIT if reason == "too_large" else FAILED
    return bad_file(path, reason, expected, got, remedy, code)
