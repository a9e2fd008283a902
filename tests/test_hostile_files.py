"""Files that name other files, claim more than they hold, or hold what would run"""

import gzip
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
import safetensors.numpy

from experiments.faults import scans
from unireg_jax import errors
from unireg_jax.imaging import itk_files, transforms
from unireg_jax.imaging import scans as readers
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.registration import weights
from unireg_jax.verbs import outputs

pytest.importorskip("SimpleITK")


@pytest.fixture
def victim(tmp_path):
    """A file elsewhere that must not be read."""
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    return path


_META = """ObjectType = Image
NDims = 3
DimSize = 4 4 4
ElementSpacing = 1 1 1
TransformMatrix = 1 0 0 0 1 0 0 0 1
ElementType = MET_UCHAR
ElementDataFile = {}
"""
_NRRD = """NRRD0004
type: uchar
dimension: 3
sizes: 4 4 4
encoding: raw
{}

"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.mhd", _META.format("../elsewhere/victim")),
        ("a.mha", _META.format("../elsewhere/victim")),
        ("a.mhd", _META.format("/etc/passwd")),
        ("a.mhd", _META.format("LIST\n../elsewhere/victim")),
        ("a.mhd", _META.format("v%03d.raw 1 4 1")),
        ("a.mhd", "elementdatafile = a.raw\n" + _META.format("../elsewhere/victim")),
        ("a.mha", "x" * 70_000 + "\n" + _META.format("../elsewhere/victim")),
        ("a.nhdr", _NRRD.format("data file: ../elsewhere/victim")),
        ("a.nrrd", _NRRD.format("data file: ../elsewhere/victim")),
        ("a.nhdr", _NRRD.format("DataFile: /etc/passwd")),
        ("a.nhdr", _NRRD.format("data file: LIST\n../elsewhere/victim")),
        ("a.nhdr", _NRRD.format("data file: v%03d.raw 1 4 1")),
        ("a.nrrd", "NRRD0004\n#" + "x" * 70_000 + "\n" + _NRRD),
    ],
)
@pytest.mark.parametrize("read", [readers.read_scan, transforms.read_itk_image])
def test_header_cannot_name_another_file_as_its_voxels(
    name, text, read, tmp_path, victim
):
    victim.write_bytes(bytes(4096))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.raw").write_bytes(bytes(4096))
    path = tmp_path / "in" / name
    path.write_text(text)
    with pytest.raises(errors.UserError, match="path_escape|not_nifti"):
        read(path)


def test_header_can_name_the_voxels_beside_it(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(64))
    for name, text in (
        ("a.mhd", _META.format("a.raw")),
        ("a.nhdr", _NRRD.format("data file: a.raw")),
    ):
        (tmp_path / name).write_text(text)
        itk_files.check_own_voxels(tmp_path / name)


def _composite(path, **content):
    """A composite .h5 with the given Parameters of its one part."""
    with h5py.File(path, "w") as file:
        group = file.create_group("TransformGroup/0")
        group["TransformType"] = [b"AffineTransform_double_3_3"]
        group["TransformFixedParameters"] = np.zeros(3)
        group.create_dataset("TransformParameters", **content)


def test_hdf5_cannot_take_its_numbers_from_another_file(tmp_path, victim):
    victim.write_bytes(np.eye(4)[:3].tobytes())
    _composite(tmp_path / "good.h5", data=np.r_[np.eye(3).ravel(), np.zeros(3)])
    assert transforms.read_parts(tmp_path / "good.h5")
    place = {"external": [(str(victim), 0, 96)]}
    _composite(tmp_path / "external.h5", shape=12, dtype="f8", **place)
    source = h5py.VirtualSource(
        str(tmp_path / "good.h5"), "TransformGroup/0/TransformParameters", 12
    )
    layout = h5py.VirtualLayout(12, "f8")
    layout[:] = source
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        group = file.create_group("TransformGroup/0")
        group["TransformType"] = [b"AffineTransform_double_3_3"]
        group["TransformFixedParameters"] = np.zeros(3)
        group.create_virtual_dataset("TransformParameters", layout)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["TransformGroup"] = h5py.ExternalLink("good.h5", "/TransformGroup")
    with h5py.File(tmp_path / "text.h5", "w") as file:
        group, place = file.create_group("TransformGroup/0"), [(str(victim), 0, 24)]
        group.create_dataset("TransformType", 1, "S24", external=place)
    for name in ("external", "virtual", "link", "text"):
        with pytest.raises(errors.UserError, match="another file"):
            transforms.read_parts(tmp_path / f"{name}.h5")


def _npz(path):
    """Its array is said to be of 81 GB; of a bomb the archive says 4 GiB of them."""
    shape = (1500, 1500, 1500, 3)
    content = io.BytesIO()
    head = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, head)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue())
    if "bomb" in path.name:
        data = bytearray(path.read_bytes())
        place = data.rfind(b"PK\1\2") + 24  # the member's size when inflated
        data[place : place + 4] = struct.pack("<I", 2**32 - 2)
        path.write_bytes(data)


def _claims(path):
    """A file of at most 10 KB that claims 20 GiB or more, by its name."""
    kind = path.name
    if kind.endswith((".nii", ".nii.gz")):
        side = 32767 if "tib" in kind else 1400
        dim = [3, side, side, side, 1, 1, 1, 1]
        raw = scans.encode(np.zeros((2, 3, 4), "f8"), np.eye(4), dim=dim)
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    elif kind.endswith(".h5"):
        shape = (2**43,) if "tib" in kind else (3 * 2**30,)
        _composite(path, shape=shape, dtype="f8", chunks=(2**16,))
    elif kind.endswith(".npz"):
        _npz(path)
    elif kind.endswith(".mha"):
        text = _META.replace("4 4 4", "20000 20000 20000").format("LOCAL")
        path.write_text(text.replace("UCHAR", "DOUBLE"))
    else:
        sizes = "3 20000 20000 20000" if "field" in kind else "20000 20000 20000"
        count = "4" if "field" in kind else "3"
        text = _NRRD.replace("4 4 4", sizes).replace(
            "dimension: 3", f"dimension: {count}"
        )
        line = (
            "kinds: vector domain domain domain" if count == "4" else "endian: little"
        )
        path.write_text(text.format(line))
    assert path.stat().st_size < 20_000
    return path


def _read_l2r(path):
    return transforms.read_l2r(path, np.eye(4))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("gib.nii", readers.read_scan),
        ("tib.nii", readers.read_scan),
        ("gib.nii.gz", readers.read_scan),
        ("tib.nii.gz", readers.read_scan),
        ("gib.mha", readers.read_scan),
        ("gib.nrrd", readers.read_scan),
        ("field.nrrd", transforms.read_itk_image),
        ("gib.h5", transforms.read_parts),
        ("tib.h5", transforms.read_parts),
        ("gib.npz", _read_l2r),
        ("bomb.npz", _read_l2r),
    ],
)
def test_small_file_that_claims_20_gib_is_refused_unread(name, read, tmp_path):
    path = _claims(tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(errors.UserError) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.reason in ("too_large", "fov", "truncated"), caught.value
    assert peak < 10 * 2**20


def _tensors(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def _tensor(begin, end, shape=(2,), kind="F32"):
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}


def _card(path):
    """The description of weights, with the digest that the file has."""
    preprocess = PreprocessSpec(shape=(32, 16, 32), spacing_mm=(12.0, 18.0, 11.0))
    card = {"format": weights.FORMAT, "architecture": {}, "features": "none"}
    card |= {"preprocess": preprocess.to_json()}
    card["sha256"] = outputs.digest(path)["sha256"]
    path.with_suffix(".json").write_text(json.dumps(card))


_HOSTILE = {
    "header of 2^62 bytes": _tensors({}, size=2**62),
    "header of 2^64 - 1 bytes": _tensors({}, size=2**64 - 1),
    "header longer than the file": _tensors({}, size=100),
    "overlap": _tensors({"a": _tensor(0, 8), "b": _tensor(4, 12)}, bytes(12)),
    "gap": _tensors({"a": _tensor(0, 8), "b": _tensor(12, 20)}, bytes(20)),
    "beyond the end": _tensors({"a": _tensor(0, 8)}, bytes(4)),
    "backwards": _tensors({"a": _tensor(8, 0)}, bytes(8)),
    "name twice": _tensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "product beyond 2^64": _tensors({"a": _tensor(0, 8, (2**33, 2**33))}, bytes(8)),
    "product 0 modulo 2^64": _tensors({"a": _tensor(0, 0, (2**32, 2**32))}),
    "negative size": _tensors({"a": _tensor(0, 8, (-2,))}, bytes(8)),
    "objects": _tensors({"a": _tensor(0, 8, (1,), "O")}, bytes(8)),
    "names up the tree": _tensors({"../../a": _tensor(0, 0, (2**40, 2**40))}),
    "no JSON": _tensors(b"__import__('os').system('true')"),
    "deep JSON": _tensors(b'{"a":' * 50_000),
    "pickle": b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
    "NaN": safetensors.numpy.save({"a": np.array([np.nan], "f4")}),
    "infinity": safetensors.numpy.save({"a": np.array([-np.inf], "f4")}),
}


@pytest.mark.parametrize("kind", _HOSTILE)
def test_hostile_weights_are_refused_though_their_digest_is_right(kind, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(_HOSTILE[kind])
    _card(path)
    with pytest.raises(errors.UserError) as caught:
        weights.load_weights(path)
    assert caught.value.exit_code == errors.CHECKPOINT
    assert caught.value.reason in ("checkpoint_torn", "checkpoint_nonfinite")


def test_weights_of_a_hundred_thousand_tensors_are_not_the_networks(tmp_path):
    path = tmp_path / "a.safetensors"
    names = {f"t{i}": _tensor(0, 0, (0,)) for i in range(100_000)}
    path.write_bytes(_tensors(names))
    _card(path)
    params, _ = weights.load_weights(path)
    wanted = {"head": {"kernel": np.zeros((2, 3), np.float32)}}
    with pytest.raises(errors.UserError, match="99998 more") as caught:
        weights.check_tensors(params, wanted, path)
    assert caught.value.exit_code == errors.CHECKPOINT


class _Call:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self._canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self._canary,)


def _object_array(path, canary):
    np.savez(path, np.array([[[[_Call(canary)] * 3]]], object), allow_pickle=True)


def _bare_pickle(path, canary):
    path.write_bytes(pickle.dumps(_Call(canary)))


def _pickle_as_member(path, canary):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", pickle.dumps(_Call(canary)))


def _expression(path, canary):
    """In place of the dict that a header is."""
    text = f"__import__('os').mkdir({str(canary)!r})".ljust(117) + "\n"
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content)


def _up_the_tree(path, canary):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"../{canary.name}/arr_0.npy", b"not an array")


@pytest.mark.parametrize(
    "make",
    [_object_array, _bare_pickle, _pickle_as_member, _expression, _up_the_tree],
)
def test_array_file_runs_nothing_and_unpacks_nothing(make, tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "disp_1_2.npz"
    make(path, canary)
    with pytest.raises(errors.UserError):
        _read_l2r(path)
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_canary_of_array_files_would_sing(tmp_path):
    canary = tmp_path / "canary"
    _object_array(tmp_path / "a.npz", canary)
    with np.load(tmp_path / "a.npz", allow_pickle=True) as archive:
        archive["arr_0"]
    assert canary.is_dir()
