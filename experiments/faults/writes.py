"""Every file-system call of a save fails once; disks that fill up while a run goes on.

    python -m experiments.faults.writes --workdir=DIR --every=1 --runs=20 --disks=4

Needs a C compiler (fail_calls.c goes before the C library) and Linux. In one process:
save, with call k failing alone, and with all from call k on failing, as after a kill;
then the newest step must be sound and the same save must succeed. In processes of their
own: whole runs of which call k fails, runs on a small tmpfs (root) or with a small
RLIMIT_FSIZE, each of which the same command then ends as if undisturbed. An interrupted
campaign goes on where it stopped.
"""

import collections
import contextlib
import ctypes
import errno
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from data_pipeline import loader
from experiments import build, cli, recent
from experiments.faults import victim
from unireg_jax.errors import STORAGE, UserError
from unireg_jax.training import checkpoint
from unireg_jax.training import state as train_state

_NEVER = 2**40
# (errno, whether all later calls fail, too)
_MODES = ((errno.ENOSPC, False), (errno.EIO, False), (errno.ENOSPC, True))


def cycles(folder: Path, *, every: int) -> dict:
    """Saves with call k failing, for every k; fail_calls is loaded in this process.

    Args:
        folder: with the run `run` of two saved steps, $FAULT_ROOT.
        every: only each so many-th call.

    Returns:
        Counts and faults.
    """
    bench = _Bench(folder)
    count = bench.save_counting()
    path = folder / "cycles.jsonl"
    rows = {(row["k"], row["mode"]): row for row in victim.known_rows(path)}
    wanted = list(itertools.product(range(1, count + 1, every), range(len(_MODES))))
    for k, mode in wanted:
        if (k, mode) not in rows:
            ended = bench.cycle(k, *_MODES[mode])
            faults = [*bench.faults]
            bench.faults.clear()
            rows[k, mode] = {"k": k, "mode": mode, "ended": ended, "faults": faults}
            victim.add_row(path, rows[k, mode])
    done = [rows[key] for key in wanted]
    ended = collections.Counter(row["ended"] for row in done)
    return {
        "calls_of_a_save": count,
        "cycles": len(done),
        "refused": ended["refused"],
        "saved": ended["saved"],
        "faults": [fault for row in done for fault in row["faults"]],
    }


class _Bench:
    """A run at its second step, which saves its third again and again."""

    def __init__(self, folder: Path):
        library = ctypes.CDLL(None)
        self._arm = library.fault_arm
        self._arm.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int)
        self._calls = library.fault_calls
        self._calls.restype = ctypes.c_long
        self._run = victim.Victim(folder / "run", folder / "data")
        self._pristine = folder / "pristine"
        if self._pristine.exists():
            self._reset()
        else:
            new = folder / "pristine.tmp"
            shutil.copytree(self._run.steps.folder, new, dirs_exist_ok=True)
            new.rename(self._pristine)
        config = self._run.config()
        experiment = build.build(config, self._run.workdir)
        fresh = train_state.make_state(
            experiment.model, experiment.tx, seed=config.seed, averaged=True
        )
        self._stream = recent.Followed(
            loader.make_iterator(
                experiment.dataset,
                "train",
                batch_size=1,
                seed=config.seed,
                weights=experiment.weights,
            )
        )
        self._fresh = fresh
        with contextlib.closing(self._open()) as checkpoints:
            self._state = checkpoints.restore(fresh, self._stream)
        self._state = self._state._replace(step=self._state.step + 5)
        self._good = {
            step: victim.state_digest(self._run.steps[step])
            for step in self._run.steps.all()
        }
        self.faults: list[str] = []

    def _reset(self) -> None:
        shutil.rmtree(self._run.steps.folder)
        shutil.copytree(self._pristine, self._run.steps.folder)

    def _open(self) -> checkpoint.Checkpoints:
        return checkpoint.Checkpoints(self._run.workdir)

    def _save(self) -> None:
        with contextlib.closing(self._open()) as checkpoints:
            checkpoints.save(self._state, self._stream)

    def save_counting(self) -> int:
        """Saves undisturbed; the number of calls that this takes."""
        checkpoints = self._open()
        self._arm(_NEVER, 0, 0)
        checkpoints.save(self._state, self._stream)
        checkpoints.close()
        count = self._calls()
        self._arm(0, 0, 0)
        newest = self._run.steps.all()[-1]
        self._good[newest] = victim.state_digest(self._run.steps[newest])
        return count

    def cycle(self, k: int, number: int, sticky: bool) -> str:
        """Saves with call k failing, then without; whether it was refused or saved."""
        self._reset()
        what = f"call {k}, {errno.errorcode[number]}{', and all later' * sticky}"
        checkpoints = self._open()
        ended = "saved"
        self._arm(k, number, int(sticky))
        try:
            checkpoints.save(self._state, self._stream)
            checkpoints.close()
        except UserError as error:
            ended = "refused"
            if error.exit_code != STORAGE or error.reason != "storage":
                self.faults.append(f"{what}: {error.reason}: {error}")
        except Exception as error:
            ended = "refused"
            self.faults.append(f"{what}: {type(error).__name__}: {error}"[:300])
        self._arm(0, 0, 0)
        steps = self._run.steps
        found = steps.find_sound()
        if (
            found != steps.all()[-1]
            or victim.state_digest(steps[found]) != (self._good[found])
        ):
            self.faults.append(f"{what}: step {found} is not what was saved")
        newest = int(self._state.step)
        if found != newest:
            self._save()
        if victim.state_digest(steps[newest]) != self._good[newest]:
            self.faults.append(f"{what}: saved again it differs")
        self._open().close()
        if litter := self._run.litter():
            self.faults.append(f"{what}: left {litter[0]}")
        return ended


def whole_runs(folder: Path, library: Path, *, runs: int, disks: int) -> dict:
    """Runs of ten steps that meet a fault, and are started again without it.

    Args:
        folder: where they go.
        library: from `victim.compile_library`.
        runs: of them, those with a failing call.
        disks: those on a small file system, and as many with a small file limit.

    Returns:
        Counts and faults.
    """
    rng = random.Random(0)
    data = victim.make_data(folder / "data")
    whole = victim.Victim(folder / "whole", data, train__steps=10)
    whole.make()
    wanted = whole.digest()
    size = sum(p.stat().st_size for p in whole.workdir.rglob("*") if p.is_file())
    path = folder / "runs.jsonl"
    rows = {row["what"]: row for row in victim.known_rows(path)}

    def meet(run, kind, what, lift, **kwargs):
        process = run.start(**kwargs)
        code = process.end()
        faults = []
        if code not in (0, STORAGE):
            faults.append(f"{what}: exit code {code}: {process.said()[-300:]}")
        lift()
        run.finish()
        if run.digest() != wanted:
            faults.append(f"{what}: the ends differ")
        faults.extend(f"{what}: litter: {name}" for name in run.litter())
        rows[what] = {"what": what, "kind": kind, "code": code, "faults": faults}
        victim.add_row(path, rows[what])

    for n in range(runs):
        run = victim.Victim(folder / f"call{n}", data, train__steps=10)
        k, sticky = rng.randrange(1, 400), n % 2
        env = {"LD_PRELOAD": str(library), "FAULT_ROOT": str(run.workdir)}
        env |= {"FAULT_AT": str(k), "FAULT_STICKY": str(sticky)}
        env["FAULT_ERRNO"] = str((errno.ENOSPC, errno.EIO)[n // 2 % 2])
        what = f"run {n}, call {k}, sticky {sticky}"
        if what not in rows:
            meet(run, "runs", what, lambda: None, env=env)
    for n in range(disks):
        run = victim.Victim(folder / f"limit{n}", data, train__steps=10)
        if f"limit {n}" not in rows:
            meet(run, "limits", f"limit {n}", lambda: None, largest=4096 * (n + 1))
        if f"disk {n}" in rows:
            continue
        disk = folder / f"disk{n}"
        disk.mkdir(exist_ok=True)
        subprocess.run(["umount", str(disk)], stderr=subprocess.DEVNULL)  # interrupted
        small = size * (n + 1) // (disks + 1) // 4096 * 4096
        mount = ["mount", "-t", "tmpfs", "-o", f"size={small}", "none", str(disk)]
        if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
            continue  # not root
        try:
            run = victim.Victim(disk / "run", data, train__steps=10)
            grow = ["mount", "-o", "remount,size=64m", str(disk)]
            meet(
                run,
                "disks",
                f"disk {n}",
                lambda grow=grow: subprocess.run(grow, check=True),
                errors=folder / f"disk{n}.err",
            )
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    kinds = collections.Counter(row["kind"] for row in rows.values())
    codes = collections.Counter(row["code"] for row in rows.values())
    return {
        **{kind: kinds[kind] for kind in ("runs", "disks", "limits")},
        "exit_6": codes[STORAGE],
        "exit_0": codes[0],
        "digest": wanted,
        "faults": [fault for row in rows.values() for fault in row["faults"]],
    }


def campaign(folder: Path, *, every: int, runs: int, disks: int) -> dict:
    """Both; this process starts another one that fail_calls is loaded in."""
    began = time.monotonic()
    library = victim.compile_library(folder)
    run = victim.Victim(
        folder / "run", victim.make_data(folder / "data"), train__steps=10
    )
    run.make()
    command = [sys.executable, "-m", "experiments.faults.writes", "--inside"]
    command += [f"--workdir={folder}", f"--every={every}"]
    env = {"LD_PRELOAD": str(library), "FAULT_ROOT": str(run.workdir)}
    done = subprocess.run(
        command,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        cwd=victim.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    counts = victim.parse(done.stdout)
    if runs or disks:
        more = whole_runs(folder, library, runs=runs, disks=disks)
        counts = counts | more | {"faults": counts["faults"] + more["faults"]}
    return counts | {"seconds": round(time.monotonic() - began)}


def main(argv) -> None:
    del argv
    cli.setup()
    given = flags.FLAGS
    folder = Path(given.workdir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if given.inside:
        victim.report(**cycles(folder, every=given.every))
    else:
        counts = campaign(folder, every=given.every, runs=given.runs, disks=given.disks)
        victim.report(campaign="writes", **counts)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("workdir", None, "Folder of the campaign; empty or absent.")
    flags.DEFINE_integer("every", 1, "Only each so many-th call fails.")
    flags.DEFINE_integer("runs", 20, "Whole runs with a failing call.")
    flags.DEFINE_integer("disks", 4, "Whole runs on a small disk, and with a limit.")
    flags.DEFINE_boolean("inside", False, "In the process that fail_calls is in.")
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
