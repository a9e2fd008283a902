"""Tensors of PyTorch's `.pth` files, read without running anything that is in them.

Such a file is a zip archive: `data.pkl`, a pickle program, builds the dict, and one
record per storage holds the numbers. `pickle` would let the program call any function.
Here each instruction is looked up in a short list and does something to plain values
only; nothing is imported, called or given attributes, and sizes are checked before
memory is taken. Neither JAX nor PyTorch is needed.
"""

import dataclasses
import errno
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unireg_jax.errors import CHECKPOINT, STORAGE, UserError
from unireg_jax.imaging.nifti import shown

_LARGEST = 1 << 32  # bytes: of the file, and of all its tensors together
_PROGRAM = 1 << 22  # bytes of data.pkl; 200 tensors take 30 kB
_DEPTH, _NODES = 32, 1 << 20  # of the dict of dicts
_KEY = 512  # letters, or bits of a number
_BFLOAT16 = "bfloat16"  # NumPy has none: becomes float32
_STORAGES = {
    "torch.DoubleStorage": "f8",
    "torch.FloatStorage": "f4",
    "torch.HalfStorage": "f2",
    "torch.BFloat16Storage": _BFLOAT16,
    "torch.LongStorage": "i8",
    "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
    "torch.ComplexFloatStorage": "c8",
    "torch.ComplexDoubleStorage": "c16",
}
_DICT, _SIZE = "collections.OrderedDict", "torch.Size"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
# NumPy's scalars, in the training notes of mmcv: taken note of, not kept.
_DROPPED = {
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
}
_NAMES = {*_STORAGES, *_DROPPED, _DICT, _SIZE, _TENSOR, _PARAMETER}
_CONSTANTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "NONE"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DISTRUST = "use another source, or re-save its tensors alone"
_AGAIN = "download or copy it again"
_RESAVE = (
    "re-save it with PyTorch 1.6 or later: "
    "`torch.save(torch.load(f, weights_only=True), new)`"
)


class _Refused(Exception):
    """What is wrong, without the file's name."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True, eq=False)
class _Name:
    """A name of the allow-list, standing for nothing that could be called."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Dropped:
    """A value that is not kept."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """A record that holds numbers."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A strided view of a storage; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all tensors that `torch.save` (PyTorch 1.6 or later) wrote.

    Args:
        path: `.pth` or `.pt` file that holds dicts, lists, numbers, text and tensors.

    Returns:
        name -> array, the keys that lead to it joined by dots. Arrays are read-only,
        may share memory and need not be contiguous; bfloat16 becomes float32.

    Raises:
        UserError: exit code 9; `checkpoint_missing` (no such file), `checkpoint_torn`
            (not whole), `checkpoint_format` (another format, or more than tensors and
            plain values: the line names what), `checkpoint_nonfinite`.
    """
    try:
        return _read(Path(path))
    except _Refused as error:
        raise _fault(error.kind, f"{shown(path)}: {error}") from error
    except PermissionError as error:
        raise _fault(
            "missing", f"{shown(path)}: read access expected, got none; ask its owner"
        ) from error
    except OSError as error:
        raise UserError(
            "storage",
            f"{shown(path)}: cannot be read: {error.strerror}; check the disk",
            STORAGE,
        ) from error


def _fault(kind: str, message: str) -> UserError:
    return UserError(f"checkpoint_{kind}", message, CHECKPOINT)


def _read(path: Path) -> dict[str, np.ndarray]:
    # A name too long or with NUL is no file either.
    try:
        found = path.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        raise _Refused("missing", "a .pth file expected, no such file; mend the path")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _check_start(file.read(16), size)
        try:
            with zipfile.ZipFile(file) as archive:
                return _read_archive(archive, size)
        # What zipfile raises for damaged archives; EINVAL: a place before the start.
        except (
            *(zipfile.BadZipFile, EOFError, struct.error, NotImplementedError),
            *(ValueError, IndexError, RuntimeError, OSError),
        ) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            got = " ".join(str(error).split())[:100]
            raise _Refused(
                "torn", f"a whole zip archive expected, got {got}; {_AGAIN}"
            ) from error


def _check_start(start: bytes, size: int) -> None:
    """Tells other formats by their first bytes."""
    if not 0 < size <= _LARGEST:
        raise _Refused("torn", f"1 to {_LARGEST} bytes expected, got {size}; {_AGAIN}")
    if start.startswith(b"PK\x03\x04"):
        return
    if start.startswith(b"\x80"):
        raise _Refused(
            "format",
            "the zip form of PyTorch's files expected, got the older bare pickle; "
            + _RESAVE,
        )
    page = start.lstrip().startswith(b"<")
    got = "a web page" if page else f"bytes that begin with {start[:4].hex(' ')}"
    raise _Refused("format", f"a .pth file of torch.save expected, got {got}; {_AGAIN}")


# --- archive ------------------------------------------------------------------------


def _read_archive(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    records = _records(archive, size)
    program = records["data.pkl"]
    if program.file_size > _PROGRAM:
        raise _Refused(
            "format",
            f"data.pkl of at most {_PROGRAM} bytes expected, got {program.file_size}; "
            + _DISTRUST,
        )
    order = "little"
    if "byteorder" in records and records["byteorder"].file_size < 16:
        order = archive.read(records["byteorder"]).decode("ascii", "replace")
    if order not in ("little", "big"):
        raise _Refused(
            "format", f"byteorder little or big expected, got {order!r}; {_AGAIN}"
        )
    found = _named_tensors(_run(archive.read(program)))
    storages: dict[str, tuple[_Storage, np.ndarray]] = {}
    tensors = {}
    total = 0
    for name, tensor in found.items():
        where, storage = repr(name[:200]), tensor.storage
        # Before any number is read: a view of stride 0 can claim any size.
        total += math.prod(max(n, 1) for n in tensor.shape) * _item_size(storage)
        if total > _LARGEST:
            raise _Refused(
                "format",
                f"{where}: tensors of at most {_LARGEST} bytes expected, got shape "
                f"{_short(tensor.shape)}; {_DISTRUST}",
            )
        first, numbers = storages.get(storage.key, (storage, None))
        if numbers is None:
            numbers = _numbers(archive, records, storage, order)
            storages[storage.key] = storage, numbers
        elif (first.dtype, first.count) != (storage.dtype, storage.count):
            raise _Refused(
                "format",
                f"{where}: storage {storage.key} of one type expected, got two; "
                + _DISTRUST,
            )
        tensors[name] = _view(numbers, tensor)
        if not np.isfinite(tensors[name]).all():
            raise _Refused(
                "nonfinite",
                f"finite numbers expected, got NaN or infinity in {where}; use an "
                "earlier checkpoint of the run",
            )
    return tensors


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries under the archive's one folder, plainly stored."""
    entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise _Refused(
                "format",
                "stored entries expected, as torch.save writes them, got a compressed "
                f"or encrypted {entry.filename[:60]!r}; unpack and re-save it",
            )
    # Entries that overlap could claim more bytes than there are.
    if (claimed := sum(e.file_size for e in entries)) > size:
        raise _Refused(
            "torn", f"at least {claimed} bytes expected, got {size}; {_AGAIN}"
        )
    folders = [e.filename[:-9] for e in entries if e.filename.endswith("/data.pkl")]
    if len(folders) != 1 or "/" in folders[0]:
        raise _Refused(
            "format",
            f"one FOLDER/data.pkl expected, got {len(folders)}; pass a file of "
            "torch.save",
        )
    start = f"{folders[0]}/"
    records = {
        e.filename.removeprefix(start): e
        for e in entries
        if e.filename.startswith(start)
    }
    if len({e.filename for e in entries}) < len(entries):
        raise _Refused("torn", f"one entry of each name expected, got two; {_AGAIN}")
    return records


def _item_size(storage: _Storage) -> int:
    return 2 if storage.dtype == _BFLOAT16 else np.dtype(storage.dtype).itemsize


def _numbers(archive, records, storage: _Storage, order: str) -> np.ndarray:
    """All numbers of a storage, native byte order."""
    entry = records.get(f"data/{storage.key}")
    want = storage.count * _item_size(storage)
    if entry is None or entry.file_size != want:
        got = "none" if entry is None else f"{entry.file_size} bytes"
        raise _Refused(
            "torn",
            f"storage {storage.key}: an entry of {want} bytes expected, got {got}; "
            + _AGAIN,
        )
    data = archive.read(entry)
    mark = "<" if order == "little" else ">"
    if storage.dtype == _BFLOAT16:  # the upper half of a float32
        upper = np.frombuffer(data, f"{mark}u2").astype(np.uint32)
        return (upper << 16).view(np.float32)
    if storage.dtype == "?":  # a byte above 1 would be neither True nor False
        return np.frombuffer(data, np.uint8) != 0
    stored = np.frombuffer(data, np.dtype(storage.dtype).newbyteorder(mark))
    return stored.astype(storage.dtype, copy=False)


def _view(numbers: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """The tensor as a view; its extent was checked when it was built."""
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, numbers.dtype)
    # Along one element the stride says nothing, and may be too large for NumPy.
    strides = [
        step * numbers.itemsize if n > 1 else 0
        for n, step in zip(tensor.shape, tensor.strides, strict=True)
    ]
    return np.lib.stride_tricks.as_strided(
        numbers[tensor.offset :], tensor.shape, strides, writeable=False
    )


# --- program ------------------------------------------------------------------------


def _run(program: bytes) -> Any:
    """Gives what the pickle program builds, of plain values, _Tensor and _Dropped."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                (value,) = machine.stack
                return value
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        got = " ".join(str(error).split())[:100]
        raise _Refused(
            "torn", f"data.pkl: a whole pickle program expected, got {got}; {_AGAIN}"
        ) from error
    raise _Refused("torn", f"data.pkl: an end expected, got none; {_AGAIN}")


class _Machine:
    """Stack, marks and memo of a pickle program; each instruction is one of these."""

    def __init__(self):
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under the marks
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in ("NEWTRUE", "NEWFALSE"):
            stack.append(name == "NEWTRUE")
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(self.memo) if name == "MEMOIZE" else argument
            self.memo[place] = stack[-1]
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in _TUPLES:
            self.push(tuple(self.pop(_TUPLES[name])))
        elif name == "TUPLE":
            self.push(tuple(self.pop_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop_mark() if name == "APPENDS" else self.pop(1)
            _only(self.stack[-1], list, "APPEND").extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop_mark() if name == "SETITEMS" else self.pop(2)
            _set_items(_only(self.stack[-1], dict, "SETITEM"), items)
        elif name == "GLOBAL":
            stack.append(_allowed(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            self.push(_allowed(*self.pop(2)))
        elif name == "BINPERSID":
            self.push(_storage(*self.pop(1)))
        elif name == "REDUCE":
            self.push(_built(*self.pop(2)))
        elif name == "BUILD":
            (state,) = self.pop(1)
            _check_state(self.stack[-1], state)
        elif name not in ("PROTO", "FRAME"):
            raise _foreign(f"the pickle instruction {name}")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("an empty stack")
        return [self.stack.pop() for _ in range(count)][::-1]

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items


def _foreign(what: str) -> _Refused:
    return _Refused(
        "format",
        f"data.pkl: tensors and plain values expected, got {what}; {_DISTRUST}",
    )


def _only(value: Any, kind: type, instruction: str) -> Any:
    if type(value) is not kind:
        raise _foreign(f"{instruction} on {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return value.text if isinstance(value, _Name) else type(value).__name__.lstrip("_")


def _allowed(module: Any, name: Any) -> _Name:
    """A name of the allow-list; what is refused is named."""
    text = f"{module}.{name}"
    if not (type(module) is type(name) is str and text in _NAMES):
        raise _foreign(
            text if text.isprintable() and len(text) < 200 else ascii(text[:200])
        )
    return _Name(text)


def _set_items(target: dict, items: list[Any]) -> None:
    # Tuples as keys are left out: nested ones take forever to hash.
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int, float, bool, type(None)):
            raise _foreign(f"a dict key of type {_kind(key)}")
        long = len(key) if type(key) is str else type(key) is int and key.bit_length()
        if long > _KEY:
            raise _foreign(f"a dict key of {long} letters or bits")
        target[key] = value


def _check_state(target: Any, state: Any) -> None:
    """BUILD does nothing here; it is met on state dicts and NumPy's types only."""
    metadata = type(state) is dict and set(state) <= {"_metadata"}
    if not (isinstance(target, _Dropped) or (type(target) is dict and metadata)):
        raise _foreign(f"BUILD on {_kind(target)}")


def _storage(identity: Any) -> _Storage:
    """('storage', type, key, device, count)"""
    if type(identity) is not tuple or len(identity) != 5:
        raise _foreign(f"a persistent id of type {_kind(identity)}")
    word, kind, key, _, count = identity
    known = isinstance(kind, _Name) and kind.text in _STORAGES
    if word != "storage" or not known or type(key) is not str:
        raise _foreign(f"a persistent id with {_kind(kind)}")
    if not re.fullmatch("[0-9]{1,18}", key):
        raise _foreign(f"storage key {key[:60]!r}")
    return _Storage(key, _STORAGES[kind.text], *_counts((count,), "storage size"))


def _built(function: Any, arguments: Any) -> Any:
    """What REDUCE makes of a name and its arguments."""
    if not isinstance(function, _Name) or type(arguments) is not tuple:
        raise _foreign(f"a call of {_kind(function)}")
    name = function.text
    if name in _DROPPED:
        return _Dropped()
    if name == _DICT and arguments == ():
        return {}
    if name == _SIZE and len(arguments) == 1:
        return _counts(arguments[0], _SIZE)
    if name == _PARAMETER and len(arguments) == 3:
        if isinstance(arguments[0], _Tensor):
            return arguments[0]
    if name == _TENSOR and len(arguments) in (6, 7):
        if isinstance(arguments[0], _Storage):
            return _tensor(*arguments[:4])
    raise _foreign(f"a call of {name} with {len(arguments)} other arguments")


def _tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> _Tensor:
    """A view that lies inside its storage."""
    (offset,) = _counts((offset,), "offset")
    shape, strides = _counts(shape, "shape"), _counts(strides, "strides")
    if len(shape) != len(strides) or len(shape) > 32:
        raise _foreign(f"shape {_short(shape)} with strides {_short(strides)}")
    steps = zip(shape, strides, strict=True)
    end = offset + 1 + sum((n - 1) * step for n, step in steps)
    if 0 not in shape and end > storage.count:
        raise _foreign(
            f"a tensor {_short(shape)} that ends at element {end} of the "
            f"{storage.count} of storage {storage.key}"
        )
    return _Tensor(storage, offset, shape, strides)


def _counts(values: Any, what: str) -> tuple[int, ...]:
    """Whole numbers from 0, small enough for every machine."""
    if type(values) is not tuple or any(
        type(n) is not int or not 0 <= n < 1 << 62 for n in values
    ):
        raise _foreign(f"{what} {_short(values)}")
    return values


def _short(values: Any) -> str:
    """Numbers as text of bounded length; of anything else only the type."""
    plain = type(values) is tuple and all(type(n) is int for n in values)
    if not plain or len(values) > 32 or any(n.bit_length() > 128 for n in values):
        return f"of type {_kind(values)}"
    return str(values)


def _named_tensors(value: Any) -> dict[str, _Tensor]:
    """The tensors in nested dicts, lists and tuples, by the keys that lead there."""
    if type(value) is not dict:
        raise _foreign(f"a {_kind(value)} instead of a dict")
    found: dict[str, _Tensor] = {}
    for visited, (name, leaf) in enumerate(_leaves(value, "", 0)):
        # Shared containers may stand for more values than there is memory.
        if visited > _NODES:
            raise _foreign(f"more than {_NODES} values")
        if isinstance(leaf, _Tensor):
            if name in found:
                raise _foreign(f"two tensors named {name[:200]!r}")
            found[name] = leaf
    return found


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Every value once per way to it."""
    yield name, value
    if type(value) not in (dict, list, tuple):
        return
    if depth > _DEPTH:
        raise _foreign(f"containers nested deeper than {_DEPTH}")
    items = value.items() if type(value) is dict else enumerate(value)
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key), depth + 1)
