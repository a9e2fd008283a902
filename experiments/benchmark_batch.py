"""Times many pairs, many conditions and a cold start on this machine.

    python -m experiments.benchmark_batch [--pairs=6] [--affine=auto] [--only=commands]

One atlas as fixed scan, phantoms of different sizes as moving ones, from files to files
(field, composite, warped image), with the weights of the package:

functions  `register` and writing, one pair after the other, and `register_many`,
           writing in its threads: interleaved in one process after a warm-up each
commands   `unireg batch` over the list, and processes that are started per pair:
           `unireg register`, and the commands of other tools where they are installed
           (elastix; greedy by its Python package): interleaved, after a round 0
           that fills the compilation cache
heads      one call under 1 and under 8 conditions, of the package's network and of the
           paper's, features given

Medians of the rounds. Other tools do other work: theirs are the times of a usual affine
and deformable setting, not of an equal result.
"""

import importlib.util
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
from experiments import cli, conventional
from unireg_jax.imaging import nifti, transforms
from unireg_jax.models.unireg import UniReg
from unireg_jax.registration import batch, compiled, network, pipeline
from unireg_jax.registration import weights as released
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


# An affine and a B-spline stage as in elastix's manual for CT: three resolutions each.
_ELASTIX = """
(FixedInternalImagePixelType "float")
(MovingInternalImagePixelType "float")
(Registration "MultiResolutionRegistration")
(ImageSampler "RandomCoordinate")
(NewSamplesEveryIteration "true")
(NumberOfSpatialSamples 2048)
(Interpolator "LinearInterpolator")
(ResampleInterpolator "FinalBSplineInterpolator")
(FinalBSplineInterpolationOrder 1)
(Resampler "DefaultResampler")
(FixedImagePyramid "FixedSmoothingImagePyramid")
(MovingImagePyramid "MovingSmoothingImagePyramid")
(Optimizer "AdaptiveStochasticGradientDescent")
(Metric "AdvancedNormalizedCorrelation")
(NumberOfResolutions 3)
(MaximumNumberOfIterations 250)
(HowToCombineTransforms "Compose")
(DefaultPixelValue -1000)
(WriteResultImage "{write}")
(ResultImageFormat "nii.gz")
(ResultImagePixelType "short")
"""
_AFFINE = '(Transform "AffineTransform")\n(AutomaticTransformInitialization "true")\n'
_SPLINE = '(Transform "BSplineTransform")\n(FinalGridSpacingInPhysicalUnits 16 16 16)\n'
_GREEDY = """
import sys
from picsl_greedy import Greedy3D
fixed, moving, out, how = sys.argv[1:]
greedy = Greedy3D()
images = f"-i {fixed} {moving}"
affine = "-a -dof 12 -ia-image-centers -m NCC 2x2x2 -n 100x50"
greedy.execute(f"{images} {affine} -o {out}.mat")
greedy.execute(f"{images} -it {out}.mat {how} -o {out}_warp.nii.gz")
warped = f"-rf {fixed} -rm {moving} {out}.nii.gz -r {out}_warp.nii.gz {out}.mat"
greedy.execute(warped)
"""


def commands(
    pairs: list[batch.Pair], folder: Path, weights: Path, iterations: int
) -> dict[str, Callable[[], None]]:
    """What a shell would start, for all pairs; only what is installed."""
    out = folder / "commands"
    out.mkdir(exist_ok=True)
    listed = folder / "scans" / "list.csv"
    lines = [f"{p.name},{p.fixed.name},{p.moving.name},{p.task}" for p in pairs]
    listed.write_text("\n".join(["id,fixed,moving,task", *lines]) + "\n")
    unireg = (sys.executable, "-m", "unireg_jax")
    common = ("--overwrite", "--quiet", "--affine", pairs[0].affine)
    common = (*common, "--weights", weights, "--io-iterations", str(iterations))

    def many():
        start((*unireg, "batch", listed, "--out", out / "batch", *common))

    def each(words):
        def run():
            for pair in pairs:
                start(words(pair))

        return run

    def register(pair):
        files = ("--fixed", pair.fixed, "--moving", pair.moving)
        where = ("--out", out / "register", "--case", pair.name, "--task", pair.task)
        return (*unireg, "register", *files, *where, *common)

    found = {"unireg batch": many, "unireg register": each(register)}
    if shutil.which("elastix"):
        stages = []
        for name, text in (("affine", _AFFINE), ("spline", _SPLINE)):
            path = out / f"{name}.txt"
            write = str(name == "spline").lower()
            path.write_text(_ELASTIX.format(write=write) + text)
            stages += ["-p", path]

        def elastix(pair):
            where = out / "elastix" / pair.name
            where.mkdir(parents=True, exist_ok=True)
            files = ("-f", pair.fixed, "-m", pair.moving)
            return ("elastix", *files, "-out", where, *stages)

        found["elastix"] = each(elastix)
    if importlib.util.find_spec("picsl_greedy"):
        (out / "greedy").mkdir(exist_ok=True)

        def greedy(pair):
            files = (pair.fixed, pair.moving, out / "greedy" / pair.name)
            return (sys.executable, "-c", _GREEDY, *files, conventional.GREEDY)

        found["greedy"] = each(greedy)
    return found


def start(words: tuple) -> None:
    """Runs a command to its end; exit codes other than 0 are a fault."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def command_rounds(
    candidates: dict[str, Callable[[], None]], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of the processes, per round, the cold one first.

    Each is reported as it ends: a round may take long.
    """
    seconds = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            before, wall = os.times(), time.perf_counter()
            run()
            after = os.times()
            cpu = after.children_user + after.children_system
            cpu -= before.children_user + before.children_system
            seconds[name].append((time.perf_counter() - wall, cpu))
            report(f"{name}, round {turn}, all pairs", *seconds[name][-1])
    return seconds


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
    print(f"{name.ljust(38)} wall {wall:8.2f} s   CPU {cpu:8.2f} s", flush=True)


def main(argv) -> None:
    del argv
    options = flags.FLAGS
    cli.setup()
    folder = Path(options.workdir).resolve()
    shape = tuple(map(int, options.shape))
    scans = make_scans(folder / "scans", options.pairs, shape, options.spacing)
    pairs = [
        batch.Pair(scans[0], path, TASK, affine=options.affine, name=path.name[:-7])
        for path in scans[1:]
    ]
    if "functions" in options.only:
        _functions(pairs, folder, options)
    if "commands" in options.only:
        _commands(pairs, folder, options)
    if "heads" in options.only:
        _heads(options.repeats)


def _functions(pairs, folder, options) -> None:
    model = network.load_model()
    out = folder / "out"
    out.mkdir(exist_ok=True)
    runs = {
        "loop": lambda: loop(pairs, model, out),
        "batch": lambda: overlapped(pairs, model, out, options.workers),
    }
    for name, (wall, cpu) in interleaved(runs, options.repeats).items():
        report(f"{name}, per pair", wall / len(pairs), cpu / len(pairs))


def _commands(pairs, folder, options) -> None:
    shutil.rmtree(folder / "cache", ignore_errors=True)
    os.environ["UNIREG_CACHE"] = str(folder / "cache")
    weights = released.find_weights()
    candidates = commands(pairs, folder, weights, options.io_iterations)
    rounds = command_rounds(candidates, options.repeats)
    medians = {name: np.median(s[1:], axis=0) for name, s in rounds.items()}
    for name, (wall, cpu) in medians.items():
        report(f"{name}, per pair", wall / len(pairs), cpu / len(pairs))
    for name in list(medians)[1:]:
        wall, cpu = medians[name] / medians["unireg batch"]
        print(f"{name} over unireg batch: wall {wall:.2f}, CPU {cpu:.2f}", flush=True)


def _heads(repeats) -> None:
    model, module = network.load_model(), UniReg()
    paper = model._replace(
        module=module, params=jax.jit(network.initializer(module))(jax.random.key(0))
    )
    for name, candidate in (("package", model), ("paper", paper)):
        for count, seconds in head_seconds(candidate, repeats + 2).items():
            report(f"{name}, {count}", *seconds)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("workdir", "runs/benchmark_batch", "Scans, results, cache.")
    flags.DEFINE_integer("pairs", 6, "Moving scans.")
    flags.DEFINE_list("shape", ["160", "128", "100"], "Voxels of the atlas.")
    flags.DEFINE_float("spacing", 2.5, "Voxel edge, mm.")
    flags.DEFINE_string("affine", "auto", "Pre-alignment.")
    flags.DEFINE_integer("io_iterations", 0, "Instance optimisation of `commands`.")
    flags.DEFINE_integer("workers", 3, "Threads of the batch.")
    flags.DEFINE_list("only", ["functions", "commands", "heads"], "Parts to be timed.")
    flags.DEFINE_integer("repeats", 2, "Counted rounds.")
    cli.run(main)
