"""Accuracy beside conventional tools: the same real pairs, start, grid and judge.

    python -m experiments.compare_peers --data=FOLDER --out=runs/peers
    python -m experiments.compare_peers --data=FOLDER --out=runs/peers --only=ours

The 12 ordered pairs of the held-out head-neck patients (with --split=train the 4 pairs
of others on which defaults were chosen), the liver phases and the two lung scans. Each
pair is pre-aligned once by `registration`, affine "auto", and resampled onto its
network grid: 96x96x80 voxels of 4 mm, with --spacing=2 192x192x160 of 2 mm. Every
method finds a displacement on that grid, which is composed with the affine on the fixed
scan's own grid and judged by one function; folds are counted on the working grid, over
the fixed body. Only "coarse" starts from matches of its own.

Each run has a process of its own, so that seconds of CPU and memory are its own, and
one that fails is a row that says why. What is counted begins with two images on the
working grid and ends with the displacement there: of a tool with reading two files, of
ours with features, network and refinement, once they are compiled; rows "refined finer"
leave out the reading of both scans on their finer grid. The process's seconds before
that are given apart: libraries, and of ours weights and programs, which the first pair
compiles and the others find in a cache. Tools that are not installed (extra `peers`;
deedsBCV and reg_f3d on PATH) are left out and named.

With --accuracy our rows are found in this process, compiled once, without seconds and
memory and on JAX's device: for many weights or patients, when nothing else is asked.

Rows go to results.json in --out; those that are there are not measured again unless
settings, version, --threads, the judge's sources or, of ours, anything in the library
or the weights changed, or the pair's start where another row had it found, or with
--redo; failed ones are.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipeline import store
from experiments import cli, conventional, digests, figures, processes, real_pairs
from experiments.real_pairs import LANDMARKS, Pair, Truth
from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError, on_terminal
from unireg_jax.evaluation import metrics, regularity
from unireg_jax.imaging import grids, mapping, nifti, points, preprocess
from unireg_jax.imaging.grids import Field, Grid
from unireg_jax.registration import Plan
from unireg_jax.registration.embedding import find_embedding
from unireg_jax.registration.weights import find_weights
from unireg_jax.tasks import OUTSIDE_HU

RESULTS = "results.json"  # in --out
SHAPES = {4: (96, 96, 80), 2: (192, 192, 160)}
_LIMIT_S = 7200  # of one run
_ERRORS = ("tre_mm", "tre_median_mm", "tre_sure_mm")
_KEY = ("spacing", "pair", "method")
_SAME = ("settings", "version", "sources")  # of a row that is not measured again
_JUDGE = (metrics, regularity, grids, mapping, nifti, points)  # and what they import


class Own(NamedTuple):
    """One of our rows.

    Attributes:
        name: in the table.
        affine: "auto", the shared start, or "coarse".
        plan: instance optimisation; None for none.
        passes: of the network; 0 leaves it out.
        symmetric: whether each of them averages both ways.
    """

    name: str
    affine: str
    plan: Plan | None
    passes: int = 0
    symmetric: bool = False


def own_rows() -> list[Own]:
    """Our rows, with the instance optimisation's defaults of now, or a finer grid.

    "network" is one pass one way, as in the paper, "network twice" two symmetric ones.
    """
    rows = []
    networks = {"": (0, False), "network": (1, False), "network twice": (2, True)}
    plans = {"": None, "refined": Plan(), "refined finer": Plan(finer=2)}
    for affine, (refined, plan), (network, how) in itertools.product(
        ("auto", "coarse"), plans.items(), networks.items()
    ):
        start = "affine" if affine == "auto" else "coarse"
        parts = [part for part in (start, network, refined) if part]
        rows.append(Own("ours: " + " + ".join(parts), affine, plan, *how))
    return [row for row in rows if row.affine == "auto" or "finer" not in row.name]


# --- the shared start, and the judge ------------------------------------------------


class Start(NamedTuple):
    """A pair on its working grid.

    Attributes:
        grid: shape and vox2world.
        kind: of the pre-alignment, as "auto" chose it.
        affine: [4, 4] fixed world -> moving world, LPS mm.
        body: [X, Y, Z] bool, of the fixed scan.
        fixed, moving: [X, Y, Z] int16 HU, OUTSIDE_HU where there is no scan.
        target: the fixed scan's own grid.
        truth: of `real_pairs.read_truth`.
        doubtful: positions of its landmarks that the images contradict.
    """

    grid: Grid
    kind: str
    affine: np.ndarray
    body: np.ndarray
    fixed: np.ndarray
    moving: np.ndarray
    target: Grid
    truth: Truth
    doubtful: tuple[int, ...] = ()


def begin(pair: Pair, session: registration.Session) -> Start:
    """Pre-aligns a pair and brings it onto its working grid."""
    scans = real_pairs.read_scans(pair)
    found = real_pairs.own_start(pair, scans, session)
    return Start(
        found.layout.grid,
        found.settings["affine_used"],
        found.matrix,
        found.body,
        found.fixed_hu,
        found.moving_hu,
        mapping.grid_of(scans[0]),
        real_pairs.read_truth(pair),
        real_pairs.DOUBTFUL.get(pair.task, ()),
    )


def whole_map(field: Field, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """The displacement of x -> affine (x + u(x)) on another grid.

    Args:
        field: u on the working grid; beyond it its edge goes on.
        affine: [4, 4] LPS mm -> LPS mm.
        grid: where to sample it.

    Returns:
        [X, Y, Z, 3] float32, LPS mm.
    """
    out = np.empty((*grid.shape, 3), np.float32)

    def work(part: slice) -> None:
        xyz = grids.positions(grid, part)
        moved, _ = grids.through([field, affine], xyz, edge=True)
        out[part] = (moved - xyz).T.reshape(out[part].shape)

    grids.slabs(work, grid.shape, None)
    return out


def judge(
    start: Start, field: Field, affine: np.ndarray | None
) -> dict[str, float | None]:
    """Scores of one result.

    Args:
        start: of the pair.
        field: on the working grid or a finer one, before the affine.
        affine: None for the shared one.

    Returns:
        fold_percent and sdlogj over the fixed body, of `field`; and dsc_percent,
        shared_percent (`shared_slices`) and hd95_mm, means over the organs (of hd95_mm
        None where one was lost, see `real_pairs.scores`), or tre_mm
        and tre_median_mm of the landmarks and tre_sure_mm, the mean of those that are
        not doubtful, if some are.

    Raises:
        ValueError: the field is on another grid, or not finite.
    """
    factor = max(1, field.grid.shape[0] // start.grid.shape[0])
    if not grids.same(field.grid, grids.finer(start.grid, factor)):
        raise ValueError(
            f"field must be on the working grid of {start.grid.shape} voxels, got "
            f"{field.grid.shape}, or another place"
        )
    mapping.field(*field)  # checks its values
    body = start.body
    for axis in range(3):
        body = body.repeat(factor, axis)
    smooth = regularity.field_scores(*field, mask=body)
    scores = {key: smooth[key] for key in ("fold_percent", "sdlogj")}
    matrix = start.affine if affine is None else affine
    whole = mapping.field(
        whole_map(field, matrix, start.target), start.target.vox2world
    )
    found = real_pairs.scores(start.truth, whole, surface=True)
    if "dsc" in found:
        found["dsc_percent"] = 100 * found["dsc"]
        found["shared_percent"] = 100 * found["dsc_shared"]
    if start.doubtful:
        sure = np.delete(found["errors_mm"], start.doubtful)
        found["tre_sure_mm"] = float(sure.mean())
    kept = ("dsc_percent", "shared_percent", "hd95_mm", *_ERRORS)
    return scores | {key: found[key] for key in kept if key in found}


def draw(
    path: Path,
    pair: Pair,
    start: Start,
    field: Field,
    title: str,
    *,
    affine: np.ndarray | None = None,
) -> None:
    """A picture on the working grid: fixed, moving, warped, field.

    Args:
        path: of the PNG.
        pair: of `start`.
        start: of the pair.
        field: on the working grid, before the affine.
        title: above it.
        affine: None for the shared one.
    """
    xyz = grids.positions(start.grid, slice(None))
    moved, _ = grids.through([field], xyz)
    coords = grids.apply(np.linalg.inv(start.grid.vox2world), moved)
    image = start.moving
    if affine is not None:
        _, scan = real_pairs.read_scans(pair)
        image = preprocess.resample(scan, start.grid, fill=OUTSIDE_HU, matrix=affine)
    labels = None
    if pair.task == "headneck":
        matrix = start.affine if affine is None else affine
        fixed, moving = (
            preprocess.prepare_labels(volume, start.grid, matrix=matrix)
            for volume, matrix in zip(start.truth, (None, matrix), strict=True)
        )
        labels = fixed, grids.nearest(moving, coords).reshape(fixed.shape)
    figures.save_registration(
        path,
        start.fixed,
        image,
        grids.linear(image, coords).reshape(start.fixed.shape),
        (moved - xyz).T.reshape(*start.fixed.shape, 3),
        np.diag(start.grid.vox2world)[:3],
        title=title,
        labels=labels,
    )


# --- our own runs, in a process of their own ----------------------------------------


class _CpuClock(registration.Clock):
    """Seconds of CPU instead."""

    def __init__(self):
        super().__init__()
        self._last = self._start = conventional.cpu_seconds()

    def lap(self, stage: str) -> None:
        now = conventional.cpu_seconds()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._last
        self._last = now


def load(weights: str, spacing: int) -> registration.Model:
    """The model, on the working grid."""
    model = registration.load_model(weights)
    spec = dataclasses.replace(
        model.preprocess, shape=SHAPES[spacing], spacing_mm=(float(spacing),) * 3
    )
    return model._replace(preprocess=spec)


def session_of(own: Own, weights: str, spacing: int) -> registration.Session:
    """What registers by one of our rows."""
    model = load(weights, spacing)
    return registration.Session(
        model,
        refine=own.plan,
        network=own.passes > 0,
        passes=max(own.passes, 1),
        symmetric=own.symmetric,
    )


def prepare(
    own: Own, pair: Pair, start: np.ndarray | str, session: registration.Session
) -> Callable[[registration.Clock], registration.Registration]:
    """A function that registers a pair by one of our rows.

    Args:
        own: the row.
        pair: what.
        start: the shared affine, [4, 4] LPS mm, or its kind, to find it anew.
        session: of the row, from `session_of`.
    """
    settings = real_pairs.settings(pair, own.affine, network=own.passes > 0)
    scans = real_pairs.read_scans(pair)
    affine = start if own.affine == "auto" else own.affine

    def run(clock):
        # New objects: a session knows scans by their identity.
        again = (volume._replace() for volume in scans)
        return session.run(*again, settings, affine=affine, clock=clock)

    return run


def outcome(result: registration.Registration) -> tuple[Field, np.ndarray]:
    """Field on the working grid, in LPS mm, and affine of a result."""
    grid = result.network_grid
    field = conventional.from_voxels(result.network_disp, grid.vox2world)
    return field, result.affine


def register(job: dict[str, Any], folder: Path) -> None:
    """One of our rows on one pair."""
    task, *paths = job["pair"]
    pair = Pair(task, (task, task), *map(Path, paths), ())
    own = Own(**job["own"])
    own = own._replace(plan=own.plan and Plan(**own.plan))
    bare = own.passes == 0 and own.plan is None
    # The shared start is found for its own row alone, and otherwise given.
    start = job["kind"] if bare else np.array(job["affine"])
    session = session_of(own, job["weights"], job["spacing"])
    register_once = prepare(own, pair, start, session)

    # What lies between two images on the grid and the displacement there.
    counted = ["affine"] if bare else ["network", "refine"]
    counted += ["affine"] * (own.affine == "coarse" and not bare)

    def run():
        clock = _CpuClock()
        return register_once(clock), clock

    # What these stages compile, they compile in the first pair; others have by now.
    if "affine" in counted or own.passes > 1 or own.symmetric:
        run()
    (result, clock), measured = conventional.measure(run)
    stages = clock.seconds()
    measured["cpu_s"] = sum(stages.get(stage, 0.0) for stage in counted)
    measured["stages"] = stages
    del measured["wall_s"]  # of the whole run
    field, affine = outcome(result)
    conventional.write_result(folder, field, measured, affine)


# --- rows ---------------------------------------------------------------------------


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        name: as printed.
        settings: JSON; a change of this or of the next two measures anew.
        version: of the tool.
        sources: digest of the code that the row depends on, see `digest`.
        own: one of `own_rows`, or None.
    """

    name: str
    settings: Any
    version: str
    sources: str
    own: Own | None = None


def digest(weights: Path | None = None, *, own: bool) -> str:
    """Start of the SHA-256 of what a row depends on besides its settings.

    Args:
        weights: network that the row looks through, with its description and with the
            package's embedding; None for none.
        own: True for our rows: the judge, and all of the library. False for tools,
            which take long: the judge alone, so that after a change of the
            pre-alignment they are measured anew where the start differs.
    """
    files = [Path(__file__), Path(conventional.__file__), Path(real_pairs.__file__)]
    library = digests.sources(digests.LIBRARY)
    files += library if own else digests.imported(_JUDGE)
    if weights is not None:
        for path in (weights, find_embedding()):
            files += [path, path.with_suffix(".json")]
    return digests.of(files)[:12]


def methods(
    only: list[str],
    spacing: int,
    weights: str = real_pairs.WEIGHTS,
    *,
    leave_out: Sequence[str] = (),
) -> tuple[list[Method], list[str]]:
    """What can run here, and the names of what is not installed.

    Args:
        only: how names of methods begin, in any case; empty for all.
        spacing: mm; the network is left out where it was not trained.
        weights: of our rows, as of `load_model`.
        leave_out: how names of methods end that are not wanted, in any case.

    Raises:
        UserError: one that begins, or ends, no name, exit code 2.
    """
    own = {row.name: row for row in own_rows()}
    theirs, plain = (digest(own=flag) for flag in (False, True))
    names = [*own, *conventional.PEERS]
    wanted = {n for one in only for n in names if n.lower().startswith(one.lower())}
    for one in only:
        if not any(name.lower().startswith(one.lower()) for name in names):
            raise UserError(
                "schema",
                f"--only: the beginning of one of {', '.join(names)} expected, got "
                f"{one}",
                USAGE,
            )
    for one in leave_out:
        ending = {name for name in names if name.lower().endswith(one.lower())}
        if not ending:
            raise UserError(
                "schema",
                f"--leave_out: the end of one of {', '.join(names)} expected, got "
                f"{one}",
                USAGE,
            )
        names = [name for name in names if name not in ending]
    found, missing = [], []
    for name in names:
        if only and name not in wanted:
            continue
        if row := own.get(name):
            plan = row.plan and row.plan._asdict()
            # The network knows its own voxels alone, and these are fine already.
            alone = row.passes == 0 and row.affine == "auto"
            if spacing == 4 or (alone and row.plan in (None, Plan())):
                settings = row._replace(plan=plan)._asdict()
                del settings["name"]
                source = plain if alone else digest(find_weights(weights), own=True)
                found.append(Method(name, settings, _version(), source, row))
            continue
        peer = conventional.PEERS[name]
        version = conventional.version(peer)
        if version is None:
            missing.append(name)
        else:
            found.append(Method(name, peer.settings, version, theirs))
    return found, missing


def _version() -> str:
    return f"{importlib.metadata.version('unireg-jax')}, jax {jax.__version__}"


def measure(
    method: Method, pair: Pair, start: Start, folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """One row of a process of its own: scores and measures, or why it failed.

    Args:
        method: what to run.
        pair: on what.
        start: of the pair; its images lie in `folder`.
        folder: of the pair.
        options: weights, spacing, threads, cache folder, picture folder or None.
    """
    threads = str(options["threads"])
    words = [sys.executable, "-m"]
    if method.own:
        job = {
            "pair": [pair.task, str(pair.fixed), str(pair.moving)],
            "own": method.own._replace(plan=method.settings["plan"])._asdict(),
            "kind": start.kind,
            "affine": start.affine.tolist(),
            "weights": options["weights"],
            "spacing": options["spacing"],
            "threads": options["threads"],
        }
        (folder / "job.json").write_text(json.dumps(job))
        words += ["experiments.compare_peers", f"--job={folder}"]
    else:
        words += ["experiments.conventional", method.name, str(folder), threads]
    environment = os.environ | {
        # A thread that waits by spinning would count as work, on shared cores most.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",  # the last line is then the one that says why
        "OMP_NUM_THREADS": threads,
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": threads,
        "UNIREG_CACHE": str(options["cache"]),
        "JAX_PLATFORMS": "cpu",
    }
    for name in (conventional.FIELD, conventional.MEASURED):
        (folder / name).unlink(missing_ok=True)
    try:
        with open(folder / "log.txt", "w+", errors="replace") as log:
            code = processes.exit_code(words, log, _LIMIT_S, env=environment)
            log.seek(0)
            said = log.read().strip().splitlines()[-1:]
        if code is None:
            return {"failed": f"not done after {_LIMIT_S} s"}
        if code:
            return {"failed": f"exit code {code} {''.join(said)[:200]}"}
        field, affine, measured = conventional.read_result(folder)
        scores = judge(start, field, affine)
    except (OSError, ValueError, KeyError) as error:
        return {"failed": f"no usable field: {error}"[:250]}
    if options["picture"]:
        file = "".join(c if c.isalnum() else "_" for c in method.name)
        name = f"{pair.name}_{file}.png"
        draw(options["picture"] / name, pair, start, field, method.name, affine=affine)
    return scores | measured


def find(
    method: Method, pair: Pair, start: Start, session: registration.Session
) -> dict[str, Any]:
    """One of our rows in this process: scores alone, or why it failed."""
    try:
        run = prepare(method.own, pair, start.affine, session)
        return judge(start, *outcome(run(registration.Clock())))
    except (UserError, OSError, ValueError) as error:
        return {"failed": " ".join(str(error).split())[:250]}


def race(
    todo: list[Pair], found: list[Method], out: Path, options: dict[str, Any], redo
) -> list[dict[str, Any]]:
    """Measures what is not in results.json; returns its rows of these settings."""
    path, session = out / RESULTS, None
    sessions = {}  # of our rows, where they share this process
    bar = tqdm(total=len(todo) * len(found), disable=not on_terminal())
    for pair in todo:
        known = read_rows(path)
        due = [m for m in found if redo or not _stands(known, pair, m, options)]
        if due:
            folder = out / f"{options['spacing']}mm" / pair.name
            folder.mkdir(parents=True, exist_ok=True)
            if session is None:
                model = load(options["weights"], options["spacing"])
                session = registration.Session(model, network=False)
            start = begin(pair, session)
            conventional.write_pair(
                folder, start.fixed, start.moving, start.grid.vox2world
            )
            # Rows of one pair belong together.
            due = [
                m
                for m in found
                if m in due
                or not same_start(known[_at(pair, m, options)], start.affine)
            ]
        bar.update(len(found) - len(due))
        for method in due:
            row = {
                **dict(zip(_KEY, _at(pair, method, options), strict=True)),
                "task": pair.task,
                **{key: getattr(method, key) for key in _SAME},
                "date": datetime.date.today().isoformat(),
                "start": start.affine.tolist(),
            }
            if options["accuracy"]:
                if method.name not in sessions:
                    sessions[method.name] = session_of(
                        method.own, options["weights"], options["spacing"]
                    )
                row |= find(method, pair, start, sessions[method.name])
            else:
                row["threads"] = options["threads"]
                row |= measure(method, pair, start, folder, options)
            _add(path, row)
            bar.update()
    names = {method.name for method in found}
    return [
        row
        for row in read_rows(path).values()
        if row["spacing"] == options["spacing"] and row["method"] in names
        if row["pair"] in {pair.name for pair in todo}
    ]


def _at(pair: Pair, method: Method, options: dict[str, Any]) -> tuple:
    """Where a row is in results.json, by `_KEY`."""
    return options["spacing"], pair.name, method.name


def _stands(known, pair: Pair, method: Method, options: dict[str, Any]) -> bool:
    """Whether a row is there that need not be found again, whatever its start."""
    old = known.get(_at(pair, method, options), {"failed": "not yet"})
    now = options["threads"]  # rows of before do not say
    timed = options["accuracy"] or ("cpu_s" in old and old.get("threads", now) == now)
    same = all(old.get(key) == getattr(method, key) for key in _SAME)
    return "failed" not in old and same and timed


def same_start(row: dict[str, Any], affine: Any) -> bool:
    """Whether a row began at an affine, but for the rounding of other machines."""
    limit = np.full(np.shape(affine), 1e-4)
    limit[:3, 3:] = 0.05  # mm
    off = np.abs(np.subtract(row.get("start", np.nan), affine))
    return bool((off <= limit).all())


def _add(path: Path, row: dict[str, Any]) -> None:
    """Writes and tells a row; another run may have added some of other methods."""
    known = read_rows(path) | {tuple(row[k] for k in _KEY): row}
    text = json.dumps({"rows": list(known.values())}, indent=1)
    store.write_atomic(path, text.encode())
    tell = {k: v for k, v in row.items() if isinstance(v, float)}
    said = row.get("failed") or ", ".join(f"{k} {v:.2f}" for k, v in tell.items())
    tqdm.write(f"{row['pair']}: {row['method']}: {said}", file=sys.stderr)


def read_rows(path: Path) -> dict[tuple, dict[str, Any]]:
    """Rows of results.json by what tells them apart."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {tuple(row[k] for k in _KEY): row for row in rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row per method."""
    lines = [
        "| method | pairs | head-neck DSC₇ %, mean (min … max) | in shared slices | "
        "HD95 mm | "
        "folds %, mean (max) | liver TRE mm, mean / median | lung TRE mm, mean / "
        "median / without doubtful marks | folds %, liver, lung | "
        "CPU s, median (max) | start s, median (max) | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def span(values, digits, ends="max"):
        if not len(values):
            return "-"
        middle = np.median(values) if ends == "median" else np.mean(values)
        return f"{middle:.{digits}f} ({np.max(values):.{digits}f})"

    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        good = [row for row in mine if "failed" not in row]

        def column(key, task=None, good=good):
            chosen = [row for row in good if task in (None, row["task"])]
            return np.array([row[key] for row in chosen if row.get(key) is not None])

        dsc = column("dsc_percent", "headneck")
        organs = "-"
        if len(dsc):
            organs = f"**{dsc.mean():.1f}** ({dsc.min():.1f} … {dsc.max():.1f})"
        shared, hd95 = (
            f"{values.mean():.1f}" if len(values) else "-"
            for values in (column(k, "headneck") for k in ("shared_percent", "hd95_mm"))
        )
        if lost := len(dsc) - len(column("hd95_mm", "headneck")):
            hd95 += f" (organs lost in {lost} more)"
        errors, folds = [], []
        for task in LANDMARKS:
            means = np.concatenate([column(key, task) for key in _ERRORS])
            errors.append(" / ".join(f"{v:.2f}" for v in means) or "-")
            more = column("fold_percent", task)
            folds.append("".join(f"{v:.2f}" for v in more) or "-")
        peak = column("peak_mib")
        count = f"{len(good)}" if len(good) == len(mine) else f"{len(good)}/{len(mine)}"
        lines.append(
            f"| {name} | {count} | {organs} | "
            f"{shared} | {hd95} | "
            f"{span(column('fold_percent', 'headneck'), 2)} | "
            f"{errors[0]} | {errors[1]} | {', '.join(folds)} | "
            f"{span(column('cpu_s'), 1, 'median')} | "
            f"{span(column('start_s'), 1, 'median')} | "
            f"{f'{peak.max():.0f}' if len(peak) else '-'} |"
        )
    return "\n".join(lines)


def main(argv) -> None:
    del argv
    cli.setup()
    processes.end_on_signals()
    options = flags.FLAGS
    if options.job:
        folder = Path(options.job)
        job = json.loads((folder / "job.json").read_text())
        conventional.hold_to(job["threads"])
        register(job, folder)
        return
    if not options.data:
        raise UserError("schema", "flags: --data=FOLDER expected; see --help", USAGE)
    data, out = Path(options.data), Path(options.out)
    if not data.is_dir():
        raise UserError("not_found", f"--data: {data} is not there", USAGE)
    # Those with landmarks, which are quick, come first.
    todo = real_pairs.pairs(data, options.split, tasks=(*LANDMARKS, "headneck"))
    if options.pairs:
        named = {pair.name: pair for pair in todo}
        if unknown := [name for name in options.pairs if name not in named]:
            raise UserError(
                "schema",
                f"--pairs: names among {', '.join(named)} expected, got "
                f"{', '.join(unknown)}",
                USAGE,
            )
        todo = [named[name] for name in options.pairs]
    weights = options.weights or real_pairs.weights_of(options.split)
    found, missing = methods(
        options.only, options.spacing, weights, leave_out=options.leave_out
    )
    if options.accuracy:
        found = [method for method in found if method.own]
        if not found or options.pictures or options.threads:
            raise UserError(
                "schema",
                "--accuracy: some of our rows expected, and neither --pictures nor "
                "--threads; see --help",
                USAGE,
            )
    out.mkdir(parents=True, exist_ok=True)
    picture = None
    if options.pictures:
        picture = out / "pictures"
        picture.mkdir(exist_ok=True)
    rows = race(
        todo,
        found,
        out,
        {
            "weights": weights,
            "spacing": options.spacing,
            "threads": options.threads or len(os.sched_getaffinity(0)),
            "cache": out.resolve() / "cache",
            "picture": picture,
            "accuracy": options.accuracy,
        },
        options.redo,
    )
    print(table(rows))
    print()
    for method in found:
        print(f"- {method.name}: {method.version}; {json.dumps(method.settings)}")
    for row in rows:
        if "failed" in row:
            print(f"- failed: {row['method']} on {row['pair']}: {row['failed']}")
    for name in missing:
        print(f"- left out, not installed: {name}")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_string("out", "runs/peers", "Where rows and pictures go.")
    flags.DEFINE_enum("split", "val", [*real_pairs.SPLITS], "Head-neck patients.")
    flags.DEFINE_list("only", [], "Methods whose names begin so; none: all.")
    flags.DEFINE_list("leave_out", [], "But not those whose names end so.")
    flags.DEFINE_list("pairs", [], "Names of pairs; none: all.")
    flags.DEFINE_integer("spacing", 4, "mm of the working grid, 4 or 2.")
    flags.register_validator("spacing", lambda n: n in SHAPES, "4 or 2 expected")
    flags.DEFINE_integer("threads", None, "Of every run; none: one per core.")
    flags.DEFINE_bool("redo", False, "Measure again what is there.")
    flags.DEFINE_bool("accuracy", False, "Our rows, untimed, in this process: faster.")
    flags.DEFINE_bool("pictures", False, "A picture of every result measured now.")
    flags.DEFINE_string("weights", None, "File, or name in the package; by --split.")
    flags.DEFINE_string("job", None, "Folder of one of our runs, which this starts.")
    cli.run(main)
