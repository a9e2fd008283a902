"""Signals that ask a run to stop, again and again; no step is lost.

    python -m experiments.faults.signals --workdir=DIR --signals=50

SIGTERM, SIGINT, SIGHUP and SIGUSR1 in turn; each at a random moment of the steps, when
a save begins, while the first step is compiled, or in the start: there the interpreter
may still be importing, and nobody listens yet. Linux. The same command goes on where an
interrupted campaign stopped.
"""

import collections
import contextlib
import os
import random
import signal
import time
from pathlib import Path

from experiments.faults import victim
from unireg_jax.errors import PREEMPTED
from unireg_jax.training import log

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_AIMS = ("steps", "save", "steps", "save", "compile", "steps", "save", "start")
_AHEAD = 6  # steps at most that are waited for


def campaign(folder: Path, *, signals: int, steps: int, seed: int = 0) -> dict:
    """Runs with signals, then undisturbed.

    Args:
        folder: where data and both runs go.
        signals: how many.
        steps: of the run; the signals must all fall into it, at about 7 steps each.
        seed: of the schedule.

    Returns:
        Counts, and the digests of both ends.
    """
    began = time.monotonic()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the run would ignore it
    data = victim.make_data(folder / "data")
    hurt = victim.Victim(folder / "hurt", data, train__steps=steps)
    path = folder / "signals.jsonl"
    rows = victim.known_rows(path)
    while len(rows) < signals and not (rows and rows[-1]["fault"]):
        row = _stop_once(hurt, len(rows), seed)
        rows.append(row)
        victim.add_row(path, row)
    faults = [f"signal {n}: {row['fault']}" for n, row in enumerate(rows, 1)]
    faults = [text for text, row in zip(faults, rows, strict=True) if row["fault"]]
    hurt.finish()
    whole = victim.Victim(folder / "whole", data, train__steps=steps)
    whole.make()
    ends = [run.digest() for run in (whole, hurt)]
    if ends[0] != ends[1]:
        faults.append("the ends differ")
    faults += [f"litter: {name}" for name in hurt.litter()]
    met = collections.Counter(row["aim"] for row in rows)
    return {
        "signals": len(rows),
        **{f"in_{aim}": met[aim] for aim in dict.fromkeys(_AIMS)},
        "exit_75": sum(row["code"] == PREEMPTED for row in rows),
        "while_importing": sum(row["importing"] for row in rows),
        "slowest_s": max(row["seconds"] for row in rows),
        "steps_lost": sum(row["lost"] for row in rows),
        "digest": ends[1],
        "undisturbed": ends[0],
        "seconds": round(time.monotonic() - began),
        "faults": faults,
    }


def _stop_once(run: victim.Victim, n: int, seed: int) -> dict:
    """Starts the run and sends it a signal; what came of it."""
    rng = random.Random(f"{seed} {n}")
    number, aim = NUMBERS[n % len(NUMBERS)], _AIMS[n % len(_AIMS)]
    before = (run.steps.all() or [0])[-1]
    process = run.start()
    if aim == "start":
        time.sleep(rng.uniform(0, 5))
    elif aim == "compile":
        process.wait_until(lambda: _opened_log(run.workdir, process.handle.pid))
        time.sleep(rng.uniform(0, 1))
    elif aim == "save":
        process.wait_for(r"step \d+/")
        process.wait_until(lambda: any(run.steps.folder.glob("unfinished-*")))
        time.sleep(rng.uniform(0, 0.1))
    else:
        process.wait_for(rf"(step \d+/.*\n){{{rng.randint(1, _AHEAD)}}}")
        time.sleep(rng.uniform(0, 0.05))
    fault = "" if process.handle.poll() is None else "the run had ended"
    asked = time.monotonic()
    code = process.end(number)
    seconds = time.monotonic() - asked
    last = process.last_step() or before
    saved = (run.steps.all() or [0])[-1]
    importing = code == -number and not process.said()
    if not importing and code != (PREEMPTED if saved else 128 + number):
        fault = fault or f"{aim}: exit code {code}"
    if saved != last:
        fault = fault or f"{aim}: step {last} was done, {saved} is saved"
    return {
        "aim": aim,
        "signal": signal.Signals(number).name,
        "code": code,
        "importing": importing,
        "saved": saved,
        "lost": last - saved,
        "seconds": round(seconds, 1),
        "fault": fault,
    }


def _opened_log(workdir: Path, process: int) -> bool:
    """Whether the process has its log open, which is just before it compiles."""
    wanted = str(workdir / log.NAME)
    with contextlib.suppress(OSError):
        links = Path(f"/proc/{process}/fd").iterdir()
        return any(os.readlink(link) == wanted for link in links)
    return False


if __name__ == "__main__":
    victim.main(
        "signals",
        campaign,
        signals=(50, "Signals."),
        steps=(500, "Steps of the run."),
        seed=(0, "Of the schedule."),
    )
