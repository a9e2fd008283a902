"""One run on 1, 2, 4 and 8 devices in turn, stopped and continued at every change.

    python -m experiments.faults.devices --workdir=DIR --switches=10

The devices are the CPU's simulated ones. At every switch the run is first started with
nothing left to do: the weights it writes from what it restored on the new devices must
be those it wrote on the old ones, bit for bit. Then it goes on. At the end it is held
against a run on one device: the place in the data and what it is drawn from (which
alone decide the pairs; no file has their numbers) are equal, and so are step and names
of the losses, one of each task in the batch, of every step of the log. The losses
differ by rounding, which is reported.
"""

import hashlib
import json
import random
import time
from pathlib import Path

from data_pipeline import synthetic
from experiments.faults import victim
from unireg_jax.training import log

_COUNTS = (1, 2, 4, 8)
_STEPS = 2  # between two switches
_RTOL = 0.05  # of the losses: Adam makes much of the rounding of small gradients


def campaign(folder: Path, *, switches: int, seed: int = 0) -> dict:
    """Runs on one device, then with switches.

    Args:
        folder: where data and both runs go.
        switches: of the number of devices.
        seed: of their order.

    Returns:
        Counts, digest of the weights at the end, largest difference of a loss, faults.
    """
    rng = random.Random(seed)
    began = time.monotonic()
    data = folder / "data"
    if not (data / "index.json").exists():
        synthetic.write_dataset(
            data,
            shape=victim.SHAPE,
            spacing_mm=victim.SPACING_MM,
            subjects_per_task=10,  # 42 training pairs; no fewer than devices
            tasks=("headneck", "lung"),
        )
    fields = {"data__batch_size": 8, "train__steps": _STEPS * (switches + 1)}
    one = victim.Victim(folder / "one", data, **fields)
    one.make(env=_devices(1))
    run = victim.Victim(folder / "run", data, **fields)
    weights = run.workdir / "weights.safetensors"
    path = folder / "switches.jsonl"
    rows = victim.known_rows(path)
    used = [8]
    if not rows:
        run.finish(env=_devices(8), train__steps=_STEPS)
    for n in range(1, switches + 1):
        used.append(rng.choice([c for c in _COUNTS if c != used[-1]]))
        if n <= len(rows):
            continue
        env, before = _devices(used[-1]), weights.read_bytes()
        run.finish(env=env, train__steps=_STEPS * n)
        same = weights.read_bytes() == before
        run.finish(env=env, train__steps=_STEPS * (n + 1))
        rows.append({"switch": n, "devices": used[-2:], "same": same})
        victim.add_row(path, rows[-1])
    faults = [f"{row}: restored differently" for row in rows if not row["same"]]
    ends = [x.steps[x.steps.find_sound()] for x in (one, run)]
    if _place(ends[0]) != _place(ends[1]):
        faults.append("another place in the data than on one device")
    others, worst = compare(*(_losses(x.workdir / log.NAME) for x in (one, run)))
    return {
        "switches": switches,
        "devices": used,
        "largest_difference_of_a_loss": round(worst, 6),
        "digest": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "seconds": round(time.monotonic() - began),
        "faults": faults + others,
    }


def compare(
    one: list[dict[str, float]], other: list[dict[str, float]]
) -> tuple[list[str], float]:
    """Compares step and losses, line by line.

    Returns:
        Faults, and the largest relative difference of a loss that both have.
    """
    faults = []
    shapes = [[(row["step"], *sorted(row)) for row in rows] for rows in (one, other)]
    if shapes[0] != shapes[1]:
        faults.append("other lines of the log, or losses in them, than on one device")
    worst = 0.0
    for a, b in zip(one, other, strict=False):  # a line too few is told of above
        for name in (a.keys() & b.keys()) - {"step"}:
            difference = abs(a[name] - b[name])
            worst = max(worst, difference / abs(b[name]) if b[name] else difference)
    if worst > _RTOL:
        faults.append(f"a loss differs by {worst:.1%}")
    return faults, worst


def _place(step: Path) -> dict:
    """Of a saved step in the data, and what these are drawn from."""
    (path,) = (step / "data").glob("process_*.json")
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "loop"}


def _devices(count: int) -> dict[str, str]:
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def _losses(path: Path) -> list[dict[str, float]]:
    """Step and losses of every step of the log; every stop has a validation more."""
    rows = map(json.loads, path.read_text().splitlines())
    return [
        {k: v for k, v in row.items() if k == "step" or k.startswith("train/loss")}
        for row in rows
        if "train/loss" in row
    ]


if __name__ == "__main__":
    victim.main(
        "devices",
        campaign,
        switches=(10, "Changes of the number of devices."),
        seed=(0, "Of their order."),
    )
