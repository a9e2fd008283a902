"""Lists of cases, and the strict reading of CSV and JSON that all lists share.

    id,fixed,moving,task
    a01,scans/a01.nii.gz,scans/a02.nii.gz,abdomen

A case is a pair of scans with what belongs to it; `Case` says which columns there are.
Only `fixed` and `moving` must be there: without an `id` column cases are called
FIXED__MOVING. Paths are relative to the list and stay in its folder, or in one that the
caller declares. JSON: a list of such objects, or {"pairs": [...]}. The dataset.json of
a Learn2Reg task is read as well: its `registration_val` and `registration_test`, else
its `training_paired_images`, with the labels, masks and points that lie beside the
images; points of one kind for the whole list.

Every fault is found before any scan is opened, all of them in one go.
"""

import csv
import difflib
import functools
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unireg_jax.errors import NOTHING, USAGE, UserError, bad_file, shown
from unireg_jax.tasks import TASKS, PairType

Fault = tuple[str, str]  # reason, message
Row = tuple[str, dict[str, Any]]  # place in the file, fields

TYPES = tuple(kind.name.lower() for kind in PairType)
NO_TASK = "none"
AUTO_TASK = "auto"
_MAX_FAULTS = 50  # shown; the rest is counted
_MAX_ID = 120  # bytes: file names are the id and a suffix
_HELD_OUT = ("registration_val", "registration_test")
_L2R_PAIRS = (*_HELD_OUT, "training_paired_images")
_L2R_POINTS = ("landmarks", "keypoints")  # set by hand before found by a program
_L2R_NAME = re.compile(r"_(\d{4})_(\d{4})$")  # patient and modality
_L2R_USUAL = ("0000", "0001")  # modalities of the fixed and the moving scan
FRAMES = ("lps_mm", "voxel_from_0", "voxel_from_1")  # see imaging.points
# Voxels beside such a header, under its name; a test compares with imaging.itk_files.
HEADERS = (".mhd", ".nhdr")
VOXELS = (".raw", ".zraw", ".raw.gz", ".img")


class Case(NamedTuple):
    """A pair of scans to be registered or judged.

    Attributes:
        id: unique name, fit for a folder's name.
        fixed: scan that stays, path.
        moving: scan to be warped, path.
        task: name in tasks.TASKS, "auto" or "none"; None to be chosen by the caller.
        type: "inter", "intra", or None for the task's own.
        fixed_label, moving_label: label maps; that of moving may stand alone.
        fixed_mask, moving_mask: where scans are compared.
        fixed_points, moving_points: landmarks, x, y, z, line by line, both or none.
        points_frame: what their numbers are, one of FRAMES; None: LPS mm, of tables
            with a header alone.
        init: pre-alignment, ITK transform of affines, fixed world -> moving world.
        fixed_subject, moving_subject: the patients, to be held against `type`.
    """

    id: str
    fixed: str
    moving: str
    task: str | None = None
    type: str | None = None
    fixed_label: str | None = None
    moving_label: str | None = None
    fixed_mask: str | None = None
    moving_mask: str | None = None
    fixed_points: str | None = None
    moving_points: str | None = None
    points_frame: str | None = None
    init: str | None = None
    fixed_subject: str | None = None
    moving_subject: str | None = None


REQUIRED = ("fixed", "moving")
PATHS = (
    *("fixed", "moving", "fixed_label", "moving_label", "fixed_mask", "moving_mask"),
    *("fixed_points", "moving_points", "init"),
)
# Names that a column has elsewhere -> ours.
_COLUMNS = {
    "fixed_segmentation": "fixed_label",
    "moving_segmentation": "moving_label",
}
# Columns that need another one; labels of the moving scan alone are to be warped.
_NEEDS = (
    ("fixed_label", "moving_label"),
    *(("fixed_points", "moving_points"), ("moving_points", "fixed_points")),
)


def read_cases(
    path: Path | str,
    *,
    roots: Sequence[Path | str] = (),
    strict: bool = False,
) -> list[Case]:
    """Reads and checks a list of cases.

    Args:
        path: `.csv` or `.json`, UTF-8.
        roots: folders that scans may lie in, besides the list's own.
        strict: a listed file that does not exist is a fault here; else it fails at its
            turn.

    Returns:
        Cases in the order of the list, with absolute paths.

    Raises:
        UserError: exit code 2 with all faults, one a line; its reason is that of the
            first (`schema`, `id_invalid`, `id_duplicate`, `task_unknown`,
            `path_escape`, `not_found`). Exit code 3 when no case is listed.
    """
    path = Path(path)
    rows = _case_rows(path)
    if not rows:
        raise UserError(
            "empty", f"{shown(path.name)}: lists no pair; add at least one", NOTHING
        )
    faults: list[Fault] = []
    check_columns(rows, REQUIRED, Case._fields, faults)
    paths = Paths(path.parent, roots, strict)
    named = any("id" in row for _, row in rows)
    cases, ids = [], []
    for where, row in rows:
        case = _case(where, row, named, paths, faults)
        ids.append((where, {"id": case.id}))
        cases.append(case)
    check_ids(ids, faults)
    if faults:
        refuse(path.name, faults)
    return cases


def _case_rows(path: Path) -> list[Row]:
    text = read_text(path, "pairs")
    if path.suffix.lower() == ".csv":
        check = functools.partial(check_columns, required=REQUIRED, known=Case._fields)
        return csv_rows(path.name, text, lambda rows, f: check(rows, faults=f))
    value = load_json(path.name, text)
    if isinstance(value, dict):
        if any(key in value for key in _L2R_PAIRS):
            return _learn2reg(path, value)
        if set(value) == {"pairs"}:
            value = value["pairs"]
    expected = 'a list of pairs, {"pairs": [...]} or a Learn2Reg dataset.json'
    return json_rows(path.name, value, expected)


def _learn2reg(path: Path, data: Mapping[str, Any]) -> list[Row]:
    """Pairs of a Learn2Reg task: held out ones, else those to be trained on."""
    keys = [key for key in _L2R_PAIRS if data.get(key)]
    held_out = [key for key in keys if key in _HELD_OUT]
    rows: list[Row] = []
    faults: list[Fault] = []
    for key in held_out or keys:
        if not isinstance(data[key], list):
            got = f"{key}: a list expected, got {kind_of(data[key])}"
            faults.append(("schema", got))
            continue
        for i, pair in enumerate(data[key], 1):
            where = f"{key}, entry {i}"
            images = [
                pair.get(name) if isinstance(pair, dict) else None for name in REQUIRED
            ]
            if not all(isinstance(image, str) and image for image in images):
                got = f'{where}: {{"fixed": …, "moving": …}} expected'
                faults.append(("schema", f"{got}, got {kind_of(pair)}"))
                continue
            rows.append((where, _learn2reg_row(path.parent, *images)))
    if faults:
        refuse(path.name, faults)
    pairs = [(row["fixed"], row["moving"]) for _, row in rows]
    tables = learn2reg_points(path.parent, pairs)
    for (_, row), found in zip(rows, tables, strict=True):
        if found:
            row["fixed_points"], row["moving_points"] = found
            row["points_frame"] = "voxel_from_0"
    return rows


def _learn2reg_row(folder: Path, fixed: str, moving: str) -> dict[str, Any]:
    """Fields of one pair but its points; labels count when both scans have them."""
    row: dict[str, Any] = {"fixed": fixed, "moving": moving}
    for side, image in (("fixed", fixed), ("moving", moving)):
        # AbdomenCTCT_0001_0000: the middle number is the patient's.
        row[f"{side}_subject"] = stem(image).rpartition("_")[0]
    images = (fixed, moving)
    found = [image.replace("images", "labels", 1) for image in images]
    if found != [*images] and all((folder / f).is_file() for f in found):
        row["fixed_label"], row["moving_label"] = found
    mask = fixed.replace("images", "masks", 1)  # that of moving is not looked at
    if mask != fixed and (folder / mask).is_file():
        row["fixed_mask"] = mask
    return row


def learn2reg_points(
    folder: Path, pairs: Sequence[tuple[str, str]]
) -> list[tuple[str, str] | None]:
    """Finds the tables of points beside the images of a Learn2Reg task.

    A mean over landmarks and key points would be the score of neither: all pairs get
    those set by hand if all that have points have such, else key points.

    Args:
        folder: of the dataset.json.
        pairs: (fixed, moving) images, as it names them.

    Returns:
        For each pair its two tables, paths from `folder`, in voxels from 0; None for a
        pair that does not have both.

    Raises:
        UserError: `schema`, exit code 2: pairs with points have no kind in common.
    """
    found = {k: [_tables(folder, k, pair) for pair in pairs] for k in _L2R_POINTS}
    judged = [i for i, _ in enumerate(pairs) if any(t[i] for t in found.values())]
    for tables in found.values():
        if all(tables[i] for i in judged):
            return tables
    lacks = [
        f"no {kind} for {stem(pairs[next(i for i in judged if not tables[i])][0])}"
        for kind, tables in found.items()
    ]
    raise bad_file(
        folder,
        "schema",
        "one kind of points that all pairs with points have",
        " and ".join(lacks),
        "lay them there, or list the pairs in a CSV",
        USAGE,
    )


def _tables(folder: Path, kind: str, images: tuple[str, str]) -> tuple[str, str] | None:
    """Both tables of a kind, where the challenge's script looks for them.

    landmarksTr; keypointsTr of modality 0000 to 0001, of other two keypoints01Tr,
    keypoints02Tr ...
    """
    ends = _learn2reg_ends(images)
    if not ends or not all("images" in image for image in images):
        return None
    modalities = tuple(modality for _, modality in ends)
    usual = modalities == _L2R_USUAL or len(set(modalities)) == 1
    if kind == "keypoints" and not usual:
        kind += "".join(str(n) for n in sorted(map(int, modalities)))
    places = (Path(image.replace("images", kind, 1)) for image in images)
    fixed, moving = (str(place.with_name(f"{stem(place)}.csv")) for place in places)
    there = all((folder / table).is_file() for table in (fixed, moving))
    return (fixed, moving) if there else None


def _learn2reg_ends(images: Sequence[str]) -> list[tuple[str, ...]]:
    """Patient and modality of each image; empty where one has another name."""
    ends = [_L2R_NAME.search(stem(image)) for image in images]
    return [end.groups() for end in ends if end] if all(ends) else []


def learn2reg_fields(case: Case) -> list[str]:
    """Names that the challenge Learn2Reg has for the field of a pair.

    Args:
        case: its scans.

    Returns:
        Without ending, the one that its script takes first: disp_0001_0001 of modality
        0000 to 0001, else disp_0001_0000_0002_0000. Empty for scans of other names.
    """
    ends = _learn2reg_ends((case.fixed, case.moving))
    if not ends:
        return []
    (a, b), (c, d) = ends
    names = [f"disp_{a}_{b}_{c}_{d}", f"disp_{a}_{c}"]
    return names[::-1] if (b, d) == _L2R_USUAL else names


def learn2reg_submission(case: Case) -> list[str]:
    """Names under which a submission holds the field of a pair.

    Args:
        case: its scans.

    Returns:
        The first one of `learn2reg_fields`; for scans of one modality also the other
        one, which alone the challenge's site reads. Empty for scans of other names.
    """
    ends = _learn2reg_ends((case.fixed, case.moving))
    alike = len({modality for _, modality in ends}) == 1
    return learn2reg_fields(case)[: 2 if alike else 1]


def _case(
    where: str, row: dict[str, Any], named: bool, paths: "Paths", faults: list[Fault]
) -> Case:
    """One case; what is wrong with it is listed."""
    values: dict[str, str] = {}
    for column in Case._fields:
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            # A number as task would index the one-hot: never taken for a name.
            reason = "task_unknown" if column in ("task", "type") else "schema"
            got = f"{where}: {column}: text expected, got {kind_of(value)}"
            faults.append((reason, got))
        values[column] = value.strip() if isinstance(value, str) else ""
        if column in REQUIRED and isinstance(value, str) and not values[column]:
            faults.append(("schema", f"{where}: {column}: is empty"))
    if named and row.get("id") is not None and not values["id"]:
        faults.append(("id_invalid", f"{where}: id: is empty"))
    if not named and values["fixed"] and values["moving"]:
        values["id"] = f"{stem(values['fixed'])}__{stem(values['moving'])}"
    if named and "id" not in row:
        faults.append(("id_invalid", f"{where}: id: is missing"))
    if values["id"] and (bad := bad_id(values["id"])):
        hint = "" if named else "; add a column id"
        faults.append(("id_invalid", f"{where}: id {values['id'][:60]!r}: {bad}{hint}"))
    known = (*TASKS, AUTO_TASK, NO_TASK)
    if values["task"] and values["task"] not in known:
        hint = nearest(values["task"], known)
        faults.append(("task_unknown", f"{where}: task {values['task']!r}{hint}"))
    if values["type"] and values["type"] not in TYPES:
        hint = nearest(values["type"], TYPES)
        faults.append(("task_unknown", f"{where}: type {values['type']!r}{hint}"))
    check_frame(where, values["points_frame"], faults)
    for column, other in _NEEDS:
        if values[column] and not values[other]:
            got = f"{where}: {column} without {other}; give that, too"
            faults.append(("schema", got))
    for column in PATHS:
        values[column] = paths.resolve(where, column, values[column], faults)
    return Case(
        **{k: v or (None if k not in REQUIRED else v) for k, v in values.items()}
    )


def check_frame(where: str, frame: str, faults: list[Fault]) -> None:
    """Lists a frame of points that is unknown; "" is none."""
    if frame and frame not in FRAMES:
        hint = nearest(frame, FRAMES)
        faults.append(("schema", f"{where}: points_frame {frame!r}{hint}"))


def stem(path: str | os.PathLike) -> str:
    """File name without .nii, .nii.gz or ITK's endings; other dots stay."""
    name = Path(path).name
    for ending in (".gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"):
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return name


# --- reading ------------------------------------------------------------------------


def read_text(path: Path, what: str) -> str:
    """Reads a list's text; a byte order mark is skipped.

    Args:
        path: of a `.csv` or `.json` file.
        what: it lists, for the message.

    Returns:
        Text that is not blank.

    Raises:
        UserError: `schema` or `not_found`, exit code 2.
    """
    text = decode(path)
    name = shown(path.name)
    if path.suffix.lower() not in (".csv", ".json"):
        raise UserError(
            "schema", f"{name}: the name must end in .csv or .json; rename", USAGE
        )
    if not text.strip():
        raise UserError("schema", f"{name}: is empty; list the {what} in it", USAGE)
    return text


def decode(path: Path) -> str:
    """Reads UTF-8 text; see `read_text`."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            "schema",
            f"{shown(path.name)}: UTF-8 text expected, byte {error.start} is not; save "
            "it as UTF-8",
            USAGE,
        ) from error
    except FileNotFoundError as error:
        raise UserError(
            "not_found", f"{shown(path)}: no such file; check the path", USAGE
        ) from error
    except OSError as error:
        raise UserError(
            "schema", f"{shown(path)}: {error.strerror}; give a CSV or JSON file", USAGE
        ) from error


def csv_rows(name: str, text: str, check_header) -> list[Row]:
    """Splits a CSV table into its rows.

    Args:
        name: of the file, for messages.
        text: its content; the first line names the columns.
        check_header: check_header(rows, faults), for a table without a row.

    Returns:
        (place, fields) of every line that is not blank.

    Raises:
        UserError: `schema`, exit code 2.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    ragged = []
    try:
        named: list[str] = next((row for row in reader if any(map(str.strip, row))), [])
        header = [column.strip() for column in named]
        for sign, found in ((";", "semicolons"), ("\t", "tabs")):
            if len(header) == 1 and sign in header[0]:
                line = f"{name}: line 1: commas between columns expected, got {found}"
                raise UserError("schema", f"{line}; save it as CSV with commas", USAGE)
        if twice := _doubled(header):
            raise UserError(
                "schema", f"{name}: line 1: columns twice: {', '.join(twice)}", USAGE
            )
        header = [_COLUMNS.get(column, column) for column in header]
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"line {reader.line_num}"
            if len(cells) != len(header):
                got = f"{len(header)} fields expected, {len(cells)} found"
                ragged.append(("schema", f"{where}: {got}; quote commas in a field"))
            values = [cell.strip() for cell in cells]
            rows.append((where, dict(zip(header, values, strict=False))))
    except csv.Error as error:
        raise UserError(
            "schema", f"{name}: line {reader.line_num}: {error}; check quotes", USAGE
        ) from error
    if ragged:
        refuse(name, ragged)
    if not rows:
        faults: list[Fault] = []
        check_header([("line 1", dict.fromkeys(header, ""))], faults)
        if faults:
            refuse(name, faults)
    return rows


def _doubled(given: Iterable[str]) -> list[str]:
    """Names of columns of which there are two, under one name or two."""
    given = list(given)
    known = [_COLUMNS.get(column, column) for column in given]
    both = (c for c, k in zip(given, known, strict=True) if known.count(k) > 1)
    return list(dict.fromkeys(both))


def json_rows(name: str, value: Any, expected: str) -> list[Row]:
    """Takes a list of objects apart.

    Args:
        name: of the file, for messages.
        value: parsed JSON.
        expected: what it should be, for messages.

    Returns:
        (place, fields) of every entry.

    Raises:
        UserError: `schema`, exit code 2: no list, or one of something else.
    """
    if not isinstance(value, list):
        got = f"{name}: {expected} expected; got {kind_of(value)}"
        raise UserError("schema", got, USAGE)
    wrong = [
        ("schema", f"entry {i}: an object expected, got {kind_of(row)}")
        for i, row in enumerate(value, 1)
        if not isinstance(row, dict)
    ]
    if wrong:
        refuse(name, wrong)
    rows = [
        (f"entry {i}", {_COLUMNS.get(k, k): v for k, v in row.items()})
        for i, row in enumerate(value, 1)
    ]
    twice = [
        ("schema", f"{where}: a column under two names: {', '.join(_doubled(given))}")
        for (where, _), given in zip(rows, value, strict=True)
        if _doubled(given)
    ]
    if twice:
        refuse(name, twice)
    return rows


def load_json(name: str, text: str) -> Any:
    """Parses strict JSON: no NaN, no key twice.

    Args:
        name: of the file, for the message.
        text: its content.

    Returns:
        The value.

    Raises:
        UserError: `schema`, exit code 2, with line and column.
    """

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise ValueError(f"key twice in one object: {', '.join(twice)}")
        return found

    def no_constant(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # ours, and integers of thousands of digits
        reason = str(error).split(";")[0]
    raise UserError("schema", f"{name}: not valid JSON: {reason}", USAGE)


def kind_of(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


# --- checks -------------------------------------------------------------------------


def refuse(name: str, faults: Sequence[Fault]) -> None:
    """Raises one UserError, exit code 2, of all faults, one a line.

    Args:
        name: of the list.
        faults: at least one; the first gives the reason.

    Raises:
        UserError: always.
    """
    # With separators, too: a message is also shown in one line.
    lines = [f"  {message}" for _, message in faults[:_MAX_FAULTS]]
    if len(faults) > _MAX_FAULTS:
        lines.append(f"  … and {len(faults) - _MAX_FAULTS} more")
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise UserError(faults[0][0], f"{name}: {count}:\n" + ";\n".join(lines), USAGE)


def check_columns(
    rows: Iterable[Row],
    required: Sequence[str],
    known: Sequence[str],
    faults: list[Fault],
) -> None:
    """Lists unknown and missing columns, each once, with the nearest known one.

    Args:
        rows: (place, fields) of every entry.
        required: columns that each must have.
        known: all columns.
        faults: is extended.
    """
    seen: dict[str, str] = {}
    absent: dict[str, str] = {}
    for where, row in rows:
        for column in row:
            seen.setdefault(column, where)
        for column in required:
            if column not in row:
                absent.setdefault(column, where)
    for column, where in seen.items():
        if column not in known:
            hint = nearest(column, known)
            faults.append(("schema", f"{where}: unknown column {column!r}{hint}"))
    for column, where in absent.items():
        faults.append(("schema", f"{where}: column {column!r} is missing"))


def nearest(word: str, known: Sequence[str]) -> str:
    """Suggests the known word that was probably meant, else lists them all."""
    close = difflib.get_close_matches(str(word).lower(), known, 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def bad_id(name: str) -> str | None:
    """Says why a name cannot be part of a file name, or None."""
    if len(name.encode("utf-8", "surrogatepass")) > _MAX_ID:
        return f"longer than {_MAX_ID} bytes"
    if name.startswith((".", "-")):
        return "must not begin with a dot or a dash"
    if not all(c.isalnum() or c in "._-+" for c in name):
        return "only letters, digits and . _ - + are allowed"
    return None


def check_ids(rows: Iterable[Row], faults: list[Fault]) -> None:
    """Lists ids that are equal, or differ only in case or Unicode form.

    Args:
        rows: (place, fields) of every entry; those without an id are passed over.
        faults: is extended.
    """
    seen: dict[str, tuple[str, str]] = {}
    for where, row in rows:
        name = row.get("id")
        if not isinstance(name, str) or not name.strip():
            continue
        name = name.strip()
        key = unicodedata.normalize("NFKC", name).casefold()
        if key not in seen:
            seen[key] = (where, name)
            continue
        first, other = seen[key]
        how = "also" if other == name else f"only differs in form from {other!r}"
        faults.append(("id_duplicate", f"{where}: id {name!r} {how} at {first}"))


class Paths:
    """Resolves paths of a list and keeps them inside the declared folders."""

    def __init__(self, home: Path, roots: Sequence[Path | str], strict: bool):
        """Takes the list's own folder, further ones, and whether files must exist."""
        self._home = os.path.realpath(home)
        self._roots = tuple(os.path.realpath(r) for r in (self._home, *roots))
        self._strict = strict
        self._real = functools.lru_cache(maxsize=4096)(os.path.realpath)

    def resolve(self, where: str, column: str, text: str, faults: list[Fault]) -> str:
        """Gives an absolute path, or "" after listing what is wrong.

        Args:
            where: place of the entry.
            column: its field.
            text: as written; "" stays "".
            faults: is extended.

        Returns:
            The name as written in its real folder, or "". Of a link the target's name
            may tell nothing (a store's), or too much (a patient's); only a header whose
            voxels lie beside the target alone is called by that.
        """
        if not text:
            return ""
        place = f"{where}: {column} {text[:80]!r}"
        if "\0" in text or "://" in text or text.startswith(("~", "$", "file:")):
            faults.append(("path_escape", f"{place}: a plain path expected"))
            return ""
        # A slash at the end would follow a link to a folder.
        folder, name = os.path.split(os.path.join(self._home, text.rstrip("/") or "/"))
        try:
            # Folders repeat: their real path is looked up once, the name's own link
            # every time.
            named = real = os.path.join(self._real(folder), name)
            if os.path.islink(named) or name in ("..", "."):
                real = os.path.realpath(named)
            exists = not self._strict or os.path.exists(real)
        except (OSError, ValueError) as error:
            faults.append(("path_escape", f"{place}: {error}"))
            return ""
        inside = any(real.startswith(root.rstrip("/") + "/") for root in self._roots)
        # One that is declared may be a scan itself, of DICOM slices; the list's own,
        # of a name that is "..", more likely is a slip.
        if not inside and real not in self._roots[1:]:
            faults.append(
                (
                    "path_escape",
                    f"{place}: leads outside the manifest's folder; declare the folder "
                    "with --data-root",
                )
            )
            return ""
        if not exists:
            faults.append(("not_found", f"{place}: no such file"))
            return ""
        lone = real != named and _has_voxels(real) and not _has_voxels(named)
        return real if name in ("..", ".") or lone else named


def _has_voxels(path: str) -> bool:
    """Whether a header's voxels lie beside it."""
    stem, ending = os.path.splitext(path)
    return ending.lower() in HEADERS and any(os.path.exists(stem + e) for e in VOXELS)
