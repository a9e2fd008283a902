"""Manifest of raw scans, CSV or JSON -> list of records; every fault found at once.

    id,image,label,label_map,task,subject,split
    a01,scans/a01.nii.gz,labels/a01.nii.gz,labels.json,abdomen,p01,train

Paths are relative to the manifest. `image` is a file in NIfTI, NRRD or MetaImage, or
the folder of a DICOM series. `label` and `label_map` may be empty together; optional
columns are `group` (contrast phase, breath hold), `roi` (a mask of where to judge) and
`points` (landmarks: x, y, z in LPS mm; those of two scans correspond line by line).
JSON: a list of such objects, or {"volumes": [...], "pairs": [["fixed id", "moving id"],
...]}; a task's pairs in a split are then those listed, if any is. An object may have
`masks`, {"name": "file" or ["file", ...]}: what any of them marks is the structure.

A label map is JSON {"raw id": "name"}; several ids may share one name, and ids that are
not in it become background. {"6": ["Hippocampus", "TemporalLobe"]} puts an id into both
structures. Where structures overlap, all are trained on; made pairs and pictures show
the one listed first.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unireg_jax import manifest
from unireg_jax.errors import NOTHING, USAGE, UserError
from unireg_jax.imaging.nifti import shown
from unireg_jax.imaging.raw import RawGrid
from unireg_jax.manifest import Fault, Row
from unireg_jax.tasks import TASKS, PairType

REQUIRED = ("id", "image", "task", "subject", "split")
OPTIONAL = ("label", "label_map", "group", "roi", "points", "masks")
SPLITS = ("train", "val", "test")
MAX_LABELS = 255  # prepared labels are uint8, 0 is background


class Record(NamedTuple):
    """One scan: what an adapter gives and what `prepare` makes arrays of.

    Attributes:
        id: unique name, fit for a file name.
        image: CT, path of a file or of the folder of a DICOM series.
        labels: label map volume, path, or None.
        label_map: (raw id, name) pairs, or None. An id may have several names and a
            name several ids; where names overlap, the one listed first comes first.
        task: name in `unireg_jax.tasks.TASKS`.
        subject: the patient.
        split: "train", "val" or "test".
        group: phase or breath hold, or None.
        masks: (name, path) pairs: what is not 0 belongs to the structure. A name with
            several files is their union; they come after `label_map`.
        roi: path of a mask of where to judge, or None; kept for evaluation.
        points: path of landmarks, or None; kept for evaluation.
        frame: what their numbers are, one of `unireg_jax.imaging.points.FRAMES`.
        slices: the image's DICOM files, when its folder holds others as well.
        grid: of an image without a header, else None.
    """

    id: str
    image: str
    labels: str | None
    label_map: tuple[tuple[int, str], ...] | None
    task: str
    subject: str
    split: str
    group: str | None = None
    masks: tuple[tuple[str, str], ...] = ()
    roi: str | None = None
    points: str | None = None
    frame: str = "lps_mm"
    slices: tuple[str, ...] = ()
    grid: RawGrid | None = None


class Collection(NamedTuple):
    """What a folder or a manifest holds.

    Attributes:
        records: one per scan and task.
        pairs: ordered (fixed id, moving id). A task with a pair in a split has only the
            listed ones there; without any it has all that its kind allows.
        notes: what was left out and why, one line each.
    """

    records: list[Record]
    pairs: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def collect(
    path: Path | str,
    *,
    roots: Sequence[Path | str] = (),
    strict: bool = False,
    allow_leak: bool = False,
) -> Collection:
    """Reads and checks a manifest before any scan is opened.

    Args:
        path: `.csv` or `.json`, UTF-8.
        roots: folders that scans may lie in, besides the manifest's own.
        strict: a listed file that does not exist is a fault here; else it fails at its
            turn.
        allow_leak: accept a subject in two splits.

    Returns:
        Collection, records in the order of the manifest.

    Raises:
        UserError: exit code 2 with all faults, one a line; its reason is that of the
            first (`schema`, `id_invalid`, `id_duplicate`, `task_unknown`,
            `path_escape`, `not_found`). Exit code 3 when no scan is listed.
    """
    path = Path(path)
    found, faults = examine(path, roots=roots, strict=strict, allow_leak=allow_leak)
    if faults:
        manifest.refuse(path.name, faults)
    return found


def check(
    collection: Collection, name: str, *, strict: bool = False, allow_leak: bool = False
) -> Collection:
    """Holds what an adapter gives to the rules of a manifest.

    Args:
        collection: from an adapter, its tasks filled in.
        name: of the folder, for the message.
        strict: a file that does not exist is a fault here; else it fails at its turn.
        allow_leak: accept a subject in two splits.

    Returns:
        The collection.

    Raises:
        UserError: exit code 2 with all faults, one a line; 3 when there is no scan.
    """
    if not collection.records:
        raise UserError("empty", f"{name}: no scan that can be used", NOTHING)
    faults: list[Fault] = []
    records = [(record.id, record) for record in collection.records]
    for where, record in records:
        if bad := manifest.bad_id(record.id):
            faults.append(("id_invalid", f"{where}: {bad}"))
        listed = (record.image, record.labels, record.roi, record.points)
        for path in (*listed, *(path for _, path in record.masks)):
            if strict and path and not os.path.exists(path):
                faults.append(("not_found", f"{where}: {shown(path)}: no such file"))
    manifest.check_ids(
        [(where, {"id": record.id}) for where, record in records], faults
    )
    if not allow_leak:
        _check_leaks(records, faults)
    _check_vocabulary(records, faults)
    _check_pairs(collection.records, collection.pairs, faults)
    if faults:
        manifest.refuse(name, faults)
    return collection


def examine(
    path: Path | str,
    *,
    roots: Sequence[Path | str] = (),
    strict: bool = False,
    allow_leak: bool = False,
) -> tuple[Collection, list[Fault]]:
    """As `collect`, but gives the faults beside the records that are good.

    Args:
        path, roots, strict, allow_leak: as in `collect`.

    Returns:
        Collection, its pairs only where nothing is at fault, and (reason, message) of
        every fault.

    Raises:
        UserError: the file as a whole cannot be read (exit code 2) or lists no scan
            (3).
    """
    path = Path(path)
    rows, listed = _content(path)
    if not rows:
        raise UserError(
            "empty", f"{path.name}: lists no scan; add at least one", NOTHING
        )
    faults: list[Fault] = []
    _check_columns(rows, faults)
    check = _Paths(path.parent, roots, strict)
    records = []
    for where, row in rows:
        record = _record(where, row, check, faults)
        if record is not None:
            records.append((where, record))
    manifest.check_ids(rows, faults)
    if not allow_leak:
        _check_leaks(records, faults)
    _check_vocabulary(records, faults)
    good = [record for _, record in records]
    pairs = _pairs(listed, faults)
    if not faults:
        _check_pairs(good, pairs, faults)
    return Collection(good, () if faults else pairs), faults


def vocabulary(records: Iterable[Record]) -> dict[str, tuple[str, ...]]:
    """Names every task's labels: the sorted union over its scans.

    Args:
        records: from `collect`.

    Returns:
        task -> names; id i + 1 stands for the i-th. Tasks in the order of TASKS.
    """
    names: dict[str, set[str]] = {}
    for record in records:
        found = names.setdefault(record.task, set())
        found.update(name for _, name in record.label_map or ())
        found.update(name for name, _ in record.masks)
    return {task: tuple(sorted(names[task])) for task in TASKS if task in names}


# --- reading ---


def _content(path: Path) -> tuple[list[Row], Any]:
    """(place, fields) of every entry, and the pairs as they are written."""
    text = manifest.read_text(path, "scans")
    if path.suffix.lower() == ".csv":
        return manifest.csv_rows(path.name, text, _check_columns), []
    value, pairs = manifest.load_json(path.name, text), []
    if isinstance(value, dict) and {"volumes"} <= set(value) <= {"volumes", "pairs"}:
        value, pairs = value["volumes"], value.get("pairs", [])
    expected = 'a list of scans, or {"volumes": [...]},'
    return manifest.json_rows(path.name, value, expected), pairs


def _check_columns(rows: list[Row], faults: list[Fault]) -> None:
    manifest.check_columns(rows, REQUIRED, REQUIRED + OPTIONAL, faults)


# --- checks ---


def _record(
    where: str, row: dict[str, Any], check: "_Paths", faults: list[Fault]
) -> Record | None:
    """One record, or None after listing what is wrong with it."""
    before = len(faults)
    values: dict[str, str] = {}
    for column in (c for c in REQUIRED + OPTIONAL if c != "masks"):
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            # A number as task would index the one-hot: never taken for a name.
            reason = "task_unknown" if column == "task" else "schema"
            got = f"{where}: {column}: text expected, got {manifest.kind_of(value)}"
            faults.append((reason, got))
        elif not (value or "").strip() and column in REQUIRED and column in row:
            reason = "id_invalid" if column == "id" else "schema"
            faults.append((reason, f"{where}: {column}: is empty"))
        values[column] = value.strip() if isinstance(value, str) else ""
    if values["id"] and (bad := manifest.bad_id(values["id"])):
        faults.append(("id_invalid", f"{where}: id {values['id'][:60]!r}: {bad}"))
    if values["task"] and values["task"] not in TASKS:
        hint = manifest.nearest(values["task"], tuple(TASKS))
        faults.append(("task_unknown", f"{where}: task {values['task']!r}{hint}"))
    if values["split"] and values["split"] not in SPLITS:
        hint = manifest.nearest(values["split"], SPLITS)
        faults.append(("schema", f"{where}: split {values['split']!r}{hint}"))
    if bool(values["label"]) != bool(values["label_map"]):
        lone, other = ("label", "label_map")
        if values["label_map"]:
            lone, other = other, lone
        faults.append(("schema", f"{where}: {lone} without {other}; give both or none"))
    image = check.resolve(where, "image", values["image"], faults)
    labels = check.resolve(where, "label", values["label"], faults)
    table = None
    if map_path := check.resolve(where, "label_map", values["label_map"], faults):
        table = check.label_map(where, map_path, faults)
    roi = check.resolve(where, "roi", values["roi"], faults)
    points = check.resolve(where, "points", values["points"], faults)
    masks = _masks(where, row.get("masks"), check, faults)
    bad = any(column not in row for column in REQUIRED)
    bad = bad or bool(values["label_map"] and table is None)  # told once per file
    if bad or len(faults) > before:
        return None
    return Record(
        values["id"],
        image,
        labels or None,
        table,
        values["task"],
        values["subject"],
        values["split"],
        values["group"] or None,
        masks,
        roi or None,
        points or None,
    )


def _masks(
    where: str, value: Any, check: "_Paths", faults: list[Fault]
) -> tuple[tuple[str, str], ...]:
    """(name, path) pairs of an object {name: file or files}."""
    if value is None or value == "":
        return ()
    files = value if isinstance(value, dict) else {"": value}
    files = {k: [v] if isinstance(v, str) else v for k, v in files.items()}
    good = isinstance(value, dict) and all(
        _is_name(name)
        and isinstance(paths, list)
        and paths
        and all(isinstance(path, str) and path.strip() for path in paths)
        for name, paths in files.items()
    )
    if not good:
        expected = '{"name": "file" or ["file", ...]} expected, in a JSON manifest'
        faults.append(
            ("schema", f"{where}: masks: {expected}, got {manifest.kind_of(value)}")
        )
        return ()
    return tuple(
        (name.strip(), check.resolve(where, "masks", path.strip(), faults))
        for name, paths in files.items()
        for path in paths
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _pairs(value: Any, faults: list[Fault]) -> tuple[tuple[str, str], ...]:
    """The pairs of a manifest; what is none is listed."""
    if not isinstance(value, list):
        got = f"pairs: a list expected, got {manifest.kind_of(value)}"
        faults.append(("schema", got))
        return ()
    pairs = []
    for i, pair in enumerate(value, 1):
        two = isinstance(pair, list) and len(pair) == 2
        if two and all(isinstance(name, str) for name in pair):
            pairs.append((pair[0].strip(), pair[1].strip()))
        else:
            kind = manifest.kind_of(pair)
            got = f'pair {i}: ["fixed id", "moving id"] expected, got {kind}'
            faults.append(("schema", got))
    return tuple(pairs)


def _check_leaks(records: list[tuple[str, Record]], faults: list[Fault]) -> None:
    """A subject seen in training must not be judged on, in no task."""
    seen: dict[str, tuple[str, str]] = {}
    told = set()
    for where, record in records:
        first, split = seen.setdefault(record.subject, (where, record.split))
        if split != record.split and record.subject not in told:
            told.add(record.subject)
            faults.append(
                (
                    "schema",
                    f"{where}: subject {record.subject!r} is in {record.split}, and in "
                    f"{split} at {first}; one split per subject, or --allow-leak",
                )
            )


def _check_pairs(
    records: Sequence[Record],
    pairs: Sequence[tuple[str, str]],
    faults: list[Fault],
) -> None:
    """Listed pairs must be pairs: known scans of one task and split, as its kind is."""
    known = {record.id: record for record in records}
    if twice := len(pairs) - len(set(pairs)):
        faults.append(("schema", f"pairs: {twice} listed twice; list each once"))
    for i, (fixed, moving) in enumerate(pairs, 1):
        where = f"pair {i} ({fixed}, {moving})"
        if absent := [name for name in (fixed, moving) if name not in known]:
            faults.append(("schema", f"{where}: no scan has the id {absent[0]!r}"))
            continue
        a, b = known[fixed], known[moving]
        intra = TASKS[a.task].pair_type == PairType.INTRA
        if (a.task, a.split) != (b.task, b.split):
            got = f"{a.task}/{a.split} and {b.task}/{b.split}"
            faults.append(
                ("schema", f"{where}: one task and split expected, got {got}")
            )
        elif a.id == b.id or (a.subject == b.subject) != intra:
            kind = "two scans of one subject" if intra else "scans of two subjects"
            faults.append(("schema", f"{where}: {a.task} takes {kind}"))


def _check_vocabulary(records: list[tuple[str, Record]], faults: list[Fault]) -> None:
    for task, names in vocabulary(record for _, record in records).items():
        if len(names) > MAX_LABELS:
            faults.append(
                (
                    "label_set",
                    f"task {task}: at most {MAX_LABELS} label names, got {len(names)}; "
                    "map fewer ids",
                )
            )


class _Paths(manifest.Paths):
    """Also reads the label maps that the paths name."""

    def __init__(self, home: Path, roots: Sequence[Path | str], strict: bool):
        super().__init__(home, roots, strict)
        self._maps: dict[str, tuple | None] = {}

    def label_map(
        self, where: str, path: str, faults: list[Fault]
    ) -> tuple[tuple[int, str], ...] | None:
        """(raw id, name) pairs of a label map; each file is read once."""
        if path not in self._maps:
            try:
                self._maps[path] = read_label_map(path)
            except UserError as error:
                self._maps[path] = None
                faults.append((error.reason, f"{where}: label_map: {error}"))
        return self._maps[path]


def read_label_map(path: Path | str) -> tuple[tuple[int, str], ...]:
    """Reads a label map.

    Args:
        path: JSON {"raw id": "name" or ["name", ...]}; ids are whole numbers from 0 to
            65535; 0 may only be named "background".

    Returns:
        (raw id, name), sorted by id, an id's names in the order given, without
        background.

    Raises:
        UserError: `schema`, exit code 2, listing all faults.
    """
    path = Path(path)
    table = manifest.load_json(path.name, manifest.decode(path))
    if not isinstance(table, Mapping) or not table:
        raise UserError(
            "schema",
            f'{path.name}: {{"1": "liver", ...}} expected; list the ids',
            USAGE,
        )
    faults, pairs = [], {}
    for key, name in table.items():
        names = name if isinstance(name, list) and name else [name]
        if not (re.fullmatch("[0-9]{1,5}", key) and int(key) <= 65535):
            faults.append(f"{key[:20]!r}: a whole number from 0 to 65535 expected")
        elif not all(map(_is_name, names)) or len(set(names)) < len(names):
            faults.append(f"{key}: a name expected, got {manifest.kind_of(name)}")
        elif int(key) == 0 and [n.strip().lower() for n in names] != ["background"]:
            faults.append("0: is background, not a structure")
        elif int(key) in pairs:
            faults.append(f"{key}: id listed twice")
        elif int(key) > 0:
            pairs[int(key)] = [n.strip() for n in names]
    if faults:
        raise UserError("schema", f"{path.name}: {'; '.join(faults)}", USAGE)
    return tuple((i, name) for i, names in sorted(pairs.items()) for name in names)
