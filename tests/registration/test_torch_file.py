"""PyTorch's files: what torch reads is what is read, and nothing in them runs."""

import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.registration import torch_file

FLOATS = np.arange(6, dtype=np.float32)


# --- making files by hand -----------------------------------------------------------


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    data = pickle.dumps(value, protocol=2)
    return data[2:-1]


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def identity(key="0", count=6, kind="torch\nFloatStorage", word="storage"):
    return (
        b"("
        + text(word)
        + f"c{kind}\n".encode()
        + text(key)
        + text("cpu")
        + number(count)
        + b"tQ"
    )


def tensor(storage=None, offset=0, shape=(2, 3), strides=(3, 1)):
    """Instructions that build a tensor."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage or identity())
        + number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def program(value):
    """A dict of one value, x."""
    return b"\x80\x02}" + text("x") + value + b"s."


def archive(path, code, records=None, compression=zipfile.ZIP_STORED):
    """A file as torch.save lays it out."""
    records = {"data/0": FLOATS.tobytes()} if records is None else records
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", code)
        for name, data in records.items():
            file.writestr(f"archive/{name}", data)
    return path


def refusal(path, *, reason):
    """The message of the UserError that reading must raise."""
    with pytest.raises(UserError) as caught:
        torch_file.read_tensors(path)
    message = str(caught.value)
    assert caught.value.exit_code == errors.CHECKPOINT
    assert caught.value.reason == f"checkpoint_{reason}", message
    assert "\n" not in message and len(message) < 1000
    assert str(path) in message and "expected" in message and "got" in message
    return message


# --- what is read -------------------------------------------------------------------


def test_read_tensors_by_hand(tmp_path):
    path = archive(tmp_path / "a.pth", program(tensor(shape=(3, 2), strides=(1, 3))))
    (name,) = found = torch_file.read_tensors(path)
    assert name == "x" and found["x"].dtype == np.float32
    np.testing.assert_array_equal(found["x"], [[0, 3], [1, 4], [2, 5]])


def test_read_tensors_of_either_byte_order(tmp_path):
    for order, mark in (("little", "<f4"), ("big", ">f4")):
        records = {"data/0": FLOATS.astype(mark).tobytes(), "byteorder": order}
        path = archive(tmp_path / "a.pth", program(tensor()), records)
        found = torch_file.read_tensors(path)["x"]
        np.testing.assert_array_equal(found.ravel(), FLOATS)
        assert found.dtype.isnative


def test_read_tensors_of_a_view_with_a_huge_stride_along_one(tmp_path):
    strides = (2**61, 1)
    code = program(tensor(shape=(1, 6), strides=strides))
    found = torch_file.read_tensors(archive(tmp_path / "a.pth", code))
    np.testing.assert_array_equal(found["x"], [FLOATS])


def test_read_tensors_skips_numpy_scalars_of_training_notes(tmp_path):
    data = pickle.dumps({"best": np.float64(0.5), "steps": np.int64(3)}, protocol=2)
    code = program(tensor() + b"s" + text("meta") + data[2:-1])
    assert set(torch_file.read_tensors(archive(tmp_path / "a.pth", code))) == {"x"}


def views(torch):
    """Tensors of many types and layouts, some of one storage."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((4, 5, 6), generator=generator)
    out = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "sliced": base[1:, ::2, 3],
        "last": base[-1, -1],
        "scalar": base[2, 3, 4],
        "expanded": base[:, :1].expand(4, 7, 6),
        "diagonal": base[0].diagonal(),
        "windows": base.reshape(-1).unfold(0, 4, 2),
        "none": torch.empty((0, 3)),
        "none_of_many": base[:, 2:2],
        "channels_last": torch.randn((2, 3, 4, 5, 6), generator=generator).to(
            memory_format=torch.channels_last_3d
        ),
        "parameter": torch.nn.Parameter(base[0]),
        "frozen": torch.nn.Parameter(base[1], requires_grad=False),
    }
    for name in "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split():
        kind = getattr(torch, name)
        many = (torch.randn((3, 4), generator=generator) * 9).abs().to(kind)
        out[name] = many
        out[f"{name}_view"] = many.T[1:, ::2]
    for kind in (torch.complex64, torch.complex128):
        out[str(kind)] = torch.randn(5, dtype=kind, generator=generator)
    return out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_tensors_equals_torch(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 1), torch.nn.BatchNorm3d(3))
    content = {
        "views": views(torch),
        "state_dict": net.state_dict(),  # an OrderedDict with an attribute
        "list": [torch.ones(2), {"deep": torch.zeros(1)}],
        "meta": {
            "text": "é\n" * 300,
            "numbers": (1, -2, 2**40, -(2**70), 0.5, True, None),
            "bytes": b"abc" if protocol > 2 else None,
            "shape": torch.Size([1, 2]),
            3: [],
        },
    }
    torch.save(content, path, pickle_protocol=protocol)
    expected = torch.load(path, weights_only=protocol == 2)
    flat = {f"views.{name}": t for name, t in expected["views"].items()}
    flat |= {f"state_dict.{name}": t for name, t in expected["state_dict"].items()}
    flat |= {"list.0": torch.ones(2), "list.1.deep": torch.zeros(1)}
    found = torch_file.read_tensors(path)
    assert list(found) == list(flat)
    for name, theirs in flat.items():
        theirs = theirs.detach()
        half = theirs.dtype == torch.bfloat16
        theirs = (theirs.float() if half else theirs).numpy()
        assert found[name].dtype == theirs.dtype, name
        np.testing.assert_array_equal(found[name], theirs, strict=True, err_msg=name)


def test_read_tensors_equals_torch_on_random_views(tmp_path):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    content = {}
    for i in range(200):
        shape = rng.integers(1, 6, rng.integers(1, 6)).tolist()
        kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int32)
        view = torch.arange(np.prod(shape)).reshape(shape).to(kinds[i % 4])
        for axis, size in enumerate(shape):
            start, step = rng.integers(0, size), rng.integers(1, 4)
            view = view[(slice(None),) * axis + (slice(start, None, step),)]
        content[f"v{i}"] = view.permute(*rng.permutation(len(shape)).tolist())
    torch.save(content, tmp_path / "a.pth")
    found = torch_file.read_tensors(tmp_path / "a.pth")
    for name, theirs in torch.load(tmp_path / "a.pth", weights_only=True).items():
        theirs = theirs.float() if theirs.dtype == torch.bfloat16 else theirs
        np.testing.assert_array_equal(found[name], theirs.numpy(), strict=True)


def test_read_tensors_imports_neither_jax_nor_torch():
    code = (
        "import sys, unireg_jax.registration.torch_file\n"
        "sys.exit(bool({'jax', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what is refused: programs ------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments, *([state] if state else []))

    def __reduce__(self):
        return self.parts


CALLS = {
    "posix.system": lambda c: Call(os.system, f"touch {c}"),
    "builtin__.eval": lambda c: Call(eval, f"open({str(c)!r}, 'w')"),
    "builtin__.getattr": lambda c: Call(getattr, os, "system"),
    "subprocess.Popen": lambda c: Call(subprocess.Popen, ["touch", str(c)]),
    "builtin__.open": lambda c: Call(open, str(c), "w"),
}


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.parametrize("protocol", [2, 4])
def test_read_tensors_calls_nothing(name, protocol, tmp_path):
    canary = tmp_path / "canary"
    if "getattr" in name:
        evil = Call(getattr, Call, "parts")
    else:
        evil = CALLS[name](canary)
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol).dump({"state_dict": OrderedDict(a=evil)})
    path = archive(tmp_path / "a.pth", buffer.getvalue())
    function = name.split(".")[1]
    assert f".{function}" in refusal(path, reason="format")
    assert not canary.exists()


def test_canaries_would_sing(tmp_path):
    """The programs above do run under pickle."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(CALLS["posix.system"](canary)))
    assert canary.exists()


LAUGH = (
    b"]"
    + b"q\x00"
    + b"".join(
        b"(" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"lq" + bytes([i + 1])
        for i in range(9)
    )
)
NESTED = b"]" * 10_000 + b"a" * 9_999
SHARED = b"]q\x00" + b"".join(
    b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(9)
)
PROGRAMS = {
    "a method of a name": (b"cos\nsystem\n", "os.system"),
    "dotted name": (b"\x8c\x02os\x8c\x0bpath.isfile\x93", "os.path.isfile"),
    "name of a number": (b"K\x01\x8c\x06system\x93", "system"),
    "name under an allowed one": (b"ctorch\nload\n", "torch.load"),
    "torch.hub": (b"ctorch.hub\nload\n", "torch.hub.load"),
    "call of a storage type": (b"ctorch\nFloatStorage\nK\x05\x85R", "FloatStorage"),
    "call of text": (text("os.system") + b")R", "a call of str"),
    "call with no tuple": (b"ctorch\nSize\n]R", "a call of torch.Size"),
    "size of text": (b"ctorch\nSize\n" + text("ab") + b"\x85\x85R", "torch.Size"),
    "dict from pairs": (b"ccollections\nOrderedDict\n]\x85R", "OrderedDict"),
    "BUILD with __setstate__": (
        b"}}" + text("__setstate__") + b"ccollections\nOrderedDict\nsb",
        "BUILD on dict",
    ),
    "BUILD on a dict": (
        b"}}" + text("__class__") + text("os") + b"sb",
        "BUILD on dict",
    ),
    "BUILD on a list": (b"]}b", "BUILD on list"),
    "BUILD on a name": (b"ctorch\nSize\n}b", "BUILD on torch.Size"),
    "BUILD on a tensor": (tensor() + b"}b", "BUILD on Tensor"),
    "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81", "NEWOBJ"),
    "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92", "NEWOBJ_EX"),
    "INST": (b"(ios\nsystem\n", "INST"),
    "OBJ": (b"(ccollections\nOrderedDict\no", "OBJ"),
    "EXT1": (b"\x82\x01", "EXT1"),
    "EXT2": (b"\x83\x01\x00", "EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "EXT4"),
    "PERSID": (b"Pstorage\n", "PERSID"),
    "POP": (b"K\x00K\x010", "POP"),
    "DUP": (b"K\x002", "DUP"),
    "text integer": (b"I1\n", "instruction INT"),
    "old text": (b"S'a'\n", "instruction STRING"),
    "append to a dict": (b"}K\x01a", "APPEND on dict"),
    "append to text": (text("a") + b"K\x01a", "APPEND on str"),
    "item of a list": (b"]K\x01K\x01s", "SETITEM on list"),
    "tuple as key": (b"})K\x01s", "a dict key of type tuple"),
    "name as key": (b"}ctorch\nSize\nK\x01s", "a dict key of type torch.Size"),
    "long key": (b"}" + text("a" * 5000) + b"K\x01s", "5000"),
    "10 000 lists deep": (NESTED, "nested deeper"),
    "a list that holds itself": (b"]q\x00h\x00a", "nested deeper"),
    "10 to the 9 values": (SHARED, "values"),
    "persistent id of a number": (b"K\x07Q", "a persistent id of type int"),
    "persistent id of a list": (b"]Q", "a persistent id of type list"),
    "short persistent id": (b"K\x01\x85Q", "a persistent id of type tuple"),
    "other persistent id": (identity(word="module"), "a persistent id with"),
    "storage of no type": (
        b"(" + text("storage") + text("f4") + text("0") + text("cpu") + b"K\x06tQ",
        "a persistent id with str",
    ),
    "storage of a call": (identity(kind="torch\nSize"), "with torch.Size"),
    "path as storage key": (identity("../../etc/passwd"), "etc/passwd"),
    "absolute storage key": (identity("/etc/passwd"), "etc/passwd"),
    "unicode digits": (identity("٣"), "storage key"),
    "negative storage": (identity(count=-6), "storage size (-6,)"),
    "storage of true": (identity(count=True), "storage size"),
    "tensor without storage": (tensor(b"N"), "other arguments"),
    "negative offset": (tensor(offset=-1), "offset (-1,)"),
    "offset past the end": (tensor(offset=1), "ends at element 7 of the 6"),
    "negative stride": (tensor(strides=(-3, 1)), "strides (-3, 1)"),
    "stride past the end": (tensor(strides=(4, 1)), "ends at element 7"),
    "negative shape": (tensor(shape=(-2, 3)), "shape (-2, 3)"),
    "shape past the end": (tensor(shape=(3, 3)), "ends at element 9"),
    "huge shape": (tensor(shape=(2**40, 2**40)), "ends at element"),
    "huge shape of stride 0": (
        tensor(shape=(2**40, 6), strides=(0, 1)),
        "tensors of at most",
    ),
    "huge shape of nothing": (tensor(shape=(2**60, 0)), "tensors of at most"),
    "shape beyond a machine word": (tensor(shape=(2**200,), strides=(0,)), "shape"),
    "shape of floats": (tensor(shape=(2.0, 3.0)), "shape of type tuple"),
    "fewer strides": (tensor(strides=(1,)), "with strides (1,)"),
    "40 axes": (tensor(shape=(1,) * 40, strides=(1,) * 40), "shape"),
    "two of one name": (
        tensor()
        + b"s"
        + text("y.z")
        + tensor()
        + b"s"
        + text("y")
        + b"}"
        + text("z")
        + tensor()
        + b"s",
        "two tensors named 'y.z'",
    ),
}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_read_tensors_refuses_the_program(name, tmp_path):
    code, match = PROGRAMS[name]
    path = archive(tmp_path / "a.pth", program(code))
    assert match in refusal(path, reason="format")


TORN = {
    "no end": program(tensor())[:-1],
    "cut": program(tensor())[:-20],
    "nothing": b"",
    "empty stack": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "two values": b"\x80\x02K\x01K\x02.",
    "open mark": b"\x80\x02}(.",
    "unknown instruction": b"\x80\x02\xff.",
    "absent memo": b"\x80\x02h\x07.",
    "odd items": program(b"}(K\x01u"),
    "text longer than the file": program(b"X\xff\xff\xff\x7fabc"),
    "text that is no UTF-8": program(b"X\x01\x00\x00\x00\xff"),
    "bytes of 2 to the 62": program(b"\x8e" + struct.pack("<Q", 1 << 62)),
}


@pytest.mark.parametrize("name", sorted(TORN))
def test_read_tensors_refuses_a_torn_program(name, tmp_path):
    refusal(archive(tmp_path / "a.pth", TORN[name]), reason="torn")


def test_read_tensors_refuses_a_lone_tensor_and_a_list(tmp_path):
    for code, match in ((tensor(), "a Tensor instead"), (b"]", "a list instead")):
        path = archive(tmp_path / "a.pth", b"\x80\x02" + code + b".")
        assert match in refusal(path, reason="format")


def test_read_tensors_refuses_a_storage_of_two_types(tmp_path):
    other = tensor(identity(count=12, kind="torch\nHalfStorage"))
    path = archive(tmp_path / "a.pth", program(tensor() + b"s" + text("y") + other))
    assert "one type" in refusal(path, reason="format")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("kind", ["Float", "Half", "BFloat16"])
def test_read_tensors_refuses_nonfinite_numbers(value, kind, tmp_path):
    numbers = np.array([0, value, 0, 0, 0, 0], np.float32)
    data = {
        "Float": numbers.tobytes(),
        "Half": numbers.astype(np.float16).tobytes(),
        "BFloat16": (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
    }[kind]
    code = program(tensor(identity(kind=f"torch\n{kind}Storage")))
    path = archive(tmp_path / "a.pth", code, {"data/0": data})
    assert "'x'" in refusal(path, reason="nonfinite")


# --- what is refused: files ---------------------------------------------------------


@pytest.mark.parametrize("name", ["absent.pth", "", "a" * 5000, "a\0b"])
def test_read_tensors_refuses_what_is_no_file(name, tmp_path):
    with pytest.raises(UserError) as caught:
        torch_file.read_tensors(str(tmp_path / name))
    assert caught.value.reason == "checkpoint_missing"


def test_read_tensors_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(UserError, match="no such file"):
        torch_file.read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("data", "reason", "match"),
    [
        (b"", "torn", "got 0"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "format", "weights_only=True"),
        (pickle.dumps({}), "format", "weights_only=True"),
        (b"<!DOCTYPE html><html>", "format", "a web page"),
        (b"version https://git-lfs", "format", "76 65 72 73"),
        (b"PK\x03\x04 and no more", "torn", "whole zip archive"),
        (b"PK\x05\x06" + bytes(18), "format", "50 4b 05 06"),
    ],
)
def test_read_tensors_refuses_other_formats(data, reason, match, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    assert match in refusal(path, reason=reason)


def test_read_tensors_refuses_torch_legacy_format(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pth"
    content = {"a": torch.ones(2)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert "weights_only=True" in refusal(path, reason="format")


@pytest.mark.parametrize(
    ("records", "reason", "match"),
    [
        ({}, "torn", "24 bytes expected, got none"),
        ({"data/0": bytes(20)}, "torn", "24 bytes expected, got 20"),
        ({"data/0": bytes(28)}, "torn", "24 bytes expected, got 28"),
        ({"data/0": bytes(24), "byteorder": "middle"}, "format", "middle"),
        ({"data/0": bytes(24), "sub/data.pkl": b"."}, "format", "data.pkl"),
        ({"data/0": bytes(24), "../data.pkl": b"."}, "format", "data.pkl"),
    ],
)
def test_read_tensors_refuses_records(records, reason, match, tmp_path):
    path = archive(tmp_path / "a.pth", program(tensor()), records)
    assert match in refusal(path, reason=reason)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_read_tensors_refuses_compressed_entries(method, tmp_path):
    path = archive(
        tmp_path / "a.pth", program(tensor()), {"data/0": bytes(1 << 24)}, method
    )
    assert path.stat().st_size < 1 << 20
    assert "compressed" in refusal(path, reason="format")


def test_read_tensors_refuses_two_entries_of_one_name(tmp_path):
    path = tmp_path / "a.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", program(tensor()))
            file.writestr("a/data/0", bytes(24))
            file.writestr("a/data/0", bytes(24))
    assert "two" in refusal(path, reason="torn")


def test_read_tensors_refuses_entries_larger_than_the_file(tmp_path):
    path = archive(tmp_path / "a.pth", program(tensor()))
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02") + 20  # sizes in the central directory
    data[place : place + 8] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(data)
    assert str(1 << 30)[:3] in refusal(path, reason="torn")


def test_read_tensors_refuses_a_large_program_before_running_it(tmp_path):
    path = archive(tmp_path / "a.pth", program(b"]" * (5 << 20)))
    assert "data.pkl of at most" in refusal(path, reason="format")


def test_read_tensors_refuses_every_cut(tmp_path):
    whole = archive(tmp_path / "whole.pth", program(tensor())).read_bytes()
    path = tmp_path / "a.pth"
    for length in range(0, len(whole) - 1, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            torch_file.read_tensors(path)
        assert caught.value.exit_code == errors.CHECKPOINT, length


def test_read_tensors_survives_every_changed_byte(tmp_path):
    """Either the same numbers (dates and the like) or one line."""
    whole = archive(tmp_path / "whole.pth", program(tensor())).read_bytes()
    path = tmp_path / "a.pth"
    rng = np.random.default_rng(0)
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            found = torch_file.read_tensors(path)
        except UserError as error:
            assert error.exit_code == errors.CHECKPOINT, (position, str(error))
            assert "\n" not in str(error)
        else:
            np.testing.assert_array_equal(found["x"].ravel(), FLOATS)


def test_read_tensors_survives_random_programs(tmp_path):
    """Spliced instructions with good checksums: read, or refused in one line."""
    parts = [code for code, _ in PROGRAMS.values() if len(code) < 500]
    parts += [tensor(), b"(", b"t", b"R", b"b", b"s", b"u", b"Q", b"a", b"}", b"]"]
    path = tmp_path / "a.pth"
    rng = np.random.default_rng(0)
    for _ in range(300):
        picks = rng.integers(0, len(parts), rng.integers(1, 8))
        code = bytearray(program(b"".join(parts[i] for i in picks)))
        code[rng.integers(0, len(code))] = rng.integers(0, 256)
        archive(path, bytes(code))
        try:
            torch_file.read_tensors(path)
        except UserError as error:
            assert error.exit_code == errors.CHECKPOINT
            assert "\n" not in str(error)
