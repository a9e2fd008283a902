"""Reading and writing NIfTI: every orientation and type in, every fault by its name."""

import errno
import gzip
import io
import os
import socket
import struct
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from experiments.faults import scans
from tests import oracles
from tests.grids import ALL_CODES, oblique
from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti, orientation

SHAPE = (5, 6, 7)
SPACING = (3.0, 2.5, 4.0)


def straight():
    return np.diag([*SPACING, 1.0])


def scan(shape=SHAPE):
    """Whole HU from -1000 to 800, no two voxels alike."""
    return np.linspace(-1000, 800, int(np.prod(shape))).round().reshape(shape)


def encode(array, vox2world=None, **fields):
    """Bytes of a NIfTI file, made without the writer under test."""
    return scans.encode(array, straight() if vox2world is None else vox2world, **fields)


def put(folder, content, name="scan.nii"):
    path = folder / name
    path.write_bytes(content)
    return path


def refuse(path, reason, match, exit_code=errors.FAILED, read=nifti.read_image):
    with pytest.raises(UserError, match=match) as caught:
        read(path)
    assert caught.value.reason == reason
    assert caught.value.exit_code == exit_code
    line = str(caught.value)
    assert "\n" not in line and f": {reason}: expected " in line and "; " in line
    return line


# --- what is read -------------------------------------------------------------------


@pytest.mark.parametrize("codes", ALL_CODES)
def test_read_image_all_orientations_give_one_volume(tmp_path, codes):
    data, world = orientation.reorient(scan().astype("i2"), oblique(), codes)
    volume = nifti.read_image(put(tmp_path, encode(data, world)))
    np.testing.assert_array_equal(volume.data, scan())
    # float32 sform of coordinates around 100 mm
    np.testing.assert_allclose(volume.vox2world, oblique(), atol=2e-5)
    assert volume.native.shape == data.shape
    np.testing.assert_allclose(volume.native.vox2world, world, atol=2e-5)
    assert volume.data.dtype == np.int16 and volume.data.flags.c_contiguous


TYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", TYPES)
def test_read_image_types_and_byte_orders(tmp_path, dtype, order):
    values = scan() if np.dtype(dtype).itemsize > 1 else np.rint(scan() / 10)
    stored = values + 1024 if dtype[0] == "u" else values
    fields = {"scl_inter": -1024} if dtype[0] == "u" else {}
    if dtype == "u1":
        stored, fields = values + 100, {"scl_inter": -100}
    content = encode(stored.astype(dtype), order=order, **fields)
    volume = nifti.read_image(put(tmp_path, gzip.compress(content), "scan.nii.gz"))
    assert volume.data.dtype == (np.float32 if dtype[0] == "f" else np.int16)
    assert volume.data.dtype.isnative
    np.testing.assert_array_equal(volume.data, values)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ("i2", "u2", "f4", "f8"))
def test_read_image_every_orientation_of_types_and_orders(tmp_path, dtype, order):
    """One volume, whichever of 48 ways, four types and two byte orders stores it."""
    offset = 1024 if dtype == "u2" else 0
    for codes in ALL_CODES:
        data, world = orientation.reorient(scan() + offset, oblique(), codes)
        content = encode(data.astype(dtype), world, order=order, scl_inter=-offset)
        volume = nifti.read_image(put(tmp_path, content))
        np.testing.assert_array_equal(volume.data, scan())
        np.testing.assert_allclose(volume.vox2world, oblique(), atol=2e-5)


def test_read_image_nifti2(tmp_path):
    content = encode(scan().astype("f4"), oblique(), kind=nib.Nifti2Header)
    volume = nifti.read_image(put(tmp_path, content))
    turned, world = orientation.reorient(scan(), oblique())
    np.testing.assert_allclose(volume.data, turned, atol=1e-4)  # float32 HU
    np.testing.assert_allclose(volume.vox2world, world, atol=1e-12)


def test_read_image_slope_gives_float(tmp_path):
    stored = np.arange(210).reshape(SHAPE).astype("i2")
    content = encode(stored, scl_slope=0.5, scl_inter=-10.25)
    volume = nifti.read_image(put(tmp_path, content))
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, stored * 0.5 - 10.25)


def test_read_image_wide_integers_become_float(tmp_path):
    stored = np.arange(210).reshape(SHAPE).astype("i4") * 1000
    volume = nifti.read_image(put(tmp_path, encode(stored)))
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, stored)


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
def test_read_image_no_slope_reads_as_stored(tmp_path, slope):
    content = encode(scan().astype("i2"), scl_slope=slope, scl_inter=77)
    volume = nifti.read_image(put(tmp_path, content))
    np.testing.assert_array_equal(volume.data, scan())
    assert any("scaling" in line for line in volume.warnings) == (slope != 0)


def test_read_image_one_frame_is_accepted(tmp_path):
    volume = nifti.read_image(put(tmp_path, encode(scan().astype("i2")[..., None])))
    np.testing.assert_array_equal(volume.data, scan())


@pytest.mark.parametrize("qfac", [1.0, -1.0, 0.0])
def test_read_image_qform_alone(tmp_path, qfac):
    world = oblique() @ np.diag([1, 1, -1 if qfac < 0 else 1, 1.0])
    content = encode(scan().astype("i2"), world, sform_code=0, pixdim=(0, qfac))
    volume = nifti.read_image(put(tmp_path, content))
    np.testing.assert_allclose(volume.native.vox2world, world, atol=1e-4)  # quaternion


@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("codes", ALL_CODES)
def test_read_image_qform_alone_agrees_with_nibabel(tmp_path, codes, kind):
    """Half turns store b, c, d of float32 length below 1: no fourth number is left."""
    shape = (9, 10, 120)
    data, world = orientation.reorient(scan(shape).astype("i2"), straight(), codes)
    path = put(tmp_path, encode(data, world, kind=kind, sform_code=0))
    volume = nifti.read_image(path)
    expected = nib.load(path).header.get_qform()
    np.testing.assert_array_equal(volume.data, scan(shape))
    # float64, the same formula; without the threshold 1e-3 mm per voxel.
    found = orientation.ras_from_lps(volume.native.vox2world)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_read_image_of_half_turn_by_simpleitk_has_no_conflict(tmp_path):
    data, world = orientation.reorient(
        scan((9, 10, 120)).astype("i2"), straight(), "SPR"
    )
    path = tmp_path / "peer.nii"
    sitk.WriteImage(oracles.itk_image(data, world), path)
    header, volume = nib.load(path).header, nifti.read_image(path)
    stored = [float(header[f"quatern_{letter}"]) for letter in "bcd"]
    assert stored == [float(np.float32(np.sqrt(0.5))), 0.0, stored[0]]
    assert volume.warnings == ()
    np.testing.assert_allclose(volume.native.vox2world, world, atol=1e-5)  # float32


def test_read_image_qform_keeps_a_turn_that_is_nearly_half(tmp_path):
    """0.2 degrees from half a turn: above the threshold the fourth number counts."""
    half = np.deg2rad(179.8) / 2
    turned = dict(quatern_b=np.sin(half), quatern_d=0.0)
    content = encode(scan().astype("i2"), sform_code=0, **turned)
    volume = nifti.read_image(put(tmp_path, content))
    turn = nib.quaternions.quat2mat([np.cos(half), np.sin(half), 0, 0])
    found = orientation.ras_from_lps(volume.native.vox2world)
    # float32 of sin(half), near 1, keeps the angle to 1e-4.
    np.testing.assert_allclose(found[:3, :3], turn * SPACING, atol=1e-3)


def test_read_image_skips_extension(tmp_path):
    content = encode(scan().astype("i2"), vox_offset=352 + 48)
    content = content[:348] + b"\1\0\0\0" + b"\xff" * 48 + content[352:]
    volume = nifti.read_image(put(tmp_path, content))
    np.testing.assert_array_equal(volume.data, scan())


@pytest.mark.parametrize("size", [0, -1, -(2**31), 2**31 - 1, 24, 8, 64])
@pytest.mark.parametrize("order", "<>")
def test_read_image_warns_of_bad_extension_and_ends(tmp_path, size, order):
    content = encode(scan().astype("i2"), order=order, vox_offset=352 + 48)
    extension = struct.pack(order + "ii", size, 6) + bytes(40)
    content = content[:348] + b"\1\0\0\0" + extension + content[352:]
    volume = nifti.read_image(put(tmp_path, content))
    assert volume.warnings == (f"offset: a header extension of {size} bytes, skipped",)
    np.testing.assert_array_equal(volume.data, scan())


def test_read_image_of_good_extensions_has_no_warning(tmp_path):
    content = encode(scan().astype("i2"), vox_offset=352 + 48)
    extensions = struct.pack("<ii8x", 16, 6) + struct.pack("<ii24x", 32, 4)
    content = content[:348] + b"\1\0\0\0" + extensions + content[352:]
    assert nifti.read_image(put(tmp_path, content)).warnings == ()


def test_read_image_warns_of_announced_extension_that_is_absent(tmp_path):
    content = bytearray(encode(scan().astype("i2")))
    content[348] = 1
    volume = nifti.read_image(put(tmp_path, content))
    assert volume.warnings == (
        "offset: header extensions are announced, none is there",
    )


def test_read_image_joined_gzip_members_with_odd_name(tmp_path):
    content, packed = encode(scan().astype("i2")), io.BytesIO()
    with gzip.GzipFile("../../x\n.nii", "wb", fileobj=packed) as file:
        file.write(content[:500])
    whole = packed.getvalue() + gzip.compress(content[500:])
    volume = nifti.read_image(put(tmp_path, whole, "scan.nii.gz"))
    np.testing.assert_array_equal(volume.data, scan())
    assert volume.warnings == ()


@pytest.mark.parametrize(
    "name",
    [
        "a b.nii",
        "-x.nii",
        "%s{}$(y).nii",
        "é\n1.2.3.NII",
        "'\".nii",
        os.fsdecode(b"\xff\xfe.nii"),
        "n" * 243 + ".nii",
        "1.2.840.113619.2.55.nii",
    ],
)
def test_read_image_odd_names(tmp_path, name):
    volume = nifti.read_image(put(tmp_path, encode(scan().astype("i2")), name))
    np.testing.assert_array_equal(volume.data, scan())


def test_read_image_is_not_mapped(tmp_path):
    path = put(tmp_path, encode(scan().astype("i2")))
    volume = nifti.read_image(path)
    path.write_bytes(b"")  # a mapped array would now raise SIGBUS
    np.testing.assert_array_equal(volume.data, scan())


def test_read_image_shortened_while_being_read_is_truncated(tmp_path, monkeypatch):
    path = put(tmp_path, encode(scan((50, 60, 70)).astype("i2")))
    plain = nifti._check_affine

    def shorten(*args):
        os.truncate(path, 100_000)
        return plain(*args)

    monkeypatch.setattr(nifti, "_check_affine", shorten)
    refuse(path, "truncated", "bytes of voxels")


def test_read_image_keeps_padding_metal_and_denormals(tmp_path):
    array = scan().astype("i2")
    array[0, 0, :2] = -3024, 30000
    volume = nifti.read_image(put(tmp_path, encode(array)))
    np.testing.assert_array_equal(volume.data, array)
    assert volume.warnings == ()
    tiny = scan().astype("f4")
    tiny[0, 0, 0] = 1e-40
    volume = nifti.read_image(put(tmp_path, encode(tiny), "tiny.nii"))
    np.testing.assert_array_equal(volume.data, tiny)


def test_read_image_negative_slope_warns(tmp_path):
    content = encode(scan().astype("i2"), scl_slope=-1)
    volume = nifti.read_image(put(tmp_path, content))
    np.testing.assert_array_equal(volume.data, -scan())
    assert volume.warnings[0].startswith("hu_range: not Hounsfield units?")


def test_read_image_hardly_sheared_has_no_warning(tmp_path):
    content = encode(scan().astype("i2"), srow_x=(1, 1e-6), qform_code=0)
    assert nifti.read_image(put(tmp_path, content)).warnings == ()


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP", "AIR"])
def test_read_image_agrees_with_simpleitk(tmp_path, codes):
    data, world = orientation.reorient(scan().astype("i2"), oblique(), codes)
    path = put(tmp_path, encode(data, world))
    volume, peer = nifti.read_image(path), sitk.ReadImage(str(path))
    to_voxel = np.linalg.inv(volume.vox2world)
    for index in ((0, 0, 0), (4, 1, 2), (1, 2, 3)):
        point = np.array(peer.TransformIndexToPhysicalPoint(index))
        place = to_voxel[:3, :3] @ point + to_voxel[:3, 3]
        np.testing.assert_allclose(place, np.rint(place), atol=1e-4)  # float32 forms
        assert volume.data[tuple(np.rint(place).astype(int))] == peer[index]


def test_read_image_of_simpleitk_file(tmp_path):
    peer = sitk.GetImageFromArray(scan((7, 6, 5)).astype("i2"))
    peer.SetSpacing(SPACING)
    peer.SetOrigin((-20, 35, -110))
    turn = oblique()[:3, :3] / np.array(SPACING)
    peer.SetDirection(turn.ravel().tolist())
    sitk.WriteImage(peer, str(tmp_path / "peer.nii.gz"))
    volume = nifti.read_image(tmp_path / "peer.nii.gz")
    np.testing.assert_array_equal(volume.data, scan((7, 6, 5)).transpose(2, 1, 0))
    np.testing.assert_allclose(volume.vox2world, oblique(), atol=1e-4)


@pytest.mark.parametrize("dtype, expected", [("u1", "u1"), ("i4", "u2"), ("f8", "u2")])
def test_read_labels_types(tmp_path, dtype, expected):
    ids = np.arange(210).reshape(SHAPE) * (1 if expected == "u1" else 300)
    volume = nifti.read_labels(put(tmp_path, encode(ids.astype(dtype))))
    assert volume.data.dtype == expected
    np.testing.assert_array_equal(volume.data, ids)


# --- warnings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "array, word",
    [
        (np.zeros(SHAPE), "constant: every voxel is 0"),
        (scan() / 2000 + 0.5, "hu_range"),
        (scan() + 1024, "hu_range"),
        (np.where(scan() < 500, 1000, -scan()), "hu_range"),  # air at +1000
        (np.clip(scan() / 8 + 100, 0, 255), "hu_range"),  # an 8-bit window
        (-scan(), "hu_range"),
    ],
)
def test_read_image_warns_of_odd_intensities(tmp_path, array, word):
    volume = nifti.read_image(put(tmp_path, encode(array.astype("f4"))))
    assert len(volume.warnings) == 1 and volume.warnings[0].startswith(word)


def test_read_image_warns_of_padding_that_counts_as_body(tmp_path):
    hu = np.random.default_rng(0).normal(40, 30, (24, 24, 24)).astype("i2")
    hu[:8] = -1000
    assert nifti.intensity_warnings(hu) == []
    assert nifti.intensity_warnings(hu // 16 * 16) == []  # coarse steps are no fill
    hu[..., 20:] = 0
    volume = nifti.read_image(put(tmp_path, encode(hu)))
    (line,) = volume.warnings
    assert line.startswith("padding: 17 % of the voxels are exactly 0 HU")


def test_read_image_of_ct_has_no_warning(tmp_path):
    assert nifti.read_image(put(tmp_path, encode(scan().astype("i2")))).warnings == ()


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"qoffset_x": 12.0}, "orientation_conflict: sform and qform differ by"),
        ({"srow_x": (1, 0.5)}, "orientation_conflict: axes are not perpendicular"),
        ({"quatern_b": np.nan}, "orientation_conflict: the qform is not finite"),
        ({"pixdim": (2, 2.0)}, "spacing: pixdim"),
        ({"pixdim": (0, 5.0)}, "orientation_conflict: qfac is 5, read as 1"),
        ({"vox_offset": 352.5}, "offset: vox_offset is 352.5, read as 352"),
    ],
)
def test_read_image_warns_of_odd_geometry(tmp_path, fields, word):
    volume = nifti.read_image(put(tmp_path, encode(scan().astype("i2"), **fields)))
    assert any(line.startswith(word) for line in volume.warnings)
    np.testing.assert_array_equal(volume.data, scan())


@pytest.mark.parametrize("packed", [False, True])
def test_read_image_warns_of_trailing_data(tmp_path, packed):
    content = encode(scan().astype("i2"))
    content = gzip.compress(content) if packed else content
    name = "scan.nii.gz" if packed else "scan.nii"
    volume = nifti.read_image(put(tmp_path, content + b"garbage", name))
    assert volume.warnings == ("trailing_data: bytes after the voxels were ignored",)
    np.testing.assert_array_equal(volume.data, scan())


# --- faults -------------------------------------------------------------------------


def test_read_image_refuses_what_is_not_there(tmp_path):
    line = refuse(tmp_path / "no.nii", "not_found", "got nothing; check the path")
    assert str(tmp_path / "no.nii") in line
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    refuse(tmp_path / "loop.nii", "not_found", "loop.nii")
    refuse(str(tmp_path / "nul\0.nii"), "not_found", "nul.x00.nii")
    refuse(tmp_path / "line\nbreak.nii", "not_found", r"line\\nbreak")


def test_read_image_refuses_folder_and_pipe(tmp_path):
    refuse(tmp_path, "not_a_file", "got a folder")
    refuse("/dev/null", "not_a_file", "got a device or pipe")
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "absent.nii")
    refuse(tmp_path / "dangling.nii", "not_found", "got nothing")
    with socket.socket(socket.AF_UNIX) as local:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path may hold about 100 bytes
        try:
            local.bind("socket.nii")
        finally:
            os.chdir(here)
        refuse(tmp_path / "socket.nii", "not_a_file", "got a device or pipe")
    os.mkfifo(tmp_path / "pipe.nii")  # opening it would block
    refuse(tmp_path / "pipe.nii", "not_a_file", "got a device or pipe")


@pytest.mark.parametrize(
    "error, reason, code",
    [
        (PermissionError(errno.EACCES, "Permission denied"), "permission", 4),
        (FileNotFoundError(errno.ENOENT, "vanished"), "not_found", 4),
        (OSError(errno.EIO, "Input/output error"), "storage", 6),
    ],
)
def test_read_image_refuses_unreadable_file(tmp_path, monkeypatch, error, reason, code):
    path = put(tmp_path, encode(scan().astype("i2")))

    def fail(*args, **kwargs):
        raise error

    # Root may read everything, so the refusal of the system is played.
    monkeypatch.setattr(nifti, "open", fail, raising=False)
    refuse(path, reason, reason, code)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_read_image_refuses_mode_000(tmp_path):
    path = put(tmp_path, encode(scan().astype("i2")))
    path.chmod(0)
    refuse(path, "permission", "got permission denied; ask its owner")


@pytest.mark.parametrize(
    "name, content",
    [("a.nii", b""), ("a.nii.gz", b""), ("a.nii.gz", gzip.compress(b"", mtime=0))],
)
def test_read_image_refuses_empty(tmp_path, name, content):
    refuse(put(tmp_path, content, name), "empty", "copy the file again")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kept", [4, 100, 347, 348, 352, 353, 560, -1])
def test_read_image_refuses_truncated(tmp_path, kept, packed):
    content = encode(scan().astype("i2"))[:kept]
    name = "scan.nii.gz" if packed else "scan.nii"
    content = gzip.compress(content) if packed else content
    refuse(put(tmp_path, content, name), "truncated", r"expected \d+ bytes.* again")


@pytest.mark.parametrize("cut", [1, 4, 8, 9, 100])
def test_read_image_refuses_cut_gzip_stream(tmp_path, cut):
    content = gzip.compress(encode(scan().astype("i2")))[:-cut]
    match = "whole gzip stream.* end too early"
    refuse(put(tmp_path, content, "scan.nii.gz"), "truncated", match)


def test_read_image_refuses_wrong_checksum(tmp_path):
    content = bytearray(gzip.compress(encode(scan().astype("i2"))))
    for position, word in ((-8, "CRC check failed"), (-4, "length")):
        bad = content.copy()
        bad[position] ^= 1
        refuse(put(tmp_path, bad, "scan.nii.gz"), "checksum", word)


def test_read_image_refuses_flipped_bit_in_stored_block(tmp_path):
    content = bytearray(gzip.compress(encode(scan().astype("i2")), 0))
    content[-100] ^= 16  # decodes cleanly: only the CRC knows
    refuse(put(tmp_path, content, "scan.nii.gz"), "checksum", "damaged: copy")


def test_read_image_refuses_damaged_deflate(tmp_path):
    content = bytearray(gzip.compress(encode(scan().astype("i2"))))
    content[12:16] = b"\xff\xff\xff\xff"
    refuse(put(tmp_path, content, "scan.nii.gz"), "checksum", "intact gzip stream")


@pytest.mark.parametrize("packed", [False, True])
def test_read_image_refuses_much_trailing_data(tmp_path, packed):
    content = encode(scan().astype("i2")) + bytes(1 << 18)
    name = "scan.nii.gz" if packed else "scan.nii"
    content = gzip.compress(content) if packed else content
    refuse(put(tmp_path, content, name), "trailing_data", "more than 65536 bytes")


def test_read_image_refuses_name_mismatch(tmp_path):
    plain = encode(scan().astype("i2"))
    packed = gzip.compress(plain)
    cases = (
        (plain, "a.nii.gz", "rename the file to end in .nii$"),
        (packed, "a.nii", "rename the file to end in .nii.gz$"),
        (plain, "a.img", "rename the file to end in .nii$"),
        (gzip.compress(packed), "a.nii.gz", "gzip stream inside a gzip stream"),
        (encode(scan().astype("i2"), magic=b"ni1"), "a.hdr", ".hdr/.img pair"),
    )
    for content, name, match in cases:
        refuse(put(tmp_path, content, name), "name_mismatch", match)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<!DOCTYPE html><html>404</html>", "HTML page"),
        (b"\n <HTML>" + b"x" * 400, "HTML page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(400), "PNG picture"),
        (b"\xff\xd8\xff\xe0" + bytes(400), "JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (bytes(128) + b"DICM" + bytes(400), "DICOM file"),
        (b"NRRD0004\ntype: short\n", "NRRD"),
        (b"ObjectType = Image\n", "MetaImage"),
        (b'{"message": "Not Found"}', "JSON"),
        (b"<?xml version='1.0'?>", "XML"),
        (b"PK\x03\x04" + bytes(40), "ZIP"),
        (b"hello there", "got text"),
        (b"hi", "got text"),
        (bytes(range(7, 256)) * 3, "unknown binary data that begin with 07 08 09 0a"),
    ],
)
def test_read_image_refuses_other_content(tmp_path, content, words):
    refuse(put(tmp_path, content), "not_nifti", words)
    packed = put(tmp_path, gzip.compress(content), "scan.nii.gz")
    refuse(packed, "not_nifti", words)


@pytest.mark.parametrize(
    "kind, dim",
    [
        (nib.Nifti1Header, [3, 20000, 20000, 20000, 1, 1, 1, 1]),
        (nib.Nifti1Header, [3, 32767, 32767, 2, 1, 1, 1, 1]),
        (nib.Nifti2Header, [3, 2**21, 2**21, 2**22, 1, 1, 1, 1]),  # 0 mod 2^64
        (nib.Nifti2Header, [3, 2**62, 2, 2, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_read_image_refuses_too_large_unallocated(tmp_path, kind, dim, packed):
    content = encode(scan().astype("i2"), kind=kind, dim=dim)
    name = "scan.nii.gz" if packed else "scan.nii"
    path = put(tmp_path, gzip.compress(content) if packed else content, name)
    tracemalloc.start()
    try:
        refuse(path, "too_large", "at most 536870912 voxels", errors.LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("honest", [True, False])
def test_read_image_does_not_inflate_a_bomb(tmp_path, honest):
    """64 MiB of zeros in 64 KiB: too large by its header, or behind a small one."""
    dim = [3, 320, 320, 320, 1, 1, 1, 1] if honest else [3, *SHAPE, 1, 1, 1, 1]
    content = encode(scan().astype("i2"), dim=dim) + bytes(2**26)
    path = put(tmp_path, gzip.compress(content, 1), "scan.nii.gz")
    seen = []

    class Counted(gzip.GzipFile):
        def read(self, size=-1):
            block = super().read(size)
            seen.append(len(block))
            return block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nifti.gzip, "GzipFile", Counted)
        with pytest.raises(UserError) as caught:
            nifti.read_image(path, max_voxels=2**24)
    assert caught.value.reason == ("too_large" if honest else "trailing_data")
    assert sum(seen) < 2**18


def test_read_image_refuses_above_callers_limit(tmp_path):
    path = put(tmp_path, encode(scan().astype("i2")))
    assert nifti.read_image(path, max_voxels=210).data.shape == SHAPE
    with pytest.raises(UserError, match=r"at most 209 voxels, got 210 \(5, 6, 7\)"):
        nifti.read_image(path, max_voxels=209)


@pytest.mark.parametrize("packed", [False, True])
def test_read_image_lying_header_allocates_nothing(tmp_path, packed):
    content = encode(scan().astype("i2"), dim=[3, 700, 700, 700, 1, 1, 1, 1])
    name = "scan.nii.gz" if packed else "scan.nii"
    path = put(tmp_path, gzip.compress(content) if packed else content, name)
    tracemalloc.start()
    try:
        refuse(path, "truncated", "expected 686000352 bytes, got a file of")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ndim", [-1, 0, 1, 2, 8, 32767])
def test_read_image_refuses_ndim(tmp_path, ndim):
    content = encode(scan().astype("i2"))
    content = content[:40] + struct.pack("<h", ndim) + content[42:]
    refuse(put(tmp_path, content), "ndim", rf"\(X, Y, Z\), got dim\[0\] = {ndim}")


@pytest.mark.parametrize("size", [0, 347, 349, -348, 2**31 - 1])
def test_read_image_refuses_wrong_sizeof_hdr(tmp_path, size):
    content = struct.pack("<i", size) + encode(scan().astype("i2"))[4:]
    refuse(put(tmp_path, content), "not_nifti", "unknown binary data|got text")


def test_read_image_refuses_voxels_of_a_pair_without_header(tmp_path):
    path = put(tmp_path, scan().astype("i2").tobytes(), "a.img")
    refuse(path, "not_nifti", "unknown binary data")


def test_read_image_refuses_several_frames(tmp_path):
    path = put(tmp_path, encode(np.zeros((5, 6, 7, 2), "i2")))
    refuse(path, "ndim", r"got shape \(5, 6, 7, 2\); pass one 3-D volume")


@pytest.mark.parametrize("dims", [(0, 6, 7), (5, -6, 7), (-5, -6, 7)])
def test_read_image_refuses_dims(tmp_path, dims):
    path = put(tmp_path, encode(scan().astype("i2"), dim=[3, *dims, 1, 1, 1, 1]))
    refuse(path, "dims", "axes of 1 voxel or more")


@pytest.mark.parametrize(
    "code, word",
    [
        (128, "RGB"),
        (2304, "RGBA"),
        (32, "complex64"),
        (1792, "complex128"),
        (2048, "complex256"),
        (1536, "float128"),
        (1, "binary"),
        (0, "none"),
        (999, "code 999"),
    ],
)
def test_read_image_refuses_dtype(tmp_path, code, word):
    path = put(tmp_path, encode(scan().astype("i2"), datatype=code))
    refuse(path, "dtype", f"8 to 64 bits, got .*{word}.*; save it as int16")


def test_read_image_refuses_ids_that_float32_changes(tmp_path):
    ids = np.where(scan() > 0, 614454277, 0).astype("i4")
    refuse(put(tmp_path, encode(ids)), "dtype", "whole numbers up to 16777216, got")
    # A padding of 2^31 is the same in float32.
    padded = np.where(scan() > 0, -(2**31), 0).astype("i4")
    assert nifti.read_image(put(tmp_path, encode(padded))).data.min() == -(2**31)


def test_read_image_refuses_contradicting_bits(tmp_path):
    path = put(tmp_path, encode(scan().astype("i2"), bitpix=8))
    refuse(path, "dtype", "expected 16 bits, got 8 bits for int16")


@pytest.mark.parametrize("offset", [np.nan, np.inf, -352, 0, 200, 2**30])
def test_read_image_refuses_offset(tmp_path, offset):
    path = put(tmp_path, encode(scan().astype("i2"), vox_offset=offset))
    refuse(path, "offset", "voxels from byte 352 on, got vox_offset")


@pytest.mark.parametrize(
    "fields",
    [
        {"srow_x": (0, np.nan)},
        {"srow_y": (3, np.inf)},
        {"srow_z": (2, 1e30)},
        {"srow_x": (3, 1e9)},
        {"sform_code": 0, "quatern_b": np.nan},
        {"sform_code": 0, "quatern_b": 1.0, "quatern_c": 1.0},
        {"sform_code": 0, "qoffset_x": np.inf},
        {"sform_code": 0, "pixdim": (1, 1e30)},
    ],
)
def test_read_image_refuses_affine_nonfinite(tmp_path, fields):
    path = put(tmp_path, encode(scan().astype("i2"), **fields))
    refuse(path, "affine_nonfinite", "within 1 km, got .*; rewrite the geometry")


@pytest.mark.parametrize(
    "rows",
    [
        {"srow_x": 0, "srow_y": 0, "srow_z": 0},
        {"srow_z": 0},
        {"srow_y": [-3.0, 0, 0, 0]},
    ],
)
def test_read_image_refuses_affine_singular(tmp_path, rows):
    path = put(tmp_path, encode(scan().astype("i2"), **rows))
    refuse(path, "affine_singular", "three independent axes")


@pytest.mark.parametrize(
    "fields",
    [
        {"pixdim": (1, 0.0)},
        {"pixdim": (2, np.nan)},
        {"pixdim": (3, np.inf)},
        {"pixdim": (1, 0.0), "sform_code": 0},
        {"pixdim": (1, 1e-30), "sform_code": 0},
        {"srow_x": [-1e-30, 0, 0, 0]},
        {"srow_x": [-400.0, 0, 0, 0]},
    ],
)
def test_read_image_refuses_spacing(tmp_path, fields):
    path = put(tmp_path, encode(scan().astype("i2"), **fields))
    refuse(path, "spacing", "0.01 to 100 mm, got")


@pytest.mark.parametrize(
    "shape, spacing",
    [
        ((5, 6, 1), (3.0, 2.5, 20.0)),
        ((1, 1, 1), (20.0, 20.0, 20.0)),
        ((5, 6, 7), (1.5, 2.5, 4.0)),
        ((5, 6, 70), (3.0, 2.5, 50.0)),
        ((1, 1, 5000), (20.0, 20.0, 0.5)),
    ],
)
def test_read_image_refuses_fov(tmp_path, shape, spacing):
    content = encode(scan(shape).astype("i2"), np.diag([*spacing, 1.0]))
    match = "2 slices or more and 10 mm to 3 m.* mm; pass a whole 3-D scan"
    refuse(put(tmp_path, content), "fov", match)


def test_read_image_refuses_orientation_unknown(tmp_path):
    match = "; set it with a tool that knows how the patient lay"
    content = encode(scan().astype("i2"), sform_code=0, qform_code=0)
    refuse(put(tmp_path, content), "orientation_unknown", match)
    content = encode(scan().astype("i2"), magic=b"")  # ANALYZE
    refuse(put(tmp_path, content), "orientation_unknown", match)


def test_read_image_refuses_mirrored_forms(tmp_path):
    content = encode(scan().astype("i2"), pixdim=(0, -1.0))
    match = "same handedness, got mirrored"
    refuse(put(tmp_path, content), "orientation_conflict", match)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_read_image_refuses_negative_spacing_of_a_qform(tmp_path, axis):
    fields = {"sform_code": 0, "pixdim": (axis, -3.0)}
    path = put(tmp_path, encode(scan().astype("i2"), **fields))
    match = r"positive spacings \(pixdim\) beside a qform, got .*-3"
    refuse(path, "orientation_conflict", match)


@pytest.mark.parametrize("units, word", [(1, "metres"), (3, "microns"), (7, "code 7")])
def test_read_image_refuses_units(tmp_path, units, word):
    path = put(tmp_path, encode(scan().astype("i2"), xyzt_units=units))
    refuse(path, "units", f"expected millimetres, got {word}")


@pytest.mark.parametrize("slope, inter", [(1, np.nan), (1, np.inf), (1e30, 0)])
def test_read_image_refuses_scaling(tmp_path, slope, inter):
    content = encode(scan().astype("i2"), scl_slope=slope, scl_inter=inter)
    refuse(put(tmp_path, content), "scaling", "finite slope and intercept below 1e6")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_read_image_refuses_nonfinite(tmp_path, value):
    array = scan()
    array[2, 3, 4] = value
    path = put(tmp_path, encode(array))
    refuse(path, "nonfinite", "got 1 NaN or infinite; replace them with air")


def test_read_image_refuses_nothing_but_nan(tmp_path):
    path = put(tmp_path, encode(np.full(SHAPE, np.nan)))
    refuse(path, "nonfinite", "got 210 NaN or infinite")


def test_read_labels_applies_the_scaling(tmp_path):
    ids = np.arange(210).reshape(SHAPE).astype("i2")
    path = put(tmp_path, encode(ids, scl_slope=2))
    np.testing.assert_array_equal(nifti.read_labels(path).data, 2 * ids)
    path = put(tmp_path, encode(ids, scl_slope=0.5))
    refuse(path, "label_value", "got fractions", read=nifti.read_labels)


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan, np.inf, 70000.0, 2.0**25])
def test_read_labels_refuses_label_value(tmp_path, value):
    array = np.ones(SHAPE, "f4")
    array[2, 3, 4] = value
    match = "whole label ids from 0 to 65535"
    path = put(tmp_path, encode(array))
    refuse(path, "label_value", match, read=nifti.read_labels)


def test_check_same_grid(tmp_path):
    def volume(shape=SHAPE, shift=0.0):
        world = oblique()
        world[0, 3] += shift
        return nifti.Volume(np.zeros(shape, np.uint8), world, path="labels.nii.gz")

    nifti.check_same_grid(volume(), volume(shift=1e-4))
    for other, match in (
        (volume((5, 6, 8)), r"expected shape \(5, 6, 7\) .* got \(5, 6, 8\)"),
        (volume(shift=3.0), "within 0.05 mm .* got 3 mm; resample it"),
    ):
        with pytest.raises(UserError, match=match) as caught:
            nifti.check_same_grid(volume(), other)
        assert caught.value.reason == "grid_mismatch"
        assert caught.value.exit_code == errors.FAILED
    # RAS taken for LPS: the same box on the other side of the origin.
    for signs, axes in (([-1, -1, 1], "x and y"), ([-1, 1, 1], "x"), ([1, 1, -1], "z")):
        world = np.diag([*signs, 1.0]) @ oblique()
        data, world = orientation.reorient(np.zeros(SHAPE, np.uint8), world)
        with pytest.raises(UserError, match=f"mirror image along {axes} of") as caught:
            nifti.check_same_grid(volume(), nifti.Volume(data, world))
        assert caught.value.reason == "mirrored"
    # Another storage order of the same grid is the same grid.
    paths = []
    for codes in ("LPS", "AIR"):
        data, world = orientation.reorient(scan().astype("i2"), oblique(), codes)
        paths.append(put(tmp_path, encode(data, world), f"{codes}.nii"))
    nifti.check_same_grid(*map(nifti.read_image, paths))


@pytest.mark.parametrize("packed", [False, True])
def test_read_image_of_random_damage_is_a_user_error_or_done(tmp_path, packed):
    rng = np.random.default_rng(7)
    content = encode(scan().astype("i2"), oblique())
    whole = np.frombuffer(gzip.compress(content) if packed else content, np.uint8)
    name = "scan.nii.gz" if packed else "scan.nii"
    reasons = set()
    for _ in range(300):
        damaged = whole.copy()
        where = rng.integers(0, 352 if not packed else whole.size, rng.integers(1, 5))
        damaged[where] = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8))
        try:
            volume = nifti.read_image(put(tmp_path, damaged.tobytes(), name))
        except UserError as error:
            assert "\n" not in str(error)
            reasons.add(error.reason)
        else:
            assert np.isfinite(volume.data).all()
    assert len(reasons) > (1 if packed else 5)


# --- writing ------------------------------------------------------------------------


GEOMETRY = ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "pixdim")
GEOMETRY += ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y")
GEOMETRY += ("qoffset_z", "xyzt_units")


def test_results_keep_the_grid_of_a_scan_at_45_degrees(tmp_path):
    """Codes of axes that tie would turn its voxels and leave its affine."""
    half = np.sqrt(0.5)
    ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    ras[:3, :3] @= [[half, 0, half], [0.5, half, -0.5], [-0.5, half, 0.5]]
    data = np.random.default_rng(0).integers(-1000, 1000, (20, 24, 28), np.int16)
    nib.save(nib.Nifti1Image(data, ras), tmp_path / "scan.nii")
    volume = nifti.read_image(tmp_path / "scan.nii")
    nifti.write_like(tmp_path / "out.nii", volume.data, volume)
    back = nib.load(tmp_path / "out.nii")
    np.testing.assert_array_equal(np.asarray(back.dataobj), data)
    np.testing.assert_allclose(back.affine, ras, atol=1e-6)


@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP", "AIR"])
def test_write_like_keeps_geometry_bits(tmp_path, codes, order, kind):
    data, world = orientation.reorient(scan().astype("i2"), oblique(), codes)
    fields = {"qform_code": 2, "sform_code": 3, "descrip": b"DOE^JANE"}
    content = encode(data, world, order=order, kind=kind, **fields)
    volume = nifti.read_image(put(tmp_path, content))
    out = tmp_path / "out.nii.gz"
    nifti.write_like(out, volume.data.astype(np.float32) + 0.5, volume)
    source, result = nib.load(tmp_path / "scan.nii").header, nib.load(out).header
    for name in GEOMETRY:
        assert source[name].tobytes() == result[name].tobytes(), name
    assert (
        result.endianness == order and result["descrip"].tobytes().strip(b"\0") == b""
    )
    np.testing.assert_array_equal(nib.load(out).get_fdata(), data + 0.5)
    again = nifti.read_image(out)
    np.testing.assert_array_equal(again.vox2world, volume.vox2world)
    np.testing.assert_array_equal(again.data, volume.data + 0.5)


def test_write_like_of_one_frame_is_3d(tmp_path):
    path = put(tmp_path, encode(scan().astype("i2")[..., None]))
    volume = nifti.read_image(path)
    nifti.write_like(tmp_path / "out.nii", volume.data, volume)
    assert nib.load(tmp_path / "out.nii").shape == SHAPE


def test_write_like_without_a_file_uses_the_grid(tmp_path):
    volume = nifti.Volume(scan().astype("i2"), oblique())
    nifti.write_like(tmp_path / "out.nii.gz", volume.data, volume)
    peer = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    point = oblique()[:3, :3] @ (1, 2, 3) + oblique()[:3, 3]
    np.testing.assert_allclose(
        peer.TransformIndexToPhysicalPoint((1, 2, 3)),
        point,
        atol=1e-4,  # float32
    )
    assert peer[1, 2, 3] == volume.data[1, 2, 3]


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP"])
def test_write_volume_agrees_with_simpleitk(tmp_path, codes):
    data, world = orientation.reorient(scan().astype("f4"), oblique(), codes)
    nifti.write_volume(tmp_path / "out.nii", data, world)
    peer = sitk.ReadImage(str(tmp_path / "out.nii"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(peer), data.transpose(2, 1, 0))
    for index in ((0, 0, 0), (4, 1, 2), (1, 2, 3)):
        np.testing.assert_allclose(
            peer.TransformIndexToPhysicalPoint(index),
            world[:3, :3] @ index + world[:3, 3],
            atol=1e-4,  # float32 forms
        )


@pytest.mark.parametrize(
    "array, dtype, stored",
    [
        (np.ones(SHAPE, bool), None, "u1"),
        (np.ones(SHAPE), None, "f4"),
        (np.ones(SHAPE, "i8"), None, "i8"),
        (np.full(SHAPE, 1.7), "i2", "i2"),
        (np.full(SHAPE, 200), np.uint8, "u1"),
    ],
)
def test_write_volume_types(tmp_path, array, dtype, stored):
    nifti.write_volume(tmp_path / "out.nii", array, straight(), dtype=dtype)
    image = nib.load(tmp_path / "out.nii")
    assert image.get_data_dtype() == stored
    expected = np.rint(array) if dtype == "i2" else array
    np.testing.assert_array_equal(image.get_fdata(), expected)


def test_write_volume_is_reproducible(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        nifti.write_volume(tmp_path / name, scan(), straight())
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    "array, options, match",
    [
        (np.zeros((5, 6)), {}, r"data must be \(X, Y, Z\)"),
        (np.full(SHAPE, np.nan), {}, "array must be finite"),
        (np.full(SHAPE, 300), {"dtype": "u1"}, "must fit uint8, got 300 to 300"),
        (np.full(SHAPE, -1.0), {"dtype": "u2"}, "must fit uint16"),
        (np.zeros(SHAPE, complex), {}, "dtype must be whole or real"),
        (np.zeros((0, 6, 7)), {}, "must hold voxels"),
    ],
)
def test_write_volume_rejects(tmp_path, array, options, match):
    with pytest.raises(ValueError, match=match):
        nifti.write_volume(tmp_path / "out.nii", array, straight(), **options)
    assert list(tmp_path.iterdir()) == []


def test_write_volume_rejects_name(tmp_path):
    with pytest.raises(ValueError, match="must end in .nii or .nii.gz"):
        nifti.write_volume(tmp_path / "out.mha", scan(), straight())


def test_write_like_rejects_other_shape(tmp_path):
    volume = nifti.Volume(scan(), straight())
    with pytest.raises(ValueError, match=r"\(5, 6, 7\) on LPS\+ axes, got \(6, 5, 7\)"):
        nifti.write_like(tmp_path / "out.nii", np.zeros((6, 5, 7)), volume)
    with pytest.raises(ValueError, match="array must begin with"):
        nifti.to_native(np.zeros((6, 5, 7, 3)), volume)


def test_write_into_no_folder_is_a_storage_fault(tmp_path):
    with pytest.raises(UserError, match="folder exists, is writable") as caught:
        nifti.write_volume(tmp_path / "no" / "out.nii", scan(), straight())
    assert (caught.value.reason, caught.value.exit_code) == ("storage", errors.STORAGE)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = put(tmp_path, b"old", "out.nii")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nifti.os, call, fail)
    with pytest.raises(UserError, match="No space left on device") as caught:
        nifti.write_volume(path, scan(), straight())
    assert (caught.value.reason, caught.value.exit_code) == ("storage", errors.STORAGE)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_write_that_is_interrupted_leaves_nothing(tmp_path):
    path = put(tmp_path, b"old", "out.bin")
    with pytest.raises(KeyboardInterrupt), nifti.atomic_path(path) as temp:
        temp.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_crc_of_written_gzip_is_right(tmp_path):
    nifti.write_volume(tmp_path / "out.nii.gz", scan(), straight())
    packed = (tmp_path / "out.nii.gz").read_bytes()
    plain = zlib.decompress(packed, 31)
    assert struct.unpack("<II", packed[-8:]) == (zlib.crc32(plain), len(plain))
