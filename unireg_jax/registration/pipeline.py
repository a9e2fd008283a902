"""One pair of scans -> displacement in mm on the fixed scan's own grid.

Preprocess, pre-align, predict, compose, and back to the original grid. The moving scan
is interpolated once for the network and once for the result, each time from its own
voxels.
"""

import functools
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unireg_jax.errors import NUMERICAL, USAGE, UserError
from unireg_jax.imaging import nifti, orientation, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import Grid
from unireg_jax.models import features
from unireg_jax.ops import intensity, jacobian, ncc, warp
from unireg_jax.registration import affine as prealign
from unireg_jax.registration import metrics
from unireg_jax.registration.network import Model, load_model
from unireg_jax.tasks import OUTSIDE_HU, TASKS, PairType

AFFINES = ("auto", *prealign.KINDS)
_AIR_HU = -1000
_FAR_MM = 30.0  # centres of two scans of one patient on one table are nearer
_SHARED = 0.3  # least share of the smaller scan that two such scans have in common
_RANGE_MM = 1000.0  # the longest vector a transform file may hold
_SLAB_VOXELS = 2**21  # native voxels per step: 100 MB of scratch


class Registration(NamedTuple):
    """What `register` found: moving is read at x + disp_mm(x), x in LPS mm.

    Attributes:
        disp_mm: [X, Y, Z, 3] float32, LPS mm; the whole map, pre-alignment included,
            on the grid of `fixed`.
        vox2world: [4, 4] float64, voxel of disp_mm -> LPS mm.
        affine: [4, 4] float64, fixed world -> moving world, LPS mm: the pre-alignment.
        network_disp: [x, y, z, 3] float32, voxels of `network_grid`: the network's own
            part, which acts before the pre-alignment.
        network_grid: shape and vox2world of the network's grid.
        warped: [X, Y, Z], moving on the grid of `fixed`, in moving's dtype; air (or the
            smallest value, where that is not air) beyond the moving scan.
        settings: task, region, pair_type, affine: asked and used.
        qc: finite; max_mm and p99_mm, length of the network's part; fold_percent,
            sdlogj (see ops/jacobian.py) of the network's part, and ncc_before,
            ncc_after (global, signed, windowed intensities, after the pre-alignment and
            after the network), over the fixed body on the network's grid. None where
            undefined.
        timings: seconds per stage; the first pair of a shape includes compilation.
    """

    disp_mm: np.ndarray
    vox2world: np.ndarray
    affine: np.ndarray
    network_disp: np.ndarray
    network_grid: Grid
    warped: np.ndarray
    settings: dict[str, str]
    qc: dict[str, Any]
    timings: dict[str, float]


def register(
    fixed: Volume | np.ndarray | str | os.PathLike,
    moving: Volume | np.ndarray | str | os.PathLike,
    *,
    task: str,
    pair_type: str | None = None,
    weights: Model | str | os.PathLike | None = None,
    affine: str | np.ndarray = "auto",
    fixed_mask: np.ndarray | None = None,
    fixed_vox2world: np.ndarray | None = None,
    moving_vox2world: np.ndarray | None = None,
    progress: Callable[[str], None] | None = None,
) -> Registration:
    """Registers two CT scans of any orientation, spacing and size.

    moving is read at y(x) = affine (x + u(x)), u the network's displacement in mm, and
    disp_mm(x) = y(x) - x.

    Args:
        fixed: path of a NIfTI file, Volume, or array [X, Y, Z] in HU.
        moving: the same; shape and spacing may differ.
        task: name in tasks.TASKS: anatomical prior, and the usual pair type.
        pair_type: "inter" or "intra"; None for the task's own.
        weights: Model for many pairs; or as in `load_model`.
        affine: "auto", "none", "com", "rigid", "affine", or a [4, 4] matrix, fixed
            world -> moving world, LPS mm. "auto": affine between patients; within one
            none, but rigid (chest: affine) when the scans' centres are over 30 mm apart
            or they share less than 30 % of the smaller one.
        fixed_mask: [X, Y, Z] bool on the grid of `fixed`: where scans are compared, in
            pre-alignment and quality control; the body by default.
        fixed_vox2world: [4, 4], voxel -> LPS mm; with arrays only.
        moving_vox2world: [4, 4], voxel -> LPS mm; with arrays only.
        progress: called with one line per stage.

    Returns:
        Registration, on the grid of `fixed`: an array's own axes, otherwise the LPS+
        axes of the Volume.

    Raises:
        ValueError: shapes or names that do not fit.
        UserError: a file that cannot be read, scans without common space (exit code
            4), weights that cannot be used (exit code 9), a field that is not finite or
            longer than 1 km (exit code 8).
    """
    say = progress or (lambda line: None)
    clock = _Clock()
    target = _volume(fixed, fixed_vox2world, "fixed")
    source = _volume(moving, moving_vox2world, "moving")
    settings = _settings(task, pair_type, affine)
    mask = _mask(fixed_mask, fixed, target)
    clock.lap("read")
    model = weights if isinstance(weights, Model) else load_model(weights)
    clock.lap("weights")

    grid = preprocess.network_grid(target, model.preprocess)
    fixed_hu = preprocess.prepare_image(target, grid, model.preprocess)
    body = _on_grid(mask, target, grid, fixed_hu)
    clock.lap("preprocess")
    matrix, used, why = _prealign(
        target, source, settings, affine, grid, fixed_hu, mask, body, model.preprocess
    )
    settings["affine_used"] = used
    say(f"pre-alignment: {used} ({why})")
    clock.lap("affine")

    moving_hu = preprocess.prepare_image(source, grid, model.preprocess, matrix=matrix)
    clock.lap("preprocess")
    if not ((moving_hu != OUTSIDE_HU) & (fixed_hu != OUTSIDE_HU)).any():
        raise UserError(
            "no_overlap",
            "fixed and moving: scans that share some space expected, none shared after "
            f"pre-alignment {used!r}; use --affine com or affine",
        )
    region = TASKS[task].region
    kind = PairType[settings["pair_type"].upper()]
    size = "x".join(map(str, grid.shape))
    say(f"network: {size}, {region.name.lower()}, {settings['pair_type']}-patient")
    disp, qc = _predict(model, fixed_hu, moving_hu, body, region, kind)
    qc = _quality(disp, qc, orientation.spacing_mm(grid.vox2world))
    clock.lap("network")

    size = "x".join(map(str, target.data.shape))
    say(f"field and warped image on the fixed grid: {size}")
    disp_mm, warped = _to_native(target, source, matrix, disp, grid)
    clock.lap("native")
    vox2world = target.vox2world
    if isinstance(fixed, np.ndarray):
        disp_mm = nifti.to_native(disp_mm, target)
        warped = nifti.to_native(warped, target)
        vox2world = target.native.vox2world
    return Registration(
        disp_mm,
        vox2world,
        matrix,
        disp,
        grid,
        warped,
        settings,
        qc,
        clock.seconds(),
    )


def residual_mm(registration: Registration) -> np.ndarray:
    """Gives the map without its pre-alignment: u in y = affine (x + u(x)).

    u(x) = A^-1 (disp_mm(x) - (affine x - x)), A the linear part of affine

    Args:
        registration: from `register`.

    Returns:
        [X, Y, Z, 3] float32, LPS mm, on the grid of disp_mm.
    """
    matrix = registration.affine
    if np.array_equal(matrix, np.eye(4)):
        return registration.disp_mm
    inverse = np.linalg.inv(matrix[:3, :3])
    rigid = (matrix - np.eye(4)) @ registration.vox2world
    out = np.empty_like(registration.disp_mm)
    for k in range(out.shape[2]):  # float64 for one slice only
        shift = metrics.slice_positions(rigid, out.shape[:2], k)
        out[:, :, k] = (registration.disp_mm[:, :, k] - shift) @ inverse.T
    return out


class _Clock:
    """Seconds per stage, in the order of their first lap."""

    def __init__(self):
        self._start = self._last = time.perf_counter()
        self._stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        total = {"total": self._last - self._start}
        return {k: round(v, 3) for k, v in (self._stages | total).items()}


def _volume(scan, vox2world, name) -> Volume:
    """A Volume on LPS+ axes from whatever the caller has."""
    if isinstance(scan, np.ndarray):
        if vox2world is None or np.shape(vox2world) != (4, 4):
            raise ValueError(
                f"{name}_vox2world must be (4, 4), voxel -> LPS mm, for an array, got "
                f"{None if vox2world is None else np.shape(vox2world)}"
            )
        if scan.ndim != 3:
            raise ValueError(
                f"{name} must be (X, Y, Z) in HU, got {scan.shape}; drop batch and "
                "channel"
            )
        if not np.isfinite(scan).all():
            raise ValueError(
                f"{name} must be finite, got NaN or infinity; use -1000 HU"
            )
        vox2world = np.asarray(vox2world, np.float64)
        data, turned = orientation.reorient(scan, vox2world)
        return Volume(data, turned, native=nifti.Native(scan.shape, vox2world))
    if vox2world is not None:
        raise ValueError(f"{name}_vox2world must be None: the file has its own")
    return scan if isinstance(scan, Volume) else nifti.read_image(scan)


def _settings(task, pair_type, affine) -> dict[str, str]:
    """What was asked for, in names; refuses unknown ones."""
    if task not in TASKS:
        raise UserError(
            "task_unknown", f"task must be one of {sorted(TASKS)}, got {task!r}", USAGE
        )
    kinds = [kind.name.lower() for kind in PairType]
    if pair_type is not None and pair_type not in kinds:
        raise UserError(
            "task_unknown", f"type must be one of {kinds}, got {pair_type!r}", USAGE
        )
    if isinstance(affine, str) and affine not in AFFINES:
        raise ValueError(f"affine must be one of {AFFINES} or (4, 4), got {affine!r}")
    return {
        "task": task,
        "region": TASKS[task].region.name.lower(),
        "pair_type": pair_type or TASKS[task].pair_type.name.lower(),
        "affine": affine if isinstance(affine, str) else "given",
    }


def _mask(mask, fixed, target: Volume) -> Volume | None:
    """The caller's mask as a Volume on target's LPS+ axes."""
    if mask is None:
        return None
    if isinstance(fixed, np.ndarray):
        if mask.shape != fixed.shape:
            raise ValueError(
                f"fixed_mask must be {fixed.shape} like fixed, got {mask.shape}"
            )
        mask, _ = orientation.reorient(mask, target.native.vox2world)
    if mask.shape != target.data.shape:
        raise ValueError(
            f"fixed_mask must be {target.data.shape} like fixed on LPS+ axes, got "
            f"{mask.shape}; resample it first"
        )
    return Volume((mask != 0).astype(np.uint8), target.vox2world)


def _on_grid(mask, target, grid, fixed_hu) -> np.ndarray:
    """Where scans are compared, [x, y, z] bool on the network's grid."""
    if mask is not None:
        body = preprocess.prepare_labels(mask, grid) > 0
    else:
        body = preprocess.body_mask(Volume(fixed_hu, grid.vox2world))
    return body & (fixed_hu != OUTSIDE_HU)


def _prealign(target, source, settings, affine, grid, fixed_hu, mask, body, spec):
    """Fixed world -> moving world, the kind used, and why."""
    if not isinstance(affine, str):
        matrix = np.asarray(affine, np.float64)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            raise ValueError(
                f"affine must be a finite (4, 4), got {matrix.shape}; fixed world -> "
                "moving world in LPS mm"
            )
        return matrix, "given", "as given"
    kind, why = affine, "as asked"
    if kind == "auto" and settings["pair_type"] == "inter":
        kind, why = "affine", "auto: two patients"
    elif kind == "auto":
        boxes = [_box(target), _box(source)]
        gap = float(np.linalg.norm(boxes[0].mean(axis=0) - boxes[1].mean(axis=0)))
        shared = _shared(*boxes)
        kind = "none"
        if gap > _FAR_MM or shared < _SHARED:
            # Two breaths change the chest's size: 6.0 mm after an affine, 8.7 mm after
            # a rigid map (landmarks of the elastix lung pair; 35.1 mm before).
            kind = "affine" if settings["region"] == "chest" else "rigid"
        why = (
            f"auto: one patient, scan centres {gap:.0f} mm apart, {100 * shared:.0f} % "
            "of the smaller scan shared"
        )
    if kind == "none":
        return np.eye(4), kind, why
    other = preprocess.network_grid(source, spec)
    matrix = prealign.affine_align(
        fixed_hu,
        preprocess.prepare_image(source, other, spec),
        fixed_vox2world=grid.vox2world,
        moving_vox2world=other.vox2world,
        kind=kind,
        fixed_mask=None if mask is None else body,
    )
    return matrix, kind, why


def _box(volume: Volume) -> np.ndarray:
    """Lowest and highest corner of a scan's field of view, [2, 3] LPS mm."""
    ends = [(-0.5, n - 0.5) for n in volume.data.shape]
    corners = np.array(list(itertools.product(*ends)))
    corners = corners @ volume.vox2world[:3, :3].T + volume.vox2world[:3, 3]
    return np.stack([corners.min(axis=0), corners.max(axis=0)])


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the smaller box that lies in the other one."""
    common = np.minimum(a[1], b[1]) - np.maximum(a[0], b[0])
    smaller = min(np.prod(a[1] - a[0]), np.prod(b[1] - b[0]))
    return float(np.prod(np.maximum(common, 0.0)) / smaller)


def _predict(model, fixed_hu, moving_hu, body, region, kind):
    """Runs the compiled program: network_disp and scalars, on the host."""
    spec = model.preprocess
    # jit keeps its programs by function and static arguments: one per shape.
    disp, scalars = jax.jit(_network, static_argnames=("module", "backend", "window"))(
        model.params,
        fixed_hu[None, ..., None],
        moving_hu[None, ..., None],
        body[None],
        np.array([region], np.int32),
        np.array([kind], np.int32),
        module=model.module,
        backend=model.features,
        window=(spec.hu_low, spec.hu_high),
    )
    scalars = jax.device_get(scalars)
    return np.asarray(disp[0]), {name: float(v[0]) for name, v in scalars.items()}


def _network(
    params, fixed_hu, moving_hu, body, region, kind, *, module, backend, window
):
    """Features, network and quality control in one program; every task shares it."""
    low, high = window
    fixed = intensity.window(fixed_hu, low=low, high=high)
    moving = intensity.window(moving_hu, low=low, high=high)
    corr = features.match(fixed, moving, backend=backend)
    disp = module.apply({"params": params}, fixed, moving, corr, region, kind)
    compare = body & intensity.valid(moving_hu)[..., 0]
    reached = warp.sample(
        intensity.valid(moving_hu),
        warp.identity_coords(disp.shape[1:4])[None] + disp,
        order=0,
    )
    after = body & reached[..., 0] & warp.inside(disp)
    return disp, {
        "finite": jnp.all(jnp.isfinite(disp), axis=(1, 2, 3, 4)),
        "fold_percent": 100 * jacobian.folding_fraction(disp, mask=body),
        "sdlogj": jacobian.sdlogj(disp, mask=body),
        "ncc_before": ncc.global_ncc(fixed, moving, mask=compare),
        "ncc_after": ncc.global_ncc(fixed, warp.warp(moving, disp), mask=after),
    }


def _quality(disp, scalars, spacing) -> dict[str, Any]:
    """QC numbers; refuses a field that no file may hold."""
    if not np.isfinite(disp).all():
        count = int((~np.isfinite(disp)).any(axis=-1).sum())
        raise UserError(
            "field_nonfinite",
            f"the network's field: finite vectors expected, got {count} of "
            f"{disp[..., 0].size} with NaN or infinity; check the two scans and the "
            "weights",
            NUMERICAL,
        )
    length = np.sqrt(sum(np.square(disp[..., i] * spacing[i]) for i in range(3)))
    longest = float(length.max())
    if longest > _RANGE_MM:
        raise UserError(
            "field_range",
            f"the network's field: vectors within {_RANGE_MM:g} mm expected, got "
            f"{longest:.4g} mm; check the two scans and the weights",
            NUMERICAL,
        )
    qc = {
        "finite": True,
        "max_mm": longest,
        "p99_mm": float(np.percentile(length, 99)),
        **{name: scalars[name] for name in scalars if name != "finite"},
    }
    return {k: None if v != v else v for k, v in qc.items()}


def _to_native(target, source, matrix, disp, grid):
    """Total displacement in mm and the warped image, both on target's grid.

    y = M (x + u), hence y - x = (M - I) x + A u, which keeps float32 exact where world
    coordinates are large.
    """
    shape = target.data.shape
    to_moving = np.linalg.inv(source.vox2world) @ matrix
    to_grid = np.linalg.inv(grid.vox2world) @ target.vox2world
    spread = matrix[:3, :3] @ grid.vox2world[:3, :3]
    place = (
        to_grid,
        (matrix - np.eye(4)) @ target.vox2world,
        spread,
        to_moving @ target.vox2world,
        np.linalg.inv(source.vox2world)[:3, :3] @ spread,
    )
    place = tuple(np.asarray(m, np.float32) for m in place)
    depth = max(1, min(shape[2], _SLAB_VOXELS // (shape[0] * shape[1])))
    step = functools.partial(
        jax.jit(_slab, static_argnames="shape"),
        jnp.asarray(disp[None]),
        jnp.asarray(source.data[None, ..., None], jnp.float32),
        place,
        np.float32(_fill(source.data)),
        shape=(*shape[:2], depth),
    )
    whole = np.issubdtype(source.data.dtype, np.integer)
    disp_mm = np.empty((*shape, 3), np.float32)
    warped = np.empty(shape, source.data.dtype)
    # The last slab overlaps the one before, so that all have one shape.
    for start in sorted({*range(0, shape[2] - depth, depth), shape[2] - depth}):
        part = slice(start, start + depth)
        field, image = step(np.float32(start))
        disp_mm[:, :, part] = field
        warped[:, :, part] = np.rint(image) if whole else image
    return disp_mm, warped


def _slab(disp, moving, place, fill, start, *, shape):
    """Total displacement in mm and warped image of one slab of native slices."""
    to_grid, rigid, spread, to_moving, turn = place
    coords = warp.identity_coords(shape) + jnp.broadcast_to(
        jnp.stack([jnp.zeros_like(start), jnp.zeros_like(start), start]), (*shape, 3)
    )
    # Beyond the network's grid its outermost vector holds.
    u = warp.sample(disp, _apply(to_grid, coords)[None])[0]
    read = _apply(to_moving, coords) + _apply(turn, u)
    return _apply(rigid, coords) + _apply(spread, u), _read(moving, read, fill)


def _read(moving, coords, fill):
    """Moving image at voxel positions [..., 3], `fill` beyond its outer faces."""
    limit = jnp.array(moving.shape[1:4], jnp.float32) - 0.5
    limit = jnp.broadcast_to(limit, coords.shape)
    inside = jnp.all((coords >= -0.5) & (coords <= limit), axis=-1)
    image = warp.sample(moving, coords[None])[0, ..., 0]
    return jnp.where(inside, image, fill)


def _apply(matrix, vectors):
    """Matrix, 3 x 3 or homogeneous, times vectors [..., 3], in full precision."""
    out = jnp.einsum(
        "...j,ij->...i", vectors, matrix[:3, :3], precision=jax.lax.Precision.HIGHEST
    )
    if matrix.shape == (4, 4):
        out = out + jnp.broadcast_to(matrix[:3, 3], out.shape)
    return out


def _fill(data: np.ndarray) -> float:
    """Air for a CT; the smallest value for an image that holds no air."""
    low = float(data.min())
    return _AIR_HU if low < _AIR_HU / 2 else low
