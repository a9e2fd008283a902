"""Tables of points as text: one reader for every delimiter and every header."""

import csv
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unireg_jax.errors import UserError, bad_file
from unireg_jax.imaging import nifti

AXES = ("x", "y", "z")
FIXED = ("fixed_x_mm", "fixed_y_mm", "fixed_z_mm")
MOVING = ("moving_x_mm", "moving_y_mm", "moving_z_mm")
_NAMES = ("name", "label", "id")
_DELIMITERS = {";": "semicolons", "\t": "tabs", ",": "commas", " ": "blanks"}


class Table(NamedTuple):
    """A table as read.

    Attributes:
        head: cells of the first line if they are words, else none.
        rows: cells of the others, empty lines left out.
        lines: number of each row's line in the file, from 1.
        delimiter: comma, semicolon, tab, or a blank for white space of any length.
    """

    head: list[str]
    rows: list[list[str]]
    lines: list[int]
    delimiter: str


def read_text(path: str | os.PathLike) -> str:
    """Reads a file of points whole.

    Args:
        path: UTF-8, with or without a byte order mark.

    Returns:
        Its text.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`, `empty`; `schema` for what
            is no text.
    """
    nifti.check_file(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return file.read()
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except UnicodeDecodeError as error:
        raise fault(path, "text in UTF-8", str(error)) from error


def parse(path: str | os.PathLike, text: str) -> Table:
    """Splits a table into cells.

    The delimiter is what divides the first line into three cells or more: semicolons,
    tabs, commas, or else white space.

    Args:
        path: of the file, for messages.
        text: of the file.

    Returns:
        Table.

    Raises:
        UserError: `schema` for what is no table.
    """
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    delimiter = _delimiter(first)
    if delimiter == " ":
        found = [(n, line.split()) for n, line in enumerate(lines, start=1)]
    else:
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        try:
            found = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise fault(path, "a table", str(error)) from error
    found = [(n, row) for n, row in found if any(cell.strip() for cell in row)]
    headed = bool(found) and not all(map(_is_number, found[0][1][:3]))
    head = found.pop(0)[1] if headed else []
    return Table(head, [row for _, row in found], [n for n, _ in found], delimiter)


def places(table: Table, names: Sequence[str]) -> list[int] | None:
    """Finds columns.

    Args:
        table: Table.
        names: of columns, lower case; x stands for x_mm, too.

    Returns:
        Their places; None unless all are there.
    """
    head = [cell.strip().lower() for cell in table.head]
    found = [
        next((head.index(n) for n in (name, f"{name}_mm") if n in head), None)
        for name in names
    ]
    return None if None in found else found


def numbers(
    path: str | os.PathLike, table: Table, columns: Sequence[int]
) -> np.ndarray:
    """Reads columns of numbers.

    Args:
        path: of the file, for messages.
        table: Table.
        columns: their places.

    Returns:
        [N, len(columns)] float64.

    Raises:
        UserError: `empty` for no row; `schema` for a cell that is no finite number.
    """
    if not table.rows:
        raise bad_file(
            path,
            "empty",
            "one point or more",
            "none",
            "write one per line",
        )
    out = np.empty((len(table.rows), len(columns)))
    for n, (line, row) in enumerate(zip(table.lines, table.rows, strict=True)):
        for i, place in enumerate(columns):
            cell = row[place].strip() if place < len(row) else None
            value = float(cell) if cell is not None and _is_number(cell) else np.nan
            if not np.isfinite(value):
                raise _no_number(path, table, line, place, cell)
            out[n, i] = value
    return out


def names(table: Table) -> list[str]:
    """Names the points.

    Args:
        table: Table.

    Returns:
        The column name, label or id; "1", "2", ... without one.
    """
    head = [cell.strip().lower() for cell in table.head]
    place = next((head.index(n) for n in _NAMES if n in head), None)
    return [
        row[place] if place is not None and place < len(row) else str(n)
        for n, row in enumerate(table.rows, start=1)
    ]


def no_columns(path: str | os.PathLike, table: Table, expected: str) -> UserError:
    """Makes the UserError of a table without the columns that are needed.

    Args:
        path: of the file.
        table: Table.
        expected: the columns.

    Returns:
        UserError, `schema`.
    """
    got = f"{', '.join(cell.strip() for cell in table.head[:12])[:80]!r} between "
    return fault(path, f"columns {expected}", got + _DELIMITERS[table.delimiter])


def fault(path: str | os.PathLike, expected: str, got: str) -> UserError:
    """Makes the UserError of a table that is not as expected.

    Args:
        path: of the file.
        expected: what should be there.
        got: what is.

    Returns:
        UserError, `schema`.
    """
    return bad_file(path, "schema", expected, got, "mend the table")


def _delimiter(line: str) -> str:
    """What divides a line into three cells or more."""
    bare = re.sub(r'"[^"]*"', "", line)
    wide = (sign for sign in _DELIMITERS if bare.count(sign) >= 2)
    return next(wide, "," if "," in bare else " ")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _no_number(path, table: Table, line: int, place: int, cell) -> UserError:
    """Where it is, and whether a decimal comma is the reason."""
    column = table.head[place].strip() if place < len(table.head) else place + 1
    got = "none" if cell is None else repr(cell[:40])
    got += f" in line {line}, column {column}, between {_DELIMITERS[table.delimiter]}"
    if cell and "," in cell and _is_number(cell.replace(",", ".")):
        got += " (a decimal comma? write a point)"
    return fault(path, "finite numbers", got)
