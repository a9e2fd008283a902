"""Tables of results: written for people and papers, read again to compare methods.

A table of results is any CSV with a column `id`, and `label` if it has a line per
label; every other column whose cells are finite numbers, or empty where undefined, is a
score.
"""

import collections
import csv
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unireg_jax.errors import USAGE, UserError, bad_file
from unireg_jax.evaluation import comparison, learn2reg, metrics, tables
from unireg_jax.evaluation.aggregate import better, summarize
from unireg_jax.imaging import nifti

_NO_SCORE = ("id", "label", "status", "reason", "message", "undefined")
_STATISTICS = ("mean", "std", "median", "worst30", "n", "undefined")
_UNDEFINED = ("", "nan", "na", "n/a", "null", "none", "-")


class Scores(NamedTuple):
    """What a table of results holds.

    Attributes:
        columns: score -> (id, label) -> value, NaN where undefined; label is "" in a
            table of cases.
        labels: in order; ("",) for a table of cases.
    """

    columns: dict[str, dict[tuple[str, str], float]]
    labels: tuple[str, ...]


def read_scores(path: str | os.PathLike) -> Scores:
    """Reads a table of results.

    Args:
        path: CSV in UTF-8.

    Returns:
        Scores.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`, `empty`; `schema` for no
            column id, lines of other lengths, no score, or a score with a cell that is
            no number; `id_duplicate`.
    """
    nifti.check_file(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file, strict=True) if any(line)]
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise _fault("schema", path, "a CSV table in UTF-8", str(error)) from error
    head = [cell.strip() for cell in lines[0]] if lines else []
    if "id" not in head or len(set(head)) < len(head):
        got = ", ".join(head[:12]) or "nothing"
        raise _fault("schema", path, "a column id, and no column twice", got)
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(head):
            got = f"{len(line)} in line {number}"
            raise _fault("schema", path, f"{len(head)} cells a line", got)
        rows.append(dict(zip(head, map(str.strip, line), strict=True)))
    if not rows:
        raise _fault("empty", path, "one case or more", "none")
    keys = [(tables.unescape(row["id"]), row.get("label", "")) for row in rows]
    if twice := [key for key, n in collections.Counter(keys).items() if n > 1]:
        raise _fault("id_duplicate", path, "every case once", f"{twice[0]} twice")
    columns = {}
    for name in head:
        values = [_number(row[name]) for row in rows]
        some = any(value is not None and value == value for value in values)
        if name in _NO_SCORE or not some:
            continue
        if None not in values:
            columns[name] = dict(zip(keys, values, strict=True))
        elif name in metrics.DEFINITIONS or name in learn2reg.DEFINITIONS:
            at = values.index(None)  # to leave the column out would go unseen
            expected = f"a finite number, or nothing, in column {name}"
            got = f"{rows[at][name]} in line {at + 2}"
            raise _fault("schema", path, expected, got)
    if not columns:
        raise _fault("schema", path, "a column of numbers", f"only {', '.join(head)}")
    return Scores(columns, tuple(dict.fromkeys(label for _, label in keys)))


def compare_scores(
    methods: Mapping[str, Mapping[tuple[str, str], float]], metric: str
) -> dict[str, Any]:
    """Compares methods in one score.

    The tests of all pairs of methods and of all labels are one family of Holm's.

    Args:
        methods: name -> (id, label) -> value; two or more.
        metric: its name.

    Returns:
        metric; better: "higher", "lower" or None; methods: a line per label and method,
        label, method, mean, std, median, worst30, n, undefined; tests: one line per
        label and pair, label and the fields of comparison.Test.

    Raises:
        ValueError: as comparison.compare.
    """
    labels = dict.fromkeys(label for scores in methods.values() for _, label in scores)
    summaries, tests, places = [], [], []
    for label in labels:
        chosen = {
            name: {case: v for (case, at), v in scores.items() if at == label}
            for name, scores in methods.items()
        }
        found = comparison.compare(chosen)
        tests += found
        places += [label] * len(found)
        for name, scores in chosen.items():
            summary = summarize(scores.values(), metric=metric)._asdict()
            summaries.append({"label": label, "method": name} | summary)
    corrected = comparison.correct(tests)
    return {
        "metric": metric,
        "better": better(metric),
        "methods": summaries,
        "tests": [
            {"label": label} | test._asdict()
            for label, test in zip(places, corrected, strict=True)
        ],
    }


def comparison_csv(compared: Sequence[Mapping[str, Any]]) -> str:
    """One line per test.

    Args:
        compared: results of `compare_scores`.

    Returns:
        CSV.
    """
    columns = ("metric", "label", *comparison.Test._fields)
    rows = [{"metric": c["metric"]} | test for c in compared for test in c["tests"]]
    return tables.csv_text(columns, rows)


def comparison_latex(compared: Sequence[Mapping[str, Any]]) -> str:
    """One table of methods by scores; by labels, one table per score.

    A star marks what differs from the first method, p < 0.05 after Holm.

    Args:
        compared: results of `compare_scores`.

    Returns:
        LaTeX.
    """
    if all(line["label"] == "" for c in compared for line in c["methods"]):
        groups = [[(c["metric"], c, "") for c in compared]]
    else:
        groups = [
            [
                (label, c, label)
                for label in dict.fromkeys(line["label"] for line in c["methods"])
            ]
            for c in compared
        ]
    return "\n".join(_methods_table(group) for group in groups)


def summary_latex(summary: Mapping[str, Any]) -> str:
    """A table of scores over cases and, with labels, one of labels.

    Args:
        summary: of cases.summarize_cases.

    Returns:
        LaTeX.
    """
    cases = summary["cases"]
    heads = ["", r"mean $\pm$ std", "median", r"worst 30\,\%", "n", "undefined"]
    rows = [
        [tables.latex_text(name), *_statistics(found)]
        for name, found in summary["metrics"].items()
    ]
    caption = f"{cases['done']} of {cases['total']} cases."
    text = tables.latex_table(heads, rows, caption=caption)
    if summary["labels"]:
        names = next(iter(summary["labels"].values()))
        rows = [
            [label, *(_counted(found.get(name)) for name in names)]
            for label, found in summary["labels"].items()
        ]
        heads = ["label", *map(tables.latex_text, names)]
        caption = r"Labels, mean $\pm$ std over cases (how many have a value)."
        text += "\n" + tables.latex_table(heads, rows, caption=caption)
    return text


def label_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of labels.

    Args:
        rows: of cases.label_rows.

    Returns:
        CSV.
    """
    return tables.csv_text(_columns(rows, ("id", "label"), ("undefined",)), rows)


def case_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of cases.

    Args:
        rows: of cases.case_row.

    Returns:
        CSV.
    """
    last = ("undefined", "reason", "message")
    return tables.csv_text(_columns(rows, ("id", "status"), last), rows)


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary for people.

    Args:
        summary: of cases.summarize_cases.

    Returns:
        Lines of text.
    """
    lines = ["".ljust(24) + "".join(name.rjust(12) for name in _STATISTICS)]
    for name, found in summary["metrics"].items():
        cells = "".join(_short(found[key]).rjust(12) for key in _STATISTICS)
        lines.append(name.ljust(24) + cells)
    return "\n".join(lines) + "\n"


def comparison_text(compared: Sequence[Mapping[str, Any]]) -> str:
    """The tests for people.

    Args:
        compared: results of `compare_scores`.

    Returns:
        Lines of text.
    """
    heads = ("n", "zero", "undefined", "unmatched", "median_difference", "effect", "p")
    heads = (*heads, "p_holm")
    titles = [name.replace("median_difference", "median diff") for name in heads]
    lines = ["".ljust(40) + "".join(name.rjust(12) for name in titles)]
    for found in compared:
        for test in found["tests"]:
            label = f" {test['label']}" if test["label"] else ""
            name = f"{found['metric']}{label}: {test['a']} - {test['b']}"
            cells = "".join(_short(test[key]).rjust(12) for key in heads)
            star = " *" if test["significant"] else ""
            lines.append(name.ljust(40) + cells + star)
    return "\n".join(lines) + "\n"


def _methods_table(group: Sequence[tuple[str, Mapping[str, Any], str]]) -> str:
    """Methods by (head, comparison, label)."""
    methods = list(dict.fromkeys(line["method"] for line in group[0][1]["methods"]))
    rows = []
    for method in methods:
        cells = []
        for _, found, label in group:
            line = next(
                entry
                for entry in found["methods"]
                if (entry["label"], entry["method"]) == (label, method)
            )
            star = any(
                test["significant"]
                for test in found["tests"]
                if (test["label"], test["a"], test["b"]) == (label, methods[0], method)
            )
            cells.append(_spread(line) + ("$^{*}$" if star else ""))
        rows.append([tables.latex_text(method), *cells])
    metrics = dict.fromkeys(found["metric"] for _, found, _ in group)
    caption = (
        rf"{tables.latex_text(', '.join(metrics))}: mean $\pm$ std over cases. "
        rf"$^{{*}}$ differs from {tables.latex_text(methods[0])}, $p < 0.05$, paired "
        "Wilcoxon test, corrected after Holm."
    )
    heads = ["method", *(tables.latex_text(head) for head, _, _ in group)]
    return tables.latex_table(heads, rows, caption=caption)


def _statistics(found: Mapping[str, Any]) -> list[str]:
    numbers = [tables.latex_spread(found[key], None) for key in ("median", "worst30")]
    return [_spread(found), *numbers, str(found["n"]), str(found["undefined"])]


def _spread(found: Mapping[str, Any] | None) -> str:
    return tables.latex_spread(found["mean"], found["std"]) if found else "--"


def _counted(found: Mapping[str, Any] | None) -> str:
    return f"{_spread(found)} ({found['n']})" if found else "--"


def _columns(
    rows: Sequence[Mapping[str, Any]], first: tuple[str, ...], last: tuple[str, ...]
) -> list[str]:
    """All columns in the order in which they first come."""
    names = dict.fromkeys((*first, *(name for row in rows for name in row)))
    return sorted(names, key=lambda name: name in last)  # stable


def _short(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4g}"


def _number(cell: str) -> float | None:
    """NaN where undefined, None for a text."""
    if cell.lower() in _UNDEFINED:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _fault(reason: str, path: str | os.PathLike, expected: str, got: str) -> UserError:
    got = " ".join(got.split())[:120]
    return bad_file(path, reason, expected, got, "mend the table", USAGE)
