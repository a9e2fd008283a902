"""Prepares raw scans for training.

    python -m data_pipeline.prepare --manifest scans.csv --out prepared --workers 4
    python -m data_pipeline.prepare --dataset segrap2023 --raw FOLDER --out prepared

Public datasets are read as they are downloaded, see docs/datasets.md. Every scan is
brought to LPS axes and onto the network grid, its labels to the ids of the task's
vocabulary. A scan is skipped when its record says that the same source, labels,
settings and code made the arrays that are there. A bad scan is reported at the end and
does not stop the others. Ctrl-C or SIGTERM end the run in order (exit code 75); the
same command goes on where it stopped.
"""

import argparse
import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import tqdm

from data_pipeline import parallel, sources, store
from data_pipeline.datasets import DATASETS, manifest
from data_pipeline.datasets.manifest import Collection, Record
from data_pipeline.pairs import SPLITS, make_pairs
from unireg_jax.errors import (
    FAILED,
    PARTLY,
    PREEMPTED,
    STORAGE,
    USAGE,
    UserError,
    on_terminal,
    tell,
)
from unireg_jax.imaging import nifti, points, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.tasks import TASKS, PairType

# Raise it when the same source would now give other arrays: everything is made again.
CODE_VERSION = 3

_Result = dict[str, Any]


class Job(NamedTuple):
    """One scan to prepare, everything a worker needs.

    Attributes:
        record: from the manifest.
        root: the prepared folder.
        spec: network grid and HU range.
        label_names: the task's vocabulary.
    """

    record: Record
    root: str
    spec: PreprocessSpec
    label_names: tuple[str, ...]


def prepare_volume(job: Job) -> _Result:
    """Prepares one scan, or finds that it is prepared already.

    Args:
        job: see Job.

    Returns:
        {"id", "status": "done" | "skipped", "entry": the index's entry}.

    Raises:
        UserError: the scan or its labels cannot be used; exit code 6 when the folder
            cannot be written.
    """
    record, root = job.record, Path(job.root)
    source = _read(_source, job)
    path = root / store.RECORDS_NAME / f"{record.id}.json"
    old = _read_record(path)
    if old is not None and old["source"] == source and _intact(root, old):
        entry = {**old, **_named(record)}
        return {"id": record.id, "status": "skipped", "entry": entry}
    image = _read(sources.read_scan, record)
    grid = preprocess.network_grid(image, job.spec)
    hu = preprocess.prepare_image(image, grid, job.spec)
    layers, more = _read(sources.read_layers, record, image, job.label_names)
    warnings = [*image.warnings, *more]
    labels, overlaps, roi = None, [], None
    if layers is not None:
        labels, *overlaps = (_on_grid(image, layer, grid) for layer in layers)
        overlaps = [layer for layer in overlaps if layer.any()]
        if not labels.any():
            warnings.append("label_set: no structure of the label map is in the volume")
    if record.roi is not None:
        marked = _read(sources.read_mask, record.roi, image, warnings)
        roi = _on_grid(image, marked.astype(np.uint8), grid)
    entry = {
        **_named(record),
        **store.write_volume(
            root,
            record.id,
            hu,
            labels,
            overlaps=np.stack(overlaps) if overlaps else None,
            roi=roi,
            points=_read(sources.read_points, record, image),
        ),
        "vox2world": grid.vox2world.tolist(),
        "source": source,
        "warnings": list(dict.fromkeys(warnings)),  # masks repeat themselves
    }
    store.write_json(path, entry)
    return {"id": record.id, "status": "done", "entry": entry}


def _on_grid(image: Volume, data: np.ndarray, grid: preprocess.Grid) -> np.ndarray:
    """An array on the image's own voxels, brought onto the network grid."""
    return preprocess.prepare_labels(image._replace(data=data), grid)


def prepare(
    records: Sequence[Record],
    out: Path | str,
    spec: PreprocessSpec,
    *,
    pairs: Sequence[tuple[str, str]] = (),
    workers: int = 1,
    report: Callable[[_Result], None] = lambda result: None,
) -> dict[str, Any]:
    """Prepares all scans of a manifest or folder and writes the index.

    Args:
        records: from `manifest.collect` or an adapter.
        out: the prepared folder; made if absent.
        spec: network grid and HU range.
        pairs: ordered (fixed id, moving id), see `manifest.Collection`.
        workers: processes; 1 works in this one.
        report: called with every result: "done", "skipped" or "failed".

    Returns:
        The index as written: failed scans are under "failed" with reason and message;
        one that the disk refuses now and that was prepared before stays, too.

    Raises:
        UserError: exit code 6 when the folder cannot be written, 2 when another run
            holds it. KeyboardInterrupt passes through; what is done stays done, and the
            index is written by the run that ends.
    """
    out = store.make_folders(out, store.VOLUMES_NAME, store.RECORDS_NAME)
    names = manifest.vocabulary(records)
    jobs = [Job(r, str(out), spec, names[r.task]) for r in records]
    results: dict[str, _Result] = {}
    with store.lock(out):
        _sweep(out)
        for result in parallel.run(_guarded, jobs, workers, died=_died):
            if result["status"] == "fatal":
                raise UserError(result["reason"], result["message"], STORAGE)
            results[result["id"]] = result
            report(result)
        index = _index(records, results, spec, names)
        if listed := _by_task(records, pairs):
            index["pairs"] = listed
        if index["volumes"]:
            _write_points(out, index)
            store.write_index(out, index)
    return index


def _index(
    records: Sequence[Record],
    results: Mapping[str, _Result],
    spec: PreprocessSpec,
    names: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    """The index, volumes in the order of the manifest."""
    done = [results[record.id] for record in records]
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.subject, set()).add(record.split)
    return {
        "version": store.INDEX_VERSION,
        "spec": spec.to_json(),
        "tasks": {task: {"labels": list(found)} for task, found in names.items()},
        "volumes": [r["entry"] for r in done if "entry" in r],
        "failed": [
            {key: r[key] for key in ("id", "reason", "message")}
            for r in done
            if r["status"] == "failed"
        ],
        # The manifest's reader has refused leaks unless they were allowed.
        "allow_leak": any(len(found) > 1 for found in splits.values()),
    }


def _by_task(
    records: Sequence[Record], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, list[list[str]]]]:
    """Listed pairs by task and split."""
    known = {record.id: record for record in records}
    found: dict[str, dict[str, list[list[str]]]] = {}
    for fixed, moving in pairs:
        record = known[fixed]
        splits = found.setdefault(record.task, {})
        splits.setdefault(record.split, []).append([fixed, moving])
    return found


def _write_points(out: Path, index: dict[str, Any]) -> None:
    """Landmark tables of all pairs that have them; counts that differ warn."""
    volumes = index["volumes"]
    folder, written = out / store.POINTS_NAME, set()
    if any("points" in volume for volume in volumes):
        store.make_folders(folder)
    for pair in (p for split in SPLITS for p in make_pairs(index, split)):
        fixed, moving = volumes[pair.fixed], volumes[pair.moving]
        if "points" not in fixed or "points" not in moving:
            continue
        a, b = (store.read_array(out, v, "points") for v in (fixed, moving))
        if len(a) != len(b):
            got = f"{len(a)} and {len(b)} points of {fixed['id']} and {moving['id']}"
            index.setdefault("warnings", []).append(f"points: {got} do not correspond")
            continue
        name = f"{fixed['id']}__{moving['id']}.csv"
        if name in written:  # of ids that hold two underscores themselves
            line = f"points: {name} is of another pair already: rename an id"
            index.setdefault("warnings", []).append(line)
            continue
        names = [str(i) for i in range(1, len(a) + 1)]
        table = points.PointPairs(names, a, b)
        points.write_points(folder / name, table)
        written.add(name)
    for path in folder.glob("*__*.csv"):  # of an earlier run
        if path.name not in written:
            store.remove(path)


# --- one scan ---


def _read(reader: Callable[..., Any], *args: Any) -> Any:
    """As `reader`; what the disk refuses of a scan does not end the run, as 6 would."""
    try:
        return reader(*args)
    except UserError as error:
        raise UserError(error.reason, str(error)) from error


def _named(record: Record) -> dict[str, Any]:
    """What the manifest says of a scan, without its paths."""
    return {
        "id": record.id,
        "task": record.task,
        "subject": record.subject,
        "split": record.split,
        "group": record.group,
    }


def _source(job: Job) -> dict[str, Any]:
    """Everything that determines the arrays, as digests."""
    return {"sha256": sources.digests(job.record), **_settings(job)}


def _settings(job: Job) -> dict[str, Any]:
    record = job.record
    table = [[raw_id, name] for raw_id, name in record.label_map or ()]
    names = job.label_names if record.labels or record.masks else []
    text = json.dumps([table, names])
    return {
        "label_map": hashlib.sha256(text.encode()).hexdigest()[:16],
        "spec": job.spec.to_json(),
        "code": CODE_VERSION,
    }


def _read_record(path: Path) -> dict[str, Any] | None:
    """A scan's record of an earlier run; None when there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"source", "sha256", "image", "labels", "vox2world", "warnings"}
        return record if wanted <= set(record) else None
    except (OSError, ValueError, TypeError):
        return None


def _intact(root: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the arrays on disk are those of the record."""
    try:
        return all(
            store.file_sha256(root / entry[kind]) == digest
            for kind, digest in entry["sha256"].items()
        )
    except (OSError, TypeError):
        return False


# --- all scans ---


def _guarded(job: Job) -> _Result:
    """As prepare_volume; a fault becomes a result, which can leave a worker."""
    try:
        return prepare_volume(job)
    except UserError as error:
        result = _failure(job, error.reason, str(error))
        if error.exit_code == STORAGE:  # nothing more can be written: the run ends
            return {**result, "status": "fatal"}
        if error.reason == "storage":
            return result | _kept(job)
        return result
    except MemoryError:
        return _failure(job, "out_of_memory", f"{job.record.id}: not enough memory")
    except Exception as error:  # a fault of ours: named, and the others still done
        return _failure(job, "internal", f"{type(error).__name__}: {error}")


def _kept(job: Job) -> _Result:
    """The entry of before of a scan that the disk refuses now; {} without one.

    A share that went away must not take prepared scans out of the index.
    """
    root, record = Path(job.root), job.record
    old = _read_record(root / store.RECORDS_NAME / f"{record.id}.json")
    if old is None or not _intact(root, old):
        return {}
    asked = _settings(job)
    same = all(old["source"].get(key) == value for key, value in asked.items())
    return {"entry": {**old, **_named(record)}} if same else {}


def _failure(job: Job, reason: str, message: str) -> _Result:
    return {
        "id": job.record.id,
        "status": "failed",
        "reason": reason,
        "message": " ".join(message.split()),
    }


def _died(job: Job) -> _Result:
    """What is said of a scan whose worker was killed."""
    return _failure(
        job,
        "worker_died",
        f"{job.record.id}: the worker process was killed, often for memory; "
        "run again with fewer --workers",
    )


def _sweep(out: Path) -> None:
    """Removes what killed runs left under temporary names."""
    for folder in (out, out / store.VOLUMES_NAME, out / store.RECORDS_NAME):
        for path in folder.glob(".unireg-*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()


# --- command ---


class _Progress:
    """A bar on a terminal, about twenty lines elsewhere; both on stderr."""

    def __init__(self, total: int):
        self._total, self._counts = total, {"done": 0, "skipped": 0, "failed": 0}
        self._every = max(1, math.ceil(total / 20))
        self._bar = None
        if on_terminal():
            self._bar = tqdm.tqdm(total=total, unit="scan", desc="prepare")

    def __call__(self, result: _Result) -> None:
        self._counts[result["status"]] += 1
        seen = sum(self._counts.values())
        counts = ", ".join(f"{n} {word}" for word, n in self._counts.items())
        if self._bar is not None:
            self._bar.set_postfix_str(counts, refresh=False)
            self._bar.update()
        elif seen % self._every == 0 or seen == self._total:
            tell(f"prepare: {seen}/{self._total}: {counts}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def grid_arguments(
    parser: argparse.ArgumentParser,
    *,
    shape: str = "192,192,160",
    spacing_mm: str = "2",
) -> None:
    """Adds --shape and --spacing.

    Args:
        parser: to be extended.
        shape: default; the published grid.
        spacing_mm: default, mm.
    """
    parser.add_argument(
        "--shape",
        type=_sizes,
        default=shape,
        metavar="X,Y,Z",
        help=f"voxels of the grid (default: {shape})",
    )
    parser.add_argument(
        "--spacing",
        type=_lengths,
        default=spacing_mm,
        metavar="MM",
        help=f"voxel edge lengths in mm, one or X,Y,Z (default: {spacing_mm})",
    )


def _sizes(text: str) -> tuple[int, ...]:
    return _numbers(text, int, above=1)


def _lengths(text: str) -> tuple[float, ...]:
    return _numbers(text, float)


def _numbers(text: str, kind: type, *, above: int = 0) -> tuple:
    """One or three numbers above a limit; argparse reports anything else."""
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or not all(above < v < math.inf for v in values):
        raise argparse.ArgumentTypeError(
            f"one or three numbers above {above}, got {text!r}"
        )
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare", description=__doc__.split("\n\n")[2]
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source_arguments(source, parser)
    parser.add_argument(
        "--task",
        choices=tuple(TASKS),
        help="what to train on it; only for --dataset nnunet",
    )
    parser.add_argument("--out", required=True, help="folder for the prepared data")
    grid_arguments(parser)
    parser.add_argument(
        "--workers", type=int, default=1, help="processes (default: 1)", metavar="N"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at once if a listed file is absent"
    )
    parser.add_argument(
        "--allow-leak", action="store_true", help="accept a subject in two splits"
    )
    return parser


def _summary(index: dict[str, Any]) -> int:
    """Prints what happened and gives the exit code."""
    lines = [f"{v['id']}: {line}" for v in index["volumes"] for line in v["warnings"]]
    for line in lines + index.get("warnings", []) + _pair_warnings(index):
        tell(f"warning: {line}")
    for item in index["failed"]:
        line = f"failed: {item['id']} ({item['reason']}): {item['message']}"
        tell(line)
    done, failed = len(index["volumes"]), len(index["failed"])
    tell(f"{done} of {done + failed} scans prepared")
    if not failed:
        return 0
    return PARTLY if done else FAILED


def _pair_warnings(index: dict[str, Any]) -> list[str]:
    """Splits of a task that hold scans but no pair."""
    lines = []
    for split in SPLITS:
        tasks = {v["task"] for v in index["volumes"] if v["split"] == split}
        tasks -= {pair.task for pair in make_pairs(index, split)}
        text = f"split {split} has scans but no pair"
        lines += [f"{task}: {text}" for task in sorted(tasks)]
    return lines


def source_arguments(source: Any, parser: argparse.ArgumentParser) -> None:
    """Adds --manifest or --dataset, --raw and --data-root.

    Args:
        source: a required, mutually exclusive group of the parser.
        parser: to be extended.
    """
    source.add_argument("--manifest", help="CSV or JSON list of scans")
    source.add_argument(
        "--dataset", choices=tuple(DATASETS), help="layout of the folder --raw"
    )
    parser.add_argument("--raw", metavar="DIR", help="folder of --dataset, as unpacked")
    parser.add_argument(
        "--data-root",
        action="append",
        default=[],
        metavar="DIR",
        help="folder that scans may lie in, besides the manifest's own; repeatable",
    )


def read_source(options: argparse.Namespace) -> Collection:
    """Lists the scans that --manifest names or that lie in --raw.

    Args:
        options: manifest, dataset, raw, data_root, task, strict, allow_leak.

    Returns:
        Collection.

    Raises:
        UserError: see `manifest.collect`; exit code 2 for options that do not fit.
    """
    checks = dict(strict=options.strict, allow_leak=options.allow_leak)
    if options.manifest:
        if options.raw or options.task:
            lone = "--raw" if options.raw else "--task"
            _refuse(f"{lone} goes with --dataset; the manifest names scans and tasks")
        return manifest.collect(options.manifest, roots=options.data_root, **checks)
    if not options.raw:
        _refuse(f"--dataset {options.dataset} needs --raw, the folder as unpacked")
    if options.data_root:
        _refuse("--data-root goes with --manifest; --raw is searched as it is")
    found = DATASETS[options.dataset](Path(options.raw))
    open_task = [not record.task for record in found.records]
    if any(open_task) and not options.task:
        known = ", ".join(TASKS)
        _refuse(f"--dataset {options.dataset} needs --task, one of {known}")
    if options.task and not any(open_task):
        _refuse(f"--dataset {options.dataset} has its own task; leave --task out")
    if options.task:
        if TASKS[options.task].pair_type == PairType.INTRA:
            _refuse(
                f"--task {options.task} pairs scans of one patient, which the folder "
                "does not tell; write a manifest with subjects"
            )
        records = [record._replace(task=options.task) for record in found.records]
        found = found._replace(records=records)
    return manifest.check(found, nifti.shown(options.raw), **checks)


def _refuse(line: str) -> NoReturn:
    raise UserError("schema", line, USAGE)


def _check_out(options: argparse.Namespace) -> None:
    """Refuses to write among the raw scans."""
    out = Path(options.out).resolve()
    if options.manifest:
        raw, among = Path(options.manifest).resolve().parent, False
    else:
        raw = Path(options.raw).resolve()
        among = raw in out.parents
    if out == raw or among:
        where = "the manifest's own folder" if options.manifest else "--raw"
        _refuse(
            f"--out: a folder apart from the raw scans expected, got {where}, or one "
            "inside; give another"
        )


def _run_command(options: argparse.Namespace) -> int:
    records, pairs, notes = read_source(options)
    _check_out(options)
    for line in notes:
        tell(f"note: {line}")
    spec = PreprocessSpec(shape=options.shape, spacing_mm=options.spacing)
    progress = _Progress(len(records))
    try:
        index = prepare(
            records,
            options.out,
            spec,
            pairs=pairs,
            workers=options.workers,
            report=progress,
        )
    finally:
        progress.close()
    return _summary(index)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: 0, 2 (manifest or usage), 3 (nothing to do), 4 (all failed), 5 (some
        failed), 6 (storage), 75 (interrupted).
    """
    options = _parser().parse_args(argv)
    try:
        with parallel.terminable():
            return _run_command(options)
    except UserError as error:
        tell(f"error: {error.reason}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted: run the same command to go on")
        return PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
