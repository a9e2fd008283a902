"""`unireg batch`: a list of pairs -> transforms and warped images."""

import argparse
import collections
import contextlib
import hashlib
import importlib
import importlib.util
import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tqdm

from unireg_jax import manifest
from unireg_jax.errors import (
    FAILED,
    NOTHING,
    PARTLY,
    PREEMPTED,
    USAGE,
    UserError,
    of_item,
    on_terminal,
    shown,
)
from unireg_jax.evaluation import tables
from unireg_jax.imaging import nifti
from unireg_jax.locks import lock
from unireg_jax.manifest import Case
from unireg_jax.registration import weights
from unireg_jax.registration.threads import End, in_threads
from unireg_jax.verbs import (
    files,
    journal,
    judging,
    options,
    outputs,
    results,
    versions,
    worker,
)
from unireg_jax.verbs.messages import kinds, one_line, progress, warn

HELP = "a list of pairs -> transforms and warped images"

SCHEMA = 1  # of batch.json
DONE = ("ok", "warn")
# Not done: failed, or refused because other results lie in the way, untouched.
NOT_DONE = ("failed", "refused")
_QC = (
    *("max_mm_network", "p99_mm_network", "fold_percent_network", "sdlogj_network"),
    *("ncc_before", "ncc_after"),
    *judging.COLUMNS,
    *("dsc_before", "dsc_affine", "dsc", "tre_mm_before", "tre_mm"),
)
_COLUMNS = ("id", "status", "reason", "message", "seconds", *_QC, "warnings")
_SAME_S = 1.0  # signals within it are one request: `timeout` sends two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Registers every pair of LIST into OUT/ID, as `register` does one, in one "
        "process with one compiled network; reading and writing overlap with the "
        "device's work. A pair that fails stops no other. OUT/batch.jsonl says what "
        "became of each pair as soon as it is on disk; batch.csv, failed.csv and "
        "batch.json sum up. The same command goes on where an earlier one stopped: "
        "results whose record, inputs, weights, settings and outputs agree stay."
    )
    parser.epilog = "example: unireg batch pairs.csv --out results --task abdomen"
    add = parser.add_argument
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument(
        "list",
        nargs="?",
        default=argparse.SUPPRESS,  # not to undo --manifest
        metavar="LIST",
        help="CSV or JSON: id, fixed, moving[, task, type, fixed_label, ...], or a "
        "Learn2Reg dataset.json; paths relative to it",
    )
    named.add_argument("--manifest", dest="list", metavar="LIST", help="the same")
    add("-o", "--out", required=True, metavar="DIR", help="folder, made if absent")
    results.add_settings(parser, required=False)
    add(
        "--data-root",
        action="append",
        default=[],
        metavar="DIR",
        help="folder that scans may lie in besides the list's; may be repeated",
    )
    add("--strict", action="store_true", help="exit 2 if a listed file is absent")
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave alone only results that agree by content with what would be made "
        "now; do the others again and replace them",
    )
    again.add_argument(
        "--overwrite",
        action="store_true",
        help="do all pairs again, replace results; stopped, the same command goes on",
    )
    add("--fail-fast", action="store_true", help="begin no pair after one that failed")
    add(
        "--dry-run",
        action="store_true",
        help="read all files, say what would be done and what is wrong, write nothing",
    )
    add("--num-parts", type=_whole, default=1, metavar="N", help="share the list by N")
    add(
        "--part-id",
        type=_whole,
        default=0,
        metavar="I",
        help="the share to do, 0 to N-1; pairs are dealt by their ids",
    )
    add("--workers", type=_whole, default=3, metavar="N", help="threads, default 3")
    add(
        "--timeout",
        type=options.weight,
        metavar="S",
        help="seconds for one pair, until it is written; default no limit",
    )
    add("--ray", type=_whole, metavar="N", help="N actors of a Ray cluster do the work")
    parser.set_defaults(redone=frozenset())  # see _redone
    judging.add_arguments(parser)
    options.add_messages(parser)


def _whole(text: str) -> int:
    if not (text.isdecimal() and text.isascii()) or len(text) > 6:
        raise argparse.ArgumentTypeError(f"a whole number expected, got {text[:40]!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    _check(args)
    cases = _cases(args)
    digest = _weights_sha256(args)
    if args.dry_run:
        return _dry_run(args, cases, digest)
    if args.device.startswith("gpu") and not args.ray:  # an actor finds out itself
        options.use_device(args)
    out = Path(args.out)
    with _alone(out, args), _stop_on_signal(args.quiet) as stop:
        outputs.sweep(out, worker.tag(args), whole=args.num_parts == 1)
        book = journal.Journal(out / _journal(args))
        with contextlib.closing(book):
            if args.overwrite:
                _begin_overwrite(args)
            code = _run(args, cases, digest, book, stop)
        if args.ray:  # of actors that died
            outputs.sweep(out, worker.tag(args))
        return code


def _run(args, cases, digest, book, stop) -> int:
    """The pairs, then the tables."""
    started = time.perf_counter()
    counts: collections.Counter = collections.Counter()
    network = any(case.task != manifest.NO_TASK for case in cases)
    register = worker.Worker(args, digest, network=network)
    if args.ray:
        module = importlib.import_module("unireg_jax.verbs.ray_job")
        ends = module.run(args, cases, digest, network=network, stop=stop)
    else:

        def work(case, claim):
            return None if stop.is_set() else register(case, claim)

        waiting = (case for case in cases if not stop.is_set())
        ends = in_threads(waiting, work, workers=args.workers, timeout_s=args.timeout)
    show, broken = _Progress(len(cases), args.quiet), False
    told: set[str] = set()
    bare = 0  # pairs that were there, without the page that is asked for
    with contextlib.closing(ends), contextlib.closing(show):
        for end in ends:
            item = end.value
            if end.timed_out:
                item = _timed_out(args, end, digest)
                item["begun"] = item["id"] in register.begun
            if item is None:
                continue
            kept, begun = item.pop("kept", False), item.pop("begun", True)
            told.add(item["id"])
            if item["status"] == "failed":
                _part_with_earlier(args, item, begun)
            if not (kept and _same(book.last(item["id"]), item)):
                book.add(item)
            counts["skipped" if kept else item["status"]] += 1
            if kept and args.html:
                bare += not Path(args.out, item["id"], outputs.PAGE).is_file()
            show(item, kept)
            if args.fail_fast and item["status"] in NOT_DONE and not stop.is_set():
                broken = True
                stop.set()
    counts["left"] = len(cases) - sum(counts.values())
    seconds = round(time.perf_counter() - started, 3)
    lines = _lines(args, cases, book, told, digest)
    summary = _summarize(args, len(cases), lines, counts, digest, seconds)
    if not counts["left"]:
        try:
            _mark(args).unlink(missing_ok=True)
        except OSError as error:
            raise outputs.storage_fault(_mark(args), error) from error
    _tell(args, summary)
    if bare:
        again = ["unireg", "report", args.out, "--list", args.list]
        again += [word for root in args.data_root for word in ("--data-root", root)]
        if len(cases) > outputs.PAGES:
            again += ["--pages", str(len(cases))]
        if Path(args.out, outputs.INDEX).exists():
            again.append("--overwrite")
        again = shlex.join(map(shown, again))
        warn(f"--html: pairs that were there and have no page: {bare}; {again}")
    code = _exit_code(counts, preempted=stop.is_set() and not broken)
    if code == PREEMPTED:
        progress(args.quiet)("stopped by a signal: the same command goes on")
    return code


def _exit_code(counts: collections.Counter, preempted: bool) -> int:
    if preempted and counts["left"]:
        return PREEMPTED
    if not any(counts[k] for k in NOT_DONE):
        return 0
    return PARTLY if sum(counts[k] for k in (*DONE, "skipped")) else FAILED


# --- before any work ----------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    results.check_settings(args)
    fault = None
    if not 0 <= args.part_id < args.num_parts:
        fault = (
            "--part-id: a number from 0 to --num-parts minus 1 expected, got "
            f"{args.part_id} of {args.num_parts}"
        )
    elif args.workers < 1 or args.ray == 0:
        fault = "--workers and --ray: at least 1 expected, got 0"
    elif args.timeout == 0:
        fault = "--timeout: seconds above 0 expected, got 0; leave it out for no limit"
    elif args.ray and args.timeout:
        fault = "--timeout works in one process only; leave it out with --ray"
    if fault:
        raise UserError("schema", fault, USAGE)
    files.spare([args.list], args.out, (*_tables(args), _journal(args)))
    if args.ray and importlib.util.find_spec("ray") is None:
        raise UserError(
            "not_installed",
            "--ray needs Ray, which is not installed: pip install 'unireg-jax[ray]'",
            USAGE,
        )


def _tables(args: argparse.Namespace) -> tuple[str, str, str]:
    """Names in OUT of the tables of all pairs and of those not done, and the counts."""
    name = worker.run_name(args)
    return f"{name}.csv", f"failed{name.removeprefix('batch')}.csv", f"{name}.json"


def _journal(args: argparse.Namespace) -> str:
    return f"{worker.run_name(args)}.jsonl"


def _cases(args: argparse.Namespace) -> list[Case]:
    """Of this part, each with a task."""
    path = Path(args.list)
    cases = manifest.read_cases(path, roots=args.data_root, strict=args.strict)
    for case in cases:
        outputs.check_free(case.id)
    if not args.task and (lost := [case.id for case in cases if not case.task]):
        named = ", ".join(lost[:5]) + (" ..." if len(lost) > 5 else "")
        raise UserError(
            "task_unknown",
            f"{shown(path.name)}: a task for every pair expected, none for {named}; "
            "pass --task or add a column task",
            USAGE,
        )
    cases = [
        case._replace(task=case.task or args.task, type=case.type or args.type)
        for case in cases
    ]
    mine = [c for c in cases if _part(c.id, args.num_parts) == args.part_id]
    if not mine:
        raise UserError(
            "empty", f"{shown(path.name)}: no pair falls to this part", NOTHING
        )
    return mine


def _part(name: str, parts: int) -> int:
    """Where an id is dealt to: the same on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % parts


def _weights_sha256(args: argparse.Namespace) -> str:
    """Of the network, verified; no JAX is needed."""
    _, spec = weights.load_weights(weights.find_weights(args.weights))
    return spec["sha256"]


@contextlib.contextmanager
def _alone(out: Path, args: argparse.Namespace) -> Iterator[None]:
    """No other run of the same pairs writes to OUT; parts may, side by side."""
    outputs.make_out(out)
    whole = ".unireg-batch.lock"
    with contextlib.ExitStack() as stack:
        shared = args.num_parts > 1
        stack.enter_context(lock(out, whole, shared=shared))
        if shared:
            stack.enter_context(lock(out, f".unireg-{worker.run_name(args)}.lock"))
        yield


def _mark(args: argparse.Namespace) -> Path:
    """Says at which byte of the journal an --overwrite began, until it is through."""
    return Path(args.out, f".unireg-{worker.run_name(args)}.overwrite")


def _begin_overwrite(args: argparse.Namespace) -> None:
    """Goes on with one that was stopped, else marks the beginning of this one."""
    args.redone = _redone(args)
    if _began(args) is None:
        with nifti.atomic_path(_mark(args)) as temp:
            found = Path(args.out, _journal(args)).stat()
            temp.write_text(f"{found.st_size} {found.st_ino}\n")
    elif args.redone:
        warn(
            "going on with an --overwrite that was stopped: pairs that stay if they "
            f"still agree: {len(args.redone)}; remove {shown(_mark(args))} to begin "
            "anew"
        )


def _began(args: argparse.Namespace) -> int | None:
    """Where in this journal a stopped --overwrite began; None: there was none."""
    try:
        since, number = map(int, _mark(args).read_text().split())
        found = Path(args.out, _journal(args)).stat()
    except (OSError, ValueError):
        return None
    same = number == found.st_ino and since <= found.st_size
    return since if same else None


def _redone(args: argparse.Namespace) -> frozenset[str]:
    """Pairs that an --overwrite of this version had done again when it was stopped."""
    since, now = _began(args), versions.version()
    if since is None:
        return frozenset()
    try:
        last = {
            item["id"]: item["status"] in DONE and item["version"] == now
            for item in journal.read(Path(args.out, _journal(args)), since)
        }
    except OSError:  # of a dry run, which opens no journal
        return frozenset()
    return frozenset(name for name, good in last.items() if good)


@contextlib.contextmanager
def _stop_on_signal(quiet: bool) -> Iterator[threading.Event]:
    """The first SIGTERM or SIGINT sets an event; one that comes later acts at once."""
    stop = threading.Event()
    before = {}
    say = progress(quiet)
    asked = None

    def handle(number, frame):
        nonlocal asked
        now = time.monotonic()
        if asked is None:
            asked = now
            stop.set()
            say("stopping: pairs in work are finished; a second signal stops at once")
        elif now - asked > _SAME_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: its owner handles signals
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- ends of pairs -----------------------------------------------------------------


def _timed_out(args, end: End, weights_sha256: str) -> dict[str, Any]:
    return worker.failure(
        args,
        end.item,
        "timeout",
        f"timeout: at most {args.timeout:g} s expected, still at work; raise --timeout "
        "or look at the scans and the disk",
        weights_sha256=weights_sha256,
        settings=results.settings_sha256(args, end.item),
        seconds=args.timeout,
    )


def _part_with_earlier(args, item: dict[str, Any], begun: bool) -> None:
    """Results of before must not look like those of a pair that failed now.

    Those of a pair that was not begun, since a scan could not be read now, stay.
    """
    out, name = Path(args.out), item["id"]
    if not (begun and (args.skip_existing or args.overwrite)):
        if (out / name).is_dir():
            item["message"] += f"; earlier results stay in {shown(name)}"
    elif outputs.set_aside(out, name):
        item["message"] += (
            f"; earlier results are in {outputs.SUPERSEDED}/{shown(name)}"
        )


def _same(known: dict[str, Any] | None, item: dict[str, Any]) -> bool:
    """Whether the journal has it that these results are there."""
    return (
        known is not None
        and known.get("status") in DONE
        and known.get("outputs") == item["outputs"]
    )


# --- for people ---------------------------------------------------------------------


class _Progress:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, total: int, quiet: bool):
        self._say, self._total, self._count = progress(quiet), total, 0
        bar = not quiet and on_terminal()
        self._bar = tqdm.tqdm(total=total, unit="pair", leave=False) if bar else None

    def __call__(self, item: dict[str, Any], kept: bool) -> None:
        self._count += 1
        failed = item["status"] in NOT_DONE
        what = item["message"] if failed else item["status"]
        line = f"{self._count}/{self._total} {item['id']}: {what}"
        line += " (there already)" if kept else f", {item['seconds']:.1f} s"
        if self._bar is None:
            self._say(line)
            return
        self._bar.update()
        if failed:
            self._bar.write(f"unireg: {one_line(line)}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _lines(args, cases, book, told, digest) -> Iterator[dict[str, Any]]:
    """The last of each pair; of earlier runs only such as are of what is asked now."""
    for case in cases:
        item = book.last(case.id)
        if case.id in told or (
            item is not None
            and item["weights"] == digest
            and item["settings"] == results.settings_sha256(args, case)
        ):
            yield item


def _summarize(args, pairs, lines, counts, digest, seconds) -> dict[str, Any]:
    """Writes the tables and batch.json."""
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    reasons: collections.Counter = collections.Counter()
    warnings: collections.Counter = collections.Counter()
    for item in lines:
        qc = item["qc"] or {}
        row = {name: item[name] for name in ("id", "status", "reason", "message")}
        row |= {"seconds": item["seconds"], "warnings": "; ".join(item["warnings"])}
        rows.append(row | {name: qc.get(name) for name in _QC})
        warnings.update(kinds(item["warnings"]))
        if item["status"] in NOT_DONE:
            reasons[item["reason"]] += 1
            failed.append(row)
    table, failures, counted = (Path(args.out, name) for name in _tables(args))
    _write_table(table, _COLUMNS, rows)
    _write_table(failures, ("id", "reason", "message"), failed)
    summary = {
        "schema": SCHEMA,
        "list": Path(args.list).name,
        "part": [args.part_id, args.num_parts],
        "pairs": pairs,
        "done": len(rows) - len(failed),
        "failed": sum(row["status"] == "failed" for row in failed),
        "refused": sum(row["status"] == "refused" for row in failed),
        "left": pairs - len(rows),
        "reasons": dict(sorted(reasons.items())),
        "warnings": dict(sorted(warnings.items())),
        "this_run": {key: counts[key] for key in (*DONE, *NOT_DONE, "skipped", "left")},
        "weights": digest,
        "version": versions.version(),
        "seconds": seconds,
        "peak_mib": versions.peak_mib(),
    }
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    with nifti.atomic_path(counted) as temp:
        temp.write_text(text, encoding="utf-8")
    return summary


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    with nifti.atomic_path(path) as temp:
        temp.write_text(tables.csv_text(columns, rows), encoding="utf-8")


def _tell(args, summary: dict[str, Any]) -> None:
    """The closing lines, and with --json the summary."""
    say = progress(args.quiet)
    for word in ("warnings", "reasons"):
        if summary[word]:
            found = ", ".join(f"{kind} {n}" for kind, n in summary[word].items())
            say(f"{word}: {found}")
    now = summary["this_run"]
    table = Path(args.out, _tables(args)[0])
    say(
        f"{summary['done']} of {summary['pairs']} done ({now['skipped']} of them were "
        f"there), {summary['failed']} failed, {summary['refused']} refused, "
        f"{summary['left']} left, in "
        f"{summary['seconds']:.1f} s: {shown(table)}"
    )
    if args.json:
        sys.stdout.write(json.dumps(summary, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()


# --- dry run ------------------------------------------------------------------------


def _dry_run(args, cases: Sequence[Case], digest: str) -> int:
    """Reads everything and writes nothing; no JAX."""
    known = results.Files(worker.KEEP)
    if args.overwrite:
        args.redone = _redone(args)

    def look(case, claim):
        del claim
        settings = results.settings_sha256(args, case)
        try:
            why, record = worker.standing(args, case, known, digest, settings)
            if why is None and record is not None:
                judging.check_kept(args, record)
                return "keep", "", ""
            if why is not None and not (args.skip_existing or args.overwrite):
                raise worker.in_the_way(why)
            results.check_inverse_fits(args, known.read(case))
        except Exception as any_error:  # a fault of ours too: it stops no other
            error = of_item(any_error)
            facts = dict(weights_sha256=digest, settings=settings, seconds=0.0)
            item = worker.failure(args, case, error.reason, str(error), **facts)
            return "refuse", error.reason, item["message"]
        return ("replace", "", why) if why else ("register", "", "")

    rows = []
    ends = in_threads(cases, look, workers=args.workers, timeout_s=args.timeout)
    for end in ends:
        late = ("refuse", "timeout", "timeout: reading took too long")
        action, reason, message = late if end.timed_out else end.value
        row = {"id": end.item.id, "action": action, "reason": reason}
        rows.append(row | {"message": one_line(message)})
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['id']}  {row['action']}  {row['message']}".rstrip())
    refused = sum(row["action"] == "refuse" for row in rows)
    progress(args.quiet)(f"{len(rows) - refused} of {len(rows)} pairs can be done")
    return 0 if not refused else FAILED if refused == len(rows) else PARTLY
