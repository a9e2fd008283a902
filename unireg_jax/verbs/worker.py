"""One pair of `unireg batch`, from its files to a line of the journal."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unireg_jax import registration
from unireg_jax.errors import CHECKPOINT, USAGE, UserError, shown
from unireg_jax.locks import no_link
from unireg_jax.manifest import PATHS, Case
from unireg_jax.registration.kept import Kept
from unireg_jax.registration.threads import GivenUp
from unireg_jax.verbs import judging, options, outputs, results, versions
from unireg_jax.verbs.messages import one_line, warn

SCHEMA = 1  # of a line of the journal
KEEP = 4  # scans remembered
# Before the inputs are read these say nothing of them: a scan that is away may come
# back, and neither a fault of ours nor a lack of memory is one of theirs.
_AWAY = ("not_found", "permission", "storage", "internal", "out_of_memory")


def run_name(args: argparse.Namespace) -> str:
    """Says what the files of this run are called in OUT."""
    if args.num_parts == 1:
        return "batch"
    return f"batch-{args.part_id}-of-{args.num_parts}"


def tag(args: argparse.Namespace) -> str:
    """Marks the run's temporary folders."""
    return f"{run_name(args)}-"


# --- one pair -----------------------------------------------------------------------


class Worker:
    """Registers one pair after the other; for several threads of one process.

    The network is loaded and compiled when the first pair needs it.
    """

    def __init__(
        self, args: argparse.Namespace, weights_sha256: str, *, network: bool = True
    ):
        """Takes the arguments of the verb.

        Args:
            args: of `add_arguments`.
            weights_sha256: of the network.
            network: False if every pair's task is "none".
        """
        self._args, self._weights, self._network = args, weights_sha256, network
        self._out = Path(args.out)
        self._files, self._sessions = results.Files(KEEP), Kept(1)
        # Cases whose inputs were read: results of before do not stand if they fail.
        self.begun: set[str] = set()

    def __call__(
        self, case: Case, claim: Callable[[], None] = lambda: None
    ) -> dict[str, Any] | None:
        """Registers a pair, unless its results are there.

        Args:
            case: the pair.
            claim: called before results appear.

        Returns:
            A line for the journal, with `kept` if the results were there and `begun`
            of one that failed; None when `claim` raised GivenUp.

        Raises:
            UserError: weights that cannot be used, exit code 9; `device` that is not
                there, exit code 2.
        """
        started = time.perf_counter()
        try:
            record, kept = self._record(case, claim)
        except GivenUp:
            return None
        except UserError as error:
            if error.exit_code == CHECKPOINT or error.reason == "device":
                raise  # of the run, not of this pair
            reason, message = error.reason, str(error)
        except Exception as error:  # of one pair, which stops no other
            reason, message = self._explain(case, error)
        else:
            return line_of(record, self._out) | ({"kept": True} if kept else {})
        settings = results.settings_sha256(self._args, case)
        return failure(
            self._args,
            case,
            reason,
            message,
            weights_sha256=self._weights,
            settings=settings,
            seconds=time.perf_counter() - started,
        ) | {"begun": case.id in self.begun or reason not in _AWAY}

    def _record(self, case: Case, claim) -> tuple[dict[str, Any], bool]:
        """Of results that are there, or that are made now."""
        args = self._args
        settings = results.settings_sha256(args, case)
        why, record = standing(args, case, self._files, self._weights, settings)
        if why is None and record is not None:
            judging.check_kept(args, record)
            return record, True
        if why is not None and not (args.skip_existing or args.overwrite):
            raise in_the_way(why)
        clock = registration.Clock()
        replace = args.skip_existing or args.overwrite
        with outputs.case_folder(
            self._out, case.id, replace, tag=tag(args), claim=claim
        ) as folder:
            inputs = self._files.read(case)
            results.check_inverse_fits(args, inputs)
            self.begun.add(case.id)
            clock.lap("read")
            session = self._sessions.get(0, self._load)
            clock.lap("load")  # of the first pair alone
            affine = args.affine if inputs.init is None else inputs.init
            asked = registration.check_settings(case.task, case.type, affine)
            result = session.run(
                inputs.fixed,
                inputs.moving,
                asked,
                affine=affine,
                mask=inputs.mask,
                clock=clock,
            )
            record = results.write(
                *(folder, inputs, result, session.model, settings),
                inverse=args.write_inverse,
            )
            clock.lap("write")
            judging.finish(args, folder, record, inputs, result)
            clock.lap("judge")
            record["timings"] = clock.seconds()
            results.seal(folder, record)
            judging.hold_back(args, folder, record, tag=tag(args), claim=claim)
        return record, False

    def _load(self):
        """JAX, the model and its compiled programs."""
        options.use_device(self._args)
        if registration.use_compilation_cache() is None:
            warn("no folder of yours for compiled programs: set UNIREG_CACHE")
        model = registration.load_model(self._args.weights)
        if (got := model.spec["sha256"]) != self._weights:
            raise UserError(
                "checkpoint_changed",
                f"checkpoint_changed: weights of SHA-256 {self._weights[:16]}... "
                f"expected, as this run began with, got {got[:16]}...; have the same "
                "file on every machine and leave it alone while the run lasts",
                CHECKPOINT,
            )
        return registration.Session(
            model,
            keep=KEEP,
            network=self._network,
            **results.session_settings(self._args),
        )

    def _explain(self, case: Case, error: Exception) -> tuple[str, str]:
        """Reason and message of what is no UserError."""
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return "out_of_memory", (
                "out_of_memory: more is needed than there is; crop the scans, take "
                "fewer --workers or a larger machine"
            )
        trace = "".join(traceback.format_exception(error))
        log = self._out / f"{run_name(self._args)}.log"
        with (
            contextlib.suppress(OSError),
            open(log, "a", encoding="utf-8", opener=no_link) as file,
        ):
            file.write(f"{case.id}\n{trace}\n")
        if self._args.debug:
            sys.stderr.write(trace)
        return "internal", (
            f"internal: {type(error).__name__}, a fault of this program; trace in "
            f"{log.name}; please report it"
        )


def standing(
    args: argparse.Namespace,
    case: Case,
    files: results.Files,
    weights_sha256: str,
    settings: str,
) -> tuple[str | None, dict[str, Any] | None]:
    """Says what is in a case's folder.

    Args:
        args: of the verb.
        case: the pair.
        files: to digest inputs.
        weights_sha256: of the network.
        settings: from `results.settings_sha256`.

    Returns:
        (None, None) when there is nothing; (None, record) of results that may stay;
        (why, ...) of results that do not agree, or are to be done again.

    Raises:
        UserError: an input that cannot be read.
    """
    folder = Path(args.out) / case.id
    if not os.path.lexists(folder):
        return None, None
    if args.overwrite and case.id not in args.redone:
        return "--overwrite", None
    return results.disagreement(
        folder, case, files, weights_sha256=weights_sha256, settings=settings
    )


def in_the_way(why: str) -> UserError:
    """Makes the UserError of results that do not agree."""
    return UserError(
        "id_duplicate",
        "id_duplicate: results that agree with what would be made now expected, or "
        f"none, got {why}; they stay as they are: pass --skip-existing to replace such "
        "results, or another --out",
        USAGE,
    )


# --- lines of the journal -----------------------------------------------------------


def failure(
    args: argparse.Namespace,
    case: Case,
    reason: str,
    message: str,
    *,
    weights_sha256: str,
    settings: str,
    seconds: float,
) -> dict[str, Any]:
    """Makes the line of a pair that failed, or was refused: others are in the way.

    Args:
        args: of the verb.
        case: the pair.
        reason: code of docs/errors.md.
        message: one line; folders in it are left out.
        weights_sha256: of the network.
        settings: from `results.settings_sha256`.
        seconds: spent on it.

    Returns:
        A line for the journal.
    """
    for name in PATHS:
        if path := getattr(case, name):
            message = message.replace(shown(path), shown(Path(path).name))
    message = message.replace(f"{shown(Path(args.out))}/", "")
    return {
        "schema": SCHEMA,
        "id": case.id,
        "status": "refused" if reason == "id_duplicate" else "failed",
        "reason": reason,
        "message": one_line(message),
        "warnings": [],
        "inputs": {},
        "weights": weights_sha256,
        "settings": settings,
        "version": versions.version(),
        "device": None,
        "seconds": round(seconds, 3),
        "peak_mib": versions.peak_mib(),
        "outputs": {},
        "qc": None,
    }


def line_of(record: dict[str, Any], out: Path) -> dict[str, Any]:
    """The line of a pair that was done, from its record."""
    case = record["case"]
    digests = ("sha256", "bytes")
    run = outputs.digest(out / case / f"{case}_run.json")
    made = {**record["outputs"], f"{case}_run.json": run}
    qc = dict(record["qc"])
    qc |= {name: record["quality"].get(name) for name in judging.COLUMNS}
    if record.get("scores"):
        qc |= record["scores"]["mean"]
        rows = record["scores"]["labels"].values()
        qc["dsc_undefined"] = sum(row.get("dsc") is None for row in rows)
    if record.get("landmarks"):
        qc |= {name: record["landmarks"][name] for name in ("tre_mm_before", "tre_mm")}
    return {
        "schema": SCHEMA,
        "id": case,
        "status": record["status"],
        "reason": None,
        "message": None,
        "warnings": record["warnings"],
        "inputs": {
            name: {key: entry[key] for key in digests}
            for name, entry in record["inputs"].items()
        },
        "weights": record["weights"]["sha256"],
        "settings": record["settings_sha256"],
        "version": record["versions"]["unireg"],
        "device": record["device"],
        "seconds": record["timings"]["total"],
        "peak_mib": record["peak_mib"],
        "outputs": {f"{case}/{name}": digest for name, digest in made.items()},
        "qc": qc,
    }
