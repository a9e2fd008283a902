"""Matching by features on real scans: points, affine maps, and their time.

    python -m experiments.benchmark_matching --data=FOLDER \
        --features=mind --features=random --features=sam.safetensors

The first table: of given points of the fixed scan the most similar place anywhere in
the moving one, against the true place: key points of the liver phases (automatic, a
silver standard), landmarks of the two lung scans, centroids of the organs that both of
two held-out head-neck patients have (12 ordered pairs). The second: the affine through
stable matches against the intensity search and no alignment at all: mean DSC of 7
organs, of the lungs and of nine organs of the abdomen for the two pairs of other
patients, landmark error, seconds of CPU without compilation. Features: mind, none, sam,
a file, or "random" and "random-lite", the embedding networks as initialised.

With --split=train, head-neck pairs of training patients, on which options are chosen.
With --fault=table the moving scan's table stands 40 mm further along the body, 25 back
and 15 aside; with --fault=cut two fifths of its slices are missing, at its lower and at
its upper end in turns.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import ablations, cli, conventional, real_pairs
from experiments.benchmark_quality import SCANS, Scans
from experiments.real_pairs import LANDMARKS, Pair, Truth
from experiments.sam import PRESETS
from unireg_jax.errors import on_terminal
from unireg_jax.imaging import nifti, preprocess
from unireg_jax.imaging.grids import Field
from unireg_jax.imaging.mapping import Mapping
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.points import PointPairs
from unireg_jax.imaging.preprocess import Grid, PreprocessSpec
from unireg_jax.models import features
from unireg_jax.models.features import Extractor, Maps, sam
from unireg_jax.registration import affine, embedding, feature_affine, matching
from unireg_jax.tasks import OUTSIDE_HU

BETWEEN = ("chest", "abdomen")  # of `ablations.between`
CLOSE_MM = 10.0
TABLE_MM = (15.0, -25.0, 40.0)
CUT = 0.4


class Scan(NamedTuple):
    """A scan on its own network grid.

    Attributes:
        volume: as read.
        grid: network grid.
        hu: [X, Y, Z] int16.
        body: [X, Y, Z] bool.
    """

    volume: Volume
    grid: Grid
    hu: np.ndarray
    body: np.ndarray


class Case(NamedTuple):
    """A pair and what is known about it.

    Attributes:
        pair: its paths.
        truth: of `real_pairs.read_truth`, or of `ablations.between`.
        fixed_mm: [N, 3] LPS mm, landmarks or centroids of organs.
        moving_mm: [N, 3] LPS mm, the same spots.
        moved: [4, 4], the moving scan's own world -> where the fault put it.
        cut: "", or the end that is missing: "lower" or "upper".
    """

    pair: Pair
    truth: Truth
    fixed_mm: np.ndarray
    moving_mm: np.ndarray
    moved: np.ndarray
    cut: str


def cases_of(data: Path, split: str, fault: str = "none") -> list[Case]:
    """Head-neck pairs of a split, the liver and lung pairs, and those of `BETWEEN`."""
    moved = np.eye(4)
    moved[:3, 3] = TABLE_MM if fault == "table" else 0
    found = [(p, real_pairs.read_truth(p)) for p in real_pairs.pairs(data, split)]
    read = Scans(data)
    for group, names, truth in ablations.between(read, BETWEEN):
        scans, labels = ([read.path(SCANS[n][i]) for n in names] for i in (1, 2))
        found.append((Pair(group, names, *scans, tuple(labels)), truth))
    out = []
    for i, (pair, truth) in enumerate(found):
        cut = ("lower", "upper")[i % 2] if fault == "cut" else ""
        marks = isinstance(truth, PointPairs)
        here, there = (truth.fixed, truth.moving) if marks else _centers(*truth)
        out.append(Case(pair, truth, here, _apply(moved, there), moved, cut))
    return out


def _centers(fixed: Volume, moving: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Centroids of the organs that both have, LPS mm."""
    shared = np.intersect1d(np.unique(fixed.data), np.unique(moving.data))
    return tuple(
        np.array([_center(volume, organ) for organ in shared if organ])
        for volume in (fixed, moving)
    )


def _center(labels: Volume, organ: int) -> np.ndarray:
    place = np.argwhere(labels.data == organ).mean(axis=0)
    return _apply(labels.vox2world, place)


def load_scan(
    path: Path,
    spec: PreprocessSpec,
    shift_mm: Sequence[float] = (0, 0, 0),
    cut: str = "",
) -> Scan:
    """Lays the network grid over a scan, which a fault may have changed."""
    volume = nifti.read_image(path)
    vox2world = volume.vox2world.copy()
    kept, count = slice(None), volume.data.shape[2]
    if cut == "lower":
        kept = slice(round(CUT * count), None)
        vox2world[:3, 3] += vox2world[:3, 2] * kept.start
    elif cut == "upper":
        kept = slice(None, round((1 - CUT) * count))
    vox2world[:3, 3] += shift_mm
    volume = volume._replace(data=volume.data[:, :, kept], vox2world=vox2world)
    grid = preprocess.network_grid(volume, spec)
    hu = preprocess.prepare_image(volume, grid, spec)
    body = preprocess.body_mask(Volume(hu, grid.vox2world)) & (hu != OUTSIDE_HU)
    return Scan(volume, grid, hu, body)


def make_extractor(name: str) -> Extractor:
    """An extractor by name or file; "random" ones are networks as initialised."""
    if not name.startswith("random"):
        return embedding.load_extractor(name)
    model = PRESETS["lite"]["model"] if name == "random-lite" else {}
    fields = {k: model[k] for k in sam.Sam.__annotations__ if k in model}
    module = sam.Sam(**fields, norm="batch", conv_impl="direct")
    variables = jax.jit(embedding.initializer(module))(jax.random.key(0))
    return Extractor(
        "sam", network=sam.Sam(**fields), params=jax.jit(sam.fold)(variables)
    )


# --- points -------------------------------------------------------------------------


def match_errors(fixed: Scan, moving: Scan, maps: tuple[Maps, Maps], case: Case):
    """Distance of the most similar place from the true one, [N] mm."""
    to_voxel = np.linalg.inv(fixed.grid.vox2world)
    fine = (_apply(to_voxel, case.fixed_mm) - 0.5) / 2
    limit = np.array(fixed.hu.shape) // 2 - 1
    query = np.clip(np.rint(fine), 0, limit).astype(np.int32)
    # One program for few and for many points.
    padded = np.pad(query, ((0, -len(query) % 512), (0, 0)))
    x, y, z = (n // 2 for n in moving.body.shape)
    mask = moving.body.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5)) >= 0.5
    find = jax.jit(matching.match, static_argnames="plan")
    found, _ = find(*maps, padded, mask, plan=matching.Plan())
    found = matching.network_points(np.asarray(found)[: len(query)])
    place = _apply(moving.grid.vox2world, found)
    return np.linalg.norm(place - case.moving_mm, axis=1)


# --- maps ---------------------------------------------------------------------------


def judge(case: Case, *parts: Field | np.ndarray) -> float:
    """Mean DSC of the organs in percent, or mean landmark error in mm.

    Args:
        case: the pair.
        parts: of a Mapping, the first one acts first; to where the fault put the scan.
    """
    whole = Mapping((*parts, np.linalg.inv(case.moved)))
    return real_pairs.told(real_pairs.scores(case.truth, whole))


def coarse(fixed: Scan, found) -> Field:
    """What SAM-coarse adds before the matrix."""
    vox2world = fixed.grid.vox2world
    disp = feature_affine.coarse_align(found, vox2world, shape=fixed.grid.shape)
    return conventional.from_voxels(np.asarray(disp[0]), vox2world)


def timed(function: Callable):
    """What a call gives, and its seconds of CPU."""
    start = time.process_time()
    value = jax.block_until_ready(function())
    return value, time.process_time() - start


def run(cases: list[Case], spec: PreprocessSpec, names: list[str]) -> list[dict]:
    """One row per pair and method.

    Args:
        cases: from `cases_of`.
        spec: network grid.
        names: of extractors.

    Returns:
        Rows: method, task, score; with features also errors, fell_back, describe (s).
    """
    load = functools.lru_cache(8)(functools.partial(load_scan, spec=spec))
    rows = []

    def add(method, case, score, seconds, **more):
        row = {"method": method, "task": case.pair.task, "score": score}
        rows.append(row | {"seconds": seconds} | more)

    def ends(case):
        fixed = load(case.pair.fixed)
        shift = tuple(case.moved[:3, 3])
        moving = load(case.pair.moving, shift_mm=shift, cut=case.cut)
        places = {
            "fixed_vox2world": fixed.grid.vox2world,
            "moving_vox2world": moving.grid.vox2world,
        }
        return fixed, moving, (fixed.hu, moving.hu), places

    for case in tqdm(cases, desc="intensity", disable=not on_terminal()):
        _, _, images, places = ends(case)
        add("worlds", case, judge(case, np.eye(4)), 0.0)
        search = functools.partial(affine.affine_align, *images, **places)
        found, seconds = timed(search)
        add("intensity", case, judge(case, found), seconds)
    for name in names:
        extractor = make_extractor(name)
        program = jax.jit(features.describe)
        plan = matching.plan_for(extractor.backend, spec.spacing_mm)
        for case in tqdm(cases, desc=name, disable=not on_terminal()):
            fixed, moving, images, places = ends(case)
            maps, describe = [], 0.0
            for hu in images:
                hu = jnp.asarray(hu[None, ..., None])
                described, seconds = timed(functools.partial(program, hu, extractor))
                maps.append(described)
                describe += seconds / 2
            errors = match_errors(fixed, moving, maps, case)
            for robust in (True, False):
                align = functools.partial(
                    feature_affine.feature_align,
                    *maps,
                    *images,
                    **places,
                    bodies=(fixed.body, moving.body),
                    plan=plan,
                    robust=robust,
                )
                found, seconds = timed(align)
                method = name if robust else f"{name}, least squares"
                add(
                    method,
                    case,
                    judge(case, found.matrix),
                    seconds,
                    errors=errors,
                    describe=describe,
                    fell_back=found.kind != "features",
                    alone=judge(case, found.fit.matrix),
                    matches=found.fit.points,
                    close=found.fit.close,
                    coarse=judge(case, coarse(fixed, found), found.matrix)
                    if robust
                    else None,
                )
    return rows


def _select(rows, method, task, key):
    chosen = [r for r in rows if r["method"] == method and r["task"] == task]
    return [row[key] for row in chosen]


def table_points(rows: list[dict], names: list[str]) -> str:
    """Markdown: errors of the most similar place."""
    lines = ["| features |", "|---|"]
    for task in ("liver", "lung", "headneck"):
        count = len(np.concatenate(_select(rows, names[0], task, "errors")))
        lines[0] += f" {task} ({count} points), median mm | within {CLOSE_MM:g} mm % |"
        lines[1] += "---|---|"
    for name in names:
        line = f"| {name} |"
        for task in ("liver", "lung", "headneck"):
            errors = np.concatenate(_select(rows, name, task, "errors"))
            share = 100 * (errors < CLOSE_MM).mean()
            line += f" {np.median(errors):.1f} | {share:.0f} |"
        lines.append(line)
    return "\n".join(lines)


def table_maps(rows: list[dict]) -> str:
    """Markdown: what each affine brings."""
    lines = [
        "| affine | head-neck DSC₇, mean (min … max) | map alone | fell back | "
        "matches, close | liver TRE mm | lung TRE mm | with coarse: DSC₇, liver, "
        "lung | s CPU | s CPU to describe a scan | chest, abdomen DSC, either way |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        column = functools.partial(_select, rows, method)
        dsc = np.array(column("headneck", "score"))
        tre = [column(task, "score")[0] for task in LANDMARKS]
        seconds = np.median([r["seconds"] for r in rows if r["method"] == method])
        either = [
            " / ".join(f"{score:.1f}" for score in column(group, "score")) or "-"
            for group in BETWEEN
        ]
        extra = ["-"] * 5
        if method not in ("worlds", "intensity"):
            counts = (np.mean(column("headneck", k)) for k in ("matches", "close"))
            describe = np.median([r["describe"] for r in rows if r["method"] == method])
            extra = [
                f"{np.mean(column('headneck', 'alone')):.1f}",
                f"{sum(column('headneck', 'fell_back'))} of {len(dsc)}",
                "{:.0f}, {:.0f}".format(*counts),
                "-",
                f"{describe:.2f}",
            ]
            coarse = [column(task, "coarse") for task in ("headneck", *LANDMARKS)]
            if coarse[0][0] is not None:
                means = [np.mean(values) for values in coarse]
                extra[3] = "{:.1f}, {:.2f}, {:.2f}".format(*means)
        lines.append(
            f"| {method} | **{dsc.mean():.1f}** ({dsc.min():.1f} … {dsc.max():.1f}) | "
            f"{extra[0]} | {extra[1]} | {extra[2]} | {tre[0]:.2f} | {tre[1]:.2f} | "
            f"{extra[3]} | {seconds:.2f} | {extra[4]} | {', '.join(either)} |"
        )
    return "\n".join(lines)


def _apply(matrix: np.ndarray, places: np.ndarray) -> np.ndarray:
    return places @ matrix[:3, :3].T + matrix[:3, 3]


def main(argv) -> None:
    del argv
    cli.setup()
    options = flags.FLAGS
    spec = PreprocessSpec(
        shape=tuple(int(n) for n in options.shape), spacing_mm=(options.spacing,) * 3
    )
    cases = cases_of(Path(options.data), options.split, options.fault)
    rows = run(cases, spec, options.features)
    print(table_points(rows, options.features), "", table_maps(rows), sep="\n")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_multi_string("features", ["mind"], "Names or files; may repeat.")
    flags.DEFINE_enum("split", "val", ["val", "train"], "Head-neck patients.")
    flags.DEFINE_enum("fault", "none", ["none", "table", "cut"], "Of moving scans.")
    flags.DEFINE_list("shape", ["96", "96", "80"], "X,Y,Z voxels of the grid.")
    flags.DEFINE_float("spacing", 4.0, "Of the grid, mm.")
    flags.mark_flags_as_required(["data"])
    cli.run(main)
