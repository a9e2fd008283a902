"""Matching by features on real scans: points, affine maps, and their time.

    python -m experiments.benchmark_matching --data=FOLDER \
        --features=mind --features=random --features=sam.safetensors

The first table: of given points of the fixed scan the most similar place anywhere in
the moving one, against the true place: key points of the liver phases (automatic, a
silver standard), landmarks of the two lung scans, centroids of the organs that both of
two held-out head-neck patients have (12 ordered pairs). The second: the affine through
stable matches against the intensity search and no alignment at all: mean DSC of 7
organs, landmark error, seconds of CPU without compilation. Features: mind, none, sam, a
file, or "random" and "random-lite", the embedding networks as initialised.

With --split=train, head-neck pairs of training patients, on which options are chosen.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli
from experiments.benchmark_refine import TRAIN_PAIRS
from experiments.real_results import LANDMARKS
from experiments.real_scans import HELD_OUT
from experiments.sam import PRESETS
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import nifti, points, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import Grid, PreprocessSpec
from unireg_jax.models import features
from unireg_jax.models.features import Extractor, Maps, sam
from unireg_jax.registration import affine, embedding, feature_affine, matching
from unireg_jax.tasks import OUTSIDE_HU

ORGANS = range(1, 8)
CLOSE_MM = 10.0


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


class Pair(NamedTuple):
    """Two scans and what is known about them.

    Attributes:
        task: "headneck", "liver" or "lung".
        fixed: path of the fixed scan.
        moving: path of the moving scan.
        fixed_mm: [N, 3] LPS mm, points.
        moving_mm: [N, 3] LPS mm, the same spots.
        labels: organs of both scans, head-neck only.
    """

    task: str
    fixed: Path
    moving: Path
    fixed_mm: np.ndarray
    moving_mm: np.ndarray
    labels: tuple[Volume, Volume] | None


def pairs_of(data: Path, split: str) -> list[Pair]:
    """Head-neck pairs of a split, and the liver and lung pairs."""
    folder = data / "headneck_openkbp"
    pairs = TRAIN_PAIRS
    if split == "val":
        pairs = tuple(itertools.permutations(HELD_OUT, 2))
    out = []
    for cases in pairs:
        paths = [folder / f"images/case_{case}.nii.gz" for case in cases]
        labels = tuple(
            nifti.read_labels(folder / f"labels/case_{case}.nii.gz") for case in cases
        )
        centers = [
            [_center(volume, organ) for volume in labels]
            for organ in ORGANS
            if all((volume.data == organ).any() for volume in labels)
        ]
        ends = np.moveaxis(np.array(centers), 1, 0)
        out.append(Pair("headneck", *paths, *ends, labels))
    for task, (fixed, moving, csv) in LANDMARKS.items():
        marks = points.read_points(data / csv)
        out.append(
            Pair(task, data / fixed, data / moving, marks.fixed, marks.moving, None)
        )
    return out


def _center(labels: Volume, organ: int) -> np.ndarray:
    place = np.argwhere(labels.data == organ).mean(axis=0)
    return _apply(labels.vox2world, place)


def load_scan(path: Path, spec: PreprocessSpec) -> Scan:
    """Lays the network grid over a scan."""
    volume = nifti.read_image(path)
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


def match_errors(fixed: Scan, moving: Scan, maps: tuple[Maps, Maps], pair: Pair):
    """Distance of the most similar place from the true one, [N] mm."""
    to_voxel = np.linalg.inv(fixed.grid.vox2world)
    fine = (_apply(to_voxel, pair.fixed_mm) - 0.5) / 2
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
    return np.linalg.norm(place - pair.moving_mm, axis=1)


# --- maps ---------------------------------------------------------------------------


def judge(pair: Pair, matrix: np.ndarray) -> float:
    """Mean DSC of the organs in percent, or mean landmark error in mm."""
    if pair.labels is None:
        moved = _apply(matrix, pair.fixed_mm)
        return float(np.linalg.norm(moved - pair.moving_mm, axis=1).mean())
    fixed, moving = pair.labels
    placed = moving._replace(vox2world=np.linalg.inv(matrix) @ moving.vox2world)
    still = np.zeros((*fixed.data.shape, 3), np.float32)
    warped = metrics.warp_labels(still, fixed.vox2world, placed, fixed)
    scores = metrics.overlap(fixed, moving, {"": warped}, surface=False)
    return 100 * scores["mean"]["dsc"]


def judge_coarse(pair: Pair, fixed: Scan, found) -> float:
    """The same after SAM-coarse; moving is read at matrix (x + disp(x))."""
    vox2world = fixed.grid.vox2world
    disp = feature_affine.coarse_align(found, vox2world, shape=fixed.grid.shape)
    disp_mm = np.asarray(disp[0]) @ vox2world[:3, :3].T.astype(np.float32)
    if pair.labels is None:
        _, error = metrics.landmark_errors(
            disp_mm,
            vox2world,
            pair.fixed_mm,
            _apply(np.linalg.inv(found.matrix), pair.moving_mm),
        )
        return float(error.mean())
    target, moving = pair.labels
    placed = moving._replace(vox2world=np.linalg.inv(found.matrix) @ moving.vox2world)
    warped = metrics.warp_labels(disp_mm, vox2world, placed, target)
    scores = metrics.overlap(target, moving, {"": warped}, surface=False)
    return 100 * scores["mean"]["dsc"]


def timed(function: Callable):
    """What a call gives, and its seconds of CPU."""
    start = time.process_time()
    value = jax.block_until_ready(function())
    return value, time.process_time() - start


def run(pairs: list[Pair], spec: PreprocessSpec, names: list[str]) -> list[dict]:
    """One row per pair and method.

    Args:
        pairs: from `pairs_of`.
        spec: network grid.
        names: of extractors.

    Returns:
        Rows: method, task, score; with features also errors, fell_back, describe (s).
    """
    load = functools.lru_cache(8)(lambda path: load_scan(path, spec))
    rows = []

    def add(method, pair, score, seconds, **more):
        row = {"method": method, "task": pair.task, "score": score, "seconds": seconds}
        rows.append(row | more)

    def ends(pair):
        fixed, moving = load(pair.fixed), load(pair.moving)
        places = {
            "fixed_vox2world": fixed.grid.vox2world,
            "moving_vox2world": moving.grid.vox2world,
        }
        return fixed, moving, (fixed.hu, moving.hu), places

    for pair in tqdm(pairs, desc="intensity", disable=not sys.stderr.isatty()):
        _, _, images, places = ends(pair)
        add("worlds", pair, judge(pair, np.eye(4)), 0.0)
        search = functools.partial(affine.affine_align, *images, **places)
        found, seconds = timed(search)
        add("intensity", pair, judge(pair, found), seconds)
    for name in names:
        extractor = make_extractor(name)
        program = jax.jit(features.describe)
        plan = matching.plan_for(extractor.backend, spec.spacing_mm)
        for pair in tqdm(pairs, desc=name, disable=not sys.stderr.isatty()):
            fixed, moving, images, places = ends(pair)
            maps, describe = [], 0.0
            for hu in images:
                hu = jnp.asarray(hu[None, ..., None])
                described, seconds = timed(functools.partial(program, hu, extractor))
                maps.append(described)
                describe += seconds / 2
            errors = match_errors(fixed, moving, maps, pair)
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
                    pair,
                    judge(pair, found.matrix),
                    seconds,
                    errors=errors,
                    describe=describe,
                    fell_back=found.kind != "features",
                    alone=judge(pair, found.fit.matrix),
                    matches=found.fit.points,
                    close=found.fit.close,
                    coarse=judge_coarse(pair, fixed, found) if robust else None,
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
        "lung | s CPU | s CPU to describe a scan |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        column = functools.partial(_select, rows, method)
        dsc = np.array(column("headneck", "score"))
        tre = [column(task, "score")[0] for task in LANDMARKS]
        seconds = np.median([r["seconds"] for r in rows if r["method"] == method])
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
            f"{extra[3]} | {seconds:.2f} | {extra[4]} |"
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
    pairs = pairs_of(Path(options.data), options.split)
    rows = run(pairs, spec, options.features)
    print(table_points(rows, options.features), "", table_maps(rows), sep="\n")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_multi_string("features", ["mind"], "Names or files; may repeat.")
    flags.DEFINE_enum("split", "val", ["val", "train"], "Head-neck patients.")
    flags.DEFINE_list("shape", ["96", "96", "80"], "X,Y,Z voxels of the grid.")
    flags.DEFINE_float("spacing", 4.0, "Of the grid, mm.")
    flags.mark_flags_as_required(["data"])
    cli.run(main)
