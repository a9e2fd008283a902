"""Numbers for other programs: CSV that spreadsheets cannot run, strict JSON, LaTeX."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# A spreadsheet takes a text that starts so for a formula and runs it.
_FORMULA = ("=", "+", "-", "@")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}


def as_json(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None.

    Args:
        value: nested dicts and lists of plain values.

    Returns:
        The same, with string keys.
    """
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_text(value: Any) -> str:
    """Strict JSON, one line feed at its end.

    Args:
        value: nested dicts and lists of plain values; NaN becomes null.

    Returns:
        ASCII text.
    """
    return json.dumps(as_json(value), indent=2, allow_nan=False) + "\n"


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A CSV table (RFC 4180, comma, UTF-8) without a cell that is a formula.

    Numbers are written in full, undefined ones are empty. A text that starts with =, +,
    - or @ gets an apostrophe before it, so that it stays a text; white space in a text
    becomes one blank, so that a line is a row.

    Args:
        columns: names, the header line.
        rows: column -> value; absent ones are empty.

    Returns:
        The text.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_cell(name) for name in columns])
    writer.writerows([[_cell(row.get(name)) for name in columns] for row in rows])
    return out.getvalue()


def unescape(cell: str) -> str:
    """The text that `csv_text` wrote into a cell.

    Args:
        cell: as read from the file.

    Returns:
        Without the apostrophe that guards a formula.
    """
    return cell[1:] if cell[:1] == "'" and _is_formula(cell) else cell


def latex_text(text: str) -> str:
    """Text for LaTeX: characters that would be commands are spelled out.

    Args:
        text: any text.

    Returns:
        One line.
    """
    return "".join(_LATEX.get(c, c) for c in " ".join(str(text).split()))


def latex_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
) -> str:
    """A LaTeX table with booktabs rules.

    Args:
        columns: heads, LaTeX; the first column is text, the others are numbers.
        rows: cells, LaTeX.
        caption: LaTeX.

    Returns:
        The text; needs `booktabs`.
    """
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}", r"\toprule"]
    lines += [" & ".join(columns) + r" \\", r"\midrule"]
    lines += [" & ".join(row) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def latex_spread(mean: float | None, std: float | None) -> str:
    """mean ± std in LaTeX, three digits behind the point.

    Args:
        mean: None or NaN gives a dash.
        std: None or NaN leaves it out.

    Returns:
        LaTeX.
    """
    if mean is None or mean != mean:
        return "--"
    text = f"{mean:.3f}"
    if std is not None and std == std:
        text += rf" \pm {std:.3f}"
    return f"${text}$"


def _cell(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool | int | float):
        return repr(value).lower() if isinstance(value, bool) else repr(value)
    text = " ".join(str(value).split())
    return f"'{text}" if _is_formula(text) else text


def _is_formula(text: str) -> bool:
    """Also behind apostrophes, so that taking one away undoes putting one before."""
    return text.lstrip("'").startswith(_FORMULA)
