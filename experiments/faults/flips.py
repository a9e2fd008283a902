"""Single bits flipped in a stored run, and its files deleted, emptied, halved, swapped.

    python -m experiments.faults.flips --workdir=DIR --flips=10000 --restores=500

Every damage must be seen by the manifest, or change nothing that is restored. A share
is restored for real: the step before is used, with the numbers it was saved with.
"""

import contextlib
import io
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from experiments.faults import victim
from unireg_jax.training import manifest
from unireg_jax.training.steps import Steps


def campaign(folder: Path, *, flips: int, restores: int, seed: int = 0) -> dict:
    """Makes a run of two saved steps and damages the newest again and again.

    Args:
        folder: where data and run go.
        flips: single bits, half of them by the size of files, half by file.
        restores: how many of them are followed by a real restore.
        seed: of the schedule.

    Returns:
        Counts.
    """
    rng = random.Random(seed)
    data = victim.make_data(folder / "data")
    run = victim.Victim(folder / "run", data, train__steps=10)
    began = time.monotonic()
    run.make()
    older, newest = run.steps.all()
    bench = _Bench(run.steps, older, newest)
    for n in range(flips):
        path = bench.pick(rng)
        bit = rng.randrange(8 * path.stat().st_size)

        def flip(path, bit=bit):
            content = bytearray(path.read_bytes())
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)

        real = n * restores // flips != (n + 1) * restores // flips
        bench.hurt(path, flip, f"bit {bit}", restore=real)
    flipped = bench.counts.copy()
    for path in bench.files:
        other = run.steps[older] / path.relative_to(run.steps[newest])
        for name, damage in _DAMAGES.items():
            bench.hurt(path, lambda p, d=damage, o=other: d(p, o), name, restore=True)
    return {
        "flips": flips,
        **flipped,
        "files": len(bench.files),
        "file_damages": bench.counts["tried"] - flipped["tried"],
        "file_damages_seen": bench.counts["seen"] - flipped["seen"],
        "file_damages_harmless": bench.counts["harmless"] - flipped["harmless"],
        "silent": bench.counts["silent"],
        "seconds": round(time.monotonic() - began),
        "faults": bench.faults,
    }


def _halve(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _swap(path: Path, other: Path) -> None:
    if other.exists():
        shutil.copyfile(other, path)
    else:  # arrays have names of their own in every step: that of another array
        others = sorted(p for p in path.parent.iterdir() if p != path and p.is_file())
        if others:
            shutil.copyfile(others[0], path)


_DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "deleted": lambda path, other: path.unlink(),
    "emptied": lambda path, other: path.write_bytes(b""),
    "halved": _halve,
    "swapped": _swap,
}


class _Bench:
    """Damages the newest of two steps, looks, and mends it."""

    def __init__(self, steps: Steps, older: int, newest: int):
        self._steps, self._older, self._newest = steps, older, newest
        self._good = {n: victim.state_digest(steps[n]) for n in (older, newest)}
        folder = steps[newest]
        self.files = sorted(p for p in folder.rglob("*") if p.is_file())
        self._sizes = [path.stat().st_size for path in self.files]
        self.counts = dict.fromkeys(
            ("tried", "seen", "harmless", "silent", "restored_older", "restored"), 0
        )
        self.faults: list[str] = []

    def pick(self, rng: random.Random) -> Path:
        """A file that is not empty; every other time by size."""
        by_size = rng.random() < 0.5
        weights = self._sizes if by_size else [bool(n) for n in self._sizes]
        return rng.choices(self.files, weights)[0]

    def hurt(
        self, path: Path, damage: Callable[[Path], None], what: str, *, restore: bool
    ) -> None:
        """Damages a file, counts what is seen of it, and puts it back."""
        content = path.read_bytes()
        damage(path)
        unchanged = path.exists() and path.read_bytes() == content
        self.counts["tried"] += 1
        where = f"{path.relative_to(self._steps.folder)}, {what}"
        try:
            manifest.verify(self._steps[self._newest], self._newest)
        except manifest.DamagedError:
            self.counts["seen"] += 1
            used = self._older
        else:
            used = self._newest
            same = unchanged or self._restored() == self._good[used]
            self.counts["harmless" if same else "silent"] += 1
            if not same:
                self.faults.append(f"silent: {where}")
        if restore and not unchanged:
            with contextlib.redirect_stderr(io.StringIO()):
                found = self._steps.find_sound()
            self.counts["restored_older" if found == self._older else "restored"] += 1
            if (
                found != used
                or victim.state_digest(self._steps[found]) != (self._good[found])
            ):
                self.faults.append(f"restored step {found}: {where}")
        path.write_bytes(content)

    def _restored(self) -> str:
        return victim.state_digest(self._steps[self._newest])


if __name__ == "__main__":
    victim.main(
        "flips",
        campaign,
        flips=(10_000, "Single bits."),
        restores=(500, "How many are followed by a restore."),
        seed=(0, "Of the schedule."),
    )
