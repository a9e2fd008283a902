"""Checks a data set before any training: all that is wrong, in one report.

    python -m data_pipeline.check --manifest scans.csv --json report.json
    python -m data_pipeline.check --dataset amos --raw FOLDER

Every scan of the manifest is read whole: geometry, spacing, intensities, labels, the
sides of paired organs, field of view; then the collection: scans that are there twice,
patients in two splits, names that mean the same, pairs per task and split. One line per
finding on stdout, worst first; `--json` and `--markdown` write the same to a file.
Exit code: 0 no error (warnings may be there), 2 the manifest itself is at fault, 3 no
scan, 4 every scan has an error, 5 some have.
"""

import argparse
import collections
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from data_pipeline import anatomy, findings, parallel, prepare, store
from data_pipeline.datasets import manifest
from data_pipeline.datasets.manifest import Collection, Record
from data_pipeline.examine import examine, nothing_known
from data_pipeline.findings import Finding
from data_pipeline.pairs import SPLITS
from unireg_jax.errors import FAILED, NOTHING, PARTLY, PREEMPTED, USAGE, UserError, tell
from unireg_jax.tasks import TASKS, PairType

REPORT_VERSION = 1
FEW_SCANS = 10  # a task trained on fewer learns its scans by heart
_SPREAD = 3.0  # spacing against the median of the task

_Result = dict[str, Any]


def check_collection(
    collection: Collection,
    faults: Sequence[tuple[str, str]] = (),
    *,
    tasks: Sequence[str] = (),
    workers: int = 1,
    progress: Callable[[Iterable, int], Iterable] = lambda results, total: results,
) -> dict[str, Any]:
    """Examines every scan of a collection and the collection as a whole.

    Args:
        collection: from a manifest or an adapter.
        faults: (reason, line) of what the collection itself does wrong.
        tasks: only these; all when empty.
        workers: processes; each holds one scan and its labels.
        progress: wraps the results as they come; takes their number too.

    Returns:
        {"version", "counts", "findings", "scans"}: findings worst first (Finding),
        scans in the order of the manifest, without paths.

    Raises:
        UserError: no scan of these tasks (3).
    """
    found = [_manifest_fault(reason, text) for reason, text in faults]
    records = [r for r in collection.records if not tasks or r.task in tasks]
    if not records and not faults:
        raise UserError("empty", f"no scan of {', '.join(tasks)} is listed", NOTHING)
    # An id may be listed twice: the report says so, and results are told apart.
    jobs = list(enumerate(records))
    done = parallel.run(_guarded, jobs, workers, died=_died)
    results = dict(progress(done, len(jobs)))
    scans = [results[i] for i in range(len(jobs))]
    for scan in scans:
        found += scan["findings"]
    found += _duplicates(scans) + _spacings(scans) + _names(records, scans)
    counts = _counts(scans, tasks, collection.pairs)
    found += _too_few(counts) + _apart(scans)
    return {
        "version": REPORT_VERSION,
        "counts": counts,
        "findings": findings.ordered(found),
        "scans": scans,
    }


def exit_code(report: Mapping[str, Any]) -> int:
    """Gives the exit code of a report: 0, 2, 4 or 5; see the module's docstring."""
    errors = [f for f in report["findings"] if f.level == "error"]
    if any(f.id == "manifest" for f in errors):
        return USAGE
    names = {scan["id"] for scan in report["scans"]}
    bad = {f.id for f in errors} & names
    if bad:
        return FAILED if bad == names else PARTLY
    return USAGE if errors else 0


def _of_dataset(
    options: argparse.Namespace,
) -> tuple[Collection, list[tuple[str, str]]]:
    """What lies in a folder, and what is wrong with it as a whole."""
    # An open task is named by --task; else --task chooses among those that are there.
    task = options.task[0] if options.dataset == "nnunet" and options.task else None
    common = {**vars(options), "strict": False, "task": task}
    loose = prepare.read_source(argparse.Namespace(**common, allow_leak=True))
    try:
        prepare.read_source(argparse.Namespace(**common, allow_leak=False))
    except UserError as error:
        return loose, _lines(error)
    return loose, []


def _lines(error: UserError) -> list[tuple[str, str]]:
    """The faults that a refusal lists under its first line."""
    lines = str(error).splitlines()
    return [(error.reason, line.strip()) for line in lines[1:] or lines]


def _manifest_fault(reason: str, text: str) -> Finding:
    where, _, rest = text.partition(": ")
    got, _, remedy = rest.partition("; ")
    expected = "entries as data_pipeline.prepare reads them"
    return Finding("error", "manifest", reason, where, expected, got, remedy)


# --- one scan ---


def _guarded(job: tuple[int, Record]) -> tuple[int, _Result]:
    """As examine; what escapes becomes a finding, so that the others are examined."""
    number, record = job
    try:
        return number, examine(record)
    except MemoryError:
        got = "more than there is"
        return number, _lost(record, "out_of_memory", "memory for the scan", got)
    except Exception as error:  # a fault of ours: named, and the others still examined
        got = f"{type(error).__name__}: {error}"
        return number, _lost(record, "internal", "no fault of the check itself", got)


def _died(job: tuple[int, Record]) -> tuple[int, _Result]:
    number, record = job
    got = "a worker process that was killed, often for memory"
    return number, _lost(record, "worker_died", "memory for the scan", got)


def _lost(record: Record, reason: str, expected: str, got: str) -> _Result:
    remedy = "report it" if reason == "internal" else "run with fewer --workers"
    finding = Finding("error", record.id, reason, "scan", expected, got, remedy)
    return nothing_known(record) | {"findings": [finding]}


# --- the collection ---


def _duplicates(scans: Sequence[_Result]) -> list[Finding]:
    """One picture under two ids: allowed only for two tasks of one patient."""
    found = []
    groups: dict[str, list[_Result]] = {}
    for scan in scans:
        if scan["voxels"]:
            groups.setdefault(scan["voxels"], []).append(scan)
    for group in groups.values():
        for i, scan in enumerate(group[1:], 1):
            same = [_duplicate(first, scan) for first in group[:i]]
            found.append(min(same, key=lambda f: findings.LEVELS.index(f.level)))
    return found


def _duplicate(first: _Result, other: _Result) -> Finding:
    """What it means that two scans are one picture."""
    digests = [scan["sha256"].get("image") for scan in (first, other)]
    same_file = digests[0] is not None and digests[0] == digests[1]
    got = "the same file" if same_file else "the same voxels, another file"
    got += f" as {first['id']}"
    where = f"{first['subject']} and {other['subject']}"
    if first["split"] != other["split"]:
        got += f", which is in split {first['split']}"
        level, remedy = "error", "judged on what was trained on: keep one"
    elif first["subject"] != other["subject"]:
        got += f", under two subjects ({where})"
        level, remedy = "error", "give both one subject, or keep one"
    elif first["task"] != other["task"]:
        level, remedy = "note", "fine: one scan serves two tasks"
    else:
        level, remedy = "warning", "keep one, or name the phase that was meant"
    expected = "every picture once"
    return Finding(level, other["id"], "id_duplicate", "image", expected, got, remedy)


def _spacings(scans: Sequence[_Result]) -> list[Finding]:
    """Spacings far from those of the other scans of the task."""
    found = []
    for task in TASKS:
        members = [s for s in scans if s["task"] == task and s["image"]]
        if len(members) < 3:
            continue
        table = np.array([s["image"]["spacing_mm"] for s in members])
        median = np.median(table, axis=0)
        for scan, row in zip(members, table, strict=True):
            if any(f.reason == "spacing" for f in scan["findings"]):
                continue  # told already
            if (row > _SPREAD * median).any() or (row * _SPREAD < median).any():
                sizes = [" x ".join(f"{v:.4g}" for v in part) for part in (median, row)]
                found.append(
                    Finding(
                        "warning",
                        scan["id"],
                        "spacing",
                        "image",
                        f"within {_SPREAD:g} times the task's median, {sizes[0]} mm",
                        f"{sizes[1]} mm",
                        "check the header's units and slice spacing",
                    )
                )
    return found


def _names(records: Sequence[Record], scans: Sequence[_Result]) -> list[Finding]:
    """Structures that no scan shows, that one alone shows, or that have two names."""
    found = []
    for task, names in manifest.vocabulary(records).items():
        shown: collections.Counter[str] = collections.Counter()
        for scan in scans:
            if scan["task"] == task and scan["labels"]:
                shown.update(n for n, size in scan["labels"]["voxels"].items() if size)
        labelled = sum(s["task"] == task and bool(s["labels"]) for s in scans)
        never = [name for name in names if not shown[name]]
        if never and labelled:
            found.append(
                Finding(
                    "warning",
                    task,
                    "label_set",
                    "label maps",
                    "every name in some scan",
                    f"no voxel anywhere of {', '.join(never[:8])}",
                    "drop it from the maps, or mend its id",
                )
            )
        once = [name for name in names if shown[name] == 1]
        if once and labelled > 1:
            found.append(
                Finding(
                    "note",
                    task,
                    "label_set",
                    "label maps",
                    "every structure in two scans or more",
                    f"in one scan only: {', '.join(once[:8])}",
                    "no pair can use it: draw it in others, or name it alike",
                )
            )
        meanings: dict[tuple, list[str]] = {}
        for name in names:
            meanings.setdefault(anatomy.side(name), []).append(name)
        for same in meanings.values():
            if len(same) > 1:
                found.append(
                    Finding(
                        "warning",
                        task,
                        "label_set",
                        "label maps",
                        "one name for one structure",
                        " and ".join(same),
                        "use one spelling: names are compared as text",
                    )
                )
    return found


def _counts(
    scans: Sequence[_Result],
    tasks: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> list[dict[str, Any]]:
    """Usable scans, subjects, ordered pairs and labelled scans per task and split."""
    rows = []
    present = {scan["task"] for scan in scans} | set(tasks)
    for task, split in itertools.product(TASKS, SPLITS):
        if task not in present:
            continue
        usable = [
            scan
            for scan in scans
            if (scan["task"], scan["split"]) == (task, split)
            and not any(f.level == "error" for f in scan["findings"])
        ]
        intra = TASKS[task].pair_type == PairType.INTRA
        per_subject = collections.Counter(scan["subject"] for scan in usable)
        within = sum(n * (n - 1) for n in per_subject.values())
        count = within if intra else len(usable) ** 2 - len(usable) - within
        ids = {s["id"] for s in scans if (s["task"], s["split"]) == (task, split)}
        if any(fixed in ids for fixed, _ in pairs):  # then the listed ones alone
            good = {scan["id"] for scan in usable}
            count = sum(good.issuperset(pair) for pair in pairs)
        rows.append(
            {
                "task": task,
                "split": split,
                "scans": len(usable),
                "subjects": len(per_subject),
                "pairs": count,
                "labelled": sum(bool(scan["labels"]) for scan in usable),
            }
        )
    return rows


def _too_few(counts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Splits without a pair; training on a handful."""
    found = []
    for row in counts:
        where = f"{row['task']}/{row['split']}"
        got = f"{row['scans']} usable scans of {row['subjects']} subjects"
        intra = TASKS[row["task"]].pair_type == PairType.INTRA
        kind = "two scans of one subject" if intra else "scans of two subjects"
        if row["split"] == "test" and not row["scans"]:
            continue  # a test split is optional
        if not row["pairs"]:
            train = row["split"] == "train"
            level = "error" if train and row["scans"] else "warning"
            remedy = (
                "add scans, or mend those with errors"
                if train
                else "hold subjects back: nothing of this task can be judged"
            )
            found.append(
                Finding(level, where, "empty", "pairs", kind, got, remedy),
            )
        elif row["split"] == "train" and row["scans"] < FEW_SCANS:
            remedy = "fine for a trial; add scans for use"
            expected = f"{FEW_SCANS} scans or more"
            found.append(
                Finding("note", where, "empty", "pairs", expected, got, remedy)
            )
    return found


def _apart(scans: Sequence[_Result]) -> list[Finding]:
    """Scans of one patient that share no space: they are paired in the world."""
    found = []
    groups: dict[tuple, list[_Result]] = {}
    for scan in scans:
        if scan["image"] and TASKS[scan["task"]].pair_type == PairType.INTRA:
            key = (scan["task"], scan["split"], scan["subject"])
            groups.setdefault(key, []).append(scan)
    for group in groups.values():
        for a, b in itertools.combinations(group, 2):
            (low_a, high_a), (low_b, high_b) = (
                np.array(s["image"]["box_mm"]) for s in (a, b)
            )
            shared = np.minimum(high_a, high_b) - np.maximum(low_a, low_b)
            part = shared / np.minimum(high_a - low_a, high_b - low_b)
            if (part < 0.3).any():
                axis = int(np.argmin(part))
                found.append(
                    Finding(
                        "warning",
                        b["id"],
                        "no_overlap",
                        "image",
                        f"to share space with {a['id']} of the same patient",
                        f"{max(0.0, 100 * part[axis]):.0f} % along {'xyz'[axis]}",
                        "pre-align the pair (experiments.prealign), or check headers",
                    )
                )
    return found


# --- reports ---


def to_json(report: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a report as strict JSON values."""
    listed = [finding.to_json() for finding in report["findings"]]
    scans = [{k: v for k, v in s.items() if k != "findings"} for s in report["scans"]]
    return {**report, "findings": listed, "scans": scans}


def summary(report: Mapping[str, Any]) -> list[str]:
    """Gives the lines of the report: findings, counts, one line of sums."""
    lines = findings.table(report["findings"])
    lines += [""] if lines else []
    header = ("task", "split", "scans", "subjects", "pairs", "labelled")
    rows = [header] + [
        tuple(str(row[key]) for key in header) for row in report["counts"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    levels = collections.Counter(f.level for f in report["findings"])
    sums = ", ".join(f"{levels[level]} {level}s" for level in findings.LEVELS)
    return [
        *(line.rstrip() for line in lines),
        "",
        f"{len(report['scans'])} scans: {sums}",
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """Gives a report as two Markdown tables: every scan, and findings by kind."""
    lines = [
        "| scan | task | voxels | mm | stored | field of view mm | HU 0.1 %, 50 %, "
        "99.9 % | labels | found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found: dict[str, list[str]] = {}
    for finding in report["findings"]:
        told = found.setdefault(finding.id, [])
        told.append(f"{finding.level}: {finding.reason}")
    for scan in report["scans"]:
        cells = [scan["id"], scan["task"]]
        if image := scan["image"]:
            value = image["intensity"]
            cells += [
                "×".join(map(str, image["shape"])),
                "×".join(f"{v:.4g}" for v in image["spacing_mm"]),
                f"{image['stored_axes']} {image['stored_type']}",
                "×".join(f"{v:.0f}" for v in image["extent_mm"]),
                f"{value['p0.1']:.4g}, {value['p50']:.4g}, {value['p99.9']:.4g}",
            ]
        else:
            cells += ["cannot be read", "", "", "", ""]
        if labels := scan["labels"]:
            there = sum(1 for size in labels["voxels"].values() if size)
            cells.append(f"{there} of {len(labels['voxels'])}")
        else:
            cells.append("–")
        cells.append(", ".join(dict.fromkeys(found.get(scan["id"], ["nothing"]))))
        lines.append(_row(cells))
    lines += ["", "| | scan | reason | what | expected | got | remedy |"]
    lines.append("|---|---|---|---|---|---|---|")
    alike: dict[tuple, list[Finding]] = {}
    for finding in report["findings"]:
        alike.setdefault((*finding[:1], *finding[2:5], finding.remedy), []).append(
            finding
        )
    for same in alike.values():
        ids = list(dict.fromkeys(finding.id for finding in same))
        gots = list(dict.fromkeys(finding.got for finding in same))
        where = ", ".join(ids)
        if len(ids) > 4:
            where = f"{ids[0]} … {ids[-1]} ({len(ids)})"
        got = gots[0] if len(gots) == 1 else "; ".join(gots[:4])
        got += " …" if len(gots) > 4 else ""
        lines.append(_row(same[0]._replace(id=where, got=got)))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    """One row of a Markdown table, whatever the cells hold."""
    plain = (str(c) if str(c).isprintable() else ascii(str(c)) for c in cells)
    escaped = (
        c.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for c in plain
    )
    return "| " + " | ".join(escaped) + " |"


# --- command ---


def _bar(results: Iterable, total: int) -> Iterable:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm.tqdm(results, total=total, desc="check", unit="scan", disable=None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.check", description=__doc__.split("\n\n")[2]
    )
    source = parser.add_mutually_exclusive_group(required=True)
    prepare.source_arguments(source, parser)
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        choices=tuple(TASKS),
        help="check only this task; repeatable",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--markdown", metavar="FILE", help="write tables of scans and findings"
    )
    parallel.add_workers(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code, see the module's docstring; also 6 (a report cannot be written) and
        75 (interrupted).
    """
    options = _parser().parse_args(argv)
    try:
        with parallel.terminable():
            if options.manifest:
                if options.raw:
                    raise UserError(
                        "schema",
                        "--raw goes with --dataset; the manifest names the scans",
                        USAGE,
                    )
                listed = manifest.examine(options.manifest, roots=options.data_root)
            else:
                listed = _of_dataset(options)
            report = check_collection(
                *listed,
                tasks=options.task,
                workers=options.workers,
                progress=_bar,
            )
        for line in summary(report):
            print(line)
        if options.json:
            store.write_json(options.json, to_json(report))
        if options.markdown:
            store.write_atomic(options.markdown, markdown(report).encode())
        return exit_code(report)
    except UserError as error:
        tell(f"error: {error.reason}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted: nothing was written")
        return PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
