"""`unireg evaluate`: metrics of one transform or many, and tests between methods."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unireg_jax import manifest
from unireg_jax.errors import FAILED, NOTHING, PARTLY, USAGE, UserError, shown
from unireg_jax.evaluation import (
    cases,
    comparison,
    learn2reg,
    metrics,
    results,
    tables,
)
from unireg_jax.evaluation.cases import Case, Files
from unireg_jax.imaging import nifti
from unireg_jax.verbs import files, options, outputs
from unireg_jax.verbs.journal import Journal, open_alone
from unireg_jax.verbs.messages import kinds, number, progress, warn

HELP = "metrics of any transform"

SCHEMA = 4  # of the JSON
EXAMPLES = """examples:
  unireg evaluate -t case_1Warp.nii.gz --fixed-label f.nii.gz --moving-label m.nii.gz
  unireg evaluate --manifest cases.csv --transforms results --out scores
  unireg evaluate --compare ours=scores theirs=other/cases.csv --metric dsc hd95_mm
"""
_SUMMARY = ("cases.csv", "labels.csv", "summary.json", "summary.tex")
_JOURNAL = "reports.jsonl"
_COMPARISON = ("comparison.csv", "comparison.json", "comparison.tex")
_TRE_L2R = 2  # algorithm of tre_mm_l2r: since 2 indices are rounded
_FRAME = 2  # of points without a frame: since 2 their tables need a header
_COLUMNS = ("transform", "landmarks")  # of a manifest, beside those of a pair
_POINTS = ("fixed_points", "moving_points")
_SCANS = ("fixed", "moving")
_PATHS = (
    *("transform", "fixed_label", "moving_label", "fixed_mask", "landmarks"),
    *_POINTS,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Overlap, surface distances, landmark errors and regularity of a transform, of "
        "all transforms of a list, or tests between methods that were so evaluated. "
        "--json also names the definition of every number."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add(
        *("-t", "--transform"),
        metavar="FILE",
        action="append",  # so that a second one is no silent change of mind
        help="the whole map: field, affine or composite; identity: as the scans lie",
    )
    add("--manifest", metavar="FILE", help="list of cases, CSV or JSON; with --out")
    add(
        "--compare",
        nargs="+",
        metavar="NAME=FILE",
        help="tables of results (cases.csv, labels.csv or the --out folder), the first "
        "one the reference; or one CSV with --columns",
    )
    add = parser.add_argument
    add(
        *options.FIXED_LABEL,
        metavar="FILE",
        help="with --moving-label: DSC, HD95, NSD; NIfTI, NRRD or MetaImage [itk]",
    )
    add(*options.MOVING_LABEL, metavar="FILE", help="labels of the moving scan")
    add("--fixed-mask", metavar="FILE", help="foreground of sdlogj, default the labels")
    add("--landmarks", metavar="CSV", help="columns fixed_x_mm ... moving_z_mm, LPS")
    add(
        "--fixed-points",
        metavar="FILE",
        help="instead, with --moving-points: points of one scan each, line by line: "
        "table, or Slicer's .fcsv or .mrk.json",
    )
    add("--moving-points", metavar="FILE", help="of the moving scan")
    add(
        "--points-frame",
        choices=manifest.FRAMES,
        help="of the numbers of tables; default lps_mm where they have a header; "
        "voxels (voxel_from_0: Learn2Reg's) are those of --fixed and --moving",
    )
    add(
        *("-f", "--fixed"),
        metavar="FILE",
        help="with --moving: the scans, whose voxels, as stored, points and fields of "
        "Learn2Reg are in",
    )
    add("-m", "--moving", metavar="FILE", help="the moving scan")
    files.add_results(parser, default="; default its column transform")
    add("-o", "--out", metavar="DIR", help="folder of the tables")
    options.add_overwrite(parser, "tables that are there, judge every case again")
    add(
        "--tolerance-mm",
        type=options.weight,
        default=metrics.TOLERANCE_MM,
        metavar="MM",
        help="of nsd, default %(default)g",
    )
    add("--no-surface", action="store_true", help="without HD95 and NSD: faster")
    add("--l2r-compat", action="store_true", help="also as Learn2Reg's script does")
    add("--metric", nargs="+", metavar="NAME", help="scores to compare, default all")
    add("--columns", nargs="+", metavar="NAME", help="methods of the one CSV compared")
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    _check_options(args)
    if args.compare:
        return _compare(args)
    settings = {
        "surface": not args.no_surface,
        "tolerance_mm": args.tolerance_mm,
        "l2r": args.l2r_compat,
    }
    head = {
        "schema": SCHEMA,
        "settings": {"tolerance_mm": args.tolerance_mm, "l2r_compat": args.l2r_compat},
    }
    if args.manifest:
        return _many(args, head, settings)
    return _one(args, head, settings)


def _check_options(args: argparse.Namespace) -> None:
    """Refuses options that the chosen mode does not know."""
    options.both_labels(args)
    if args.transform and len(args.transform) > 1:
        raise _usage(
            f"--transform: one file that holds the whole map expected, got "
            f"{len(args.transform)}; chain them first: unireg compose -t "
            f"{' -t '.join(map(shown, args.transform))} -o chain.h5"
        )
    if bool(args.fixed_points) != bool(args.moving_points):
        raise _usage("--fixed-points and --moving-points belong together, got one")
    if args.landmarks and args.fixed_points:
        raise _usage("--landmarks or --fixed-points expected, got both; name one")
    if args.transform and args.points_frame and not args.fixed_points:
        raise _usage("--points-frame is that of --fixed-points, got none; name them")
    if bool(args.fixed) != bool(args.moving):
        raise _usage("--fixed and --moving belong together, got one; name both")
    mode = next(m for m in ("transform", "manifest", "compare") if getattr(args, m))
    belong = {
        "transform": (
            *("fixed_label", "moving_label", "fixed_mask", "landmarks"),
            *("fixed_points", "moving_points", "points_frame", "fixed", "moving"),
        ),
        "manifest": ("transforms", "data_root"),
        "compare": ("metric", "columns"),
    }
    for other, names in belong.items():
        for name in names:
            if other != mode and getattr(args, name):
                flag = name.replace("_", "-")
                raise _usage(f"--{flag} belongs to --{other}, got it with --{mode}")
    if args.out and mode == "transform":
        raise _usage("--out belongs to --manifest or --compare; use --json > FILE")
    if mode == "manifest" and not args.out:
        raise _usage("--manifest needs --out DIR for its tables, got none")


def _usage(line: str) -> UserError:
    return UserError("schema", f"schema: {line}", USAGE)


# --- one transform ------------------------------------------------------------------


def _one(args: argparse.Namespace, head: dict, settings: dict[str, Any]) -> int:
    (transform,) = args.transform
    given = Files(
        transform=transform,
        fixed_label=args.fixed_label,
        moving_label=args.moving_label,
        fixed_mask=args.fixed_mask,
        landmarks=args.landmarks,
        fixed_points=args.fixed_points,
        moving_points=args.moving_points,
        points_frame=args.points_frame,
        fixed=args.fixed,
        moving=args.moving,
    )
    report = cases.score_files(given, **settings)
    for line in report["warnings"]:
        warn(line)
    head["transform"] = files.named(transform)
    names = {"definitions": cases.definitions(l2r=args.l2r_compat)}
    _print(args, head | report | names, _table)
    return 0


def _table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = []
    if "labels" in report:
        names = list(report["mean"])
        lines.append("label".ljust(10) + "".join(name.rjust(16) for name in names))
        rows = {**report["labels"], "mean": report["mean"], "n": report["n"]}
        for label, row in rows.items():
            cells = "".join(number(row.get(name)).rjust(16) for name in names)
            lines.append(label.ljust(10) + cells)
    blocks = ("landmarks", "field", "learn2reg")
    for block in (report.get(name, {}) for name in blocks):
        for name, value in block.get("mean", block).items():
            lines.append(f"{name.ljust(24)} {number(value)}")
    return "\n".join(lines) + "\n"


# --- a list of cases ----------------------------------------------------------------


def _many(args: argparse.Namespace, head: dict, settings: dict[str, Any]) -> int:
    out = Path(args.out)
    files.spare([args.manifest], out, (*_SUMMARY, _JOURNAL))
    # Where a journal is, the tables beside it are made of it, and may be made anew.
    if not os.path.isfile(out / _JOURNAL):
        _refuse_existing(args, out, _SUMMARY)
    listed = read_list(args.manifest, args.transforms, roots=args.data_root)
    if args.l2r_compat and any(one.fixed_label for one in listed.values()):
        learn2reg.check_installed()
    say = progress(args.quiet)
    done = []
    with open_alone(out / _JOURNAL) as journal:
        for count, (name, given) in enumerate(listed.items(), start=1):
            case, known = _judge(name, given, journal, settings, args.overwrite)
            done.append(case)
            say(f"{count}/{len(listed)} {name}: {_outcome(case, known)}")
        summary = head | cases.summarize_cases(done)
        summary["definitions"] = cases.definitions(l2r=args.l2r_compat)
        texts = {
            "cases.csv": results.case_csv([cases.case_row(case) for case in done]),
            "labels.csv": results.label_csv(
                [row for case in done for row in cases.label_rows(case)]
            ),
            "summary.json": tables.json_text(summary),
            "summary.tex": results.summary_latex(summary),
        }
        _write(out, texts)
    failed = summary["cases"]["failed"]
    say(f"{len(done) - failed} of {len(done)} cases done: {shown(out)}")
    _print(args, summary, results.summary_text)
    if failed == len(done):
        return FAILED
    return PARTLY if failed else 0


def _judge(
    name: str, given: Files, journal: Journal, settings: dict[str, Any], again: bool
) -> tuple[Case, bool]:
    """A case, and whether the journal knew it: same files, settings and schema."""
    paths = {key: getattr(given, key) for key in (*_PATHS, *_SCANS)}
    inputs = {key: files.sha256(path) for key, path in paths.items() if path}
    if given.points_frame:
        inputs["points_frame"] = given.points_frame
    elif given.fixed_points:
        inputs["points_frame"] = _FRAME
    key = {"schema": SCHEMA, "settings": settings, "inputs": inputs}
    if settings["l2r"] and (given.landmarks or given.fixed_points):
        key["tre_l2r"] = _TRE_L2R
    known = journal.last(name)
    if not again and known and known.get("report") and known.get("key") == key:
        return Case(name, known["report"]), True
    case = cases.score_case(name, given, **settings)
    journal.add({"id": name, "reason": case.reason, "report": case.report, "key": key})
    return case, False


def _outcome(case: Case, known: bool) -> str:
    """What became of a case, in one line."""
    if case.report is None:
        return f"failed: {case.message}"
    row = cases.metric_row(case.report)
    names = [n for n in ("dsc", "tre_mm", "fold_percent_whole") if n in row]
    text = ", ".join(f"{n} {number(row[n])}" for n in names)
    found = kinds(case.report["warnings"])
    text += f"; warnings: {', '.join(found)}" if found else ""
    return f"{text} (judged before)" if known else text


def read_list(
    path: str | os.PathLike,
    transforms: str | os.PathLike | None = None,
    *,
    roots: list[str] | tuple[str, ...] = (),
) -> dict[str, Files]:
    """Reads which cases are to be judged, and where their transforms lie.

    Args:
        path: CSV or JSON. With `transforms` a list of pairs as unireg_jax.manifest
            reads; without it every case has `id` and `transform`, and may have the
            columns of a pair and `landmarks`. A transform may be "identity".
        transforms: folder of results, see --help; a transform that does not lie there
            fails at its turn.
        roots: further folders that paths may lead into.

    Returns:
        id -> Files.

    Raises:
        UserError: exit code 2 with all faults of the list, 3 when it has no case.
    """
    path, blind = Path(path), []
    if transforms is not None:
        files.check_results(transforms)
        # Labels that `batch` was to warp tell nothing of overlap alone.
        pairs = [
            pair if pair.fixed_label else pair._replace(moving_label=None)
            for pair in manifest.read_cases(path, roots=roots)
        ]
        folder, listed = Path(transforms), {}
        for pair in pairs:
            values = pair._asdict() | {"transform": files.find_result(folder, pair)}
            if not _on_scans(values, blind):
                values |= dict.fromkeys(_SCANS)
            listed[pair.id] = _files(values)
        _tell_blind(blind)
        return listed
    text = manifest.read_text(path, "cases")
    known = (*manifest.Case._fields, *_COLUMNS)
    faults: list[manifest.Fault] = []

    def check(rows: list[manifest.Row], faults: list[manifest.Fault]) -> None:
        manifest.check_columns(rows, ("id", "transform"), known, faults)

    if path.suffix.lower() == ".csv":
        rows = manifest.csv_rows(path.name, text, check)
    else:
        value = manifest.load_json(path.name, text)
        rows = manifest.json_rows(path.name, value, "a list of cases")
    if not rows:
        raise UserError(
            "empty", f"{shown(path.name)}: empty: lists no case; add one", NOTHING
        )
    check(rows, faults)
    manifest.check_ids(rows, faults)
    paths = manifest.Paths(path.parent, roots, False)
    listed = {}
    for where, row in rows:
        names = ("id", "points_frame", *_PATHS)
        values = {name: _cell(where, row, name, faults) for name in names}
        for name in ("id", "transform"):
            if name in row and not values[name]:
                faults.append(("schema", f"{where}: {name}: is empty"))
        if values["id"] and (bad := manifest.bad_id(values["id"])):
            faults.append(("id_invalid", f"{where}: id {values['id'][:60]!r}: {bad}"))
        manifest.check_frame(where, values["points_frame"], faults)
        _check_points(where, values, row, faults)
        for name in _PATHS:
            values[name] = paths.resolve(where, name, values[name], faults)
        if all(row.get(name) for name in _SCANS):
            told: list[manifest.Fault] = []
            for name in _SCANS:
                text = _cell(where, row, name, told)
                values[name] = paths.resolve(where, name, text, told)
            if _on_scans(values, blind):
                faults += told
            else:
                values |= dict.fromkeys(_SCANS)
        listed[values["id"]] = _files(values)
    if faults:
        manifest.refuse(path.name, faults)
    _tell_blind(blind)
    return listed


def _cell(
    where: str, row: Mapping[str, Any], name: str, faults: list[manifest.Fault]
) -> str:
    """Text of a field, or "" after listing what else it is."""
    cell = row.get(name) or ""
    if not isinstance(cell, str):
        got = f"text expected, got {manifest.kind_of(cell)}"
        faults.append(("schema", f"{where}: {name}: {got}"))
        return ""
    return cell.strip()


def _check_points(
    where: str,
    values: Mapping[str, str],
    row: Mapping[str, Any],
    faults: list[manifest.Fault],
) -> None:
    """Lists points of one scan, of two kinds, or in voxels of unknown scans."""
    told = []
    some = any(values[name] for name in _POINTS)
    if some and not all(values[name] for name in _POINTS):
        told.append(f"{' and '.join(_POINTS)} belong together, got one; name both")
    if values["landmarks"] and (some or _in_voxels(values)):
        told.append("landmarks are in LPS mm and stand alone; leave out other points")
    elif some and _in_voxels(values) and not all(row.get(name) for name in _SCANS):
        frame = values["points_frame"]
        told.append(f"points_frame {frame!r} needs the scans; name fixed and moving")
    faults += [("schema", f"{where}: {line}") for line in told]


def _in_voxels(values: Mapping[str, Any]) -> bool:
    return (values["points_frame"] or "lps_mm") != "lps_mm"


def _on_scans(values: Mapping[str, Any], blind: list[str]) -> bool:
    """Whether the voxels of the scans, as stored, give points or a field their place.

    Where scans are away, labels give that of a Learn2Reg field; `blind` gets its id.
    """
    if values["fixed_points"] and _in_voxels(values):
        return True
    try:
        if not files.is_l2r(values["transform"]):
            return False
    except UserError:  # fails at its turn
        return False
    there = all(os.path.exists(values[name] or "") for name in _SCANS)
    if not there and values["fixed_label"]:
        blind.append(values["id"])
    return there or not values["fixed_label"]


def _tell_blind(names: Sequence[str]) -> None:
    if names:
        warn(
            f"{len(names)} cases ({names[0]} first): the scans that are named cannot "
            "be looked at: their Learn2Reg fields are read along the axes of the labels"
        )


def _files(values: Mapping[str, Any]) -> Files:
    names = (*_PATHS, *_SCANS, "points_frame")
    return Files(**{name: values.get(name) or None for name in names})


# --- methods ------------------------------------------------------------------------


def _compare(args: argparse.Namespace) -> int:
    out = Path(args.out) if args.out else None
    if out is not None:
        read = [
            word if args.columns else word.partition("=")[2] for word in args.compare
        ]
        files.spare(read, out, _COMPARISON)
        _refuse_existing(args, out, _COMPARISON)
    methods = _one_table(args) if args.columns else _many_tables(args)
    compared = [
        results.compare_scores(scores, metric) for metric, scores in methods.items()
    ]
    report = {
        "schema": SCHEMA,
        "test": "Wilcoxon signed-rank, two-sided, paired by case; zero differences "
        "dropped; p_holm: Holm over all pairs of methods and all labels of a metric",
        "alpha": comparison.ALPHA,
        "comparisons": compared,
        "definitions": cases.definitions(l2r=True),
    }
    if out is not None:
        texts = {
            "comparison.csv": results.comparison_csv(compared),
            "comparison.json": tables.json_text(report),
            "comparison.tex": results.comparison_latex(compared),
        }
        outputs.make_out(out)
        _write(out, texts)
        progress(args.quiet)(f"done: {shown(out)}")
    _print(args, report, lambda found: results.comparison_text(found["comparisons"]))
    return 0


def _one_table(args: argparse.Namespace) -> dict[str, dict]:
    """Methods are columns of one table."""
    names = [word for given in args.columns for word in given.split(",") if word]
    if len(args.compare) != 1 or len(set(names)) != len(names) or len(names) < 2:
        raise _usage(
            "--columns needs one table and two or more different columns, got "
            f"{len(args.compare)} and {', '.join(names)}"
        )
    if args.metric and len(args.metric) > 1:
        raise _usage("--columns hold one score, got several in --metric; name one")
    columns = results.read_scores(args.compare[0]).columns
    for name in names:
        if name not in columns:
            hint = manifest.nearest(name, list(columns))
            raise _usage(
                f"{shown(args.compare[0])}: no column of scores {name!r}{hint}"
            )
    metric = args.metric[0] if args.metric else "score"
    return {metric: {name: columns[name] for name in names}}


def _many_tables(args: argparse.Namespace) -> dict[str, dict]:
    """Methods are tables; score -> method -> values."""
    found = {}
    for word in args.compare:
        name, equals, path = word.partition("=")
        if not (name and equals and path) or name in found:
            raise _usage(
                f"--compare {word[:60]!r}: NAME=FILE expected, every NAME once; "
                "such as ours=scores/cases.csv"
            )
        path = Path(path)
        if os.path.isdir(path):
            path /= "cases.csv"
        found[name] = results.read_scores(path)
    if len(found) < 2:
        raise _usage("--compare needs two or more NAME=FILE, got one; or --columns")
    if len({scores.labels == ("",) for scores in found.values()}) > 1:
        raise _usage("--compare mixes tables of cases and of labels; name one kind")
    first = next(iter(found.values()))
    common = [n for n in first.columns if all(n in s.columns for s in found.values())]
    if args.metric:
        for name in args.metric:
            if name not in common:
                hint = manifest.nearest(name, common)
                raise _usage(f"--metric {name!r} is not a score of every table{hint}")
        chosen = args.metric
    else:
        known = cases.definitions(l2r=True)
        chosen = [name for name in common if name in known]
    if not chosen:
        raise _usage("--compare: the tables share no known score; name it by --metric")
    return {
        metric: {name: scores.columns[metric] for name, scores in found.items()}
        for metric in chosen
    }


# --- output -------------------------------------------------------------------------


def _refuse_existing(
    args: argparse.Namespace, out: Path, names: tuple[str, ...]
) -> None:
    """Refuses an --out that is no folder or holds tables."""
    outputs.check_out(out)
    there = [name for name in names if os.path.exists(out / name)]
    if there and not args.overwrite:
        raise UserError(
            "storage",
            f"{shown(out / there[0])}: exists; pass --overwrite or another --out",
            USAGE,
        )


def _write(out: Path, texts: Mapping[str, str]) -> None:
    """Each file whole or not at all."""
    for name, text in texts.items():
        with nifti.atomic_path(out / name) as temp:
            temp.write_text(text, encoding="utf-8", newline="")


def _print(
    args: argparse.Namespace,
    report: Mapping[str, Any],
    text: Callable[[Mapping[str, Any]], str],
) -> None:
    """The result on stdout."""
    sys.stdout.write(tables.json_text(report) if args.json else text(report))
    sys.stdout.flush()
