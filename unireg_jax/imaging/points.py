"""Landmark tables, and point files of other tools; inside always LPS mm."""

import copy
import csv
import json
import os
from typing import Any, NamedTuple

import numpy as np

from unireg_jax.errors import USAGE, UserError, bad_file
from unireg_jax.imaging import nifti, point_tables
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.point_tables import AXES, FIXED, MOVING, fault

# Spaces of point files: world mm, or indices from 0 along the axes as stored.
SPACES = ("lps", "ras", "voxel")
SCANS = {"fixed": FIXED, "moving": MOVING}  # of a table of landmarks
_FCSV = ("id", *AXES, "ow", "ox", "oy", "oz", "vis", "sel", "lock", "label", "desc")
_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/"
    "Resources/Schema/markups-schema-v1.0.3.json#"
)
# Coordinates of `read_table`: world, or indices of the voxels as stored.
FRAMES = ("lps_mm", "voxel_from_0", "voxel_from_1")


class PointPairs(NamedTuple):
    """Corresponding points; the i-th of `fixed` and of `moving` are the same spot.

    Attributes:
        names: N strings; "1", "2", ... when the file has none.
        fixed: [N, 3] float64, LPS mm, in the fixed scan.
        moving: [N, 3] float64, LPS mm, in the moving scan.
    """

    names: list[str]
    fixed: np.ndarray
    moving: np.ndarray


class PointFile(NamedTuple):
    """Points of one scan and the file that they came from.

    Attributes:
        xyz: [N, 3] float64, LPS mm.
        names: N strings, "1", "2", ... when the file has none.
        kind: "csv", "fcsv" or "json".
        space: of the file, one of SPACES.
        content: the file as read, so that all else in it is kept.
    """

    xyz: np.ndarray
    names: list[str]
    kind: str
    space: str
    content: Any


def read_points(path: str | os.PathLike) -> PointPairs:
    """Reads landmarks from a table.

    Args:
        path: columns fixed_x_mm, fixed_y_mm, fixed_z_mm, moving_x_mm, moving_y_mm,
            moving_z_mm in LPS mm, optionally name (or label, id), between commas,
            semicolons or tabs; others are ignored.

    Returns:
        PointPairs.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`, `empty` for no point,
            `schema` for a missing column or a cell that is no finite number.
    """
    table = point_tables.parse(path, point_tables.read_text(path))
    columns = point_tables.places(table, FIXED + MOVING)
    if columns is None:
        expected = "fixed_x_mm ... moving_z_mm (LPS mm)"
        raise point_tables.no_columns(path, table, expected)
    values = point_tables.numbers(path, table, columns)
    return PointPairs(point_tables.names(table), values[:, :3], values[:, 3:])


def read_table(
    path: str | os.PathLike, frame: str | None, volume: Volume | None
) -> np.ndarray:
    """Reads the points of one scan; points of two scans correspond line by line.

    Args:
        path: as of `read_file`; or a table of any other name, also between white space,
            with columns x, y, z (or x_mm ...), or no header and three numbers first.
        frame: one of FRAMES, of a table; voxel indices count along the axes as stored.
            None: LPS mm, of a table with a header.
        volume: the scan, whose grid gives voxels their place; None with mm.

    Returns:
        [N, 3] float64, LPS mm.

    Raises:
        ValueError: frame is none of FRAMES.
        UserError: `not_found`, `not_a_file`, `permission`, `empty`; `schema` for a line
            that is no point, or landmarks of two scans in one table; exit code 2 for a
            table without header and frame.
    """
    if frame not in (None, *FRAMES):
        raise ValueError(f"frame must be one of {FRAMES}, got {frame!r}")
    if not _is_table(path):
        found = read_file(path)
        if lost := unplaced(found):
            raise point_tables.fault(
                path,
                "a place of every point, as line by line it has a partner",
                f"none of {', '.join(lost)}",
            )
        return found.xyz
    table = point_tables.parse(path, point_tables.read_text(path))
    if point_tables.places(table, FIXED):
        raise point_tables.no_columns(path, table, "x, y, z of one scan")
    values = point_tables.numbers(path, table, _columns(path, table))
    if frame is None and not table.head:
        raise _usage(
            path,
            f"the frame of a table without a header, {', '.join(FRAMES)}",
            "none",
            "name it by --points-frame, in a list by the column points_frame "
            "(Learn2Reg's tables: voxel_from_0)",
        )
    if frame in (None, "lps_mm"):
        return values
    matrix = _to_lps("voxel", volume, path)
    indices = values - (frame == "voxel_from_1")
    return indices @ matrix[:3, :3].T + matrix[:3, 3]


def read_pair(
    paths: tuple[str | os.PathLike, str | os.PathLike],
    frame: str | None,
    volumes: tuple[Volume | None, Volume | None],
) -> PointPairs:
    """Reads the points of two scans, one table each, which correspond line by line.

    Args:
        paths: tables of the fixed and of the moving scan, as of `read_table`.
        frame: as of `read_table`, of both.
        volumes: the fixed and the moving scan, as of `read_table`.

    Returns:
        PointPairs, called "1", "2", ...

    Raises:
        ValueError: as `read_table`.
        UserError: as `read_table`; `schema` for tables of other lengths.
    """
    fixed, moving = (
        read_table(path, frame, volume)
        for path, volume in zip(paths, volumes, strict=True)
    )
    if len(fixed) != len(moving):
        expected = f"{len(fixed)} points as in the fixed scan's table, line by line"
        raise fault(paths[1], expected, str(len(moving)))
    return PointPairs([str(n) for n in range(1, len(fixed) + 1)], fixed, moving)


def write_points(path: str | os.PathLike, points: PointPairs) -> None:
    """Writes landmarks as `read_points` reads them.

    Args:
        path: name of the CSV file.
        points: names, fixed [N, 3] and moving [N, 3], LPS mm.

    Raises:
        ValueError: the three do not have N entries.
        UserError: `storage`.
    """
    count = len(points.names)
    if points.fixed.shape != (count, 3) or points.moving.shape != (count, 3):
        raise ValueError(
            f"points must be ({count}, 3) in mm, got fixed {points.fixed.shape} and "
            f"moving {points.moving.shape}; one row per name"
        )
    with (
        nifti.atomic_path(path) as temp,
        open(temp, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", *FIXED, *MOVING))
        for name, fixed, moving in zip(*points, strict=True):
            numbers = (repr(float(value)) for value in (*fixed, *moving))
            writer.writerow((name, *numbers))


# --- point files of other tools -----------------------------------------------------


def read_file(
    path: str | os.PathLike,
    space: str | None = None,
    volume: Volume | None = None,
    *,
    scan: str = "fixed",
) -> PointFile:
    """Reads points of one scan.

    Args:
        path: `.csv` with columns x, y, z (or x_mm, y_mm, z_mm), or without a header
            and three numbers first, between commas, semicolons or tabs; a table of
            landmarks as of `read_points`; Slicer's `.fcsv` or `.mrk.json`.
        space: one of SPACES. A CSV does not tell its own, the others do: None, or the
            same.
        volume: the scan, for "voxel".
        scan: "fixed" or "moving": whose points of a table of landmarks.

    Returns:
        PointFile.

    Raises:
        ValueError: unknown space or scan.
        UserError: `not_found`, `not_a_file`, `permission`, `empty`; `schema` for what
            is no such table, and, exit code 2, for a space that is missing or
            contradicts the file, or "voxel" without the scan.
    """
    if space not in (None, *SPACES):
        raise ValueError(f"space must be one of {SPACES}, got {space!r}")
    if scan not in SCANS:
        raise ValueError(f"scan must be one of {tuple(SCANS)}, got {scan!r}")
    kind = _kind(path)
    text = point_tables.read_text(path)
    if kind == "csv":
        table, names, told, content = _parse_csv(path, text, SCANS[scan])
    else:
        parse = {"fcsv": _parse_fcsv, "json": _parse_json}[kind]
        table, names, told, content = parse(path, text)
    space = _agreed_space(path, space, told)
    if not len(table):
        raise bad_file(
            path,
            "empty",
            "one point or more",
            "none",
            "mark some",
        )
    if not np.isfinite(table).all():
        raise fault(path, "finite coordinates", "NaN or infinity")
    matrix = _to_lps(space, volume, path)
    xyz = table @ matrix[:3, :3].T + matrix[:3, 3]
    return PointFile(xyz, names, kind, space, content)


def write_file(
    path: str | os.PathLike,
    points: PointFile,
    space: str | None = None,
    volume: Volume | None = None,
) -> str:
    """Writes points of one scan.

    Args:
        path: `.csv`, `.fcsv` or `.mrk.json`. Written as the kind they were read as,
            all else in the file stays as it was.
        points: xyz in LPS mm.
        space: one of SPACES; None for that of `points`, and LPS in a CSV made of a file
            of Slicer: its own cannot be told there.
        volume: the scan, for "voxel", which only a CSV can hold.

    Returns:
        The space.

    Raises:
        ValueError: unknown space, or names and xyz of other lengths.
        UserError: `storage`; `schema`, exit code 2, for "voxel" without the scan or in
            a file of Slicer.
    """
    kind = _kind(path)
    if space is None:
        space = "lps" if kind == "csv" != points.kind else points.space
    if space not in SPACES:
        raise ValueError(f"space must be one of {SPACES}, got {space!r}")
    if points.xyz.shape != (len(points.names), 3):
        raise ValueError(
            f"xyz must be ({len(points.names)}, 3), got {points.xyz.shape}; one row "
            "per name"
        )
    if kind != "csv" and space == "voxel":
        raise _usage(path, "lps or ras in a file of Slicer", "voxel", "write a .csv")
    matrix = np.linalg.inv(_to_lps(space, volume, path))
    table = points.xyz @ matrix[:3, :3].T + matrix[:3, 3]
    content = points.content if kind == points.kind else None
    if kind == "json":
        text = _json_text(table, points.names, space, content)
    else:
        rows = {"csv": _csv_rows, "fcsv": _fcsv_rows}[kind]
        lines = rows(table, points.names, space, content)
    with (
        nifti.atomic_path(path) as temp,
        open(temp, "w", newline="", encoding="utf-8") as file,
    ):
        if kind == "json":
            file.write(text)
        else:
            delimiter = content[0].delimiter if kind == "csv" and content else ","
            writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
            for line in lines:
                if isinstance(line, str):
                    file.write(line + "\n")
                else:
                    writer.writerow(line)
    return space


def unplaced(points: PointFile) -> list[str]:
    """Names the control points of Slicer's markups that have no place.

    Args:
        points: from `read_file`.

    Returns:
        Their labels, "?" for none, of eight at most.
    """
    if points.kind != "json":
        return []
    listed = [p for m in points.content["markups"] for p in m.get("controlPoints", [])]
    placed = {id(p) for m in points.content["markups"] for p in _defined(m)}
    names = [str(p.get("label") or "?") for p in listed if id(p) not in placed]
    return names[:8]


def _is_table(path: str | os.PathLike) -> bool:
    """Whether a file is none of Slicer's, by its name."""
    return not os.fspath(path).lower().endswith((".fcsv", ".json"))


def _kind(path: str | os.PathLike) -> str:
    """Of a point file, by its name."""
    name = os.fspath(path).lower()
    for ending, kind in ((".fcsv", "fcsv"), (".json", "json"), (".csv", "csv")):
        if name.endswith(ending):
            return kind
    raise _usage(path, "a name in .csv, .fcsv or .mrk.json", "another", "rename it")


def _agreed_space(path: str | os.PathLike, asked: str | None, told: str | None) -> str:
    """The space that the caller names or the file tells."""
    if asked is None and told is None:
        remedy = "pass --space lps, ras or voxel: a table does not tell"
        raise _usage(path, "the space of the coordinates", "none", remedy)
    if asked and told and asked != told:
        raise _usage(path, f"the space of the file, {told}", asked, "leave out --space")
    return asked or told


def _to_lps(space: str, volume: Volume | None, path: str | os.PathLike) -> np.ndarray:
    """4 x 4 from the coordinates of a file to LPS mm."""
    if space == "lps":
        return np.eye(4)
    if space == "ras":
        return np.diag([-1.0, -1.0, 1.0, 1.0])
    if volume is None:
        raise _usage(path, "the scan that the voxels are of", "none", "name the scan")
    return (volume.native or volume).vox2world


def _parse_csv(path, text, landmarks):
    """Numbers, names, space (landmarks alone tell), the table and its columns."""
    table = point_tables.parse(path, text)
    both = point_tables.places(table, landmarks)
    if both:  # written as points of one scan: nothing else in it would hold
        values = point_tables.numbers(path, table, both)
        return values, point_tables.names(table), "lps", None
    columns = _columns(path, table)
    values = point_tables.numbers(path, table, columns)
    return values, point_tables.names(table), None, (table, columns)


def _columns(path, table) -> list[int]:
    """Places of x, y, z; without a header the first three."""
    columns = point_tables.places(table, AXES)
    if columns is None and table.head:
        expected = "x, y, z (or x_mm, y_mm, z_mm), or fixed_x_mm ... moving_z_mm"
        raise point_tables.no_columns(path, table, expected)
    return columns or [0, 1, 2]


def _parse_fcsv(path, text):
    """Slicer's older markups: comments tell space and columns."""
    lines = text.splitlines()
    told, columns = {}, list(_FCSV)
    for line in lines:
        if line.startswith("#") and "=" in line:
            key, _, value = line[1:].partition("=")
            told[key.strip().lower()] = value.strip()
    if "columns" in told:
        columns = [name.strip().lower() for name in told["columns"].split(",")]
    # Older Slicer wrote 0 for RAS and 1 for LPS; without a word it is RAS.
    spaces = {"0": "ras", "1": "lps", "ras": "ras", "lps": "lps"}
    space = spaces.get(told.get("coordinatesystem", "0").lower())
    if space is None or any(axis not in columns for axis in AXES):
        got = f"{told.get('coordinatesystem')} and {','.join(columns)[:60]}"
        raise fault(path, "CoordinateSystem LPS or RAS and columns x,y,z", got)
    body = [row for row in csv.reader(x for x in lines if not x.startswith("#")) if row]
    places = [columns.index(axis) for axis in AXES]
    table = _cells(path, body, places)
    named = columns.index("label") if "label" in columns else len(columns)
    names = [
        row[named] if named < len(row) else str(n) for n, row in enumerate(body, 1)
    ]
    comments = [line for line in lines if line.startswith("#")]
    return table, names, space, (comments, body, places)


def _parse_json(path, text):
    """Slicer's markups: control points of every markup, undefined ones left alone."""
    try:
        content = json.loads(text)
        spaces, table, names = set(), [], []
        for markup in content["markups"]:
            spaces.add(str(markup.get("coordinateSystem", "LPS")).lower())
            for point in _defined(markup):
                names.append(str(point.get("label", len(names) + 1)))
                table.append([float(value) for value in point["position"]])
                if len(table[-1]) != 3:
                    got = f"{len(table[-1])} in {names[-1][:40]!r}"
                    raise fault(path, "three numbers a point", got)
        array = np.array(table, np.float64).reshape(-1, 3)
    except (
        ValueError,
        OverflowError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        got = f"{type(error).__name__}: {error}"[:100]
        raise fault(path, "Slicer markups in JSON", got) from error
    if len(spaces) != 1 or not spaces <= {"lps", "ras"}:
        raise fault(path, "one coordinateSystem, LPS or RAS", f"{sorted(spaces)}")
    return array, names, spaces.pop(), content


def _defined(markup: dict) -> list[dict]:
    """Control points that have a place."""
    points = markup.get("controlPoints", [])
    return [p for p in points if p.get("positionStatus", "defined") == "defined"]


def _csv_rows(table, names, space, content):
    """Rows, the other columns kept."""
    if content is None:
        unit = "" if space == "voxel" else "_mm"
        yield ("name", *(axis + unit for axis in AXES))
        for name, point in zip(names, table, strict=True):
            yield (name, *map(_text, point))
        return
    given, columns = content
    if given.head:
        head = list(given.head)
        for place, axis in zip(columns, AXES, strict=True):
            if space == "voxel" and head[place].strip().lower() == f"{axis}_mm":
                head[place] = axis
        yield head
    yield from _replaced(given.rows, columns, table)


def _fcsv_rows(table, names, space, content):
    """Comment lines and rows."""
    if content is None:
        yield "# Markups fiducial file version = 4.11"
        yield f"# CoordinateSystem = {space.upper()}"
        yield f"# columns = {','.join(_FCSV)},associatedNodeID"
        for n, (name, point) in enumerate(zip(names, table, strict=True), start=1):
            yield (n, *map(_text, point), 0, 0, 0, 1, 1, 1, 0, name, "", "")
        return
    comments, body, places = content
    for line in comments:
        known = line[1:].strip().lower().startswith("coordinatesystem")
        yield f"# CoordinateSystem = {space.upper()}" if known else line
    if not any("coordinatesystem" in line.lower() for line in comments):
        yield f"# CoordinateSystem = {space.upper()}"
    yield from _replaced(body, places, table)


def _json_text(table, names, space, content):
    """Markups of Slicer 5."""
    if content is None:
        points = [
            {"label": name, "position": point.tolist()}
            for name, point in zip(names, table, strict=True)
        ]
        content = {
            "@schema": _SCHEMA,
            "markups": [
                {
                    "type": "Fiducial",
                    "coordinateSystem": space.upper(),
                    "controlPoints": points,
                }
            ],
        }
    else:
        content = copy.deepcopy(content)
        rows = iter(table.tolist())
        for markup in content["markups"]:
            markup["coordinateSystem"] = space.upper()
            for point in _defined(markup):
                point["position"] = next(rows)
    return json.dumps(content, indent=2) + "\n"


def _replaced(rows, places, table):
    for row, point in zip(rows, table, strict=True):
        row = list(row)
        for place, value in zip(places, point, strict=True):
            row[place] = _text(value)
        yield row


def _text(value: float) -> str:
    """To a millionth of a millimetre."""
    return f"{value + 0.0:.6f}"


def _cells(path, rows, places):
    """[N, 3] of three columns."""
    table = np.empty((len(rows), 3))
    for n, row in enumerate(rows):
        for axis, place in enumerate(places):
            try:
                table[n, axis] = float(row[place])
            except (ValueError, IndexError) as error:
                got = f"{','.join(row)[:40]!r} in point {n + 1}"
                raise fault(path, "three numbers a point", got) from error
    return table


def _usage(path, expected: str, got: str, remedy: str) -> UserError:
    return bad_file(path, "schema", expected, got, remedy, USAGE)
