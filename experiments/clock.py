"""Where the seconds of a run go, over all its processes: how much of them was training.

Monotonic clocks alone, so that setting the machine's clock changes nothing. What lies
between the end of a process and the start of the next is not counted: none is there to
see it.
"""

import contextlib
import json
import os
import time
from pathlib import Path

from unireg_jax.training import log

NAME = "times.json"
_KINDS = ("startup", "data", "step", "validation", "save")


def process_began() -> float:
    """When this process began, by `time.monotonic`; now, where the system hides it."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.monotonic() - max(age, 0.0)


class Clock:
    """Splits the time since the start into kinds; every second belongs to one.

    Steps that a kill made the run repeat count once: the others are lost time.
    """

    def __init__(self, writer: log.Log, *, step: int, began: float | None = None):
        """Starts, or goes on from what earlier processes have left.

        Args:
            writer: log of the run.
            step: where the run goes on.
            began: by `time.monotonic`; None: now.
        """
        self._path = None if writer.silent else writer.workdir / NAME
        self._at = time.monotonic() if began is None else began
        before = _read(writer.workdir / NAME)
        self._starts = before["starts"] + 1
        self._seconds = before["seconds"]
        self._step = step
        # After a clean stop it goes on between two log lines; after a kill before some.
        logged = writer.times.get(log.TIMES + "useful_s") or 0.0
        self._useful = before["useful"] if before["step"] == step else logged
        self._since = (0, 0.0)  # pairs and seconds of the steps since the last numbers
        # Steps after the first of this process, and seconds since it.
        self._pace: tuple[int, float] | None = None

    def lap(self, kind: str) -> float:
        """Gives the seconds since the last lap to a kind, and returns them."""
        now = time.monotonic()
        seconds, self._at = now - self._at, now
        self._seconds[kind] += seconds
        if self._pace:
            self._pace = (self._pace[0], self._pace[1] + seconds)
        return seconds

    def step(self, n: int, pairs: int, *, waited: float) -> None:
        """Ends a step; the first of a process is compiled, and counts as start-up.

        Args:
            n: which step of the run.
            pairs: of it.
            waited: seconds of the lap before, for data.
        """
        self._step = n
        if not self._pace:
            self.lap("startup")
            self._pace = (0, 0.0)
            return
        seconds = self.lap("step")
        self._useful += seconds
        self._pace = (self._pace[0] + 1, self._pace[1])
        self._since = (self._since[0] + pairs, self._since[1] + seconds + waited)

    def scalars(self) -> dict[str, float]:
        """Numbers for the log, and those since the last call; keeps the sums."""
        self._save()
        total = sum(self._seconds.values())
        (pairs, seconds), self._since = self._since, (0, 0.0)
        numbers = {f"{kind}_s": self._seconds[kind] for kind in _KINDS} | {
            "total_s": total,
            "useful_s": self._useful,
            "lost_s": self._seconds["step"] - self._useful,
            "goodput": self._useful / total if total else 0.0,
            "starts": float(self._starts),
        }
        if seconds:
            numbers["pairs_per_s"] = pairs / seconds
        return {log.TIMES + k: v for k, v in numbers.items()}

    def left(self, steps: int) -> float | None:
        """Seconds that so many steps take, validations and saves among them."""
        count, seconds = self._pace or (0, 0.0)
        return steps * seconds / count if count else None

    def close(self) -> None:
        """Keeps the sums for the next process."""
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        temp = self._path.with_name(f"{NAME}.tmp")
        # Times alone: no reason to end a run, or to wait for the disk.
        with contextlib.suppress(OSError):
            content = {"starts": self._starts, "seconds": self._seconds}
            content |= {"step": self._step, "useful": self._useful}
            temp.write_text(json.dumps(content) + "\n")
            temp.replace(self._path)


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        seconds = {kind: float(found["seconds"][kind]) for kind in _KINDS}
        return {
            "starts": int(found["starts"]),
            "seconds": seconds,
            "step": int(found.get("step", -1)),  # not in files of earlier releases
            "useful": float(found.get("useful", 0.0)),
        }
    except (OSError, ValueError, KeyError, TypeError):
        seconds = dict.fromkeys(_KINDS, 0.0)
        return {"starts": 0, "seconds": seconds, "step": -1, "useful": 0.0}
