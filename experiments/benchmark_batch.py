"""Times many pairs, many conditions and a cold start on this machine.

    python -m experiments.benchmark_batch [--pairs=6] [--affine=auto] [--processes=2]

One atlas as fixed scan, phantoms of different sizes as moving ones, from files to files
(field, composite, warped image), with the weights of the package:

loop       `register` and writing, one pair after the other
batch      `register_many`, writing in its threads
processes  `unireg register` per pair, compilation cache warm
heads      one call under 1 and under 8 conditions, of the package's network and of the
           paper's, features given

The first two run interleaved in one process after a warm-up each; medians. A cold start
is the first `unireg register` with an empty cache folder, a warm one the next.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags

from data_pipeline import synthetic
from experiments import cli
from unireg_jax.imaging import nifti, transforms
from unireg_jax.models.unireg import UniReg
from unireg_jax.registration import batch, compiled, network, pipeline
from unireg_jax.tasks import PairType, Region

TASK = "chest"


def make_scans(folder: Path, count: int, shape, spacing_mm: float) -> list[Path]:
    """Writes an atlas and `count` other subjects, of as many numbers of slices."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(count + 1):
        size = (*shape[:2], shape[2] + 2 * seed)
        scan = synthetic.phantom(TASK, shape=size, spacing_mm=spacing_mm, seed=seed)
        paths.append(folder / f"scan{seed}.nii.gz")
        nifti.write_volume(paths[-1], scan.hu, scan.vox2world)
    return paths


def write(prefix: Path, result: pipeline.Registration, fixed: nifti.Volume) -> None:
    """What the command writes, without its record."""
    grid = {"vox2world": result.vox2world, "like": fixed}
    nifti.write_like(f"{prefix}_warped.nii.gz", result.warped, fixed)
    transforms.write_field(f"{prefix}_1Warp.nii.gz", result.disp_mm, **grid)
    residual = pipeline.residual_mm(result)
    transforms.write_composite(
        f"{prefix}_Composite.h5", result.affine, residual, **grid
    )


def loop(pairs: list[batch.Pair], model: network.Model, out: Path) -> None:
    """One pair after the other."""
    for pair in pairs:
        fixed = nifti.read_image(pair.fixed)
        result = pipeline.register(
            fixed, pair.moving, task=pair.task, affine=pair.affine, weights=model
        )
        write(out / pair.name, result, fixed)


def overlapped(
    pairs: list[batch.Pair], model: network.Model, out: Path, workers: int
) -> None:
    """The same through `register_many`."""

    def finish(pair, result, fixed, moving):
        del moving
        write(out / pair.name, result, fixed)

    for outcome in batch.register_many(
        pairs, weights=model, finish=finish, workers=workers
    ):
        if outcome.error:
            raise outcome.error


def command_seconds(pair: batch.Pair, out: Path, cache: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one `unireg register` process."""
    before = os.times()
    start = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "unireg_jax", "register", "--quiet", "--overwrite"),
            *("--fixed", pair.fixed, "--moving", pair.moving, "--out", out),
            *("--task", pair.task, "--affine", pair.affine),
        ],
        check=True,
        env={**os.environ, "UNIREG_CACHE": str(cache)},
    )
    after = os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return time.perf_counter() - start, cpu


def interleaved(
    candidates: dict[str, Callable[[], None]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each, after one warm-up."""
    seconds = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:
                spent = time.perf_counter() - wall, time.process_time() - cpu
                seconds[name].append(spent)
    return {name: tuple(np.median(s, axis=0)) for name, s in seconds.items()}


def head_seconds(model: network.Model, repeats: int) -> dict[str, tuple[float, float]]:
    """One call of the network, both volumes described, under 1 and 8 conditions."""
    shape = model.preprocess.shape
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 600, (2, *shape)).astype(np.int16)
    every = np.array([(r, p) for r in Region for p in PairType]).T
    candidates = {}
    for count in (1, every.shape[1]):
        program = compiled.compile_register(model, conditions=count)
        scans = [program.describe(volume) for volume in hu]
        codes = every[:, :count]

        def run(program=program, scans=scans, codes=codes):
            jax.block_until_ready(program(*scans, *codes))

        candidates[f"{count} conditions"] = run
    return interleaved(candidates, repeats)


def report(name: str, wall: float, cpu: float) -> None:
    print(f"{name.ljust(28)} wall {wall:8.2f} s   CPU {cpu:8.2f} s", flush=True)


def main(argv) -> None:
    del argv
    options = flags.FLAGS
    cli.setup()
    folder = Path(options.workdir)
    shape = tuple(map(int, options.shape))
    scans = make_scans(folder / "scans", options.pairs, shape, options.spacing)
    pairs = [
        batch.Pair(scans[0], path, TASK, affine=options.affine, name=path.name[:-7])
        for path in scans[1:]
    ]
    model = network.load_model()
    out = folder / "out"
    out.mkdir(exist_ok=True)
    runs = {
        "loop": lambda: loop(pairs, model, out),
        "batch": lambda: overlapped(pairs, model, out, options.workers),
    }
    for name, (wall, cpu) in interleaved(runs, options.repeats).items():
        report(f"{name}, per pair", wall / len(pairs), cpu / len(pairs))
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    for name in ("cold", "warm"):
        report(f"process, {name} start", *command_seconds(pairs[0], out, cache))
    others = [command_seconds(p, out, cache) for p in pairs[1 : 1 + options.processes]]
    if others:
        report("processes, per pair", *np.mean(others, axis=0))
    module = UniReg()
    paper = model._replace(
        module=module, params=jax.jit(network.initializer(module))(jax.random.key(0))
    )
    for name, candidate in (("package", model), ("paper", paper)):
        for count, seconds in head_seconds(candidate, options.repeats + 2).items():
            report(f"{name}, {count}", *seconds)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("workdir", "runs/benchmark_batch", "Scans, results, cache.")
    flags.DEFINE_integer("pairs", 6, "Moving scans.")
    flags.DEFINE_list("shape", ["160", "128", "100"], "Voxels of the atlas.")
    flags.DEFINE_float("spacing", 2.5, "Voxel edge, mm.")
    flags.DEFINE_string("affine", "auto", "Pre-alignment.")
    flags.DEFINE_integer("workers", 3, "Threads of the batch.")
    flags.DEFINE_integer("processes", 2, "Pairs that the command registers, too.")
    flags.DEFINE_integer("repeats", 2, "Counted rounds.")
    cli.run(main)
