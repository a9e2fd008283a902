"""One pair under every task and pair type: what each costs in folds, and brings.

The backbone runs once; a condition costs its head, 171 numbers, and its measurement.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unireg_jax.evaluation import metrics
from unireg_jax.imaging import orientation, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import Grid
from unireg_jax.registration import pipeline
from unireg_jax.registration.compiled import compile_register
from unireg_jax.registration.network import Model, load_model
from unireg_jax.registration.pipeline import Clock, Session, check_settings
from unireg_jax.tasks import TASKS, PairType, Region, Task

_REGULARITY = ("fold_percent_network", "sdlogj_network")
CONDITIONS = tuple(itertools.product(Region, PairType))


class Sweep(NamedTuple):
    """What `sweep` found.

    Attributes:
        rows: one per condition: region, type, task (its name in tasks.TASKS, or None),
            ncc_before, ncc_after, fold_percent_network, sdlogj_network (see
            Registration.qc), max_mm_network, p99_mm_network, and with labels dsc, mean
            over the labels on the network's grid.
            The first row has region None: pre-alignment alone.
        settings: affine asked and used, fov_used, body_covered, and seen, the body
            region that each scan shows.
        grid: of the network, where all is measured.
        affine: [4, 4] float64, fixed world -> moving world, LPS mm.
        disp: [N, x, y, z, 3] float32, voxels of `grid`, in the order of rows[1:].
        timings: seconds per stage.
        warnings: one line each.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    grid: Grid
    affine: np.ndarray
    disp: np.ndarray
    timings: dict[str, float]
    warnings: tuple[str, ...]


def sweep(
    fixed: Volume | np.ndarray | str | os.PathLike,
    moving: Volume | np.ndarray | str | os.PathLike,
    *,
    labels: tuple[Volume, Volume] | None = None,
    conditions: Sequence[tuple[Region, PairType]] = CONDITIONS,
    weights: Model | str | os.PathLike | None = None,
    affine: str | np.ndarray = "auto",
    fixed_mask: np.ndarray | None = None,
    fixed_vox2world: np.ndarray | None = None,
    moving_vox2world: np.ndarray | None = None,
    progress: Callable[[str], None] | None = None,
) -> Sweep:
    """Predicts one pair under many conditions and measures every field.

    One pre-alignment serves all of them, and one window of the network, centred on the
    fixed body.

    Args:
        fixed: path, Volume, image, or array [X, Y, Z] in HU; see `register`.
        moving: the same.
        labels: of fixed and of moving, on their grids; None for no DSC.
        conditions: region and pair type of each row.
        weights: Model, or as in `load_model`.
        affine: see `register`, but not "coarse"; "auto" is affine.
        fixed_mask: see `register`; the body by default.
        fixed_vox2world: [4, 4], voxel -> LPS mm; with arrays only.
        moving_vox2world: [4, 4], voxel -> LPS mm; with arrays only.
        progress: called with one line per stage.

    Returns:
        Sweep.

    Raises:
        ValueError: no condition, labels of another shape, and see `register`.
        UserError: see `register`.
    """
    if not conditions:
        raise ValueError("conditions must name at least one region and pair type")
    say = progress or (lambda line: None)
    clock = Clock()
    target = pipeline.as_volume(fixed, fixed_vox2world, "fixed")
    source = pipeline.as_volume(moving, moving_vox2world, "moving")
    mask = pipeline.own_mask(fixed_mask, fixed, target)
    for volume, label in zip((target, source), labels or (), strict=False):
        if label.data.shape != volume.data.shape:
            raise ValueError(
                f"labels must be {volume.data.shape} like their scan, got "
                f"{label.data.shape}; resample them first"
            )
    clock.lap("read")
    if isinstance(affine, str) and affine == "coarse":
        raise ValueError("affine must not be 'coarse', which adds a field")
    model = weights if isinstance(weights, Model) else load_model(weights)
    clock.lap("weights")
    session = Session(model, network=False, fov="crop")
    programs = compile_register(model, conditions=len(conditions))
    clock.lap("compile")
    # Between patients "auto" is affine; no one task decides here.
    settings = check_settings(pipeline.NO_TASK, "inter", affine)
    pair = session.prepare(
        target, source, settings, affine=affine, mask=mask, clock=clock, say=say
    )
    seen = {
        name: session.seen(v).record()
        for name, v in (("fixed", target), ("moving", source))
    }
    clock.lap("region")
    say(f"network: {len(conditions)} conditions in one pass")
    scans = [programs.describe(hu) for hu in (pair.fixed_hu, pair.moving_hu)]
    disp = programs(
        *scans, *(np.array(codes) for codes in zip(*conditions, strict=True))
    )
    jax.block_until_ready(disp)
    clock.lap("network")
    disp, scores = jax.device_get((disp, programs.judge(*scans, pair.body, disp)))
    clock.lap("quality")
    grid = pair.layout.grid
    rows = _rows(conditions, disp, scores, orientation.spacing_mm(grid.vox2world))
    if labels:
        say("labels on the network's grid")
        for row, dsc in zip(rows, _dsc(labels, pair, disp), strict=True):
            row["dsc"] = dsc
        clock.lap("labels")
    kept = ("affine", "affine_used", "fov_used", "body_covered", "matched_by")
    settings = {k: pair.settings[k] for k in kept if k in pair.settings}
    return Sweep(
        rows,
        settings | {"seen": seen},
        grid,
        pair.matrix,
        disp,
        clock.seconds(),
        pair.warnings,
    )


def _rows(conditions, disp, scores, spacing) -> list[dict[str, Any]]:
    """Pre-alignment alone, then every condition."""
    before = _number(scores["ncc_before"][0])
    still = {"region": None, "type": None, "task": None}
    rows = [
        still
        | {"ncc_before": before, "ncc_after": before}
        | dict.fromkeys((*_REGULARITY, "max_mm_network", "p99_mm_network"), 0.0)
    ]
    names = {task: name for name, task in TASKS.items()}
    for i, (region, pair_type) in enumerate(conditions):
        length = np.sqrt(np.square(disp[i] * spacing).sum(axis=-1))
        names_of = {
            "region": Region(region).name.lower(),
            "type": PairType(pair_type).name.lower(),
            "task": names.get(Task(Region(region), PairType(pair_type))),
        }
        measured = {
            name: _number(scores[name][i])
            for name in ("ncc_before", "ncc_after", *_REGULARITY)
        }
        lengths = {
            "max_mm_network": _number(length.max()),
            "p99_mm_network": _number(np.percentile(length, 99)),
        }
        rows.append(names_of | measured | lengths)
    return rows


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def _dsc(labels, pair, disp) -> list[float | None]:
    """Mean DSC on the network's grid, of no displacement and of each."""
    grid = pair.layout.grid
    fixed = Volume(preprocess.prepare_labels(labels[0], grid), grid.vox2world)
    to_moving = np.linalg.inv(labels[1].vox2world) @ pair.matrix @ grid.vox2world
    points = np.stack(np.indices(grid.shape), axis=-1).astype(np.float32)
    # Of the fixed scan's labels: others count once a map brings them into view.
    there = [str(label) for label in np.unique(fixed.data) if label]
    shares = []
    for field in (None, *disp):
        at = points if field is None else points + field
        at = np.rint(at @ to_moving[:3, :3].T + to_moving[:3, 3]).astype(int)
        limit = np.array(labels[1].data.shape)
        inside = ((at >= 0) & (at < limit)).all(axis=-1)
        at = np.clip(at, 0, limit - 1)
        warped = labels[1].data[at[..., 0], at[..., 1], at[..., 2]] * inside
        scores = metrics.overlap(fixed, labels[1], {"": warped}, surface=False)
        shares.append([scores["labels"][label]["dsc"] for label in there])
    return [float(np.mean(row)) if row else None for row in shares]
