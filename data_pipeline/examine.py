"""Looks at one raw scan and its labels: facts, and everything that seems wrong.

One volume and its label map are in memory at a time; what leaves is a small dict, so
that many processes can look at a large collection.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import anatomy, findings, sources
from data_pipeline.datasets.manifest import Record
from data_pipeline.findings import Finding
from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti, orientation, scans
from unireg_jax.imaging.nifti import Volume

# Field of view (left-right, front-back, head-feet) below which a scan cannot show what
# its task registers: about the extent of these organs in a small adult. Chosen here.
MIN_FOV_MM = {
    "headneck": (120.0, 120.0, 100.0),
    "chest": (200.0, 150.0, 150.0),
    "abdomen": (200.0, 150.0, 150.0),
    "liver": (150.0, 150.0, 100.0),
    "lung": (100.0, 120.0, 120.0),
}
COARSE_MM = 6.0  # an edge beyond hides organs of a few millimetres
FINE_MM = 0.2
OBLIQUE_DEG = 30.0
_HOLLOW = set(
    "lung lungs lobe trachea airway airways bronchus bronchi bowel colon stomach "
    "duodenum esophagus oesophagus larynx pharynx sinus cavity rectum nasal".split()
)


def examine(record: Record) -> dict[str, Any]:
    """Examines one scan of a manifest.

    Args:
        record: from the manifest.

    Returns:
        {"id", "task", "subject", "split", "sha256", "voxels", "image", "labels",
        "findings"}: digests of files and of values, facts (None where a file cannot be
        read) and a list of Finding.
    """
    result = nothing_known(record)
    found: list[Finding] = result["findings"]
    image = None
    try:
        image = sources.read_scan(record)
        result["sha256"] = _digests(record)
    except UserError as error:
        found.append(findings.from_error(record.id, "image", error, record.image))
    except OSError as error:  # it vanished or broke after it had been read
        found.append(_unreadable(record.id, "image", error))
    true_hu = False
    if image is not None:
        result["image"] = _image_facts(image)
        result["voxels"] = value_digest(image.data)
        found += _reader_warnings(record.id, "image", image)
        odd = _intensity(record.id, image.data)
        true_hu = not any(f.level == "error" for f in odd)
        found += odd + _geometry(record, result["image"])
    if record.labels is not None or record.masks:
        _examine_labels(record, image, true_hu, result)
    if image is not None:
        found += _judged(record, image)
    return result


def nothing_known(record: Record) -> dict[str, Any]:
    """The result of `examine` before anything is read."""
    return {
        "id": record.id,
        "task": record.task,
        "subject": record.subject,
        "split": record.split,
        "sha256": {},
        "voxels": None,
        "image": None,
        "labels": None,
        "findings": [],
    }


def value_digest(data: np.ndarray) -> str | None:
    """Digest of the values alone: blind to header, order and direction of the axes.

    Whole numbers within int16 have one digest, whichever type they are stored as.

    Args:
        data: [X, Y, Z] int16 or float32.

    Returns:
        16 hexadecimal digits; None for a constant volume, which is no one's scan.
    """
    low, high = data.min(), data.max()
    if low == high:
        return None
    fits = low >= -(1 << 15) and high < 1 << 15
    if data.dtype == np.int16 or (
        fits and all(np.array_equal(plane, np.rint(plane)) for plane in data)
    ):
        counts = np.zeros(1 << 16, np.int64)
        for plane in data:  # plane by plane: bincount makes int64 of what it counts
            codes = plane.ravel().astype(np.int32) + (1 << 15)
            counts += np.bincount(codes, minlength=1 << 16)
        values = counts
    else:
        values = np.sort(data, axis=None)
    digest = hashlib.sha256(str(sorted(data.shape)).encode())
    digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()[:16]


def _digests(record: Record) -> dict[str, str]:
    """Of all files; of the image alone where another cannot be read, as is told there.

    Raises:
        UserError: the image cannot be read.
    """
    try:
        return sources.digests(record)
    except UserError:
        return sources.digests(
            record._replace(labels=None, masks=(), roi=None, points=None)
        )


def _unreadable(name: str, what: str, error: OSError) -> Finding:
    got = error.strerror or type(error).__name__
    remedy = "check the disk or the network share"
    return Finding("error", name, "storage", what, "a readable file", got, remedy)


def _reader_warnings(name: str, what: str, volume: Volume) -> list[Finding]:
    """The reader's warnings; those of intensities are looked into more closely here."""
    return [
        findings.from_warning(name, what, line)
        for line in volume.warnings
        if not line.startswith(("hu_range", "constant"))
    ]


# --- geometry ---


def _image_facts(image: Volume) -> dict[str, Any]:
    """Geometry and values of a scan, as plain numbers."""
    spacing = np.array(image.spacing_mm)
    shape = np.array(image.data.shape)
    cosines = image.vox2world[:3, :3] / spacing
    straight = np.abs(cosines).max(axis=0).clip(0, 1)
    ends = np.array([[-0.5] * 3, shape - 0.5])
    corners = [
        image.vox2world[:3, :3] @ [ends[i, 0], ends[j, 1], ends[k, 2]]
        + image.vox2world[:3, 3]
        for i in (0, 1)
        for j in (0, 1)
        for k in (0, 1)
    ]
    parts = np.percentile(_sample(image.data), (0.1, 50, 99.9))
    return {
        "shape": shape.tolist(),
        "stored_axes": orientation.axis_codes((image.native or image).vox2world),
        "stored_type": _stored_type(image),
        "spacing_mm": spacing.round(4).tolist(),
        "extent_mm": (spacing * shape).round(1).tolist(),
        "oblique_deg": float(np.degrees(np.arccos(straight.min())).round(1)),
        "box_mm": [
            np.min(corners, axis=0).round(1).tolist(),
            np.max(corners, axis=0).round(1).tolist(),
        ],
        "intensity": {
            "min": float(image.data.min()),
            "p0.1": float(parts[0]),
            "p50": float(parts[1]),
            "p99.9": float(parts[2]),
            "max": float(image.data.max()),
        },
    }


def _stored_type(image: Volume) -> str:
    """Of NIfTI what the header says; of other formats what was made of them."""
    header = image.header
    return header.get_data_dtype().name if header is not None else image.data.dtype.name


def _sample(data: np.ndarray, count: int = 96) -> np.ndarray:
    """About count^3 voxels spread over the volume, flat."""
    step = tuple(slice(None, None, max(1, n // count)) for n in data.shape)
    return data[step].ravel()


def _geometry(record: Record, facts: Mapping[str, Any]) -> list[Finding]:
    """Spacing, obliqueness and field of view."""
    found = []
    spacing, extent = facts["spacing_mm"], facts["extent_mm"]
    if max(spacing) > COARSE_MM or min(spacing) < FINE_MM:
        found.append(
            Finding(
                "warning",
                record.id,
                "spacing",
                "image",
                f"voxel edges of {FINE_MM:g} to {COARSE_MM:g} mm",
                _times(spacing) + " mm",
                "use a thinner reconstruction of the same scan if there is one",
            )
        )
    if facts["oblique_deg"] > OBLIQUE_DEG:
        found.append(
            Finding(
                "warning",
                record.id,
                "orientation_conflict",
                "image",
                f"axes within {OBLIQUE_DEG:g} degrees of the patient's",
                f"{facts['oblique_deg']:g} degrees",
                "look at the scan: its direction matrix may be wrong",
            )
        )
    wanted = MIN_FOV_MM[record.task]
    if any(have < need for have, need in zip(extent, wanted, strict=True)):
        found.append(
            Finding(
                "warning",
                record.id,
                "fov",
                "image",
                f"at least {_times(wanted)} mm for {record.task}",
                f"{_times(extent)} mm",
                "leave the scan out, or name the task that it shows",
            )
        )
    return found


def _times(lengths) -> str:
    return " x ".join(f"{length:.4g}" for length in lengths)


# --- intensities ---


def _intensity(name: str, data: np.ndarray) -> list[Finding]:
    """Says what the values are if they are not Hounsfield units."""
    low, high = float(data.min()), float(data.max())
    expected = "HU: air near -1000, soft tissue 0 to 100"
    if low == high:
        got, remedy = f"{low:g} everywhere", "leave the scan out"
        return [Finding("error", name, "constant", "image", expected, got, remedy)]
    sample = _sample(data)
    p01, p50, p95, p999 = (float(v) for v in np.percentile(sample, (0.1, 50, 95, 99.9)))
    if p01 <= -500 and p999 >= 0 and p50 <= 700 and p95 <= 800:
        return _cut_off(name, sample, low, high)
    level, got, remedy = _not_hu(sample, low, high)
    got += f" (0.1 %, 50 %, 99.9 %: {p01:g}, {p50:g}, {p999:g})"
    return [Finding(level, name, "hu_range", "image", expected, got, remedy)]


def _not_hu(sample: np.ndarray, low: float, high: float) -> tuple[str, str, str]:
    """Level, what the values look like, and what mends it."""

    def share(first: float, last: float) -> float:
        return float(((sample >= first) & (sample <= last)).mean())

    again = "export the scan again from DICOM, in HU"
    whole = bool((sample == np.rint(sample)).all())
    if low >= -1 and high <= 1:
        return "error", f"values scaled to {low:g} … {high:g}", again
    if low >= 0 and whole and len(np.unique(sample)) < 100 and share(0, 0) > 0.3:
        return "error", "few whole numbers, as in a label map", "name the CT itself"
    if low >= 0 and high <= 255:
        return "error", "0 … 255, an 8-bit picture or an MR", again
    if share(900, 1100) > 0.1 and low < -100 and share(-1100, -900) < 0.02:
        got = "air at +1000: the sign is turned"
        return "error", got, "rewrite the header with slope -1, or export again"
    if share(-60, 200) > 0.05 and share(900, 1200) > 0.1 and low > -1100:
        got = "air near 0 and soft tissue near 1024: the offset is not subtracted"
        return "error", got, "set the intercept (scl_inter) to -1024"
    inside = sample[sample > 0]
    soft = float((inside <= 250).mean()) if inside.size else 0.0
    if low == 0 and share(0, 0) > 0.1 and soft > 0.7 and high > 300:
        return "error", "air and fat cut off at 0", again
    if low >= 0:
        got = "no value below 0, as in MR, PET or a rescaled picture"
        return "error", got, "only CT in HU can be used: leave the scan out or convert"
    return (
        "warning",
        "hardly any air",
        "check that the lower end is not cut off; a crop inside the body is fine",
    )


def _cut_off(name: str, sample: np.ndarray, low: float, high: float) -> list[Finding]:
    """Ends of the range that are missing, and air at another value."""
    found = []

    def add(expected: str, got: str, remedy: str) -> None:
        found.append(
            Finding("warning", name, "hu_range", "image", expected, got, remedy)
        )

    window = "export the scan again without a display window"
    if low > -900:
        add("air near -1000 HU", f"nothing below {low:g}", window)
    if high < 700:
        add("bone of 700 HU and more", f"nothing above {high:g}", window)
    # Padding beyond the scanner's circle lies lower, lung and gas in bowel higher.
    air = sample[(sample > -1250) & (sample < -930)]
    if air.size > 0.02 * sample.size and low <= -900:
        value = float(np.median(air))
        if abs(value + 1000) > 60:
            got = f"{value:g} HU"
            add("air within 60 HU of -1000", got, "check the intercept in the header")
    return found


# --- labels ---


class _Structure(NamedTuple):
    """One structure: voxels, how many of them lie in air, centre in LPS mm."""

    voxels: int
    in_air: int
    center: np.ndarray | None


def _examine_labels(
    record: Record, image: Volume | None, true_hu: bool, result: dict[str, Any]
) -> None:
    """Adds the facts of the structures to `result`, and what is wrong with them."""
    found = result["findings"]
    structures: dict[str, _Structure] = {}
    unknown: list[int] = []
    labels = None
    table = record.label_map or ()
    fits = image is not None
    if record.labels is not None:
        labels, same = _read_labels(record, record.labels, "labels", image, found)
        if labels is not None:
            ids, codes = _compact(labels.data)
            structures = _measure(table, ids, labels._replace(data=codes), image, same)
            unknown = sorted(set(ids.tolist()) - {0} - {i for i, _ in table})
        fits &= same
    masks: dict[str, list[str]] = {}
    for name, path in record.masks:
        masks.setdefault(name, []).append(path)
    for name, paths in masks.items():
        marked = None
        raw_ids = [raw_id for raw_id, other in table if other == name]
        if labels is not None and raw_ids:  # the structure is both together
            drawn = np.isin(labels.data, raw_ids)
            marked = labels._replace(data=drawn.astype(np.uint16))
        for path in paths:
            mask, same = _read_labels(record, path, f"mask of {name}", image, found)
            fits &= same
            if mask is not None and (marked is None or same):
                drawn = mask.data != 0
                if marked is not None and marked.data.shape == drawn.shape:
                    drawn |= marked.data > 0
                marked = mask._replace(data=drawn.astype(np.uint16))
        if marked is not None:
            ids = np.arange(2)
            structures |= _measure([(1, name)], ids, marked, image, fits)
    if not structures:
        return
    sizes = {name: item.voxels for name, item in structures.items()}
    result["labels"] = {"voxels": sizes, "unknown_ids": unknown}
    found += _label_sets(record.id, sizes, unknown)
    if fits:
        places = {n: s.center for n, s in structures.items() if s.center is not None}
        found += anatomy.check_places(record.id, places)
    if fits and true_hu:
        found += _in_air(record.id, structures)


def _read_labels(
    record: Record, path: str, what: str, image: Volume | None, found: list[Finding]
) -> tuple[Volume | None, bool]:
    """A label map or mask, None if it cannot be read, and whether it fits the image."""
    paths = (record.image, path)
    try:
        labels = scans.read_labels(path)
    except UserError as error:
        found.append(findings.from_error(record.id, what, error, *paths))
        return None, False
    found += _reader_warnings(record.id, what, labels)
    if image is None:
        return labels, False
    try:
        nifti.check_same_grid(image, labels)
    except UserError as error:
        found.append(findings.from_error(record.id, what, error, *paths))
        return labels, False
    return labels, True


def _judged(record: Record, image: Volume) -> list[Finding]:
    """What only evaluation reads: the mask of where to judge, and landmarks."""
    found: list[Finding] = []
    if record.roi is not None:
        _read_labels(record, record.roi, "roi", image, found)
    try:
        points = sources.read_points(record, image)
    except UserError as error:
        paths = (record.image, record.points)
        return [*found, findings.from_error(record.id, "landmarks", error, *paths)]
    if points is not None and len(points):
        to_voxel = np.linalg.inv(image.vox2world)
        index = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        size = np.array(image.data.shape)
        outside = int((((index < -0.5) | (index > size - 0.5)).any(axis=1)).sum())
        if outside:
            found.append(
                Finding(
                    "warning",
                    record.id,
                    "grid_mismatch",
                    "landmarks",
                    "every point inside the scan",
                    f"{outside} of {len(points)} outside",
                    "check their frame: LPS mm, or voxels of this scan",
                )
            )
    return found


def _compact(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids that are there, sorted, and for every voxel the position of its id."""
    counts = np.zeros(1 << 16, np.int64)
    for plane in labels:  # plane by plane: bincount makes int64 of what it counts
        counts += np.bincount(plane.ravel(), minlength=1 << 16)
    ids = np.flatnonzero(counts)
    lookup = np.zeros(1 << 16, np.uint16)
    lookup[ids] = np.arange(ids.size)
    return ids, lookup[labels]


def _measure(
    table: Iterable[tuple[int, str]],
    ids: np.ndarray,
    coded: Volume,
    image: Volume | None,
    same_grid: bool,
) -> dict[str, _Structure]:
    """Measures named structures; `coded` holds the position of every voxel's id."""
    codes = coded.data
    tables = []  # per axis [n, ids]: voxels of each id in every plane across it
    for axis in range(3):
        planes = np.moveaxis(codes, axis, 0)
        counts = [np.bincount(plane.ravel(), minlength=ids.size) for plane in planes]
        tables.append(np.stack(counts))
    in_air = np.zeros(ids.size, np.int64)
    if image is not None and same_grid:
        for plane, drawn in zip(image.data, codes, strict=True):
            in_air += np.bincount(drawn[plane < -500], minlength=ids.size)
    names: dict[str, list[int]] = {}
    for raw_id, name in table:
        names.setdefault(name, []).append(raw_id)
    found = {}
    for name, raw_ids in names.items():
        columns = np.isin(ids, raw_ids)
        planes = [counts[:, columns].sum(axis=1) for counts in tables]
        voxels, center = int(planes[0].sum()), None
        if voxels:
            index = [np.arange(p.size) @ p / voxels for p in planes]
            center = coded.vox2world[:3, :3] @ index + coded.vox2world[:3, 3]
        found[name] = _Structure(voxels, int(in_air[columns].sum()), center)
    return found


def _label_sets(name: str, sizes: Mapping[str, int], unknown: list[int]):
    """Nothing labelled, names that are absent, ids that are not in the map."""
    found = []
    absent = [structure for structure, size in sizes.items() if not size]
    if len(absent) == len(sizes):
        got = "no voxel of any"
        if unknown:
            got += f"; ids there: {_listed(unknown)}"
        return [
            Finding(
                "warning",
                name,
                "label_set",
                "labels",
                f"structures of the label map ({len(sizes)})",
                got,
                "check that label file and label map belong together",
            )
        ]
    if absent:
        found.append(
            Finding(
                "warning",
                name,
                "label_set",
                "labels",
                "every structure of the label map",
                f"none of {_listed(absent)}",
                "fine if they were not drawn or lie outside; else mend the map",
            )
        )
    if unknown:
        # With every name in its place, ids left out were left out on purpose.
        found.append(
            Finding(
                "warning" if absent else "note",
                name,
                "label_unknown",
                "labels",
                "ids of the label map",
                f"{len(unknown)} other: {_listed(unknown)}",
                "they become background; name them in the map to use them",
            )
        )
    return found


def _listed(items: list, *, most: int = 8) -> str:
    text = ", ".join(str(item) for item in items[:most])
    return f"{text} and {len(items) - most} more" if len(items) > most else text


def _in_air(name: str, structures: Mapping[str, _Structure]) -> list[Finding]:
    """Solid organs drawn over air: the labels are shifted or turned in the array."""
    solid = {
        structure: item
        for structure, item in structures.items()
        if not _HOLLOW & set(anatomy.words(structure))
    }
    totals = {structure: item.voxels for structure, item in solid.items()}
    air = {structure: item.in_air for structure, item in solid.items()}
    total, lost = sum(totals.values()), sum(air.values())
    if lost > 0.5 * total:
        got = f"{100 * lost / total:.0f} % of their voxels in air"
        level, remedy = "error", "shifted, turned or of another scan: look at both"
    else:
        parts = {n: air[n] / totals[n] for n in solid if air[n] > 0.2 * totals[n]}
        if not parts:
            return []
        listed = [f"{100 * part:.0f} % of {organ}" for organ, part in parts.items()]
        got = f"{_listed(listed)} in air"
        level, remedy = (
            "warning",
            "drawn beyond the scan, or on another one: look at it",
        )
    return [
        Finding(
            level,
            name,
            "grid_mismatch",
            "labels",
            "solid organs drawn on tissue",
            got,
            remedy,
        )
    ]
