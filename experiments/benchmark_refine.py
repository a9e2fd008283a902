"""Instance optimisation: its time beside PyTorch's, and what it brings on real scans.

    python -m experiments.benchmark_refine --shape=96,96,80 --shape=192,192,160
    python -m experiments.benchmark_refine --data=FOLDER [--split=train]
    python -m experiments.benchmark_refine --data=FOLDER --sweep=smoothness=0.25,0.5,1 \
        --sweep=iterations=10,25,50 [--plot=tradeoff.png]

The first form times the default plans on textured volumes: seconds of CPU and of the
clock of all steps, of `--iterations`, taken as the difference to none; seconds to
compile; scratch. Where PyTorch is installed, the same steps run in turn with ours and
are timed alike, and both costs after the last one are printed. OMP_WAIT_POLICY=PASSIVE
keeps its threads from counting as work while they wait.

The others register pairs of the real collection through `registration`, with 0 and 50
iterations or with several values of one field of the plan at a time: the 12 ordered
pairs of the held-out head-neck patients or, with --split=train, 4 pairs of others, on
which the defaults were chosen; the liver phases and the two lung scans, which have no
other pair. --plot draws what each value costs in seconds and in unevenness, and names
folds.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from scipy import ndimage
from tqdm import tqdm

from experiments import cli, figures, real_pairs, timing
from experiments.real_pairs import LANDMARKS
from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError, on_terminal
from unireg_jax.registration import pipeline, refine
from unireg_jax.registration.compiled import Described
from unireg_jax.registration.embedding import load_extractor
from unireg_jax.registration.refine import Plan


class Run(NamedTuple):
    """One way to register a pair.

    Attributes:
        affine: pre-alignment, see `registration.register`.
        network: False leaves it out.
        plan: instance optimisation.
    """

    affine: str
    network: bool
    plan: Plan


RUNS = (
    Run("auto", True, Plan(0)),
    *(Run("auto", True, Plan(50, k)) for k in ("image", "sam", "mind")),
    Run("auto", False, Plan(0)),
    *(Run("auto", False, Plan(50, k)) for k in ("image", "sam", "mind")),
    Run("coarse", False, Plan(0)),
    Run("coarse", True, Plan(0)),
    *(Run("coarse", network, Plan(50)) for network in (False, True)),
)


# --- time ---------------------------------------------------------------------------


def measure(shape: tuple[int, int, int], iterations: int, repeats: int) -> list[str]:
    """Rows of the table for one grid.

    Args:
        shape: (X, Y, Z) voxels.
        iterations: see Plan.
        repeats: counted runs.
    """
    lines = []
    size = "x".join(map(str, shape))
    scans, disp = _inputs(shape)
    for kind in sorted(refine.LEVELS):
        plan = Plan(iterations, kind)
        views = [_view(scan, plan) for scan in scans]
        plans = plan._replace(iterations=0), plan
        ours = [
            timing.compile_program(
                functools.partial(refine.refine, plan=p), disp, *views
            )
            for p in plans
        ]
        peers = [_torch_loop(disp, *views, p) for p in plans]
        runs = {f"ours {i}": program.run for i, program in enumerate(ours)}
        runs |= {f"torch {i}": peer for i, peer in enumerate(peers) if peer}
        times = timing.measure(runs, repeats)
        cpu, wall = _difference(times, "ours")
        cost = float(ours[1].run().cost_after[0])
        line = (
            f"| {size} | {kind} | {cpu:.2f} | {wall:.2f} | {ours[1].compile_s:.1f} | "
            f"{ours[1].scratch_mib:.0f} | {cost:.4f} | "
        )
        if peers[1]:
            theirs = _difference(times, "torch")
            line += (
                f"{theirs[0]:.2f} | {theirs[1]:.2f} | {theirs[0] / cpu:.1f} | "
                f"{theirs[1] / wall:.1f} | {peers[1]():.4f} |"
            )
        else:
            line += "- | - | - | - | - |"
        lines.append(line)
    return lines


def _difference(times, name) -> tuple[float, float]:
    """Seconds of CPU and of the clock of the steps, without what surrounds them."""
    none, all_steps = times[f"{name} 0"], times[f"{name} 1"]
    return (
        (all_steps.cpu_ms - none.cpu_ms) / 1e3,
        (all_steps.wall_ms - none.wall_ms) / 1e3,
    )


def _inputs(shape):
    """Two textured volumes, the second one displaced, and a start."""
    rng = np.random.default_rng(0)
    # Coarse noise enlarged: a filter over the full grid would take minutes.
    coarse = rng.normal(size=tuple(n // 4 for n in shape))
    volume = ndimage.zoom(coarse, 4, order=1)
    volume = -200 + 300 * volume / volume.std()
    moved = np.roll(volume, (2, -1, 1), axis=(0, 1, 2))
    scans = [
        Described(jnp.asarray(np.rint(v).astype(np.int16)[None, ..., None]), None)
        for v in (volume, moved)
    ]
    # Off the voxel centres, where the slope of the interpolation is not one number.
    return scans, jnp.full((1, *shape, 3), 0.3, jnp.float32)


def _view(scan, plan):
    extractor = load_extractor("sam" if plan.features == "sam" else "none")
    view = functools.partial(refine.view, plan=plan)
    return jax.block_until_ready(jax.jit(view)(scan, extractor))


def _torch_loop(disp, fixed, moving, plan):
    """The same iterations in PyTorch; None without it or on an accelerator."""
    try:
        import torch
        from torch.nn import functional

        from experiments.torch_twin import box_mean as mean
    except ImportError:
        return None
    if jax.default_backend() != "cpu":
        return None

    def first(array):
        return torch.tensor(np.moveaxis(np.asarray(array), -1, 1)).contiguous()

    def correlation(a, b, mask):
        mean_a, mean_b = mean(a, plan.window), mean(b, plan.window)
        cross = mean(a * b, plan.window) - mean_a * mean_b
        var_a = (mean(a * a, plan.window) - mean_a**2).clamp(min=0)
        var_b = (mean(b * b, plan.window) - mean_b**2).clamp(min=0)
        # As in ops/ncc.py, whose products are of sums, not of means.
        floor = 1e-5 / plan.window**6
        found = (mask * cross**2 / (var_a * var_b + floor)).sum() / mask.sum()
        return found / a.shape[1]

    def all_over(part, edge):
        """Where a window is 1 all over, whatever lies beyond the grid."""
        return functional.max_pool3d(1 - part, edge, 1, edge // 2) < 1e-3

    def sampler(shape):
        """Reads volumes at x + disp, the edge held; and where that is inside."""
        still = functional.affine_grid(
            torch.eye(3, 4)[None], (1, 1, *shape), align_corners=True
        )
        half = (torch.tensor(shape) - 1) / 2

        def sample(volume, disp):
            # grid_sample wants the last axis first, in [-1, 1].
            grid = still + (disp.permute(0, 2, 3, 4, 1) / half).flip(-1)
            inside = (grid.detach().abs() <= 1 + 1e-6).all(-1)[:, None]
            read = functional.grid_sample(
                volume, grid, align_corners=True, padding_mode="border"
            )
            return read, inside

        return sample

    finest = refine.LEVELS[plan.features]
    scans = [(first(s.values), first(s.valid)) for s in (fixed, moving)]
    whole = first(disp)
    passes = math.ceil(plan.smoothness)

    def level(factor):
        """Cost and sampler of one grid, and the start there."""
        (one, weight), (other, valid) = (
            [functional.avg_pool3d(part, factor // finest) for part in scan]
            for scan in scans
        )
        sample = sampler(one.shape[2:])
        scanned = torch.cat([other, valid], 1)

        def cost(disp):
            warped, inside = sample(scanned, disp)
            reached = warped[:, -1:].detach() * inside
            if plan.features == "image":
                mask = weight * all_over(weight * reached, plan.window)
                return 1 - correlation(one, warped[:, :-1], mask)
            mask = weight * all_over(reached, 1)
            distance = (warped[:, :-1] - one).square().sum(1, keepdim=True) / 2
            return 1 - (mask * (1 - distance)).sum() / mask.sum()

        return cost, sample, functional.avg_pool3d(whole, factor) / factor

    def steps(cost, sample, u, count):
        for _ in range(count):
            moved = u.clone().requires_grad_()
            (slope,) = torch.autograd.grad(cost(moved), moved)
            down = mean(mean(-slope, 5), 3)
            down = down * plan.step / down.square().sum(1).sqrt().max()
            u = down + sample(u, down)[0]
            for _ in range(passes):
                u = u + plan.smoothness / passes * (mean(u, 3) - u)
        return u

    def run():
        gain = None
        for factor, count in refine.steps(plan, disp.shape[1:4]):
            cost, sample, start = level(int(factor))  # of plans that end on this grid
            u = start
            if gain is not None:
                u = start + 2 * functional.interpolate(
                    gain, scale_factor=2, mode="trilinear", align_corners=False
                )
            u = steps(cost, sample, u, count)
            gain = u - start
        return float(cost(u))

    return run


# --- real scans ---------------------------------------------------------------------


def judge(data: Path, model, split: str, runs: Sequence[Run] = RUNS) -> list[dict]:
    """One row per pair and run.

    Args:
        data: folder of the collection.
        model: from `load_model`.
        split: "val", the held-out patients, or "train".
        runs: what to do with each pair.
    """
    sessions = {run.plan: pipeline.Session(model, refine=run.plan) for run in runs}
    todo, rows = real_pairs.pairs(data, split), []
    for pair in tqdm(todo, disable=not on_terminal()):
        scans, truth = real_pairs.read_scans(pair), real_pairs.read_truth(pair)
        start = real_pairs.own_start(pair, scans, sessions[runs[0].plan]).matrix
        for run in runs:
            named = real_pairs.settings(pair, run.affine, network=run.network)
            session, clock = sessions[run.plan], pipeline.Clock()
            affine = start if run.affine == "auto" else run.affine
            result = session.run(*scans, named, affine=affine, clock=clock)
            rows.append(
                {
                    "task": pair.task,
                    "run": run,
                    **real_pairs.scores(truth, real_pairs.stages(result)["network"]),
                    "fold_percent_network": result.qc["fold_percent_network"],
                    "sdlogj_network": result.qc["sdlogj_network"],
                    "seconds": result.timings.get("refine", 0.0),
                }
            )
    return rows


def swept(text: str) -> list[Run]:
    """Runs from the pair's own affine alone, one for each value of a field of the plan.

    Args:
        text: FIELD=A,B,C.

    Raises:
        UserError: no such field, or no numbers.
    """
    name, _, values = text.partition("=")
    kinds = {k: type(v) for k, v in Plan._field_defaults.items() if k != "features"}
    try:
        values = [kinds[name](value) for value in values.split(",")]
    except (KeyError, ValueError):
        raise UserError(
            "schema",
            f"--sweep: FIELD=A,B,C with FIELD of {sorted(kinds)} and numbers expected, "
            f"got {text!r}",
            USAGE,
        ) from None
    return [Run("auto", False, Plan()._replace(**{name: value})) for value in values]


def merged(texts: Sequence[str]) -> dict[str, list[Run]]:
    """Field -> its runs, of several texts as `swept` takes them."""
    sweeps = {}
    for text in texts:
        sweeps.setdefault(text.partition("=")[0], []).extend(swept(text))
    return sweeps


def plot(path: Path, rows: list[dict], sweeps: dict[str, list[Run]]) -> None:
    """Draws a line per swept field: what overlap costs in seconds, and how uneven.

    Args:
        path: PNG file.
        rows: from `judge`.
        sweeps: field -> its runs.
    """

    def mean(run, key, task="headneck"):
        mine = [r[key] for r in rows if r["run"] == run and r["task"] == task]
        return float(np.mean(mine))

    def text(run, name):
        folds = mean(run, "fold_percent_network")
        more = f" ({folds:.2f} % folds)" if folds >= 5e-3 else ""
        return f"{getattr(run.plan, name):g}{more}"

    lines = {}
    for name, runs in sweeps.items():
        lines[name] = [
            figures.Setting(
                text(run, name),
                run.plan == Plan(),
                {
                    "seconds of instance optimisation": mean(run, "seconds"),
                    "SDlogJ": mean(run, "sdlogj_network"),
                    "head-neck DSC, %": 100 * mean(run, "dsc"),
                    **{f"{t} TRE, mm": mean(run, "tre_mm", t) for t in LANDMARKS},
                },
            )
            for run in runs
        ]
    figures.save_settings(
        path,
        lines,
        across=("seconds of instance optimisation", "SDlogJ"),
        up=("head-neck DSC, %", *(f"{task} TRE, mm" for task in LANDMARKS)),
    )


def table(rows: list[dict], runs: Sequence[Run] = RUNS) -> str:
    """Markdown: one row per run; "better" than the first one."""
    lines = [
        "| start | features | iterations | smoothness | head-neck DSC₇, mean "
        "(min … max) | pairs better | folds %, mean (max) | SDlogJ | liver TRE mm, "
        "mean / median | lung TRE mm, mean / median | folds %, liver, lung | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def column(run, task, key):
        chosen = [r for r in rows if r["run"] == run and r["task"] == task]
        return np.array([r[key] for r in chosen])

    base = column(runs[0], "headneck", "dsc")
    for run in runs:
        plan = run.plan
        dsc, folds, uneven, seconds = (
            column(run, "headneck", k)
            for k in ("dsc", "fold_percent_network", "sdlogj_network", "seconds")
        )
        better, dsc = int((dsc > base).sum()), 100 * dsc
        tre = [
            " / ".join(
                f"{column(run, task, k)[0]:.2f}" for k in ("tre_mm", "tre_median_mm")
            )
            for task in LANDMARKS
        ]
        other = [column(run, task, "fold_percent_network")[0] for task in LANDMARKS]
        start = run.affine + " + network" * run.network
        name = plan.features if plan.iterations else "none"
        for field in ("step", "window", "finer"):
            if (value := getattr(plan, field)) != Plan._field_defaults[field]:
                name += f", {field} {value:g}"
        weight = f"{plan.smoothness:g}" if plan.iterations else ""
        lines.append(
            f"| {start} | {name} | {plan.iterations} | {weight} | **{dsc.mean():.1f}** "
            f"({dsc.min():.1f} … {dsc.max():.1f}) | "
            f"{better} of {len(dsc)} | "
            f"{folds.mean():.2f} ({folds.max():.2f}) | {uneven.mean():.2f} | "
            f"{tre[0]} | {tre[1]} | "
            f"{other[0]:.2f}, {other[1]:.2f} | {np.median(seconds):.1f} |"
        )
    return "\n".join(lines)


@cli.one_line_errors
def main(argv) -> None:
    del argv
    cli.setup()
    options = flags.FLAGS
    if (options.sweep or options.plot) and not options.data:
        raise UserError("schema", "--sweep, --plot: --data expected, none given", USAGE)
    if options.plot and not options.sweep:
        raise UserError("schema", "--plot: a --sweep to draw expected, got none", USAGE)
    if options.data:
        model = registration.load_model(
            options.weights or real_pairs.weights_of(options.split)
        )
        sweeps = merged(options.sweep)
        # The defaults are in each.
        runs = tuple(dict.fromkeys(run for part in sweeps.values() for run in part))
        rows = judge(Path(options.data), model, options.split, runs or RUNS)
        print(table(rows, runs or RUNS))
        if options.plot:
            plot(Path(options.plot), rows, sweeps)
        return
    jax.config.update("jax_enable_compilation_cache", False)
    print(
        "| grid | features | CPU s | wall s | compile s | scratch MiB | cost after | "
        "torch CPU s | wall s | CPU x | wall x | its cost after |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for text in options.shape:
        shape = tuple(int(n) for n in text.split(","))
        for line in measure(shape, options.iterations, options.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_multi_string("shape", ["96,96,80"], "X,Y,Z voxels; may repeat.")
    flags.DEFINE_integer("iterations", 50, "See Plan.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Counted runs.", lower_bound=1)
    flags.DEFINE_string("data", None, "Folder of the collection: accuracy instead.")
    flags.DEFINE_enum("split", "val", [*real_pairs.SPLITS], "Head-neck patients.")
    flags.DEFINE_multi_string("sweep", [], "FIELD=A,B,C of Plan, no network.")
    flags.DEFINE_string("plot", None, "PNG of the sweeps.")
    flags.DEFINE_string("weights", None, "File, or name in the package; by --split.")
    app.run(main)
