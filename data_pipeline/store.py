"""The layout of a prepared folder: arrays, index, and how they are written and read.

    <root>/index.json                 what is there, with digests, geometry and split
    <root>/volumes/<id>.hu.npy        [X, Y, Z] int16 HU, OUTSIDE_HU beyond the scan
    <root>/volumes/<id>.labels.npy    [X, Y, Z] uint8, ids of the task's vocabulary
    <root>/volumes/<id>.overlaps.npy  optional: [L, X, Y, Z] uint8, further ids of the
                                      same voxels, where organs overlap
    <root>/align.json                 optional: "<fixed id>|<moving id>" -> 4 x 4
    <root>/align_kinds.json           optional: how, and of which volumes
    <root>/records/<id>.json          of `prepare`: what it made a scan's arrays from

and, where the source has them, for evaluation (the loader does not read them):

    <root>/volumes/<id>.roi.npy       [X, Y, Z] uint8, 1 where to judge
    <root>/volumes/<id>.points.npy    [N, 3] float64, landmarks in LPS mm
    <root>/points/<fixed>__<moving>.csv   those of a pair, for `evaluate --landmarks`
    <root>/fields/<fixed>__<moving>.npy   of `synthesize`: the known field of a pair

Every file appears whole or not at all: temporary file beside it, fsync, rename.
"""

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unireg_jax import locks
from unireg_jax.errors import (
    CHECKPOINT,
    DATA_CHANGED,
    NOTHING,
    STORAGE,
    USAGE,
    UserError,
)
from unireg_jax.imaging import nifti

INDEX_VERSION = 2  # 2: may list pairs, which a reader of 1 would not heed
READABLE = (1, 2)
INDEX_NAME = "index.json"
ALIGN_NAME = "align.json"
ALIGN_NOTES_NAME = "align_kinds.json"
VOLUMES_NAME = "volumes"
POINTS_NAME = "points"
FIELDS_NAME = "fields"
RECORDS_NAME = "records"
# What numpy.save writes before a plain array: magic, version 1.0, length, header.
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<dtype>[^']+)', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>[\d, ]*)\), \}"
    rb" *\n",
    re.DOTALL,
)

lock = locks.lock  # of a prepared folder or a work folder


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folders(root: Path | str, *names: str) -> Path:
    """Makes a folder and folders in it.

    Args:
        root: the folder; its parents are made too.
        names: of folders inside.

    Returns:
        root as a Path.

    Raises:
        UserError: `storage`, exit code 6; `not_a_file`, exit code 2, when root is one.
    """
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise UserError(
            "not_a_file", f"{root.name}: a folder expected, got a file", USAGE
        )
    try:
        for folder in (root, *(root / name for name in names)):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "storage", f"{root.name}: {error.strerror}; give another --out", STORAGE
        ) from error
    return root


@contextlib.contextmanager
def made_folder(root: Path | str) -> Iterator[Path]:
    """Holds a folder to be written: a new one, or one of made pairs, to be replaced.

    When the block ends well, arrays that the index does not name are removed: those of
    the pairs before.

    Args:
        root: the folder; made if absent.

    Yields:
        root as a Path.

    Raises:
        UserError: `schema`, exit code 2: scans were prepared there, which took other
            files and perhaps hours; `storage`, 2, when another run holds it; see
            `make_folders` and `read_index`.
    """
    root = make_folders(root)
    with lock(root):
        volumes = read_index(root)["volumes"] if (root / INDEX_NAME).exists() else []
        made = {"generated", "phantom"}
        others = [v["id"] for v in volumes if not made & set(v.get("source", {}))]
        begun = (root / RECORDS_NAME).exists()  # a preparation; it may have no scan yet
        if begun and any(path.is_file() for path in root.glob("*/*")):
            others.append(f"{RECORDS_NAME}/")
        if others:
            raise UserError(
                "schema",
                f"{nifti.shown(root.name)}: a new folder or one of made pairs "
                f"expected, got one of prepared scans ({others[0]}); give another "
                "--out",
                USAGE,
            )
        yield root
        if (root / INDEX_NAME).exists():  # else NIfTI files were written
            _remove_unnamed(root, read_index(root))


def _remove_unnamed(root: Path, index: dict[str, Any]) -> None:
    """Removes volumes and fields that an index does not name."""
    named = set(index.get("fields", {}).values())
    for volume in index["volumes"]:
        named |= {volume[kind] for kind in volume["sha256"]}
    for folder in (VOLUMES_NAME, FIELDS_NAME):
        for path in (root / folder).glob("*.npy"):
            if f"{folder}/{path.name}" not in named:
                remove(path)


def remove(path: Path) -> None:
    """Removes a file of an earlier run.

    Args:
        path: the file.

    Raises:
        UserError: `storage`, exit code 6.
    """
    try:
        path.unlink()
    except OSError as error:
        raise UserError(
            "storage", f"{nifti.shown(path)}: {error.strerror}; remove it", STORAGE
        ) from error


def write_atomic(path: Path | str, content: bytes) -> None:
    """Writes a file that exists whole or not at all, even after a power loss.

    Args:
        path: final name; its folder must exist.
        content: the bytes.

    Raises:
        UserError: `storage`, exit code 6: full, read-only, over quota, I/O error.
    """
    with nifti.atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path | str, value: Any) -> None:
    """Writes strict JSON (no NaN), atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def write_volume(
    root: Path | str,
    volume_id: str,
    hu: np.ndarray,
    labels: np.ndarray | None,
    *,
    overlaps: np.ndarray | None = None,
    roi: np.ndarray | None = None,
    points: np.ndarray | None = None,
) -> dict[str, Any]:
    """Writes one volume's arrays and returns the index fields that describe them.

    Args:
        root: the prepared folder; made if absent.
        volume_id: file stem.
        hu: [X, Y, Z] int16, HU.
        labels: [X, Y, Z] uint8, or None.
        overlaps: [L, X, Y, Z] uint8, further ids of the voxels of labels, or None.
        roi: [X, Y, Z] uint8, or None.
        points: [N, 3] float64, LPS mm, or None.

    Returns:
        {"image", "labels", "sha256": {"image", "labels"}}; paths relative to root. The
        other arrays have a path only when they are there, and "layers" is the L of
        overlaps.

    Raises:
        ValueError: wrong dtype or shape.
        UserError: `storage`, exit code 6.
    """
    if hu.dtype != np.int16 or hu.ndim != 3:
        raise ValueError(f"hu must be [X, Y, Z] int16, got {hu.shape} {hu.dtype}")
    if labels is not None and (labels.dtype != np.uint8 or labels.shape != hu.shape):
        raise ValueError(
            f"labels must be {hu.shape} uint8 like hu, got {labels.shape} "
            f"{labels.dtype}; compact the ids first"
        )
    for name, array in (("overlaps", overlaps), ("roi", roi)):
        if array is not None and (
            array.dtype != np.uint8 or array.shape[-3:] != hu.shape
        ):
            raise ValueError(
                f"{name} must be {hu.shape} uint8 like hu, got {array.shape} "
                f"{array.dtype}"
            )
    make_folders(root, VOLUMES_NAME)
    fields: dict[str, Any] = {"image": None, "labels": None, "sha256": {}}
    for kind, suffix, array in (
        ("image", "hu", hu),
        ("labels", "labels", labels),
        ("overlaps", "overlaps", overlaps),
        ("roi", "roi", roi),
        ("points", "points", points),
    ):
        if array is None:
            continue
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        content = buffer.getvalue()
        name = f"{VOLUMES_NAME}/{volume_id}.{suffix}.npy"
        write_atomic(Path(root) / name, content)
        fields[kind] = name
        fields["sha256"][kind] = hashlib.sha256(content).hexdigest()
    if overlaps is not None:
        fields["layers"] = len(overlaps)
    return fields


def count_layers(root: Path | str, entry: dict[str, Any]) -> int:
    """Counts the layers of a volume's overlaps.

    Args:
        root: the prepared folder.
        entry: the volume's entry in the index; of one that an earlier release wrote,
            without "layers", the array is read.

    Returns:
        L of [L, X, Y, Z]; 0 when nothing overlaps.

    Raises:
        UserError: see `read_array`.
    """
    if "overlaps" not in entry:
        return 0
    if "layers" in entry:
        return entry["layers"]
    return len(read_array(root, entry, "overlaps"))


def read_array(root: Path | str, entry: dict[str, Any], kind: str) -> np.ndarray:
    """Reads one array of a volume whole and checks it against the index.

    Args:
        root: the prepared folder.
        entry: the volume's entry in the index.
        kind: "image", "labels", "overlaps", "roi" or "points", present in the entry.

    Returns:
        The array as `write_volume` took it; read-only.

    Raises:
        UserError: `checksum` or `not_found`, exit code 10: the file is no longer the
            one that was prepared.
    """
    remedy = "run data_pipeline.prepare again with the same arguments"
    where = f"{entry['id']}: {entry[kind]}"
    try:
        content = (Path(root) / entry[kind]).read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            "not_found", f"{where}: is gone; {remedy}", DATA_CHANGED
        ) from error
    except OSError as error:
        raise UserError("storage", f"{where}: {error.strerror}", STORAGE) from error
    found, expected = hashlib.sha256(content).hexdigest(), entry["sha256"][kind]
    if found != expected:
        raise UserError(
            "checksum",
            f"{where}: changed since it was prepared: sha256 {expected[:12]}… "
            f"expected, {found[:12]}… found; {remedy}",
            DATA_CHANGED,
        )
    return _view_npy(content)


def _view_npy(content: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file of `write_volume`, not a copy.

    NumPy's own reader parses the header as Python source. CPython 3.11 counts how deep
    that goes for all threads together, and in a loader's threads it now and then ends
    in a SystemError ("AST constructor recursion depth mismatch").
    """
    found = _NPY_HEADER.match(content)
    assert found, content[:100]  # its digest says that it is ours
    shape = tuple(int(n) for n in found["shape"].split(b",") if n.strip())
    order = "F" if found["fortran"] == b"True" else "C"
    dtype = np.dtype(found["dtype"].decode())
    return np.ndarray(shape, dtype, content, offset=found.end(), order=order)


def write_index(root: Path | str, index: dict[str, Any]) -> None:
    """Writes `index.json` atomically."""
    write_json(Path(root) / INDEX_NAME, index)


def unreadable(path: Path, error: OSError) -> UserError:
    """The fault of a file of a prepared folder that is there and cannot be read."""
    denied = isinstance(error, PermissionError)
    return UserError(
        "permission" if denied else "storage",
        f"{path.name}: {error.strerror}; give yourself the right to read the prepared "
        "folder, or mend the disk",
        STORAGE,
    )


def read_index(root: Path | str) -> dict[str, Any]:
    """Reads the index of a prepared folder.

    Args:
        root: folder written by `data_pipeline.prepare` or `synthetic.write_dataset`.

    Returns:
        {"version", "spec", "tasks", "volumes"} as written by `write_index`, and
        optionally "pairs": {task: {split: [[fixed id, moving id], ...]}}.

    Raises:
        UserError: `not_found` (exit code 3) when there is no index; `permission` or
            `storage` (6) when it cannot be read; `schema` (10) when it is no index;
            `schema` (9) when a newer version wrote it.
    """
    path = Path(root) / INDEX_NAME
    remedy = "make it with: python -m data_pipeline.prepare --manifest … --out …"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            "not_found", f"{root}: no prepared data ({INDEX_NAME}); {remedy}", NOTHING
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            "schema", f"{path.name}: not readable as JSON; {remedy}", DATA_CHANGED
        ) from error
    if not isinstance(index, dict) or not {"version", "spec", "tasks", "volumes"} <= (
        index.keys()
    ):
        raise UserError(
            "schema",
            f"{path.name}: must hold version, spec, tasks and volumes; {remedy}",
            DATA_CHANGED,
        )
    if index["version"] not in READABLE:
        raise UserError(
            "schema",
            f"{path.name}: version 1 or 2 expected, {index['version']!r} "
            f"found: another release wrote it; {remedy}",
            CHECKPOINT,
        )
    return index


def index_digest(index: dict[str, Any]) -> str:
    """Digest of everything that a stream of pairs depends on, as 16 hex digits."""
    parts = [
        [v["id"], v["task"], v["subject"], v["split"], v["vox2world"], v["sha256"]]
        for v in index["volumes"]
    ]
    whole = [index["spec"], index["tasks"], parts]
    if index.get("pairs"):
        whole.append(index["pairs"])
    text = json.dumps(whole, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
