"""`unireg report`: a page to look at, for a case or for a batch."""

import argparse
import csv
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unireg_jax import manifest
from unireg_jax.errors import DATA_CHANGED, NOTHING, USAGE, UserError, shown
from unireg_jax.evaluation import quality, tables
from unireg_jax.imaging import nifti, scans, transforms
from unireg_jax.imaging.nifti import Volume
from unireg_jax.reports import case as told
from unireg_jax.reports import index, pictures
from unireg_jax.verbs import files, judging, options, outputs, results
from unireg_jax.verbs.messages import kinds, progress, warn, with_reason

HELP = "a page to look at, for a case or for a batch"
_RECORD_BYTES = 1 << 26


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        f"Of the folder of a case: {outputs.PAGE}, pictures of the scans in three "
        "planes with sliders, numbers and what is wrong with them. Of the folder of a "
        f"batch: {outputs.INDEX}, all cases, the worst first, and with --list their "
        "pages. Each is one file that works offline and asks for nothing."
    )
    parser.epilog = (
        "example: unireg report results/a__b --fixed a.nii.gz --moving b.nii.gz; "
        "unireg report results --list pairs.csv"
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="OUT/CASE, or OUT of a batch")
    add("-f", "--fixed", metavar="FILE", help="of a case: the scans are not in DIR")
    add("-m", "--moving", metavar="FILE", help="with --fixed")
    text = "with --fixed: labels to be outlined"
    add(*options.FIXED_LABEL, metavar="FILE", help=text)
    add("--list", metavar="LIST", help="of a batch: the list that names the scans")
    add(
        "--data-root",
        action="append",
        default=[],
        metavar="DIR",
        help="folder that scans may lie in besides the list's; may be repeated",
    )
    add(
        "--pages",
        type=options.count,
        default=outputs.PAGES,
        metavar="N",
        help="of a batch: pages and small pictures of the N worst, default "
        f"{outputs.PAGES}",
    )
    add("-o", "--out", dest="file", metavar="FILE", help="default in DIR")
    options.add_overwrite(parser, "the pages")
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    folder = Path(args.folder)
    if not os.path.isdir(folder):
        raise UserError("not_found", f"{shown(folder)}: a folder expected", USAGE)
    if bool(args.fixed) != bool(args.moving):
        raise UserError(
            "schema", "--fixed and --moving belong together, got one; name both", USAGE
        )
    if args.fixed_label and not args.fixed:
        raise UserError(
            "schema", "--fixed-label needs --fixed, got none; name the scan", USAGE
        )
    say = progress(args.quiet)
    done = _case(args, folder, say) if _records(folder) else _batch(args, folder, say)
    if args.json:
        print(json.dumps(done, indent=2))
    return 0


class _Case(NamedTuple):
    """A case on disk."""

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.record["case"])


# --- one case -----------------------------------------------------------------------


def _case(args, folder: Path, say) -> dict[str, Any]:
    """Writes the page of a case."""
    if args.list:
        raise UserError(
            "schema", f"--list is for a batch, {shown(folder)} holds one case", USAGE
        )
    if not args.fixed:
        raise UserError(
            "not_found",
            f"{shown(folder)}: holds results and no scans; pass --fixed and --moving",
            USAGE,
        )
    target = _target(args, folder / outputs.PAGE)
    read = _read(folder)
    case, drawn = _look(read, args.fixed, args.moving, args.fixed_label, strict=True)
    text = _page(read, case, drawn)
    with nifti.atomic_path(target) as temp:
        temp.write_text(text, encoding="utf-8")
    say(f"{told.status(case.record)}: {shown(target)}")
    return _line(case) | {"page": target.name}


def _look(
    case: _Case, fixed: str, moving: str, fixed_label: str | None, *, strict: bool
) -> tuple[_Case, pictures.Scene]:
    """Reads scans and results; measures what the record does not say yet.

    Labels of the fixed scan that do not fit are refused if `strict`, else left out.
    """
    volumes, known = [], results.Files()
    for name, path in (("fixed", fixed), ("moving", moving)):
        _check_input(case, name, path, known)
        volumes.append(scans.read_scan(path))
    labels = None
    if fixed_label:
        try:
            labels = _fixed_labels(case, fixed_label, volumes[0], known)
        except UserError as error:
            if strict:
                raise
            why = with_reason(error)
            warn(f"{case.name}: labels of the fixed scan are not outlined: {why}")
    prefix = case.folder / case.name
    warped = nifti.read_image(f"{prefix}_warped.nii.gz")
    disp_mm, vox2world = transforms.read_field(f"{prefix}_1Warp.nii.gz")
    nifti.check_same_grid(volumes[0], warped)
    nifti.check_same_grid(volumes[0], warped._replace(vox2world=vox2world))
    if disp_mm.shape[:3] != warped.data.shape:
        raise _broken(case.folder, "a field on the grid of the warped image")
    for name in ("warped", "1Warp"):
        _check_output(case, f"{case.name}_{name}.nii.gz", known)
    affine = _affine(case)
    if not told.numbers(case.record):
        found = judging.assess(
            *volumes, disp_mm, affine, scores=_dict(case.record.get("scores"))
        )
        case = case._replace(record=case.record | {"quality": found})
        lines = [finding.line for finding in judging.findings(case.record)]
        if lines:
            warnings = [*told.warnings(case.record), *lines]
            case.record.update(warnings=warnings, status="warn")
    outlined = judging.labels_to_outline(case.folder, case.record, volumes[0], labels)
    scene = pictures.scene(*volumes, warped.data, disp_mm, affine, labels=outlined)
    return case, scene


def _fixed_labels(case: _Case, path: str, fixed: Volume, known) -> Volume:
    """Labels of the fixed scan, those of the record."""
    if not _input(case, "fixed_label"):
        raise UserError(
            "schema",
            f"{shown(path)}: {shown(case.name)} was registered without labels of the "
            "fixed scan; leave --fixed-label out, or register again with it",
            USAGE,
        )
    _check_input(case, "fixed_label", path, known)
    labels = scans.read_labels(path)
    nifti.check_same_grid(fixed, labels)
    return labels


def _input(case: _Case, name: str) -> Mapping[str, Any]:
    """What the record says of an input."""
    return _dict(_dict(case.record.get("inputs")).get(name))


def _check_input(case: _Case, name: str, path: str, known: results.Files) -> None:
    """Refuses a file that is not the one of the record."""
    said = (
        f"the file that the record has as {name} expected, its digest is another; name "
        "that one, or register again"
    )
    _check_digest(_input(case, name), path, known, said)


def _check_output(case: _Case, name: str, known: results.Files) -> None:
    """Refuses a result that is not the one of the record, whose numbers stand by it."""
    listed = _dict(_dict(case.record.get("outputs")).get(name))
    said = (
        "the file that was written with the record expected, its digest is another or "
        "not told; register again"
    )
    _check_digest(listed, str(case.folder / name), known, said)


def _check_digest(
    listed: Mapping[str, Any], path: str, known: results.Files, said: str
) -> None:
    """Raises UserError, exit code 10, where a record lists another digest."""
    if listed.get("sha256") != known.digest(path)["sha256"]:
        raise UserError("checksum", f"{shown(path)}: {said}", DATA_CHANGED)


def _page(read: _Case, case: _Case, drawn: pictures.Scene) -> str:
    """The page of `case`, if its results are still those that were `read`."""
    text = judging.page_text(case.record, drawn)
    if _read(read.folder).record != read.record:
        raise UserError(
            "checksum",
            f"{shown(case.name)}: results that stay as they are expected, they were "
            "replaced while being drawn; make the page again",
            DATA_CHANGED,
        )
    return text


def _affine(case: _Case) -> np.ndarray:
    """The pre-alignment of a record."""
    try:
        matrix = np.asarray(case.record["affine"], np.float64)
        good = matrix.shape == (4, 4) and np.isfinite(matrix).all()
        good = good and abs(np.linalg.det(matrix)) > 1e-9
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise _broken(case.folder, "an affine of 4 x 4 numbers")
    return matrix


# --- many cases ---------------------------------------------------------------------


def _batch(args, folder: Path, say) -> dict[str, Any]:
    """Writes the index of a batch, and the pages of its worst cases."""
    if args.fixed:
        raise UserError(
            "schema",
            f"{shown(folder)}: --fixed and --moving are for one case, and no "
            "CASE_run.json is here; pass --list for a batch",
            USAGE,
        )
    target = _target(args, folder / outputs.INDEX)
    listed = {}
    if args.list:
        rows = manifest.read_cases(args.list, roots=args.data_root)
        listed = {row.id: row for row in rows}
    entries, cases = [], []
    for parent in (folder, folder / outputs.REJECTED):
        for record in sorted(parent.glob("*/*_run.json")):
            if record.parent.name.startswith("."):  # of a run at work, or killed
                continue
            try:
                cases.append(_read(record.parent))
            except UserError as error:
                name = record.parent.name
                entries.append(_failed(name, [str(error)]))
    known = {entry.case for entry in entries} | {case.name for case in cases}
    not_done = {path: _failures(path) for path in sorted(folder.glob("failed*.csv"))}
    failures = {n: why for found in not_done.values() for n, why in found.items()}
    entries += [_failed(n, [m]) for n, m in failures.items() if n not in known]
    # Of the last whole run, else of parts: done again and failed, with the results of
    # before in its folder.
    whole = folder / "failed.csv"
    again = {
        n: (message, path.stat().st_mtime)
        for path in ([whole] if whole in not_done else not_done)
        for n, message in not_done[path].items()
        if not message.startswith("id_duplicate")
    }
    if not entries and not cases:
        raise UserError(
            "empty",
            f"{shown(folder)}: no CASE/CASE_run.json; name the --out of `unireg batch` "
            "or one of its cases",
            NOTHING,
        )
    cases.sort(key=_badness, reverse=True)
    for i, case in enumerate(cases):
        thumbs, text = (), ""
        page = case.folder / outputs.PAGE
        if (row := listed.get(case.name)) and i < args.pages:
            say(f"{i + 1} of {min(len(cases), args.pages)}: {case.name}")
            try:
                labels = row.fixed_label if _input(case, "fixed_label") else None
                seen, drawn = _look(case, row.fixed, row.moving, labels, strict=False)
                if args.overwrite or not page.exists():
                    text = _page(case, seen, drawn)
            except UserError as error:
                warn(f"{case.name}: no page: {with_reason(error)}")
            else:
                case, thumbs = seen, _thumbs(drawn)
            if text:
                with nifti.atomic_path(page) as temp:
                    temp.write_text(text, encoding="utf-8")
        entry = _entry(case, target, page if page.is_file() else None, thumbs)
        why, at = again.get(case.name, ("", None))
        if at and entry.status != "failed" and _record_time(case) < at:
            reasons = [why, *entry.reasons]
            entry = entry._replace(status="failed", badness=math.inf, reasons=reasons)
        entries.append(entry)
    with nifti.atomic_path(target) as temp:
        text = index.index_page(folder.resolve().name, entries)
        temp.write_text(text, encoding="utf-8")
    say(f"{len(entries)} cases: {shown(target)}")
    return {
        "index": target.name,
        "cases": [
            {"case": e.case, "status": e.status, "reasons": list(e.reasons)}
            for e in index.worst_first(entries)
        ],
    }


def _entry(case: _Case, target: Path, page: Path | None, thumbs) -> index.Entry:
    """The row of a case that has results."""
    values = told.numbers(case.record)
    mean = _dict(_dict(case.record.get("scores")).get("mean"))
    if isinstance(dsc := mean.get("dsc"), int | float):
        values["dsc"] = dsc
    link = None
    if page is not None:
        link = Path(os.path.relpath(page.resolve(), target.parent.resolve()))
    return index.Entry(
        case.name,
        told.status(case.record),
        _badness(case),
        kinds(told.warnings(case.record)),
        values,
        None if link is None else link.as_posix(),
        thumbs,
    )


def _failed(name: str, why: list[str]) -> index.Entry:
    return index.Entry(name, "failed", float("inf"), why, {})


def _record_time(case: _Case) -> float:
    """When its results were made, seconds."""
    return (case.folder / f"{case.name}_run.json").stat().st_mtime


def _failures(path: Path) -> dict[str, str]:
    """Cases that were not done, and why, of one table of `unireg batch`."""
    found = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                name, message = row.get("id"), row.get("message")
                if name:
                    why = message or row.get("reason") or "failed"
                    found[tables.unescape(name)] = why
    except (OSError, ValueError, csv.Error):
        return found
    return found


def _thumbs(drawn: pictures.Scene) -> tuple[bytes, ...]:
    """Small overlays, axial and coronal."""
    planes = ("axial", "coronal")
    middles = [pictures.middle_slice(drawn, plane) for plane in planes]
    return tuple(
        pictures.picture(drawn, "overlay", plane, place)
        for plane, place in zip(planes, middles, strict=True)
    )


def _badness(case: _Case) -> float:
    values = told.numbers(case.record)
    if not values:
        return 0.0
    return quality.badness(values, told.kind(case.record))


# --- files --------------------------------------------------------------------------


def _records(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_run.json"))


def _read(folder: Path) -> _Case:
    """The record in a case's folder."""
    (path,) = _records(folder)[:1] or [folder / "CASE_run.json"]
    nifti.check_file(path)
    try:
        if path.stat().st_size > _RECORD_BYTES:
            raise ValueError
        record = json.loads(path.read_bytes())
        name = record["case"]
        good = isinstance(name, str) and path.name == f"{name}_run.json"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise _broken(folder, "a whole CASE_run.json that names its case")
    return _Case(folder, record)


def _broken(folder: Path, expected: str) -> UserError:
    return UserError(
        "schema", f"{shown(folder.name)}: schema: {expected} expected; register again"
    )


def _target(args, default: Path) -> Path:
    """Where the page goes; refuses to replace one unasked, or an input at all."""
    target = default if args.file is None else Path(args.file)
    inputs = (args.list, args.fixed, args.moving, args.fixed_label)
    # No other ending: results and records have theirs.
    endings = (".html", ".htm")
    files.output(str(target), endings, overwrite=args.overwrite, inputs=inputs)
    return target


def _line(case: _Case) -> dict[str, Any]:
    return {
        "case": case.name,
        "status": told.status(case.record),
        "quality": _dict(case.record.get("quality")),
        "warnings": told.warnings(case.record),
    }


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
