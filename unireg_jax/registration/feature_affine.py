"""Affine pre-alignment by feature matching: matched points, a fit, and a check.

Every matrix maps fixed world mm to moving world mm (LPS, column vectors).
"""

from typing import NamedTuple

import jax
import numpy as np

from unireg_jax.imaging import preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration import affine, matching
from unireg_jax.registration.matching import CoarsePlan, Plan
from unireg_jax.tasks import OUTSIDE_HU

MODELS = ("affine", "rigid", "translation", "identity")
_FEWEST = {"affine": 4, "rigid": 3, "translation": 1}
_LEAST_MM = 5.0  # extent (rms) that an axis needs; two layers of fine voxels have 4
_SCALE = (0.5, 2.0)  # of any direction: sizes of two patients, with a wide margin
_TURN_DEG = 60.0
# Widths of the re-weighting: no pair is lost at first, at last half of one that is
# 8 mm off. Rigid while wide: an affine map would shrink towards the outliers' mean.
_WIDE_MM, _NARROW_MM, _SHRINK = 200.0, 12.0, 0.8
_AFFINE_BELOW_MM = 30.0
_POINTS_STEP = 256
_COARSE_FEWEST = 50
_TIE = 5e-4  # of similarities, which are told to three digits


class Fit(NamedTuple):
    """A map through pairs of points.

    Attributes:
        matrix: [4, 4] float64, fixed world -> moving world, LPS mm.
        kind: row of MODELS: the freest that the points bear.
        points: pairs given.
        close: pairs within 12 mm of the map.
        residual_mm: median distance of all pairs from the map; NaN without any.
        reason: why it is not affine; empty if it is.
    """

    matrix: np.ndarray
    kind: str
    points: int
    close: int
    residual_mm: float
    reason: str


class Alignment(NamedTuple):
    """Result of `feature_align`.

    Attributes:
        matrix: [4, 4] float64, fixed world -> moving world, LPS mm.
        kind: "features", or the plain start that is more similar: "none" (the worlds),
            "middle" (the grids' centres), "com" (the bodies' centroids).
        fit: what the points gave.
        warning: why not all went as wished; empty if it did.
        fixed_mm: [N, 3] LPS mm, the matched points of the fixed scan.
        moving_mm: [N, 3] LPS mm, of the moving scan.
    """

    matrix: np.ndarray
    kind: str
    fit: Fit
    warning: str
    fixed_mm: np.ndarray
    moving_mm: np.ndarray


def fit_map(fixed_mm: np.ndarray, moving_mm: np.ndarray, *, robust: bool = True) -> Fit:
    """Fits the freest plausible map to pairs of points.

    min sum_i w_i |matrix @ fixed_i - moving_i|^2

    with w = 1, as SAMReg does, or `robust`: w = (1 + r^2 / c^2)^-2 of the residual r,
    c shrinking from 200 to 12 mm (Geman-McClure with graduated non-convexity, H. Yang
    et al., 2020).

    An affine map needs 4 points that spread 5 mm or more (rms) along every axis, in
    both scans; a rigid one 3 points along two axes. A map that stretches any direction
    by a factor outside [0.5, 2], mirrors, or turns by over 60 degrees is not taken:
    then the next of MODELS is fitted.

    Args:
        fixed_mm: [N, 3] LPS mm.
        moving_mm: [N, 3] LPS mm.
        robust: whether to re-weight. MIND's matches of two head-neck patients are for
            the greater part wrong: affine DSC of 7 organs on 30 pairs 40.2 % with and
            11.6 % without (see also experiments/benchmark_matching.py).

    Returns:
        Fit.

    Raises:
        ValueError: shapes do not fit, or points that are not finite.
    """
    fixed, moving = (np.asarray(p, np.float64) for p in (fixed_mm, moving_mm))
    if fixed.ndim != 2 or fixed.shape[1] != 3 or fixed.shape != moving.shape:
        raise ValueError(
            f"fixed_mm and moving_mm must both be (N, 3) in mm, got {fixed.shape} and "
            f"{moving.shape}"
        )
    if not (np.isfinite(fixed).all() and np.isfinite(moving).all()):
        raise ValueError("fixed_mm and moving_mm must be finite; drop padding first")
    reasons = []
    for kind in MODELS[:-1]:
        fault = _degenerate(kind, fixed, moving, np.ones(len(fixed)))
        if not fault:
            matrix, weights = _solve(kind, fixed, moving, robust)
            fault = _degenerate(kind, fixed, moving, weights) or _implausible(matrix)
        if not fault:
            return _fit(matrix, kind, fixed, moving, reasons)
        reasons.append(f"{kind}: {fault}")
    return _fit(np.eye(4), MODELS[-1], fixed, moving, reasons)


def feature_align(
    fixed: tuple[jax.Array, jax.Array],
    moving: tuple[jax.Array, jax.Array],
    fixed_hu: np.ndarray,
    moving_hu: np.ndarray,
    *,
    fixed_vox2world: np.ndarray,
    moving_vox2world: np.ndarray,
    fixed_mask: np.ndarray | None = None,
    bodies: tuple[np.ndarray, np.ndarray] | None = None,
    plan: Plan | None = None,
    robust: bool = True,
) -> Alignment:
    """Finds the map of two scans by matching their features; no start is needed.

    The result is never less similar than the alignment of the two worlds, of the grids'
    centres, or of the bodies' centroids (see `affine.best_map`).

    Args:
        fixed: fine and coarse map [1, ...] of the fixed scan on its network grid, see
            `matching.find_matches`.
        moving: of the moving scan, on a grid of its own.
        fixed_hu: [X, Y, Z] HU, the scan they describe; OUTSIDE_HU beyond it.
        moving_hu: the same.
        fixed_vox2world: [4, 4], fixed voxel -> LPS mm.
        moving_vox2world: [4, 4], moving voxel -> LPS mm.
        fixed_mask: [X, Y, Z] bool, where the scans are compared; by default the body.
        bodies: [X, Y, Z] bool each, where points may lie in the fixed and in the moving
            scan, if known already; by default fixed_mask or the body, and the body.
        plan: of the matching; None for the defaults.
        robust: see `fit_map`.

    Returns:
        Alignment.

    Raises:
        ValueError: shapes do not fit.
    """
    if bodies is None:
        bodies = (
            _body(fixed_hu, fixed_vox2world) if fixed_mask is None else fixed_mask,
            _body(moving_hu, moving_vox2world),
        )
    masks = [_fine(body) for body in bodies]
    # Called here, so that one trace serves every pair of a shape.
    find = jax.jit(matching.find_matches, static_argnames="plan")
    found = jax.device_get(find(fixed, moving, *masks, plan=plan or Plan()))
    points = [
        _apply(vox2world, matching.network_points(p[found.valid]))
        for p, vox2world in (
            (found.fixed, fixed_vox2world),
            (found.moving, moving_vox2world),
        )
    ]
    fit = fit_map(*points, robust=robust)
    kind, matrix, scores = affine.best_map(
        fixed_hu,
        moving_hu,
        {"features": fit.matrix},
        fixed_vox2world=fixed_vox2world,
        moving_vox2world=moving_vox2world,
        fixed_mask=fixed_mask,
    )
    warning = ""
    if kind == "features" and fit.kind == "identity":
        kind = "none"
        warning = f"features: no map of {fit.points} matches; {fit.reason}"
    elif kind != "features" and scores["features"] < scores[kind] - _TIE:
        warning = (
            f"features: the map of {fit.points} matches ({fit.kind}, {fit.close} close "
            f"to it) is less similar than {kind!r}, {scores['features']:.3f} against "
            f"{scores[kind]:.3f}; {kind!r} is used"
        )
    elif fit.reason:
        warning = f"features: {fit.kind} map of {fit.points} matches; {fit.reason}"
    return Alignment(matrix, kind, fit, warning, *points)


def coarse_fault(alignment: Alignment) -> str:
    """Says why matches cannot bear a displacement; empty if they can.

    Args:
        alignment: from `feature_align`.

    Returns:
        Why: few points near the map would move all voxels around them.
    """
    if alignment.fit.kind not in ("affine", "rigid"):
        return (
            f"an affine or rigid map of the matches expected, got {alignment.fit.kind}"
        )
    if alignment.fit.close < _COARSE_FEWEST:
        return (
            f"{_COARSE_FEWEST} matches or more within {_NARROW_MM:g} mm of the affine "
            f"expected, got {alignment.fit.close}"
        )
    return ""


def coarse_align(
    alignment: Alignment,
    vox2world: np.ndarray,
    *,
    shape: tuple[int, int, int],
    within_mm: float | None = 24.0,
    plan: CoarsePlan | None = None,
) -> jax.Array:
    """Fits SAM-coarse's displacement to what an affine leaves of its matches.

    Args:
        alignment: from `feature_align`.
        vox2world: [4, 4], voxel of the fixed network grid -> LPS mm.
        shape: (X, Y, Z), that grid.
        within_mm: pairs farther from the affine map are left out; None for all pairs,
            as SAMReg does. With MIND, DSC of 7 organs on 4 head-neck pairs 41.3 %
            before, 50.9 % within 24 mm, 21.5 % with all.
        plan: of the optimisation; None for the defaults.

    Returns:
        [1, X, Y, Z, 3] float32, voxels of the fixed network grid: acts before the
        affine, moving is read at matrix (x + disp(x)).
    """
    back = np.linalg.inv(alignment.matrix)
    targets = _apply(back, alignment.moving_mm)
    to_voxel = np.linalg.inv(vox2world)
    gap = np.linalg.norm(alignment.fixed_mm - targets, axis=1)
    near = np.full(len(gap), True) if within_mm is None else gap <= within_mm
    # Few sizes: pairs of nearly as many matches share a program.
    pad = -len(gap) % _POINTS_STEP if len(gap) else _POINTS_STEP
    points, targets = (
        np.pad(_apply(to_voxel, p), ((0, pad), (0, 0))).astype(np.float32)
        for p in (alignment.fixed_mm, targets)
    )
    fit = jax.jit(matching.coarse_disp, static_argnames=("shape", "plan"))
    near = np.pad(near, (0, pad))
    return fit(points, targets, near, shape=tuple(shape), plan=plan or CoarsePlan())


def _fit(matrix, kind, fixed, moving, reasons):
    gap = _residual(matrix, fixed, moving)
    median = float(np.median(gap)) if len(gap) else float("nan")
    close = int((gap < _NARROW_MM).sum())
    return Fit(matrix, kind, len(gap), close, median, "; ".join(reasons))


def _degenerate(kind, fixed, moving, weights) -> str:
    """Says why points cannot bear a map; empty if they can."""
    if len(fixed) < _FEWEST[kind]:
        return f"{_FEWEST[kind]} points or more expected, got {len(fixed)}"
    needed = {"affine": 3, "rigid": 2, "translation": 0}[kind]
    for name, points in (("fixed", fixed), ("moving", moving)):
        share = weights / weights.sum()
        centred = (points - share @ points) * np.sqrt(share)[:, None]
        # At least three rows, so that there are always three values.
        extent = np.linalg.svd(np.vstack([centred, np.zeros((3, 3))]), compute_uv=False)
        if (extent[:needed] < _LEAST_MM).any():
            shape = ("one spot", "a line", "a plane")[int((extent >= _LEAST_MM).sum())]
            return f"the points of {name} lie on {shape}"
    return ""


def _implausible(matrix) -> str:
    """Says why no two scans of CT relate so; empty if they may."""
    turn, stretch, back = np.linalg.svd(matrix[:3, :3])
    if np.linalg.det(matrix[:3, :3]) <= 0:
        return "the map mirrors"
    if stretch.min() < _SCALE[0] or stretch.max() > _SCALE[1]:
        return f"the map stretches by {stretch.min():.2f} to {stretch.max():.2f}"
    cosine = (np.trace(turn @ back) - 1) / 2
    angle = np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))
    return f"the map turns by {angle:.0f} degrees" if angle > _TURN_DEG else ""


def _solve(kind, fixed, moving, robust):
    """Matrix and weights of one model."""
    weights = np.ones(len(fixed))
    if not robust:
        return _SOLVERS[kind](fixed, moving, weights), weights
    start = "rigid" if kind == "affine" else kind
    matrix = _SOLVERS[start](fixed, moving, weights)
    width = _WIDE_MM
    while True:
        square = np.square(_residual(matrix, fixed, moving) / width)
        weights = np.square(1 / (1 + square))
        model = kind if width <= _AFFINE_BELOW_MM else start
        matrix = _SOLVERS[model](fixed, moving, weights)
        if width <= _NARROW_MM:
            return matrix, weights
        width = max(_NARROW_MM, _SHRINK * width)


def _least_squares(fixed, moving, weights):
    """Weighted affine map; about the centroids, which keeps the system well scaled."""
    share = weights / weights.sum()
    centers = share @ fixed, share @ moving
    root = np.sqrt(share)[:, None]
    linear = np.linalg.lstsq(
        (fixed - centers[0]) * root, (moving - centers[1]) * root, rcond=None
    )[0].T
    return _about(linear, *centers)


def _procrustes(fixed, moving, weights):
    """Weighted rotation and shift (W. Kabsch, 1976), never a mirror."""
    share = weights / weights.sum()
    centers = share @ fixed, share @ moving
    cross = (moving - centers[1]).T @ ((fixed - centers[0]) * share[:, None])
    left, _, right = np.linalg.svd(cross)
    sign = np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    return _about(left @ sign @ right, *centers)


def _shift(fixed, moving, weights):
    share = weights / weights.sum()
    return _about(np.eye(3), share @ fixed, share @ moving)


_SOLVERS = {"affine": _least_squares, "rigid": _procrustes, "translation": _shift}


def _about(linear, center, target):
    """x -> linear (x - center) + target, as 4 x 4."""
    out = np.eye(4)
    out[:3, :3] = linear
    out[:3, 3] = target - linear @ center
    return out


def _residual(matrix, fixed, moving):
    return np.linalg.norm(_apply(matrix, fixed) - moving, axis=1)


def _body(hu, vox2world):
    return preprocess.body_mask(Volume(hu, vox2world)) & (hu != OUTSIDE_HU)


def _fine(mask):
    """Voxels of the fine grid of which half or more is in the mask."""
    x, y, z = (n // 2 for n in mask.shape)
    share = mask[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2).mean((1, 3, 5))
    return share >= 0.5


def _apply(matrix, points):
    """Homogeneous matrix times points [N, 3]."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]
