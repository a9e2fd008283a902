"""SIGKILL again and again in one logical run, which then ends as if undisturbed.

    python -m experiments.faults.kills --workdir=DIR --kills=100 --deletions=12

Three aims: a random moment of the start; the first save of a start or a later one, up
to 100 ms after its folder has appeared; a random moment of the steps. What was met is
told by what lies on the disk. The deletion of an old step takes a millisecond that no
chance would meet: there the C library kills the process, before its first call on the
step (the new step counts, the old one is still there), its second and so on; this needs
a C compiler (fail_calls.c).
The campaign itself may be interrupted: the same command goes on with the next kill.
"""

import collections
import random
import signal
import time
from pathlib import Path

from experiments.faults import victim

_AIMS = ("start", *("save", "steps") * 3, *("save",) * 3)  # of ten kills
_AHEAD = 6  # steps at most that are waited for
_DELETION = 24  # calls of a deletion, about


def campaign(
    folder: Path, *, kills: int, steps: int, deletions: int = 0, seed: int = 0
) -> dict:
    """Runs with kills, then undisturbed.

    Args:
        folder: where data and both runs go.
        kills: how many at random moments.
        deletions: how many more within deletions.
        steps: of the run; the kills must all fall into it, at about 8 steps each.
        seed: of the schedule.

    Returns:
        Counts, and the digests of both ends.
    """
    began = time.monotonic()
    data = victim.make_data(folder / "data")
    hurt = victim.Victim(folder / "hurt", data, train__steps=steps)
    path = folder / "kills.jsonl"
    rows = victim.known_rows(path)
    library = victim.compile_library(folder) if deletions else None
    while len(rows) < kills + deletions:
        if rows and rows[-1]["met"] == "nothing":
            break
        if len(rows) < kills:
            row = _kill_once(hurt, len(rows), rows, seed)
        else:
            row = _kill_in_deletion(hurt, library, len(rows) - kills)
        rows.append(row)
        victim.add_row(path, row)
    hurt.finish()
    whole = victim.Victim(folder / "whole", data, train__steps=steps)
    whole.make()
    ends = [run.digest() for run in (whole, hurt)]
    litter = hurt.litter()
    faults = [f"litter: {name}" for name in litter]
    if ends[0] != ends[1]:
        faults.append("the ends differ")
    saved = [row["saved"] for row in rows]
    if saved != sorted(saved):
        faults.append("a saved step was lost")
    met = collections.Counter(row["met"] for row in rows)
    if met["nothing"]:
        faults.append("the run had ended before the last kill")
    return {
        "kills": len(rows) - met["nothing"],
        "in_start": met["start"],
        "in_save": met["save"],
        "in_deletion": met["deletion"],
        "between": met["steps"],
        "most_steps_lost": max((row["lost"] for row in rows), default=0),
        "steps_of_run": steps,
        "litter": len(litter),
        "digest": ends[1],
        "undisturbed": ends[0],
        "seconds": round(time.monotonic() - began),
        "faults": faults,
    }


def _kill_once(run: victim.Victim, n: int, rows: list, seed: int) -> dict:
    """Starts the run and kills it; what that has met."""
    rng = random.Random(f"{seed} {n}")
    aim = _AIMS[n % len(_AIMS)]
    seconds = [row["startup_s"] for row in rows if row["startup_s"]]
    began = time.monotonic()
    process = run.start()
    startup = 0.0
    if aim == "start":
        time.sleep(rng.uniform(0, min(seconds, default=5)))
    else:
        process.wait_for(r"step \d+/")
        startup = time.monotonic() - began
        if aim == "save":
            first = run.steps.all()
            if rng.random() < 0.7:  # else the run would hardly get on
                process.wait_until(lambda: run.steps.all() != first)
            process.wait_until(lambda: any(run.steps.folder.glob("unfinished-*")))
            time.sleep(rng.uniform(0, 0.1))
        else:
            process.wait_for(rf"(step \d+/.*\n){{{rng.randint(1, _AHEAD)}}}")
            time.sleep(rng.uniform(0, 0.05))
    ended = process.handle.poll() is not None
    victim.kill(process)
    row = _found(run, process, aim) | {"startup_s": round(startup, 2)}
    return row | {"met": "nothing"} if ended else row


def _kill_in_deletion(run: victim.Victim, library: Path, n: int) -> dict:
    """Starts the run, which is killed before a call of a deletion.

    That of the oldest step, once a new one counts; of four times one that of what the
    kill before has left, at the start.
    """
    call = 1 + 5 * n % _DELETION
    oldest = "" if n % 4 == 3 else (run.steps.all() or [""])[0]
    env = {"LD_PRELOAD": str(library), "FAULT_ROOT": str(run.workdir)}
    env |= {"FAULT_ONLY": f"/deleted-{oldest}", "FAULT_AT": str(call)}
    env["FAULT_ERRNO"] = "0"
    process = run.start(env=env)
    killed = process.end() == -signal.SIGKILL
    row = _found(run, process, "deletion") | {"call": call, "startup_s": 0.0}
    return row if killed else row | {"met": "nothing"}


def _found(run: victim.Victim, process: victim.Process, aim: str) -> dict:
    """What a killed process has left."""
    names = [path.name for path in run.steps.folder.glob("*-*")]
    steps = run.steps.all() or [0]
    met = aim
    if aim != "start":
        kinds = {name.split("-")[0] for name in names}
        met = "save" if "unfinished" in kinds else "steps"
        if "deleted" in kinds or len(steps) > victim.STEPS_KEPT:
            met = "deletion"
    reached = process.last_step() or 0
    return {
        "aim": aim,
        "met": met,
        "reached": reached,
        "saved": steps[-1],
        "lost": max(0, reached - steps[-1]),
        "left": names,
    }


if __name__ == "__main__":
    victim.main(
        "kills",
        campaign,
        kills=(100, "SIGKILLs at random moments."),
        deletions=(12, "SIGKILLs within the deletion of an old step."),
        steps=(1000, "Steps of the run."),
        seed=(0, "Of the schedule."),
    )
