"""Many cases as one page, the worst first, with small pictures and links."""

import math
import os
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unireg_jax.reports.page import chip, document, number, part, text
from unireg_jax.reports.pictures import data_uri

COLUMNS = {  # number of the record -> heading
    "local_ncc": "local NCC",
    "local_ncc_gain": "gain",
    "coverage": "coverage",
    "fold_percent_body": "folds %",
    "sdlogj_body": "SDlogJ",
    "p99_mm": "p99 mm",
    "inverse_mm": "inverse mm",
    "dsc": "DSC",
}


class Entry(NamedTuple):
    """One case of the index.

    Attributes:
        case: its name.
        status: "ok", "warn" or "failed".
        badness: see `quality.badness`; infinity for a case without results.
        reasons: codes, or the message of a case that failed.
        numbers: name -> number or None.
        page: its page, relative to the index, or None.
        thumbs: PNG each, axial and coronal; empty for none.
    """

    case: str
    status: str
    badness: float
    reasons: Sequence[str]
    numbers: Mapping[str, Any]
    page: str | None = None
    thumbs: Sequence[bytes] = ()


def worst_first(entries: Sequence[Entry]) -> list[Entry]:
    """Sorts cases: failed ones, then by badness, then by name.

    Args:
        entries: any order.

    Returns:
        The same entries.
    """
    return sorted(entries, key=lambda e: (e.status != "failed", -e.badness, e.case))


def index_page(name: str, entries: Sequence[Entry]) -> str:
    """Writes the index of a batch.

    Args:
        name: of the batch.
        entries: its cases.

    Returns:
        HTML; it asks for nothing, links lead to pages beside it.
    """
    entries = worst_first(entries)
    used = [k for k in COLUMNS if any(e.numbers.get(k) is not None for e in entries)]
    heads = "".join(
        f'<th class=n data-sort="number">{text(COLUMNS[key])}</th>' for key in used
    )
    counts = {
        status: sum(e.status == status for e in entries)
        for status in ("ok", "warn", "failed")
    }
    words = {"ok": "ok", "warn": "to look at", "failed": "failed"}
    line = " · ".join(f"{counts[k]} {words[k]}" for k in words if counts[k])
    script, style = part("index.js"), part("page.css")
    pictures = any(entry.thumbs for entry in entries)
    rows = "\n".join(
        _row(i, entry, used, pictures) for i, entry in enumerate(entries, 1)
    )
    body = (
        f'<header class="wide"><div><h1>'
        f"{text(name)}</h1><p>{len(entries)} cases: {line}. The worst "
        "come first: 1 in the column badness is the limit of the number that is "
        "furthest from good.</p></div></header>"
        '<main class="wide">'
        '<div class="scroll index"><table><thead><tr>'
        '<th class=n data-sort="number">rank</th>'
        f"{'<th>overlay</th>' if pictures else ''}"
        '<th data-sort="text">case</th><th data-sort="text">status</th>'
        f'<th>why</th><th class=n data-sort="number">badness</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></main><script>{script}</script>"
    )
    return document(f"{name}: registrations", body, style, script)


def _row(rank: int, entry: Entry, used: Sequence[str], pictures: bool) -> str:
    label = text(entry.case)
    if entry.page is not None:
        label = f'<a href="{_address(entry.page)}">{label}</a>'
    cells = [f'<td class=n data-key="{rank}">{rank}</td>']
    if pictures:
        images = "".join(
            f'<img class="thumb" src="{data_uri(png)}" alt="">' for png in entry.thumbs
        )
        cells.append(f'<td><div class="thumbs">{images}</div></td>')
    cells.append(f"<td class=name>{label}</td><td>{chip(entry.status)}</td>")
    # Before the numbers, which a narrow window may cut off.
    cells.append(f"<td class=why>{'<br>'.join(text(r) for r in entry.reasons)}</td>")
    cells.append(_number(entry.badness))
    cells += [_number(entry.numbers.get(key)) for key in used]
    return f"<tr>{''.join(cells)}</tr>"


def _number(value: Any) -> str:
    known = isinstance(value, int | float) and value == value
    if known and math.isinf(value):
        return '<td class=n data-key="1e300">∞</td>'
    key = f"{value:.9g}" if known else ""
    return f'<td class=n data-key="{key}">{number(value)}</td>'


def _address(path: str) -> str:
    """A relative address; bytes that mean something in one are spelled %XX."""
    plain = set((string.ascii_letters + string.digits + "/._~-").encode())
    return "".join(chr(b) if b in plain else f"%{b:02X}" for b in os.fsencode(path))
