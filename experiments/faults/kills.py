"""SIGKILL again and again in one logical run, which then ends as if undisturbed.

    python -m experiments.faults.kills --workdir=DIR --kills=100

Three aims: a random moment of the start; the first save of a start or a later one, up
to 100 ms after its folder has appeared; a random moment of the steps. What was met is
told by what lies on the disk.
The campaign itself may be interrupted: the same command goes on with the next kill.
"""

import collections
import json
import random
import sys
import time
from pathlib import Path

from experiments.faults import victim

_AIMS = ("start", *("save", "steps") * 3, *("save",) * 3)  # of ten kills
_AHEAD = 6  # steps at most that are waited for


def campaign(folder: Path, *, kills: int, steps: int, seed: int = 0) -> dict:
    """Runs with kills, then undisturbed.

    Args:
        folder: where data and both runs go.
        kills: how many.
        steps: of the run; the kills must all fall into it, at about 8 steps each.
        seed: of the schedule.

    Returns:
        Counts, and the digests of both ends.
    """
    began = time.monotonic()
    data = victim.make_data(folder / "data")
    hurt = victim.Victim(folder / "hurt", data, train__steps=steps)
    path = folder / "kills.jsonl"
    path.touch()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    while len(rows) < kills and not (rows and rows[-1]["met"] == "nothing"):
        row = _kill_once(hurt, len(rows), rows, seed)
        rows.append(row)
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"kill {len(rows)}: {row}", file=sys.stderr, flush=True)
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
    before = rows[-1]["saved"] if rows else 0
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
    names = [path.name for path in run.steps.folder.glob("*-*")]
    saved = (run.steps.all() or [0])[-1]
    reached = process.last_step() or before
    met = aim
    if ended:
        met = "nothing"
    elif aim != "start":
        found = {name.split("-")[0] for name in names}
        met = "save" if "unfinished" in found else "steps"
        met = "deletion" if "deleted" in found else met
    return {
        "aim": aim,
        "met": met,
        "reached": reached,
        "saved": saved,
        "lost": max(0, reached - saved),
        "left": names,
        "startup_s": round(startup, 2),
    }


if __name__ == "__main__":
    victim.main(
        "kills",
        campaign,
        kills=(100, "SIGKILLs."),
        steps=(1000, "Steps of the run."),
        seed=(0, "Of the schedule."),
    )
