"""Judges a registration without ground truth: numbers, limits, findings.

The map is judged as it was written, on a grid of 4 mm over the fixed scan: a whole CT
takes seconds, and differences between scanners' noise do not count. Limits were chosen
on real pairs, see docs/quality.md.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from unireg_jax.evaluation import regularity
from unireg_jax.imaging import preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import Grid

STEP_MM = 4.0  # of the judging grid, or the scan's own spacing where that is coarser
_AIR_HU = -1000.0
_WINDOW_HU = (-300.0, 300.0)  # what is compared: soft tissue and the edges of the rest
_WINDOW_VOXELS = 9  # of the local correlation: 36 mm, as in training
_SAME = 1e-4  # of a window: rounding of one value
_FLAT = 1e-3  # variance of windowed intensity, 0 to 1, below which nothing is compared
_BLUR_VOXELS = 2.0  # of the judging grid, while a mirror image settles
_EVERY = 2  # voxel of it is compared meanwhile, along each axis
_SETTLING = 12  # steps
_LEAST_BLOCKS = 8  # for a standard error
_LEAST_ERROR = 0.002  # of local_ncc: reading between voxels costs as much
_LEAST_POINTS = 200
_LEAST_SLICES = 3
_SIDES = ("left and right", "front and back", "head and feet")


class Check(NamedTuple):
    """A number that can be out of bounds.

    Attributes:
        reason: code of docs/errors.md.
        inter: limit between patients; None for no limit.
        intra: limit within one patient.
        least: whether the limit is the smallest good value, not the largest.
        unit: after the number; empty for none.
        meaning: one line.
        advice: what to do.
        refined: both limits of a kind that is "refined", where they differ.
    """

    reason: str
    inter: float | None
    intra: float | None
    least: bool
    unit: str
    meaning: str
    advice: str
    refined: tuple[float, float] | None = None


KINDS = ("inter", "intra", "inter refined", "intra refined")  # of pairs
# Defaults of registration.Plan, which the limits were chosen with; a test compares.
_REFINED = {"iterations": 50, "smoothness": 0.5}
# Name -> check, in the order in which they are reported. Chosen: docs/quality.md.
CHECKS = {
    "coverage": Check(
        *("no_overlap", 0.3, 0.3, True, ""),
        "share of the fixed body that the map reads inside the moving scan",
        "are both scans of the same region, and pre-aligned?",
    ),
    "local_ncc": Check(
        *("similarity", 0.3, 0.6, True, ""),
        "correlation in windows of 36 mm over the fixed body, after registration",
        "are both scans of the same region, and pre-aligned?",
        (0.4, 0.75),
    ),
    "local_ncc_gain": Check(
        *("similarity", -0.02, -0.02, True, ""),
        "what the displacement added to local_ncc of the pre-alignment",
        "the pre-alignment alone may serve better",
    ),
    "dsc_gain": Check(
        *("similarity", -0.02, -0.02, True, ""),
        "what the displacement added to the mean DSC of the pre-alignment",
        "the pre-alignment alone may serve better",
    ),
    "mirror_sure": Check(
        *("mirrored", 2.5, 2.5, False, ""),
        "mirror_gain in standard errors, taken over blocks of 36 mm",
        "look at the moving scan: an axis of its file may be turned",
    ),
    "fold_percent_body": Check(
        *("folding", 2.0, 1.0, False, "%"),
        "share of the fixed body where the map turns over (J <= 0)",
        "look at the grid; refine the field, try another pre-alignment or task",
    ),
    "sdlogj_body": Check(
        *("folding", 3.5, 2.0, False, ""),
        "standard deviation of log max(J, 1e-9) over the fixed body",
        "look at the Jacobian; refine the field, try another pre-alignment or task",
        (0.65, 0.5),
    ),
    "p99_mm": Check(
        *("field_range", 60.0, 40.0, False, "mm"),
        "99th percentile of the length of the displacement after the pre-alignment",
        "try another pre-alignment",
        (100.0, 60.0),
    ),
    "max_mm": Check(
        *("field_range", 300.0, 300.0, False, "mm"),
        "longest displacement after the pre-alignment, over the fixed body",
        "try another pre-alignment",
    ),
    "inverse_mm": Check(
        *("inverse_consistency", 12.0, 8.0, False, "mm"),
        "mean distance from a point of the fixed body to where both registrations, "
        "there and back, bring it",
        "one of the two directions is wrong: look at the pictures",
    ),
    "volume_factor": Check(
        *("volume_change", 4.0, 2.5, False, ""),
        "largest factor by which the map grows or shrinks a label's volume",
        "look at that label and at the Jacobian",
    ),
}


class Finding(NamedTuple):
    """A number out of bounds.

    Attributes:
        reason: code of docs/errors.md.
        name: of the number; "constant" when a scan shows nothing.
        line: what was expected and got, and advice; begins with the reason.
    """

    reason: str
    name: str
    line: str


# --- numbers ------------------------------------------------------------------------


def measure(
    fixed: Volume,
    moving: Volume,
    disp_mm: np.ndarray,
    affine: np.ndarray,
    *,
    mask: np.ndarray | None = None,
) -> dict[str, float]:
    """Measures a registration from its scans and its map.

    moving is read at x + disp_mm(x), x in LPS mm.

    Args:
        fixed: scan on LPS+ axes.
        moving: scan on LPS+ axes.
        disp_mm: [X, Y, Z, 3] float32, LPS mm, on the grid of `fixed`, the whole map.
        affine: [4, 4], fixed world -> moving world, LPS mm: the pre-alignment in it.
        mask: [X, Y, Z] bool on the grid of `fixed`; the body by default.

    Returns:
        coverage, local_ncc_before, local_ncc_affine, local_ncc, local_ncc_gain,
        mirror_gain, by how much the moving scan fits better with an axis turned round,
        mirror_sure, mirror_axis (0, 1, 2 of LPS), fold_percent_body, sdlogj_body,
        p99_mm, max_mm, constant (1 where a scan shows nothing); see CHECKS. NaN where
        undefined.

    Raises:
        ValueError: disp_mm or mask is not on the grid of fixed.
    """
    shape = fixed.data.shape
    if disp_mm.shape != (*shape, 3):
        raise ValueError(
            f"disp_mm must be {(*shape, 3)} in mm on fixed's LPS+ axes, got "
            f"{disp_mm.shape}"
        )
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask must be {shape} like fixed, got {mask.shape}")
    grid = judging_grid(fixed)
    target = _on(fixed, grid)
    source = judging_grid(moving)
    source = Volume(_on(moving, source), source.vox2world)
    body = _body(fixed, target, grid, mask)
    disp = _field(disp_mm, fixed, grid)
    points = _positions(grid)
    placed = _through(affine, points)
    window = _window(fixed.data), _window(moving.data)

    def compared(volume, xyz):
        image, inside = _read(volume, xyz)
        seen = _windowed(target, window[0]), _windowed(image, window[1])
        return _correlation(*seen, body & inside)

    def similarity(volume, xyz):
        ratio, told = compared(volume, xyz)
        return float(ratio[told].mean()) if told.any() else math.nan

    _, reached = _read(source, points + disp)
    out = {"coverage": float(reached[body].mean()) if body.any() else math.nan}
    out["local_ncc_before"] = similarity(source, points)
    out["local_ncc_affine"] = similarity(source, placed)
    out["local_ncc"] = similarity(source, points + disp)
    out["local_ncc_gain"] = out["local_ncc"] - out["local_ncc_affine"]
    shown = (
        (fixed, _windowed(target, window[0])[body]),
        (moving, _windowed(source.data, window[1]).ravel()),
    )
    flat = [
        volume.data.min() == volume.data.max() or not some.size or np.ptp(some) < _SAME
        for volume, some in shown
    ]
    out["constant"] = float(any(flat))
    out |= _mirrored(source, target, window, body, grid, affine, compared)
    out |= _shape(disp, affine, points, placed, body, grid)
    return out


def inverse_consistency(
    fixed: Volume,
    disp_fm_mm: np.ndarray,
    moving: Volume,
    disp_mf_mm: np.ndarray,
    *,
    mask: np.ndarray | None = None,
) -> dict[str, float]:
    """Measures how far registering there and back leads away.

    e(x) = | d_fm(x) + d_mf(x + d_fm(x)) |

    Args:
        fixed: scan on LPS+ axes.
        disp_fm_mm: [X, Y, Z, 3] LPS mm, on fixed, points into moving.
        moving: scan on LPS+ axes.
        disp_mf_mm: [X', Y', Z', 3] LPS mm, on moving, points into fixed: of a second
            registration, not an inverse of the first.
        mask: [X, Y, Z] bool on the grid of `fixed`; the body by default.

    Returns:
        inverse_mm and inverse_p95_mm, mean and 95th percentile over the fixed body
        that falls into the moving scan; NaN where none does.
    """
    grid = judging_grid(fixed)
    body = _body(fixed, _on(fixed, grid), grid, mask)
    there = _field(disp_fm_mm, fixed, grid)
    xyz = _positions(grid) + there
    other = judging_grid(moving)
    field = _field(disp_mf_mm, moving, other)
    back = [_read(Volume(part, other.vox2world), xyz) for part in field]
    inside = back[0][1] & body
    gap = np.sqrt(sum((a + b[0]) ** 2 for a, b in zip(there, back, strict=True)))
    some = bool(inside.any())
    return {
        "inverse_mm": float(gap[inside].mean()) if some else math.nan,
        "inverse_p95_mm": float(np.percentile(gap[inside], 95)) if some else math.nan,
    }


def volume_changes(
    disp_mm: np.ndarray, vox2world: np.ndarray, labels: np.ndarray
) -> dict[int, float]:
    """Measures how the map changes the volume of every label.

    change = mean of J over the label = volume in moving / volume in fixed

    Args:
        disp_mm: [X, Y, Z, 3] LPS mm, the whole map, pre-alignment included.
        vox2world: [4, 4], voxel -> LPS mm.
        labels: [X, Y, Z] whole numbers on the same grid, 0 background.

    Returns:
        id -> factor, no unit; NaN for a label on the outermost voxels only.
    """
    detj = regularity.jacobian_determinant(disp_mm, vox2world)
    inner = labels[1:-1, 1:-1, 1:-1].ravel()
    ids = [int(i) for i in np.unique(labels) if i != 0]
    least = max(ids, default=0) + 1
    counts = np.bincount(inner, minlength=least)
    sums = np.bincount(inner, weights=detj.ravel(), minlength=least)
    return {i: float(sums[i] / counts[i]) if counts[i] else math.nan for i in ids}


def volume_factor(changes: Mapping[Any, float]) -> float:
    """Largest growth or shrinkage among labels, at least 1; see `volume_changes`.

    Args:
        changes: label -> factor.

    Returns:
        Factor, no unit; infinity for a volume turned over; NaN without labels.
    """
    known = [c for c in changes.values() if c is not None and c == c]
    factors = [max(c, 1 / c) if c > 0 else math.inf for c in known]
    return max(factors, default=math.nan)


# --- judgement ----------------------------------------------------------------------


def kind_of(settings: Mapping[str, Any]) -> str:
    """Says by which limits a pair is judged.

    Args:
        settings: of a Registration or of its record: pair_type, and refine, the plan of
            the instance optimisation. Anything may be absent.

    Returns:
        Of KINDS. "refined": at least the default's steps and smoothing, by the images,
        which follows them closer and further than the network, and by smoother maps.
    """
    kind = "intra" if settings.get("pair_type") == "intra" else "inter"
    plan = settings.get("refine")
    if not isinstance(plan, Mapping) or plan.get("features") != "image":
        return kind
    for name, least in _REFINED.items():
        if not _known(plan.get(name)) or plan[name] < least:
            return kind
    return f"{kind} refined"


def judge(numbers: Mapping[str, Any], kind: str) -> list[Finding]:
    """Says which numbers are out of bounds.

    Args:
        numbers: of `measure`, `inverse_consistency`, volume_factor, dsc_gain; None or
            absent where unknown.
        kind: of KINDS.

    Returns:
        Findings, in the order of CHECKS.
    """
    if numbers.get("constant"):
        line = "constant: a scan shows no anatomy; nothing can be compared"
        return [Finding("constant", "constant", line)]
    found = []
    for name, check in CHECKS.items():
        limit, value = limit_of(check, kind), numbers.get(name)
        undefined = name == "local_ncc" and name in numbers and not _known(value)
        if undefined or (_known(value) and _beyond(value, limit, check)):
            found.append(Finding(check.reason, name, _line(name, numbers, limit)))
    return found


def badness(numbers: Mapping[str, Any], kind: str) -> float:
    """How far the worst number is from good, to sort many pairs.

    Args:
        numbers: see `judge`.
        kind: of KINDS.

    Returns:
        0 best; over 1 exactly when `judge` finds something, but for rounding. Of a
        share v with a least value l: (1 - v) / (1 - l); else v / l.
    """
    if numbers.get("constant") or not _known(numbers.get("local_ncc")):
        return math.inf
    worst = 0.0
    for name, check in CHECKS.items():
        value, limit = numbers.get(name), limit_of(check, kind)
        if limit is None or not _known(value):
            continue
        share = check.least and limit > 0
        part = (1 - value) / (1 - limit) if share else value / limit
        worst = max(worst, float(part))
    return worst


def limit_of(check: Check, kind: str) -> float | None:
    """The limit of a check for a kind of pair.

    Args:
        check: of CHECKS.
        kind: of KINDS.

    Returns:
        Limit, or None.
    """
    pair_type, _, refined = kind.partition(" ")
    limits = (check.refined if refined else None) or (check.inter, check.intra)
    return limits[pair_type == "intra"]


def expected(check: Check, kind: str) -> str:
    """The limit in words.

    Args:
        check: of CHECKS.
        kind: of KINDS.

    Returns:
        Such as "at most 2 %".
    """
    limit = limit_of(check, kind)
    if limit is None:
        return ""
    value = f"{limit:g} {check.unit}".rstrip()
    return f"{value} or more" if check.least else f"at most {value}"


def _known(value) -> bool:
    """A number, infinity included."""
    return isinstance(value, int | float) and value == value


def _beyond(value, limit, check) -> bool:
    if limit is None:
        return False
    return value < limit if check.least else value > limit


def _line(name: str, numbers, limit) -> str:
    """One finding in words."""
    check, value = CHECKS[name], numbers.get(name)
    unit = f" {check.unit}" if check.unit else ""
    got = f"{value:.3g}{unit}" if _known(value) else "none"
    side = "or more" if check.least else "or less"
    where = ""
    if name == "mirror_sure" and _known(axis := numbers.get("mirror_axis")):
        where = f" with {_SIDES[int(axis)]} exchanged"
    return (
        f"{check.reason}: {name} of {limit:g}{unit} {side} expected, got {got}{where}; "
        f"{check.advice}"
    )


# --- parts of measure ---------------------------------------------------------------


def judging_grid(volume: Volume) -> Grid:
    """A grid along a scan's axes, about 4 mm, or its own spacing if that is coarser.

    A slab thinner than 12 mm keeps 3 slices.

    Args:
        volume: scan.

    Returns:
        Grid over the same extent.
    """
    shape = np.array(volume.data.shape)
    # Of a thin slab some slices remain.
    most = np.maximum(1.0, shape / _LEAST_SLICES)
    ratio = np.clip(STEP_MM / np.array(volume.spacing_mm), 1.0, most)
    counts = np.maximum(1, np.rint(shape / ratio)).astype(int)
    ratio = shape / counts  # from outer face to outer face
    vox2world = volume.vox2world.copy()
    vox2world[:3, :3] = volume.vox2world[:3, :3] * ratio
    first = (shape - 1) / 2 - (counts - 1) / 2 * ratio
    vox2world[:3, 3] += volume.vox2world[:3, :3] @ first
    return Grid(tuple(int(n) for n in counts), vox2world)


def _on(volume: Volume, grid: Grid) -> np.ndarray:
    return preprocess.resample(volume, grid, fill=_AIR_HU)


def _field(disp_mm, volume: Volume, grid: Grid) -> np.ndarray:
    """[3, X, Y, Z] mm, a field of the volume's grid on the judging grid."""
    parts = [np.ascontiguousarray(disp_mm[..., i]) for i in range(3)]
    return np.stack(
        [preprocess.resample(volume._replace(data=p), grid, fill=0.0) for p in parts]
    )


def _body(volume, target, grid, mask) -> np.ndarray:
    """Where scans are compared, on the judging grid."""
    if mask is not None:
        part = volume._replace(data=mask.astype(np.float32))
        share = preprocess.resample(part, grid, fill=0.0)
        most = share >= 0.5
        return most if most.any() else share > 0  # of a thin one, what it meets
    if volume.data.min() >= -500:  # no air: no CT, or one cut out
        low, high = _window(volume.data)
        return target > low + 0.05 * (high - low)
    return preprocess.body_mask(Volume(target, grid.vox2world))


def _window(data: np.ndarray) -> tuple[float, float]:
    """Values compared: a soft-tissue window; percentiles where there is no air."""
    if data.min() < -500:
        return _WINDOW_HU
    some = data[tuple(slice(None, None, max(1, n // 64)) for n in data.shape)]
    low, high = (float(v) for v in np.percentile(some, (1, 99)))
    return low, max(high, low + 1e-3)


def _windowed(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    low, high = window
    return ((np.clip(image, low, high) - low) / (high - low)).astype(np.float32)


def _positions(grid: Grid) -> np.ndarray:
    """[3, X, Y, Z] float64, LPS mm of every voxel."""
    i, j, k = np.ogrid[: grid.shape[0], : grid.shape[1], : grid.shape[2]]
    return np.stack([r[0] * i + r[1] * j + r[2] * k + r[3] for r in grid.vox2world[:3]])


def _through(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [3, ...] through [4, 4]."""
    shift = matrix[:3, 3].reshape(3, *(1,) * (points.ndim - 1))
    return np.tensordot(matrix[:3, :3], points, 1) + shift


def _read(volume: Volume, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values at world points [3, ...], linear, and which lie in the volume."""
    coords = _through(np.linalg.inv(volume.vox2world), points)
    limit = np.array(volume.data.shape).reshape(3, *(1,) * (points.ndim - 1))
    inside = ((coords >= -0.5) & (coords <= limit - 0.5)).all(axis=0)
    return ndimage.map_coordinates(volume.data, coords, order=1, mode="nearest"), inside


def _correlation(
    a: np.ndarray, b: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Signed correlation in windows cut by the mask, at its voxels; and where told."""
    size = [min(_WINDOW_VOXELS, n) for n in mask.shape]  # of a slab, all of it
    weight = mask.astype(np.float32)  # the filter itself sums in float64

    def mean(values):
        return ndimage.uniform_filter(values, size, mode="constant")

    count = mean(weight)
    share = np.maximum(count, np.float32(1e-9))
    mean_a, mean_b = mean(a * weight) / share, mean(b * weight) / share
    var_a = mean(a * a * weight) / share - mean_a**2
    var_b = mean(b * b * weight) / share - mean_b**2
    cov = mean(a * b * weight) / share - mean_a * mean_b
    # A window with little in it, or flat in the fixed scan, says nothing; one that is
    # flat in the moving scan alone does not match.
    told = mask & (var_a > _FLAT) & (count > 0.3)
    ratio = cov / np.sqrt(np.maximum(var_a, _FLAT) * np.maximum(var_b, _FLAT / 10))
    return np.clip(ratio, -1, 1), told


def _mirrored(source, target, windows, body, grid, affine, compared):
    """Whether the pre-aligned moving scan fits better with an axis turned round.

    The plain scan and its three mirror images settle anew from the pre-alignment, each
    by an affine map of its own: one that was found for a turned scan serves no other.
    They are compared where all lie in view. A body that is nearly its own mirror image
    fits either way by chance: the gain counts in standard errors.
    """
    image = ndimage.gaussian_filter(_windowed(source.data, windows[1]), _BLUR_VOXELS)
    ground = ndimage.gaussian_filter(_windowed(target, windows[0]), _BLUR_VOXELS)
    some = np.zeros(grid.shape, bool)
    some[::_EVERY, ::_EVERY, ::_EVERY] = True
    some &= body
    points, seen = _positions(grid), ground[some]
    center = source.vox2world[:3, :3] @ (np.array(image.shape) - 1) / 2
    center += source.vox2world[:3, 3]

    def fit(axis):
        turn = np.eye(4)
        if axis is not None:
            turn[axis, axis], turn[axis, 3] = -1.0, 2 * center[axis]
        place = turn @ source.vox2world
        settled = _settle(Volume(image, place), seen, points[:, some], affine)
        return compared(Volume(source.data, place), _through(settled, points))

    unknown = dict.fromkeys(("mirror_gain", "mirror_sure", "mirror_axis"), math.nan)
    if not some.any() or min(image.shape) < 2:  # no slope along one slice
        return unknown
    plain, told = fit(None)
    found = []
    for axis in range(3):
        turned, also = fit(axis)
        gain, error = _blockwise(turned - plain, told & also)
        found.append((gain, gain / math.hypot(error, _LEAST_ERROR), axis))
    known = [one for one in found if one[1] == one[1]]
    if not known:
        return unknown
    gain, sure, axis = max(known, key=lambda one: one[1])
    return {"mirror_gain": gain, "mirror_sure": sure, "mirror_axis": float(axis)}


def _blockwise(values: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Mean over the mask, and its standard error over blocks as wide as a window.

    Neighbouring voxels share most of their windows: a block counts as one observation.
    """
    counts = [-(-n // _WINDOW_VOXELS) for n in mask.shape]
    places = np.unravel_index(np.flatnonzero(mask), mask.shape)
    block = np.ravel_multi_index([p // _WINDOW_VOXELS for p in places], counts)
    weight = np.bincount(block)
    sums = np.bincount(block, weights=values[mask])
    some = weight > 0
    count = np.count_nonzero(some)
    if count < _LEAST_BLOCKS:
        return math.nan, math.nan
    weight, means = weight[some], sums[some] / weight[some]
    mean = float(np.average(means, weights=weight))
    # Of a weighted mean: blocks at the rim of the body hold less and count less.
    shares = weight / weight.sum()
    error = np.sqrt(np.square(shares * (means - mean)).sum() * count / (count - 1))
    return mean, float(error)


def _settle(image: Volume, seen: np.ndarray, points: np.ndarray, matrix) -> np.ndarray:
    """Affine map nearby that makes image(matrix @ points) most like `seen`.

    Gauss-Newton on the squared difference (Lucas and Kanade), points [3, N].
    """
    to_world = np.linalg.inv(image.vox2world[:3, :3])
    slopes = [Volume(g, image.vox2world) for g in np.gradient(image.data)]
    center, scale = points.mean(axis=1, keepdims=True), 100.0  # mm: well conditioned
    basis = np.vstack([(points - center) / scale, np.ones(points.shape[1])])
    unscale = np.eye(4)
    unscale[:3, :3] /= scale
    unscale[:3, 3] = -center[:, 0] / scale
    matrix = matrix.copy()
    for _ in range(_SETTLING):
        xyz = _through(matrix, points)
        value, inside = _read(image, xyz)
        if inside.sum() < _LEAST_POINTS:
            break
        slope = to_world.T @ np.stack([_read(part, xyz)[0] for part in slopes])
        jacobian = (slope[:, None] * basis[None])[:, :, inside].reshape(12, -1)
        normal = jacobian @ jacobian.T
        normal[np.diag_indices(12)] *= 1.01
        normal[np.diag_indices(12)] += 1e-9
        step = np.linalg.solve(normal, jacobian @ (value - seen)[inside])
        matrix[:3] -= step.reshape(3, 4) @ unscale
    return matrix


def _shape(disp, affine, points, placed, body, grid) -> dict[str, float]:
    """Regularity of the map, and length of what it adds to the pre-alignment."""
    names = ("fold_percent_body", "sdlogj_body", "p99_mm", "max_mm")
    if not body.any():
        return dict.fromkeys(names, math.nan)
    out = {}
    field = np.ascontiguousarray(np.moveaxis(disp, 0, -1), np.float32)
    detj = regularity.jacobian_determinant(field, grid.vox2world)
    inner = detj[body[1:-1, 1:-1, 1:-1]]
    some = inner.size > 0
    out["fold_percent_body"] = 100 * float((inner <= 0).mean()) if some else math.nan
    logs = np.log(np.maximum(inner, 1e-9), dtype=np.float64)
    out["sdlogj_body"] = float(np.std(logs)) if some else math.nan
    turn = np.linalg.inv(affine[:3, :3])
    residual = np.tensordot(turn, points + disp - placed, 1)
    length = np.sqrt(np.square(residual).sum(axis=0))[body]
    out["p99_mm"] = float(np.percentile(length, 99))
    out["max_mm"] = float(length.max())
    return out
