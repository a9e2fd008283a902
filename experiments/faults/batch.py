"""Kills `unireg batch` again and again over a list with poisoned pairs, and counts.

    python -m experiments.faults.batch [--pairs=1000] [--poisoned=0.07] [--kills=10]

Makes tiny scans, a tiny network and a list; runs the command with --skip-existing and
kills it with SIGKILL, in start-up and between pairs, as often as asked; then lets the
same command finish. After that every good pair must be there once, with the digests of
an undisturbed run over the good pairs alone, every poisoned one must have failed with
the reason of its kind (experiments/faults/scans.py), and nothing else may lie about.
Prints one JSON object; exit code 1 if anything is wrong.
"""

import collections
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipeline import store
from experiments import cli
from experiments.faults import scans
from unireg_jax.errors import PARTLY
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.models.unireg import UniReg
from unireg_jax.registration import network, weights

SHAPE, SPACING = (20, 22, 18), (12.0, 11.0, 13.0)
SPEC = PreprocessSpec(shape=(32, 16, 32), spacing_mm=(12.0, 18.0, 11.0))
ARCHITECTURE = {
    "encoder": [4, 4, 4, 4],
    "decoder": [4, 4, 4, 4],
    "remaining": [8],
    "field_level": 1,
    "conv_impl": "direct",
}
FIXED = 8  # scans that stay, in turn
_STARTUP = 0.2  # share of kills that come before the first pair
_WAIT_S = 300.0  # for a run to get on


def make_network(path: Path, *, key: int = 0) -> Path:
    """Writes a random network whose field is nearly still; the key decides which."""
    fields = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in ARCHITECTURE.items()
    }
    params = jax.jit(network.initializer(UniReg(**fields)))(jax.random.key(key))
    controller = params["head"]["controller"]
    # As initialised it is 0, and results would not tell the pair types apart.
    noise = jax.random.normal(jax.random.key(key + 1), controller["kernel"].shape)
    controller["kernel"] = 5e-7 * noise
    preprocess = SPEC.to_json()
    spec = {"architecture": ARCHITECTURE, "features": "none", "preprocess": preprocess}
    weights.save_weights(path, params, spec)
    return path


def body(shift_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A soft ellipsoid with a spot, int16 HU, and its geometry."""
    axes = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    x = (np.stack(axes, -1) - (np.array(SHAPE) - 1) / 2) * SPACING - shift_mm
    radius = np.square(x / [100, 90, 95]).sum(-1)
    spot = np.exp(-np.square((x - [30, -20, 25]) / 35).sum(-1))
    hu = -1000 + 1040 / (1 + np.exp((radius - 1) * 6)) + 250 * spot
    vox2world = np.diag([*SPACING, 1.0])
    vox2world[:3, 3] = -120.0, -110.0, 300.0
    return np.rint(hu).astype(np.int16), vox2world


def make_list(
    folder: Path, *, good: int, kinds: list[scans.Kind], seed: int
) -> dict[str, str | None]:
    """Writes scans and list.csv, good and poisoned pairs mixed.

    Args:
        folder: empty or absent.
        good: pairs without a fault.
        kinds: one poisoned pair each.
        seed: of their order and of the good ones' shifts.

    Returns:
        id -> reason that it must fail with, None for a good one; as listed.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(FIXED):
        array, vox2world = body(np.array([0.0, 2.0 * i, 0.0]))
        (folder / f"fixed{i}.nii").write_bytes(scans.encode(array, vox2world))
        labels = (array > -200).astype("u1")
        (folder / f"label{i}.nii").write_bytes(scans.encode(labels, vox2world))
    order = [None] * good + list(kinds)
    rows, expected = [], {}
    for n, place in enumerate(rng.permutation(len(order))):
        kind, name = order[place], f"p{n:05d}"
        row = {"id": name, "fixed": f"fixed{n % FIXED}.nii"}
        array, vox2world = body(rng.uniform(-15, 15, 3))
        (folder / name).mkdir()
        if kind is None:
            content = scans.encode(array, vox2world)
            (folder / name / "moving.nii").write_bytes(content)
            columns = {"moving": "moving.nii"}
        else:
            columns = kind.write(folder / name, array, vox2world)
        row |= {column: f"{name}/{file}" for column, file in columns.items()}
        if "moving_label" in row:
            row["fixed_label"] = f"label{n % FIXED}.nii"
        rows.append(row)
        expected[name] = None if kind is None else kind.reason
    write_list(folder / "list.csv", rows)
    sound = [row for row in rows if expected[row["id"]] is None]
    write_list(folder / "good.csv", sound)
    return expected


def write_list(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes a list of pairs with the columns that any of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def command(folder: Path, name: str, out: Path) -> list[str]:
    """The command over one of the lists."""
    return [
        *(sys.executable, "-m", "unireg_jax", "batch", str(folder / name)),
        *("--out", str(out), "--task", "lung", "--affine", "none", "--skip-existing"),
        *("--weights", str(folder / "tiny.safetensors"), "--io-iterations", "0"),
    ]


def lines(out: Path) -> list[dict[str, Any]]:
    """Whole lines of the journal."""
    path = out / "batch.jsonl"
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def kill_often(
    words: list[str], out: Path, *, pairs: int, kills: int, seed: int, env=None
) -> list[int]:
    """Starts the command and kills it, `kills` times.

    Args:
        words: the command.
        out: where its journal grows.
        pairs: that it has to do.
        kills: how often; the last ones fall away if it ends before.
        seed: of the moments.
        env: of the process.

    Returns:
        Pairs in the journal at each kill.
    """
    rng = np.random.default_rng(seed)
    targets = np.sort(rng.uniform(0, 0.95 * pairs, kills)).astype(int)
    seen = []
    for target in targets:
        with open(out.parent / "stderr.txt", "ab") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, env=env)
        if rng.random() < _STARTUP:
            time.sleep(rng.uniform(0, 3))
        else:
            limit = time.monotonic() + _WAIT_S
            while done_ids(out) <= target and process.poll() is None:
                if time.monotonic() > limit:
                    break
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 0.2))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(done_ids(out))
    return seen


def digest_of(path: Path) -> dict[str, Any]:
    return {"sha256": store.file_sha256(path), "bytes": path.stat().st_size}


def done_ids(out: Path) -> int:
    return len({line["id"] for line in lines(out)})


def judge(out: Path, expected: dict[str, str | None], clean: Path | None) -> list[str]:
    """Finds what is not as it must be after the last run.

    Args:
        out: of the disturbed runs.
        expected: from `make_list`.
        clean: results of an undisturbed run over the good pairs, or None.

    Returns:
        One line per fault.
    """
    faults = []
    count: collections.Counter = collections.Counter()
    last = {}
    for line in lines(out):
        count[line["id"], line["status"] != "failed"] += 1
        last[line["id"]] = line
    for name, reason in expected.items():
        line = last.get(name, {"status": "missing", "reason": None})
        if reason is not None:
            if (line["status"], line["reason"]) != ("failed", reason):
                faults.append(f"{name}: {reason} expected, got {line['reason']}")
            if (out / name).exists():
                faults.append(f"{name}: has results")
            continue
        if line["status"] not in ("ok", "warn") or count[name, True] != 1:
            faults.append(
                f"{name}: one good line expected, got {count[name, True]}, the last "
                f"{line['status']} {line['reason']}"
            )
            continue
        found = {f"{name}/{p.name}" for p in (out / name).iterdir()}
        if found != set(line["outputs"]):
            faults.append(f"{name}: holds {sorted(found)}")
        for file, digest in line["outputs"].items():
            if digest_of(out / file) != digest:
                faults.append(f"{file}: is not what the journal says")
            # Of the record, only its times differ.
            if clean and not file.endswith("_run.json"):
                if digest_of(clean / file) != digest:
                    faults.append(f"{file}: differs from the undisturbed run")
    names = {*expected, "batch.csv", "batch.json", "batch.jsonl", "failed.csv"}
    names |= {".unireg-batch.lock"}
    faults += [f"{name}: lies about" for name in set(os.listdir(out)) - names]
    return faults


def prove(
    folder: Path, *, pairs: int, poisoned: float, kills: int, seed: int
) -> dict[str, Any]:
    """The whole proof.

    Args:
        folder: is emptied.
        pairs: of the list.
        poisoned: share of them.
        kills: of the command.
        seed: of everything.

    Returns:
        Counts, seconds, exit codes, and the list of faults.
    """
    shutil.rmtree(folder, ignore_errors=True)
    bad = round(pairs * poisoned)
    kinds = [scans.KINDS[i % len(scans.KINDS)] for i in range(bad)]
    expected = make_list(folder, good=pairs - bad, kinds=kinds, seed=seed)
    make_network(folder / "tiny.safetensors")
    env = {**os.environ, "UNIREG_CACHE": str(folder / "cache")}
    clean, out = folder / "clean", folder / "out"
    start = time.perf_counter()
    undisturbed = subprocess.run(
        command(folder, "good.csv", clean), env=env, capture_output=True, text=True
    )
    if undisturbed.returncode:
        sys.exit(f"the undisturbed run fails: {undisturbed.stderr[-1000:]}")
    clean_s = json.loads((clean / "batch.json").read_text())["seconds"]
    words = command(folder, "list.csv", out)
    killed_at = kill_often(words, out, pairs=pairs, kills=kills, seed=seed, env=env)
    final = subprocess.run(words, env=env, capture_output=True, text=True)
    mixed = subprocess.run(
        command(folder, "list.csv", folder / "whole"), env=env, capture_output=True
    )
    whole_s = json.loads((folder / "whole" / "batch.json").read_text())["seconds"]
    faults = judge(out, expected, clean)
    faults += judge(folder / "whole", expected, clean)
    codes = (undisturbed.returncode, final.returncode, mixed.returncode)
    if codes != (0, PARTLY, PARTLY):
        faults.append(f"exit codes {codes}: {final.stderr[-500:]}")
    return {
        "pairs": pairs,
        "poisoned": bad,
        "kinds": len({kind.name for kind in kinds}),
        "rows": len({kind.row for kind in kinds}),
        "kills": len(killed_at),
        "pairs_at_kill": killed_at,
        "faults": faults,
        "seconds_per_good_pair_clean": round(clean_s / (pairs - bad), 4),
        "seconds_per_good_pair_poisoned": round(whole_s / (pairs - bad), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(argv) -> None:
    del argv
    options = flags.FLAGS
    cli.setup()
    report = prove(
        Path(options.workdir),
        pairs=options.pairs,
        poisoned=options.poisoned,
        kills=options.kills,
        seed=options.seed,
    )
    print(json.dumps(report, indent=2))
    sys.exit(bool(report["faults"]))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/faults_batch", "Emptied; scans and results.")
    flags.DEFINE_integer("pairs", 1000, "Of the list.")
    flags.DEFINE_float("poisoned", 0.07, "Share of the pairs.")
    flags.DEFINE_integer("kills", 10, "SIGKILLs.")
    flags.DEFINE_integer("seed", 0, "Of shifts, order and moments.")
    cli.run(main)
