"""Reads what a record names: the scan, its structures as layers of ids, its points.

Structures may overlap. At every voxel the ids that hold there are kept in the order in
which the record lists them, the first in layer 0, the second in layer 1 and so on: a
structure is where any layer has its id. Layer 0 alone is a plain label map.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline import store
from data_pipeline.datasets.manifest import Record
from unireg_jax.errors import STORAGE, UserError
from unireg_jax.imaging import dicom, nifti, points, raw, scans
from unireg_jax.imaging.nifti import Volume


def read_scan(record: Record) -> Volume:
    """Reads a record's image, whatever format it has.

    Args:
        record: from a manifest or an adapter.

    Returns:
        Volume, HU on LPS+ axes.

    Raises:
        UserError: the scan cannot be used.
    """
    if record.grid is not None:
        return raw.read_raw(record.image, record.grid)
    if record.slices or os.path.isdir(record.image):
        return dicom.read_series(record.slices or record.image)
    if record.image.lower().endswith(scans.ITK_ENDINGS):
        return scans.read_scan(record.image)
    return nifti.read_image(record.image)


def read_layers(
    record: Record, image: Volume, label_names: Sequence[str]
) -> tuple[np.ndarray | None, list[str]]:
    """Reads a record's structures on the grid of its image.

    Args:
        record: gives label map, masks, and their order.
        image: from `read_scan`.
        label_names: the task's vocabulary; id i + 1 stands for the i-th name.

    Returns:
        [L, X, Y, Z] uint8, L at least 1, or None when the record has no structures;
        and warnings.

    Raises:
        UserError: a file cannot be used, or lies on another grid.
    """
    layers: list[np.ndarray] = []
    warnings: list[str] = []
    if record.labels is not None:
        volume = scans.read_labels(record.labels)
        nifti.check_same_grid(image, volume)
        warnings += volume.warnings
        layers = list(map_layers(volume.data, record, label_names))
    masks: dict[str, list[str]] = {}
    for name, path in record.masks:
        masks.setdefault(name, []).append(path)
    for name, paths in masks.items():
        marked = np.zeros(image.data.shape, bool)
        for path in paths:
            marked |= read_mask(path, image, warnings)
        _add(layers, marked, label_names.index(name) + 1)
    if record.labels is None and not masks:
        return None, warnings
    return np.stack(layers or [np.zeros(image.data.shape, np.uint8)]), warnings


def read_mask(path: str, image: Volume, warnings: list[str]) -> np.ndarray:
    """Reads a mask on the grid of an image: what is not 0.

    Args:
        path: NIfTI, NRRD or MetaImage of whole numbers.
        image: from `read_scan`.
        warnings: extended by those of the file.

    Returns:
        [X, Y, Z] bool.

    Raises:
        UserError: the file cannot be used, or lies on another grid.
    """
    volume = scans.read_labels(path)
    nifti.check_same_grid(image, volume)
    warnings += volume.warnings
    return volume.data != 0


def map_layers(
    data: np.ndarray, record: Record, label_names: Sequence[str]
) -> np.ndarray:
    """Replaces raw ids by those of the task's vocabulary.

    Args:
        data: [X, Y, Z] uint8 or uint16, raw ids.
        record: gives the label map; ids that are not in it become 0.
        label_names: the vocabulary; id i + 1 stands for the i-th name.

    Returns:
        [L, X, Y, Z] uint8; L is the largest number of names of one id.

    Raises:
        ValueError: data is not uint8 or uint16.
    """
    if data.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"labels must be uint8 or uint16, got {data.dtype}")
    names: dict[int, list[str]] = {}
    for raw_id, name in record.label_map or ():
        names.setdefault(raw_id, []).append(name)
    depth = max(map(len, names.values()), default=1)
    lookup = np.zeros((depth, np.iinfo(data.dtype).max + 1), np.uint8)
    for raw_id, found in names.items():
        if raw_id < lookup.shape[1]:
            for layer, name in enumerate(found):
                lookup[layer, raw_id] = label_names.index(name) + 1
    return np.stack([row[data] for row in lookup])


def read_points(record: Record, image: Volume) -> np.ndarray | None:
    """Reads a record's landmarks.

    Args:
        record: gives the file and what its numbers are.
        image: from `read_scan`; voxels get their place from it.

    Returns:
        [N, 3] float64, LPS mm, or None without a file.

    Raises:
        UserError: see `points.read_table`.
    """
    if record.points is None:
        return None
    return points.read_table(record.points, record.frame, image)


def digests(record: Record) -> dict[str, str]:
    """Digests of all files of a record.

    Args:
        record: from a manifest or an adapter.

    Returns:
        SHA-256 by kind: "image", and "labels", "masks", "roi", "points" where given.

    Raises:
        UserError: a file is absent or cannot be read.
    """
    found = {}
    slices = record.slices
    if not slices and os.path.isdir(record.image):
        with _told(record.image):
            folder = sorted(Path(record.image).iterdir())
            slices = [p for p in folder if p.is_file() and not p.name.startswith(".")]
    if slices or os.path.isdir(record.image):
        found["image"] = _joined([[_file(path)] for path in slices])
    else:
        found["image"] = _file(record.image)
    if record.grid is not None:
        found["image"] = _joined([[found["image"], *map(str, record.grid)]])
    if record.labels is not None:
        found["labels"] = _file(record.labels)
    if record.masks:
        found["masks"] = _joined([[name, _file(path)] for name, path in record.masks])
    if record.roi is not None:
        found["roi"] = _file(record.roi)
    if record.points is not None:
        found["points"] = _joined([[record.frame, _file(record.points)]])
    return found


def _joined(parts: list[list[str]]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _file(path: str | Path) -> str:
    """SHA-256 of one file, with the voxels of a header that keeps them beside it."""
    nifti.check_file(path)
    with _told(path):
        own, *voxels = (store.file_sha256(p) for p in scans.files_of(path))
    return _joined([[own, *voxels]]) if voxels else own


@contextlib.contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """What the disk refuses becomes a fault that names the file or folder."""
    try:
        yield
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except OSError as error:
        raise UserError(
            "storage", f"{nifti.shown(path)}: {error.strerror or error}", STORAGE
        ) from error


def _add(layers: list[np.ndarray], marked: np.ndarray, number: int) -> None:
    """Puts an id where it is marked and not yet, into the first layer that is free."""
    for layer in layers:
        marked = marked & (layer != number)
    for layer in layers:
        free = marked & (layer == 0)
        layer[free] = number
        marked = marked & ~free
    if marked.any():
        layers.append(np.where(marked, np.uint8(number), np.uint8(0)))
