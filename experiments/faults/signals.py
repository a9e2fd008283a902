"""Signals that ask a run to stop, again and again; no step is lost.

    python -m experiments.faults.signals --workdir=DIR --signals=50

SIGTERM, SIGINT, SIGHUP and SIGUSR1 in turn; each at a random moment of the steps, when
a save begins, while the first step is compiled, or in the start.
"""

import random
import re
import signal
import sys
import time
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.faults import victim
from unireg_jax.errors import PREEMPTED

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_AIMS = ("steps", "save", "steps", "save", "compile", "steps", "save", "start")


def campaign(folder: Path, *, signals: int, steps: int, seed: int = 0) -> dict:
    """Runs undisturbed, then with signals.

    Args:
        folder: where data and both runs go.
        signals: how many.
        steps: of the run; the signals must all fall into it.
        seed: of the schedule.

    Returns:
        Counts, and the digests of both ends.
    """
    rng = random.Random(seed)
    data = victim.make_data(folder / "data")
    whole = victim.Victim(folder / "whole", data, train__steps=steps)
    began = time.monotonic()
    whole.finish()
    hurt = victim.Victim(folder / "hurt", data, train__steps=steps)
    counts = {"signals": 0, "exit_75": 0, "before_listening": 0}
    counts |= dict.fromkeys(_AIMS, 0)
    faults: list[str] = []
    slowest = 0.0
    for n in range(signals):
        number, aim = NUMBERS[n % len(NUMBERS)], _AIMS[n % len(_AIMS)]
        before = (hurt.steps.all() or [0])[-1]
        process = hurt.start()
        if not _wait(process, hurt, aim, rng):
            faults.append(f"signal {n}: the run had ended: {process.said()[-300:]}")
            break
        asked = time.monotonic()
        code = process.end(number)
        if aim != "compile":  # which takes as long as it takes
            slowest = max(slowest, time.monotonic() - asked)
        saved = (hurt.steps.all() or [0])[-1]
        counts["signals"] += 1
        counts[aim] += 1
        counts["exit_75"] += code == PREEMPTED
        told = re.findall(r"^step (\d+)/", process.said(), re.M)
        last = int(told[-1]) if told else before
        if code == -number and not told and not process.said():
            counts["before_listening"] += 1  # the interpreter was still importing
        elif code not in (PREEMPTED, 128 + number if not before else PREEMPTED):
            faults.append(f"signal {n}: {aim}: exit code {code}")
        if saved != last:
            faults.append(f"signal {n}: {aim}: step {last} was done, {saved} is saved")
        print(f"signal {n}: {aim}, {code}, step {saved}", file=sys.stderr, flush=True)
    hurt.finish()
    ends = [run.digest() for run in (whole, hurt)]
    if ends[0] != ends[1]:
        faults.append("the ends differ")
    faults += [f"litter: {name}" for name in hurt.litter()]
    return {
        **counts,
        "slowest_s": round(slowest, 1),
        "digest": ends[1],
        "undisturbed": ends[0],
        "seconds": round(time.monotonic() - began),
        "faults": faults,
    }


def _wait(process, run, aim, rng) -> bool:
    """Until the moment that is aimed at; False when the run ended before."""
    if aim == "start":
        time.sleep(rng.uniform(0, 4))
    elif aim == "compile":  # the log is opened just before
        path = run.workdir / "metrics.jsonl"
        before = path.stat().st_atime_ns if path.exists() else 0
        until = time.monotonic() + 60
        while not (path.exists() and path.stat().st_atime_ns != before):
            if process.handle.poll() is not None or time.monotonic() > until:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
    elif not process.wait_for(r"step \d+/"):
        return False
    elif aim == "steps":
        time.sleep(rng.uniform(0, 0.6))
    else:
        until = time.monotonic() + 60
        while not list(run.steps.folder.glob("unfinished-*")):
            if process.handle.poll() is not None or time.monotonic() > until:
                break
        time.sleep(rng.uniform(0, 0.1))
    return process.handle.poll() is None


def main(argv) -> None:
    del argv
    cli.setup()
    given = flags.FLAGS
    folder = Path(given.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    victim.report(
        campaign="signals",
        **campaign(folder, signals=given.signals, steps=given.steps, seed=given.seed),
    )


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("workdir", None, "Folder of the campaign; empty or absent.")
    flags.DEFINE_integer("signals", 50, "Signals.")
    flags.DEFINE_integer("steps", 2000, "Steps of the run.")
    flags.DEFINE_integer("seed", 0, "Of the schedule.")
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
