"""Scans that are damaged in every way of docs/malformed_inputs.md, and their reasons.

Files are made byte by byte, without the writer and the reader under test.
"""

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from unireg_jax.imaging import orientation


def encode(
    array: np.ndarray,
    vox2world: np.ndarray,
    *,
    order: str = "<",
    kind: type = nib.Nifti1Header,
    **fields,
) -> bytes:
    """Gives the bytes of a NIfTI file.

    Args:
        array: [X, Y, Z] of any type.
        vox2world: [4, 4], LPS mm.
        order: "<" or ">".
        kind: of header.
        fields: of the header, set last; (index, value) sets one of several numbers.

    Returns:
        Header, four bytes of no extension, voxels.
    """
    header = kind(endianness=order)
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    affine = orientation.ras_from_lps(vox2world)
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header.set_xyzt_units("mm")
    header["magic"] = header.single_magic
    header["vox_offset"] = header.sizeof_hdr + 4
    header["scl_slope"], header["scl_inter"] = 1, 0
    for name, value in fields.items():
        if isinstance(value, tuple):
            index, value = value
            header[name][index] = value
        else:
            header[name] = value
    data = array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")
    return header.binaryblock + b"\0\0\0\0" + data


class Kind(NamedTuple):
    """One kind of damage.

    Attributes:
        name: unique.
        row: of docs/malformed_inputs.md.
        reason: that it must be refused with.
        write: write(folder, array, vox2world) makes the files and gives the columns of
            a list of pairs that name them.
    """

    name: str
    row: int
    reason: str
    write: Callable[[Path, np.ndarray, np.ndarray], dict[str, str]]


Make = Callable[[np.ndarray, np.ndarray], bytes]


def _kind(name: str, row: int, reason: str, make: Make, ending=".nii") -> Kind:
    """Damage of the bytes of the moving scan."""

    def write(folder, array, vox2world):
        (folder / f"moving{ending}").write_bytes(make(array, vox2world))
        return {"moving": f"moving{ending}"}

    return Kind(name, row, reason, write)


def _header(name: str, row: int, reason: str, **fields) -> Kind:
    return _kind(name, row, reason, lambda a, m: encode(a, m, **fields))


def _packed(name: str, row: int, reason: str, change: Callable, level=6) -> Kind:
    """Damage of the gzip stream."""

    def make(array, vox2world):
        return bytes(change(bytearray(gzip.compress(encode(array, vox2world), level))))

    return _kind(name, row, reason, make, ".nii.gz")


def _content(name: str, content: bytes) -> Kind:
    return _kind(name, 9, "not_nifti", lambda a, m: content)


def _flip(content: bytearray, place: int) -> bytearray:
    content[place] ^= 16
    return content


def _deflate(content: bytearray) -> bytearray:
    content[12:16] = b"\xff\xff\xff\xff"
    return content


def _voxel(value: float) -> Make:
    def make(array, vox2world):
        array = array.astype("f8")
        array[2, 3, 4] = value
        return encode(array, vox2world)

    return make


def _bomb(honest: bool) -> Make:
    """64 MiB of zeros in 64 KiB, behind a header that admits them or does not."""

    def make(array, vox2world):
        fields = {"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]} if honest else {}
        content = encode(array, vox2world, **fields) + bytes(2**26)
        return gzip.compress(content, 1)

    return make


def _bytes_of(name: str, row: int, reason: str, place: int, new: bytes) -> Kind:
    def make(array, vox2world):
        content = encode(array, vox2world)
        return content[:place] + new + content[place + len(new) :]

    return _kind(name, row, reason, make)


def _special(name: str, row: int, reason: str, make: Callable[[Path], None]) -> Kind:
    """What is no file at all."""

    def write(folder, array, vox2world):
        make(folder / "moving.nii")
        return {"moving": "moving.nii"}

    return Kind(name, row, reason, write)


def _labels(name: str, row: int, reason: str, change: Callable) -> Kind:
    """Damage of the moving label map; change(labels, vox2world) -> the same two."""

    def write(folder, array, vox2world):
        labels = (array > -200).astype("f4")
        files = {"moving": (array, vox2world), "moving_label": (labels, vox2world)}
        files["moving_label"] = change(labels.copy(), vox2world.copy())
        for column, (data, place) in files.items():
            (folder / f"{column}.nii").write_bytes(encode(data, place))
        # Labels of the fixed scan are the caller's.
        return {column: f"{column}.nii" for column in files}

    return Kind(name, row, reason, write)


def _label_value(value: float) -> Callable:
    def change(labels, vox2world):
        labels[2, 3, 4] = value
        return labels, vox2world

    return change


def _moved(mm: float) -> Callable:
    def change(labels, vox2world):
        vox2world[2, 3] += mm
        return labels, vox2world

    return change


def _mirrored(labels, vox2world):
    vox2world[0, :] *= -1
    return labels, vox2world


def _far(array, vox2world):
    vox2world = vox2world.copy()
    vox2world[2, 3] += 5000.0
    return encode(array, vox2world)


def _extra(column: str, name: str, content: bytes) -> Callable:
    """A sound scan with another file that is none."""

    def write(folder, array, vox2world):
        (folder / "moving.nii").write_bytes(encode(array, vox2world))
        (folder / name).write_bytes(content)
        return {"moving": "moving.nii", column: name}

    return write


def _uneven_points(folder, array, vox2world):
    (folder / "moving.nii").write_bytes(encode(array, vox2world))
    (folder / "f.csv").write_text("x,y,z\n1,2,3\n4,5,6\n")
    (folder / "m.csv").write_text("x,y,z\n1,2,3\n")
    columns = {"fixed_points": "f.csv", "moving_points": "m.csv"}
    return {"moving": "moving.nii"} | columns


def _spread(spacing) -> Make:
    return lambda a, m: encode(a, np.diag([*spacing, 1.0]))


def _tall(array, vox2world):
    return encode(np.concatenate([array] * 3, axis=2), np.diag([12.0, 13.0, 99.0, 1]))


KINDS = (
    _kind("empty", 1, "empty", lambda a, m: b""),
    _kind("empty_packed", 1, "empty", lambda a, m: b"", ".nii.gz"),
    _kind("gzip_of_nothing", 1, "empty", lambda a, m: gzip.compress(b""), ".nii.gz"),
    _kind("cut_in_header", 2, "truncated", lambda a, m: encode(a, m)[:200]),
    _kind("no_voxels", 2, "truncated", lambda a, m: encode(a, m)[:352]),
    _kind("one_byte_short", 3, "truncated", lambda a, m: encode(a, m)[:-1]),
    _kind("half", 3, "truncated", lambda a, m: encode(a, m)[: 352 + a.size]),
    _packed("stream_cut", 4, "truncated", lambda c: c[: len(c) // 2]),
    _packed("trailer_missing", 4, "truncated", lambda c: c[:-8]),
    _packed("wrong_crc", 4, "checksum", lambda c: _flip(c, -8)),
    _packed("wrong_length", 4, "checksum", lambda c: _flip(c, -4)),
    _packed("flipped_bit", 5, "checksum", lambda c: _flip(c, -100), 0),
    _packed("broken_deflate", 5, "checksum", _deflate),
    _kind("trailing", 6, "trailing_data", lambda a, m: encode(a, m) + bytes(1 << 18)),
    _packed("gzip_in_gzip", 8, "name_mismatch", gzip.compress),
    _kind("plain_as_gz", 8, "name_mismatch", encode, ".nii.gz"),
    _kind("gz_as_plain", 8, "name_mismatch", lambda a, m: gzip.compress(encode(a, m))),
    _content("html", b"<!DOCTYPE html><html>404</html>"),
    _content("lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid"),
    _content("png", b"\x89PNG\r\n\x1a\n" + bytes(400)),
    _content("dicom", bytes(128) + b"DICM" + bytes(400)),
    _content("noise", bytes(range(7, 256)) * 3),
    _kind("bomb", 10, "too_large", _bomb(True), ".nii.gz"),
    _kind("hidden_bomb", 11, "trailing_data", _bomb(False), ".nii.gz"),
    _header("terabytes", 12, "too_large", dim=[3, 20000, 20000, 20000, 1, 1, 1, 1]),
    _bytes_of("no_axes", 13, "ndim", 40, struct.pack("<h", 0)),
    _bytes_of("two_axes", 13, "ndim", 40, struct.pack("<h", 2)),
    _bytes_of("many_axes", 13, "ndim", 40, struct.pack("<h", 32767)),
    _header("zero_size", 13, "dims", dim=[3, 0, 6, 7, 1, 1, 1, 1]),
    _header("negative_sizes", 13, "dims", dim=[3, -5, -6, 7, 1, 1, 1, 1]),
    _kind("frames", 14, "ndim", lambda a, m: encode(np.stack([a, a], -1), m)),
    _header("rgb", 15, "dtype", datatype=128),
    _header("complex", 15, "dtype", datatype=32),
    _header("unknown_type", 15, "dtype", datatype=999),
    _header("bits", 16, "dtype", bitpix=8),
    _bytes_of("sizeof_hdr", 16, "not_nifti", 0, struct.pack("<i", 349)),
    _header("analyze", 17, "orientation_unknown", magic=b""),
    _header("offset_nan", 18, "offset", vox_offset=np.nan),
    _header("offset_in_header", 18, "offset", vox_offset=200),
    _header("affine_nan", 20, "affine_nonfinite", srow_x=(0, np.nan)),
    _header("affine_huge", 20, "affine_nonfinite", srow_z=(2, 1e30)),
    _header("origin_far", 20, "affine_nonfinite", srow_x=(3, 1e9)),
    _header("singular", 21, "affine_singular", srow_z=0),
    _header("qform_nan", 23, "affine_nonfinite", sform_code=0, quatern_b=np.nan),
    _header("spacing_zero", 24, "spacing", pixdim=(1, 0.0)),
    _header("spacing_huge", 24, "spacing", srow_x=[-400.0, 0, 0, 0]),
    _kind("small_field", 24, "fov", _spread((0.2, 0.2, 0.2))),
    _kind("large_field", 24, "fov", _tall),
    _header("negative", 25, "orientation_conflict", sform_code=0, pixdim=(2, -3.0)),
    _header("mirrored_forms", 26, "orientation_conflict", pixdim=(0, -1.0)),
    _header("no_forms", 27, "orientation_unknown", sform_code=0, qform_code=0),
    _header("metres", 29, "units", xyzt_units=1),
    _header("intercept_nan", 30, "scaling", scl_inter=np.nan),
    _header("slope_huge", 30, "scaling", scl_slope=1e30),
    _kind("one_nan", 33, "nonfinite", _voxel(np.nan)),
    _kind("one_infinity", 33, "nonfinite", _voxel(np.inf)),
    _kind("one_slice", 37, "fov", lambda a, m: encode(a[:, :, :1], m)),
    _kind("far_apart", 38, "no_overlap", _far),
    _labels("label_fraction", 40, "label_value", _label_value(0.5)),
    _labels("label_negative", 40, "label_value", _label_value(-1)),
    _labels("label_nan", 40, "label_value", _label_value(np.nan)),
    _labels("label_moved", 41, "grid_mismatch", _moved(3.0)),
    _labels("label_mirrored", 41, "mirrored", _mirrored),
    _special("absent", 56, "not_found", lambda path: None),
    _special("folder", 44, "not_dicom", lambda path: path.mkdir()),
    _special("pipe", 44, "not_a_file", os.mkfifo),
    _special("dangling", 44, "not_found", lambda path: path.symlink_to("gone.nii")),
    _special("own_link", 44, "not_found", lambda path: path.symlink_to(path.name)),
    Kind("mask_html", 9, "not_nifti", _extra("fixed_mask", "m.nii", b"<html>404")),
    Kind("init_text", 9, "schema", _extra("init", "a.txt", b"no transform")),
    Kind("points_differ", 52, "schema", _uneven_points),
)
