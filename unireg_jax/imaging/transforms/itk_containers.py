"""Files in which ITK and ANTs keep transforms: HDF5, text, MATLAB 4.

A file lists transforms, each by its kind and two rows of numbers. A composite lists
its parts last-acting first.
"""

import os
import re
import struct
import uuid
from collections.abc import Sequence

import h5py
import numpy as np
from isal import isal_zlib

from unireg_jax.errors import LIMIT, UserError, bad_file
from unireg_jax.imaging import nifti
from unireg_jax.imaging.transforms import checks, heaps

FIELD_KIND = "DisplacementFieldTransform"
_SLAB_NUMBERS = 2**20  # of a field, put in order at once
_CHUNK = 2**17  # numbers that are compressed together
_MAX_TEXT = 1 << 26  # bytes: a field of 100 x 100 x 100
# kind, fixed parameters, parameters
Listed = tuple[str, np.ndarray, np.ndarray]


def read(path: str | os.PathLike) -> list[Listed]:
    """Lists the transforms of a file of any kind.

    Args:
        path: HDF5 (`.h5`), ITK text (`.txt`, `.tfm`) or ANTs' binary affine (`.mat`).

    Returns:
        Kind, fixed parameters and parameters of each; a field's vectors float32.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`; `schema` for other content;
            `checksum`, `too_large`.
    """
    nifti.check_file(path)
    if checks.ends(path, ".mat"):
        return _mat_transforms(path)
    return _h5_transforms(path) if _magic(path) == b"\x89HDF" else read_text(path)


def read_text(path: str | os.PathLike) -> list[Listed]:
    """Lists the transforms of an ITK text file.

    Args:
        path: `.txt` or `.tfm`.

    Returns:
        As `read`.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`; `schema` for other content;
            `too_large`.
    """
    kinds: list[str] = []
    numbers: list[dict[str, np.ndarray]] = []
    for line in _read_text(path).splitlines():
        key, _, value = line.partition(":")
        if key == "Transform":
            kinds.append(value.strip())
            numbers.append({})
        elif key in ("Parameters", "FixedParameters") and kinds:
            # One by one: a list of a field's words takes several times the file.
            words = re.finditer(r"\S+", value)
            try:
                numbers[-1][key] = np.fromiter((float(w[0]) for w in words), float)
            except ValueError as error:
                raise not_text(path, f"{key} that are no numbers") from error
    none = np.empty(0)
    return [
        (kind, found.get("FixedParameters", none), found.get("Parameters", none))
        for kind, found in zip(kinds, numbers, strict=True)
    ]


def write_text(path: str | os.PathLike, transform: Listed) -> None:
    """Writes one transform as ITK text.

    Args:
        path: name of the file.
        transform: kind, fixed parameters and parameters.

    Raises:
        UserError: `storage`.
    """
    kind, fixed, parameters = transform
    text = (
        "#Insight Transform File V1.0\n"
        "#Transform 0\n"
        f"Transform: {kind}\n"
        f"Parameters: {_numbers(parameters)}\n"
        f"FixedParameters: {_numbers(fixed)}\n"
    )
    with nifti.atomic_path(path) as temp:
        temp.write_text(text, encoding="ascii")


def write_h5(path: str | os.PathLike, listed: Sequence[Listed]) -> None:
    """Writes a composite as HDF5.

    Args:
        path: name of the file.
        listed: kind, fixed parameters and parameters of its parts; those of a field
            may have several axes, the last one fastest.

    Raises:
        UserError: `storage`.
    """
    # Made in memory: on a full disk the HDF5 library ends the process. It knows even
    # such a file by its name, which two threads must not share.
    name = f"{uuid.uuid4().hex}.h5"
    with h5py.File(name, "w", driver="core", backing_store=False) as file:
        root = file.create_group("TransformGroup")
        _add_transform(root, 0, "CompositeTransform_double_3_3", None, None)
        for number, entry in enumerate(listed, start=1):
            _add_transform(root, number, *entry)
        file.flush()
        image = file.id.get_file_image()
    with nifti.atomic_path(path) as temp:
        temp.write_bytes(image)


def _add_transform(
    root: h5py.Group,
    number: int,
    kind: str,
    fixed: np.ndarray | None,
    parameters: np.ndarray | None,
) -> None:
    """One numbered group in ITK's HDF5 layout."""
    group = root.create_group(str(number))
    # An array of one variable-length string, as ITK writes it.
    group.create_dataset("TransformType", data=[kind], dtype=h5py.string_dtype("ascii"))
    if parameters is not None:
        # The checksum finds what damage does to numbers that are not compressed.
        group.create_dataset("TransformFixedParameters", data=fixed, fletcher32=True)
        if parameters.size > 1000:
            _add_packed(group, parameters)
        else:
            group.create_dataset(
                "TransformParameters", data=parameters.ravel(), fletcher32=True
            )


def _add_packed(group: h5py.Group, parameters: np.ndarray) -> None:
    """The numbers of a field, shuffled and deflated as HDF5's own filters do it."""
    chunk = min(_CHUNK, parameters.size)
    packed = {"compression": "gzip", "shuffle": True, "chunks": (chunk,)}
    numbers = group.create_dataset(
        "TransformParameters", (parameters.size,), np.float64, **packed
    )
    start, rest = 0, np.empty(0)
    # Put in order and widened slab by slab: no copy of a large field.
    step = max(1, _SLAB_NUMBERS // parameters[0].size)
    for first in range(0, len(parameters), step):
        part = np.append(rest, parameters[first : first + step])
        if first + step >= len(parameters):  # the last chunk is a full one
            part = np.append(part, np.zeros(-part.size % chunk))
        whole = part.size - part.size % chunk
        for block in part[:whole].reshape(-1, chunk):
            shuffled = block.view(np.uint8).reshape(-1, block.itemsize).T.tobytes()
            # The library's own filter would take five times as long.
            numbers.id.write_direct_chunk((start,), isal_zlib.compress(shuffled, 2))
            start += chunk
        rest = part[whole:]


def _h5_transforms(path: str | os.PathLike) -> list[Listed]:
    """Those of an ITK HDF5 file; a field's vectors in float32."""
    listed, total = [], 0
    try:
        heaps.check(path)
        with h5py.File(path, "r") as file:
            root = file["TransformGroup"]
            for number in sorted(root, key=int):
                group = root[number]
                kind = _kind(group["TransformType"], file)
                numbers = []
                # SimpleITK spells fixed parameters so; others with their typing error.
                for name in ("FixedParameters", "Parameters"):
                    names = (f"Transform{name}", f"Tranform{name}")
                    found = next((group[n] for n in names if n in group), None)
                    total += 0 if found is None else found.size
                    if total > checks.MAX_NUMBERS:
                        raise checks.too_large(path, total)
                    if found is not None and _elsewhere(found, file):
                        raise ValueError(f"{name} that lie in another file")
                    if found is not None and found.dtype.kind not in "fiu":
                        raise ValueError(f"{name} that are no numbers")
                    field = name == "Parameters" and kind.startswith(FIELD_KIND)
                    dtype = np.float32 if field else np.float64
                    numbers.append(
                        np.empty(0) if found is None else found.astype(dtype)[()]
                    )
                listed.append((kind, *numbers))
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (
        OSError,
        KeyError,
        ValueError,
        IndexError,
        AttributeError,
        TypeError,
        RuntimeError,
    ) as error:
        raise not_parts(path, " ".join(str(error).split())[:120]) from error
    return listed


def _mat_transforms(path: str | os.PathLike) -> list[Listed]:
    """The one of an ANTs `.mat`: two named columns, as MATLAB 4 wrote them."""
    found: dict[str, np.ndarray] = {}
    try:
        data = _beginning(path, 1 << 16)  # more than one affine can have
        place = 0
        while place < len(data) and len(found) < 2:
            kind, rows, columns, imaginary, length = struct.unpack_from(
                "<5i", data, place
            )
            place += 20
            # Little-endian, full matrix: thousands and units are 0, tens the type.
            if kind not in (0, 10) or imaginary or not 0 < length < 200:
                raise ValueError("another kind of MATLAB file")
            name = data[place : place + length].rstrip(b"\0").decode("ascii")
            place += length
            dtype = np.dtype("<f8" if kind == 0 else "<f4")
            if not 0 <= rows * columns <= 1000:
                raise ValueError(f"a matrix of {rows} x {columns}")
            found[name] = np.frombuffer(data, dtype, rows * columns, place).astype(
                np.float64
            )
            place += rows * columns * dtype.itemsize
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise not_parts(path, str(error)) from error
    center = found.pop("fixed", np.empty(0))
    return [(kind, center, numbers) for kind, numbers in found.items()]


def _numbers(values) -> str:
    """Shortest decimal spelling that reads back to the same float64."""
    return " ".join(repr(float(v)) for v in values)


def _magic(path: str | os.PathLike) -> bytes:
    """The first four bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(4)
    except PermissionError as error:
        raise nifti.permission_error(path) from error


def _read_text(path: str | os.PathLike) -> str:
    """A text file whole."""
    if (size := nifti.check_file(path)) > _MAX_TEXT:
        expected, remedy = f"at most {_MAX_TEXT} bytes of text", "save it as .h5"
        raise bad_file(path, "too_large", expected, str(size), remedy, LIMIT)
    try:
        text = _beginning(path, _MAX_TEXT).decode("ascii")
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except UnicodeDecodeError as error:
        raise not_text(path, "binary data") from error
    if not text.startswith("#Insight Transform File"):
        raise not_text(path, "no '#Insight Transform File' line")
    return text


def _beginning(path: str | os.PathLike, most: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(most)


def _kind(found: h5py.Dataset, file: h5py.File) -> str:
    """The string in it. Asked for one of another type the HDF5 library may crash."""
    if _elsewhere(found, file):
        raise ValueError("a TransformType that lies in another file")
    if h5py.check_string_dtype(found.dtype) is None or found.dtype.itemsize > 200:
        raise ValueError("a TransformType that is no short text")
    return found[0].decode("ascii")


def _elsewhere(found: h5py.Dataset, file: h5py.File) -> bool:
    """Whether a dataset's numbers come of a file that the HDF5 file only names."""
    return bool(
        found.external or found.is_virtual or found.file.filename != file.filename
    )


def not_text(path: str | os.PathLike, got: str) -> UserError:
    """Makes the UserError of a file that is no transform as ITK text.

    Args:
        path: of the file.
        got: what it holds instead.

    Returns:
        UserError, `schema`.
    """
    expected, remedy = "a transform as ITK text", "convert it with ITK or ANTs"
    return bad_file(path, "schema", expected, got, remedy)


def not_parts(path: str | os.PathLike, got: str) -> UserError:
    """Makes the UserError of a file that holds no such transform.

    Args:
        path: of the file.
        got: what it holds instead.

    Returns:
        UserError, `schema`.
    """
    expected = "an ITK transform file of affines and displacement fields in 3-D"
    remedy = "sample other kinds as a displacement field with ITK"
    return bad_file(path, "schema", expected, got, remedy)
