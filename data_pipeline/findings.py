"""What a check of a data set found: one line per finding, worst first."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from unireg_jax.errors import UserError
from unireg_jax.imaging.nifti import shown

LEVELS = ("error", "warning", "note")

# What a reader's warning should have been, and what mends it.
_WARNED = {
    "orientation_conflict": (
        "one perpendicular geometry, the same in sform and qform",
        "find out which is right and set both alike",
    ),
    "spacing": ("pixdim and affine of one spacing", "rewrite the header"),
    "scaling": ("a finite slope", "rewrite the header with slope 1"),
    "offset": ("a header that leads to the voxels", "rewrite the file"),
    "padding": ("tissue or air in every voxel", "fill with -1000 what was added"),
    "trailing_data": ("nothing after the voxels", "export the file again"),
}


class Finding(NamedTuple):
    """One thing that is, or may be, wrong.

    Attributes:
        level: "error": refused by the preparation, or silently wrong in training;
            "warning": to be looked at; "note": allowed, but good to know.
        id: of the scan; else `manifest`, a task, or task/split.
        reason: code from the closed list in docs/errors.md.
        what: the part that was looked at.
        expected: in words.
        got: in words.
        remedy: what mends it.
    """

    level: str
    id: str
    reason: str
    what: str
    expected: str
    got: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """Gives the fields by name."""
        return self._asdict()


def from_error(name: str, what: str, error: UserError, *paths: str | None) -> Finding:
    """Takes a refusal of a reader apart.

    Args:
        name: id of the scan.
        what: the part that was read.
        error: its line is `path: reason: expected …, got …; remedy`.
        paths: files of the scan; the report names none.

    Returns:
        Finding of level "error"; the whole line under `got` if it has another form.
    """
    text = " ".join(str(error).split())
    for path, word in zip(paths, ("the image", "the labels"), strict=False):
        if path is not None:
            text = text.replace(shown(path), word)
    form = rf".*?{re.escape(error.reason)}: expected (.*), got (.*); (.*)"
    parts = re.fullmatch(form, text)
    expected, got, remedy = parts.groups() if parts else ("a readable file", text, "")
    return Finding("error", name, error.reason, what, expected, got, remedy)


def from_warning(name: str, what: str, line: str) -> Finding:
    """Takes a warning of a reader apart.

    Args:
        name: id of the scan.
        what: the part that was read.
        line: `reason: what was seen`.

    Returns:
        Finding of level "warning".
    """
    reason, _, got = line.partition(": ")
    expected, remedy = _WARNED.get(reason, ("nothing odd", "look at the file"))
    return Finding("warning", name, reason, what, expected, got, remedy)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Sorts by level, then reason, then id, so that equal faults stand together."""
    return sorted(findings, key=lambda f: (LEVELS.index(f.level), f.reason, f.id))


def table(findings: Iterable[Finding]) -> list[str]:
    """Lays findings out, one line each, the first three columns aligned.

    Args:
        findings: in the order to print.

    Returns:
        Lines without line ends; no control characters, whatever the findings hold.
    """
    rows = []
    for finding in findings:
        text = f"{finding.what}: expected {finding.expected}, got {finding.got}"
        text += f"; {finding.remedy}" if finding.remedy else ""
        rows.append((finding.level, finding.id, finding.reason, text))
    rows = [tuple(_plain(cell) for cell in row) for row in rows]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return [
        "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]])
        for row in rows
    ]


def _plain(text: str) -> str:
    """One printable line."""
    return text if text.isprintable() else ascii(text)[1:-1]
