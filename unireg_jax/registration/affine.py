"""Rigid and affine pre-alignment of two CT volumes on their network grids.

Every matrix maps fixed world mm to moving world mm (LPS, column vectors): the moving
image is read at `matrix @ x` for a point x of the fixed image.

The similarity is the mean squared correlation of some hundred small cubes of the fixed
body with the moving image. Only positive correlation counts, cubes near the body's long
axis weigh more than arms and shoulders. Up to two fifths of what could be compared may
lie outside of either scan and do not count; what is missing beyond counts as unlike, so
that a map of little overlap must be the more similar where the scans meet. One compiled
program per pair of grids scores shifts along the long axis, until a quarter is shared,
and tilts, refines the best of them with Adam, and keeps the best of all. Not from the
paper, which takes its affine stage from SAMReg: chosen because it needs no weights.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import ndimage

from unireg_jax.ops import warp
from unireg_jax.tasks import OUTSIDE_HU, PairType, Region

KINDS = ("none", "com", "rigid", "affine")
# One more with every change of what is found.
ALGORITHM = 3
_FAR_MM = 30.0  # centres of two scans of one patient on one table are nearer
_SHARED = 0.3  # least share of the smaller scan that two such scans have in common

# Parameters are in mm of motion at 100 mm from the centre, so that one learning rate
# serves all: 3 translations (mm), 3 rotations, 3 log scales, 3 shears (1/100).
_ARM_MM = 100.0
_VOXEL_MM = 8.0  # resolution of the search; finer ones gained no overlap (head-neck)
_WANTED = 0.6  # of what could be compared: less overlap lowers the similarity


class Plan(NamedTuple):
    """Effort of the search; a static argument, so a change compiles anew.

    Attributes:
        coarse: cubes used while many starts are refined.
        fine: cubes used for the last refinement.
        side: voxels of 8 mm along the edge of a cube.
        tilts_deg: rotations about the left-right axis to start from, degrees.
        shared: share of the shorter grid's length that the largest shift along the long
            axis to start from leaves in common, in (0, 1].
        stride_mm: between two such shifts, mm.
        starts: refined rigidly.
        finalists: refined in full.
        coarse_steps: Adam steps per start.
        fine_steps: Adam steps per finalist.
        coarse_mm: first step length of the former, mm.
        fine_mm: first step length of the latter, mm.
        axis_mm: width (Gaussian sigma) of the weight about the long axis, mm.
        prior: penalty on log scales and shears, per square of 10 %; it does not shrink
            with the similarity where overlap is missing.
    """

    coarse: int = 256
    fine: int = 512
    side: int = 4
    tilts_deg: tuple[float, ...] = (-25.0, -12.0, 0.0, 12.0, 25.0)
    shared: float = 0.25
    stride_mm: float = 15.0
    starts: int = 12
    finalists: int = 3
    coarse_steps: int = 30
    fine_steps: int = 60
    coarse_mm: float = 4.0
    fine_mm: float = 2.0
    axis_mm: float = 80.0
    prior: float = 0.01


class _Cubes(NamedTuple):
    """Small cubes of the fixed image: N of them with K voxels each.

    Attributes:
        points: [N, K, 3] float32, mm from the fixed body's centre.
        image: [N, K] float32 in [-1, 1].
        inside: [N, K] float32, share of the voxel within the scan and near the body.
        weight: [N] float32.
    """

    points: jax.Array
    image: jax.Array
    inside: jax.Array
    weight: jax.Array


class _Moving(NamedTuple):
    """The moving image.

    Attributes:
        image: [1, X, Y, Z, 1] float32 in [-1, 1].
        valid: [1, X, Y, Z, 1] bool, within the scan.
        mm2vox: [4, 4] float32, mm from the *fixed* body's centre -> voxel.
        overlap: scalar, share of the cubes that should meet the moving scan.
    """

    image: jax.Array
    valid: jax.Array
    mm2vox: jax.Array
    overlap: jax.Array


def choose_kind(
    fixed_box: np.ndarray,
    moving_box: np.ndarray,
    *,
    region: Region | None,
    pair_type: PairType,
) -> tuple[str, str]:
    """Says which pre-alignment a pair needs, in use and for training alike.

    Args:
        fixed_box: [2, 3] LPS mm, from `scan_box`.
        moving_box: the same.
        region: what is registered; None if that is not said.
        pair_type: between patients or within one.

    Returns:
        Row of KINDS, and why: affine between patients; within one none, but rigid
        (chest: affine) when the scans' centres are over 30 mm apart or they share less
        than 30 % of the smaller one.
    """
    if pair_type == PairType.INTER:
        return "affine", "two patients"
    gap = float(np.linalg.norm(fixed_box.mean(axis=0) - moving_box.mean(axis=0)))
    ends = [
        np.maximum(fixed_box[0], moving_box[0]),
        np.minimum(fixed_box[1], moving_box[1]),
    ]
    smaller = min(np.prod(box[1] - box[0]) for box in (fixed_box, moving_box))
    shared = float(np.prod(np.maximum(ends[1] - ends[0], 0.0)) / smaller)
    kind = "none"
    if gap > _FAR_MM or shared < _SHARED:
        # Two breaths change the chest's size: 6.0 mm after an affine, 8.7 mm after a
        # rigid map (landmarks of the elastix lung pair; 35.1 mm before).
        kind = "affine" if region == Region.CHEST else "rigid"
    return kind, (
        f"one patient, scan centres {gap:.0f} mm apart, {100 * shared:.0f} % of the "
        "smaller scan shared"
    )


def scan_box(vox2world: np.ndarray, first, last) -> np.ndarray:
    """Lowest and highest corner of a field of view.

    Args:
        vox2world: [4, 4], voxel -> LPS mm.
        first: (x, y, z), the first voxel inside.
        last: (x, y, z), the last voxel inside.

    Returns:
        [2, 3] LPS mm, faces of the outermost voxels.
    """
    ends = zip(np.asarray(first) - 0.5, np.asarray(last) + 0.5, strict=True)
    corners = _apply(
        np.asarray(vox2world, float), np.array([*itertools.product(*ends)])
    )
    return np.stack([corners.min(axis=0), corners.max(axis=0)])


def affine_align(
    fixed_hu: np.ndarray,
    moving_hu: np.ndarray,
    *,
    fixed_vox2world: np.ndarray,
    moving_vox2world: np.ndarray,
    kind: str = "affine",
    fixed_mask: np.ndarray | None = None,
    plan: Plan | None = None,
) -> np.ndarray:
    """Finds the rigid or affine map that brings the moving image onto the fixed one.

    The result never scores below the alignment of the two worlds, of the two grids'
    centres, and of the two bodies' centroids.

    Args:
        fixed_hu: [X, Y, Z] HU; OUTSIDE_HU beyond the scan.
        moving_hu: [X', Y', Z'] HU, on its own grid; OUTSIDE_HU beyond the scan.
        fixed_vox2world: [4, 4], fixed voxel -> LPS mm; axes along the world's.
        moving_vox2world: [4, 4], moving voxel -> LPS mm; axes along the world's.
        kind: "none" (identity), "com" (body centroids), "rigid" or "affine".
        fixed_mask: [X, Y, Z] bool, where to compare; by default the body, which is the
            largest connected part above air.
        plan: effort of the search; None for the defaults.

    Returns:
        [4, 4] float64, fixed world -> moving world, LPS mm.

    Raises:
        ValueError: unknown kind, wrong shapes, matrices that are not invertible, a scan
            or a mask without a voxel, or `plan.shared` out of its range.
    """
    _check(fixed_hu, moving_hu, fixed_vox2world, moving_vox2world, kind, fixed_mask)
    if kind == "none":
        return np.eye(4)
    plan = plan or Plan()
    if not 0 < plan.shared <= 1:
        raise ValueError(f"plan.shared must be in (0, 1], got {plan.shared}")
    fixed = _Scan.of(fixed_hu, fixed_vox2world, fixed_mask)
    moving = _Scan.of(moving_hu, moving_vox2world, None)
    shift = moving.centroid - fixed.centroid
    if kind == "com":
        return _matrix(np.eye(3), shift, np.zeros(3))
    plain = np.zeros((3, 12), np.float32)
    plain[1, :3] = moving.middle - fixed.middle
    plain[2, :3] = shift
    free = np.ones(12, np.float32)
    free[6:] = kind == "affine"
    best = jax.jit(_search, static_argnames="plan")(
        _cubes(fixed, plan, plan.coarse),
        _cubes(fixed, plan, plan.fine),
        _target(moving, fixed),
        plain,
        _shifts(fixed, moving, plan),
        free,
        plan=plan,
    )
    linear, shift = _linear(np.asarray(best, np.float64), np)
    return _matrix(linear, shift, fixed.center)


def best_map(
    fixed_hu: np.ndarray,
    moving_hu: np.ndarray,
    matrices: Mapping[str, np.ndarray],
    *,
    fixed_vox2world: np.ndarray,
    moving_vox2world: np.ndarray,
    fixed_mask: np.ndarray | None = None,
) -> tuple[str, np.ndarray, dict[str, float]]:
    """Picks the most similar of some maps and of the plain starts of `affine_align`.

    Args:
        fixed_hu: see `affine_align`.
        moving_hu: the same.
        matrices: name -> [4, 4], fixed world -> moving world, LPS mm.
        fixed_vox2world: see `affine_align`.
        moving_vox2world: the same.
        fixed_mask: the same.

    Returns:
        Name and matrix of the best, and the similarity of each, in [0, 1]. To the names
        come "none", "middle" (the grids' centres meet) and "com" (the bodies' do),
        which win over given ones that are no better.

    Raises:
        ValueError: see `affine_align`.
    """
    _check(fixed_hu, moving_hu, fixed_vox2world, moving_vox2world, "none", fixed_mask)
    fixed = _Scan.of(fixed_hu, fixed_vox2world, fixed_mask)
    moving = _Scan.of(moving_hu, moving_vox2world, None)
    plain = {
        "none": np.zeros(3),
        "middle": moving.middle - fixed.middle,
        "com": moving.centroid - fixed.centroid,
    }
    found = {
        name: _matrix(np.eye(3), shift, np.zeros(3)) for name, shift in plain.items()
    } | dict(matrices)
    plan = Plan()
    score = jax.jit(_likeness)
    cubes, target = _cubes(fixed, plan, plan.fine), _target(moving, fixed)
    scores = {}
    for name, matrix in found.items():
        shift = _apply(matrix, fixed.center) - fixed.center
        place = (matrix[:3, :3].astype(np.float32), shift.astype(np.float32))
        scores[name] = float(score(cubes, target, *place))
    best = max(scores, key=scores.__getitem__)
    return best, found[best], scores


class _Scan(NamedTuple):
    """One scan at about 8 mm, on the host.

    Attributes:
        image: [X, Y, Z] float32 in [-1, 1]; -1 outside the body.
        valid: [X, Y, Z] bool.
        body: [X, Y, Z] float32, share of body or of its 8 mm neighbourhood.
        axis_mm: [X, Y, Z] float32, distance from the body's long axis.
        vox2world: [4, 4], of these voxels.
        center: [3] centroid of what is compared, LPS mm; rotations are about it.
        centroid: [3] centroid of the body, LPS mm.
        middle: [3] centre of the grid, LPS mm.
        length: of the grid along the body, mm.
        volume: of the body, mm3.
    """

    image: np.ndarray
    valid: np.ndarray
    body: np.ndarray
    axis_mm: np.ndarray
    vox2world: np.ndarray
    center: np.ndarray
    centroid: np.ndarray
    middle: np.ndarray
    length: float
    volume: float

    @classmethod
    def of(cls, hu, vox2world, mask):
        """Pools HU, validity and body mask to about 8 mm."""
        spacing = np.linalg.norm(vox2world[:3, :3], axis=0)
        factor = [
            int(np.clip(round(_VOXEL_MM / s), 1, n))
            for s, n in zip(spacing, hu.shape, strict=True)
        ]
        valid = hu != OUTSIDE_HU
        body = _body(hu) if mask is None else mask & valid
        if not body.any():
            raise ValueError(
                f"nothing to align: no voxel of {np.shape(hu)} is within the scan"
                f"{'' if mask is None else ' and the mask'}; do they lie on the grid?"
            )
        near = ndimage.binary_dilation(body, iterations=max(1, min(factor))) & valid
        # Same window as the network's; what is not body (table, arms apart) is air.
        image = np.where(near, (np.clip(hu, -800, 400) + 800) / 600 - 1, -1)
        place = np.diag([*map(float, factor), 1.0])
        place[:3, 3] = (np.array(factor) - 1) / 2
        coarse = vox2world @ place
        share = _pool(body, factor)
        points = np.argwhere(body)
        center = _apply(vox2world, points.mean(axis=0))
        centroid = center
        if mask is not None:  # one organ lies elsewhere than the body of the other scan
            centroid = _apply(vox2world, np.argwhere(_body(hu)).mean(axis=0))
        return cls(
            _pool(image, factor),
            _filled(_pool(valid, factor)),
            _pool(near, factor),
            _axis_distance(share, np.linalg.norm(coarse[:3, :3], axis=0)),
            coarse,
            center,
            centroid,
            _apply(vox2world, (np.array(hu.shape) - 1) / 2),
            float(hu.shape[2] * spacing[2]),
            len(points) * float(np.prod(spacing)),
        )


def _search(coarse, fine, moving, plain, shifts, free, *, plan):
    """Best parameters [12]: grid of starts, rigid refinement, full refinement."""

    def score(cubes, p):
        return _score(cubes, moving, p, plan.prior)

    tilts = jnp.deg2rad(jnp.array(plan.tilts_deg, jnp.float32)) * _ARM_MM
    grid = jnp.zeros((len(plain), len(tilts), len(shifts), 12), jnp.float32)
    grid = grid + jnp.expand_dims(plain, (1, 2))
    grid = grid.at[..., 2].add(jnp.broadcast_to(shifts, grid.shape[:-1]))
    tilts = jnp.broadcast_to(jnp.expand_dims(tilts, 1), grid.shape[:-1])
    grid = grid.at[..., 3].add(tilts)
    scores = jax.lax.map(lambda p: score(coarse, p), grid.reshape(-1, 12))
    # Only peaks along the shifts: their neighbours would end in the same place.
    table = jnp.pad(
        scores.reshape(grid.shape[:-1]),
        ((0, 0), (0, 0), (1, 1)),
        constant_values=-jnp.inf,
    )
    peak = (table[..., 1:-1] >= table[..., :-2]) & (table[..., 1:-1] >= table[..., 2:])
    rank = jnp.where(peak.reshape(-1), scores, -jnp.inf)
    starts = grid.reshape(-1, 12)[jax.lax.top_k(rank, plan.starts)[1]]

    rigid = free * (jnp.arange(12) < 6)
    found, scores = jax.lax.map(
        lambda p: _refine(
            lambda q: score(coarse, q), p, rigid, plan.coarse_steps, plan.coarse_mm
        ),
        starts,
    )
    finalists = found[jax.lax.top_k(scores, plan.finalists)[1]]
    found, scores = jax.lax.map(
        lambda p: _refine(
            lambda q: score(fine, q), p, free, plan.fine_steps, plan.fine_mm
        ),
        finalists,
    )
    rest = jax.lax.map(lambda p: score(fine, p), plain)
    # Plain ones first: of equal scores the first wins, and without overlap all are 0.
    every = jnp.concatenate([plain, found])
    return every[jnp.argmax(jnp.concatenate([rest, scores]))]


def _refine(score, start, free, steps, length):
    """Adam ascent of the score from `start`; returns the best point met."""
    optimizer = optax.adam(optax.cosine_decay_schedule(length, steps, 0.05), b2=0.95)

    def step(carry, _):
        p, state, best, best_score = carry
        value, grad = jax.value_and_grad(score)(p)
        best = jnp.where(value > best_score, p, best)
        updates, state = optimizer.update(-grad * free, state)
        p = p + updates * free
        return (p, state, best, jnp.maximum(value, best_score)), None

    carry = (start, optimizer.init(start), start, jnp.float32(-jnp.inf))
    (_, _, best, best_score), _ = jax.lax.scan(step, carry, None, length=steps)
    return best, best_score


def _score(cubes, moving, p, prior):
    """Likeness less a penalty on log scales and shears; at most 1."""
    likeness = _likeness(cubes, moving, *_linear(p, jnp))
    return likeness - prior * jnp.sum(jnp.square(p[6:] / 10.0))


def _likeness(cubes, moving, linear, shift):
    """Weighted mean over cubes of max(cc, 0)^2, in [0, 1].

    Over those that meet the moving scan, and over as many that count 0 as are missing
    of `moving.overlap`.
    """
    turn = _matmul(moving.mm2vox[:3, :3], linear)
    start = _matmul(moving.mm2vox[:3, :3], shift) + moving.mm2vox[:3, 3]
    coords = _matmul(cubes.points, turn.T) + jnp.expand_dims(start, (0, 1))
    coords = jnp.expand_dims(coords, 0)
    warped = warp.sample(moving.image, coords)[0, ..., 0]
    # Nearest, hence without gradient: the edge of the scan attracts nothing.
    valid = warp.sample(moving.valid, jax.lax.stop_gradient(coords), order=0)
    limit = jnp.array(moving.valid.shape[1:4], jnp.float32) - 0.5
    within = (coords >= -0.5) & (coords <= jnp.expand_dims(limit, (0, 1, 2)))
    valid = valid[0, ..., 0] & jnp.all(within[0], axis=-1)
    weight = cubes.inside * valid

    total = jnp.sum(weight, axis=1)
    safe = jnp.maximum(total, 1e-3)

    def mean(x):
        return jnp.sum(weight * x, axis=1) / safe

    f = cubes.image - jnp.expand_dims(mean(cubes.image), 1)
    w = warped - jnp.expand_dims(mean(warped), 1)
    # 1e-3: variance of 20 HU of noise in the window of 1200 HU, squared.
    cc = mean(f * w) * jax.lax.rsqrt((mean(f * f) + 1e-3) * (mean(w * w) + 1e-3))
    total = total * cubes.weight
    whole = jnp.sum(cubes.weight * jnp.sum(cubes.inside, axis=1))
    similar = jnp.sum(total * jnp.square(jnp.maximum(cc, 0.0)))
    wanted = jnp.maximum(moving.overlap * whole, 1e-3)
    return similar / jnp.maximum(jnp.sum(total), wanted)


def _linear(p, xp):
    """Parameters [12] -> (3 x 3 linear part, translation in mm): R @ upper(S, H)."""
    x, y, z = p[3:6] / _ARM_MM
    zero, one = xp.zeros_like(x), xp.ones_like(x)
    cos, sin = xp.cos, xp.sin

    def rows(*values):
        return xp.stack(values).reshape(3, 3)

    about_x = rows(one, zero, zero, zero, cos(x), -sin(x), zero, sin(x), cos(x))
    about_y = rows(cos(y), zero, sin(y), zero, one, zero, -sin(y), zero, cos(y))
    about_z = rows(cos(z), -sin(z), zero, sin(z), cos(z), zero, zero, zero, one)
    a, b, c = xp.exp(p[6:9] / _ARM_MM)
    d, e, f = p[9:12] / _ARM_MM
    stretch = rows(a, d, e, zero, b, f, zero, zero, c)
    matmul = _matmul if xp is jnp else np.matmul
    return matmul(matmul(matmul(about_z, about_y), about_x), stretch), p[:3]


def _matmul(a, b):
    """Matrix units may round float32: coordinates keep all bits."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _cubes(fixed: _Scan, plan: Plan, number: int) -> _Cubes:
    """Picks the heaviest `number` cubes, one per cell of 24 mm with body in it."""
    where = np.argwhere(_filled(fixed.body))
    _, cell = np.unique(where // 3, axis=0, return_inverse=True)
    count = np.bincount(cell.ravel())
    center = [np.bincount(cell.ravel(), where[:, axis]) / count for axis in range(3)]
    center = np.stack(center, axis=1)
    distance = fixed.axis_mm[tuple(np.rint(center).astype(int).T)]
    weight = count * np.exp(-0.5 * np.square(distance / plan.axis_mm))
    order = np.argsort(-weight, kind="stable")[:number]
    # Few cubes: the first one again, with no weight, keeps the shape.
    weight = np.pad(weight[order], (0, number - len(order)))
    order = np.pad(order, (0, number - len(order)))

    offset = np.arange(plan.side) - (plan.side - 1) / 2
    offset = np.stack(np.meshgrid(offset, offset, offset, indexing="ij"), axis=-1)
    index = np.floor(center[order][:, None] + offset.reshape(1, -1, 3) + 0.5)
    limit = np.array(fixed.image.shape) - 1
    within = ((index >= 0) & (index <= limit)).all(axis=-1)
    index = np.clip(index, 0, limit).astype(int)
    pick = tuple(np.moveaxis(index, -1, 0))
    return _Cubes(
        (_apply(fixed.vox2world, index) - fixed.center).astype(np.float32),
        fixed.image[pick],
        (within & fixed.valid[pick]) * fixed.body[pick],
        weight.astype(np.float32),
    )


def _shifts(fixed: _Scan, moving: _Scan, plan: Plan) -> np.ndarray:
    """Shifts along the long axis to start from, mm; 0 in the middle."""
    lengths = (fixed.length, moving.length)
    reach = sum(lengths) / 2 - plan.shared * min(lengths)
    count = int(np.ceil(reach / plan.stride_mm))
    return plan.stride_mm * np.arange(-count, count + 1, dtype=np.float32)


def _target(moving: _Scan, fixed: _Scan) -> _Moving:
    """Moving image for the search, in coordinates about the fixed body's centre."""
    mm2vox = np.linalg.inv(moving.vox2world)
    mm2vox[:3, 3] = _apply(mm2vox, fixed.center)
    # A short scan cannot cover a long one.
    overlap = _WANTED * min(1.0, moving.volume / fixed.volume)
    return _Moving(
        moving.image[None, ..., None],
        moving.valid[None, ..., None],
        mm2vox.astype(np.float32),
        np.float32(overlap),
    )


def _body(hu: np.ndarray) -> np.ndarray:
    """Largest connected part above air; thin things (table, clothes) cut off."""
    solid = ndimage.binary_opening(hu > -300)
    names, count = ndimage.label(solid)
    if count == 0:
        return hu != OUTSIDE_HU
    return names == 1 + np.argmax(np.bincount(names.ravel())[1:])


def _axis_distance(body: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance of every voxel from the smoothed line of slice centroids, mm."""
    area = body.sum(axis=(0, 1))
    square = np.zeros(body.shape)
    for axis in (0, 1):
        index = np.arange(body.shape[axis])
        first = (body.sum(axis=1 - axis) * index[:, None]).sum(axis=0)
        line = np.where(area > 0, first / np.maximum(area, 1), first.sum() / area.sum())
        line = ndimage.gaussian_filter1d(line, 20.0 / spacing[2], mode="nearest")
        gap = np.expand_dims((index[:, None] - line[None]) * spacing[axis], 1 - axis)
        square = square + gap**2
    return np.sqrt(square).astype(np.float32)


def _pool(x: np.ndarray, factor: list[int]) -> np.ndarray:
    """Mean over blocks; a rest at the end is dropped."""
    a, b, c = (n // f for n, f in zip(x.shape, factor, strict=True))
    i, j, k = factor
    x = x[: a * i, : b * j, : c * k].astype(np.float32)
    return x.reshape(a, i, b, j, c, k).mean(axis=(1, 3, 5))


def _filled(share: np.ndarray) -> np.ndarray:
    """Voxels more than half full; of a scan too thin to fill any so, those it meets."""
    most = share > 0.5
    return most if most.any() else share > 0


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Homogeneous matrix times points [..., 3]."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _matrix(linear: np.ndarray, shift: np.ndarray, center: np.ndarray) -> np.ndarray:
    """x -> linear (x - center) + center + shift, as 4 x 4."""
    out = np.eye(4)
    out[:3, :3] = linear
    out[:3, 3] = center + shift - linear @ center
    return out


def _check(fixed_hu, moving_hu, fixed_vox2world, moving_vox2world, kind, fixed_mask):
    """Raises ValueError for what the search cannot use."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    for name, hu in (("fixed_hu", fixed_hu), ("moving_hu", moving_hu)):
        if np.ndim(hu) != 3:
            raise ValueError(
                f"{name} must be (X, Y, Z) in HU, got {np.shape(hu)}; drop batch and "
                "channel"
            )
    for name, matrix in (
        ("fixed_vox2world", fixed_vox2world),
        ("moving_vox2world", moving_vox2world),
    ):
        if np.shape(matrix) != (4, 4) or abs(np.linalg.det(matrix)) < 1e-9:
            raise ValueError(
                f"{name} must be an invertible (4, 4), got {np.shape(matrix)}; pass "
                "voxel -> LPS mm"
            )
    if fixed_mask is not None and fixed_mask.shape != fixed_hu.shape:
        raise ValueError(
            f"fixed_mask must be {fixed_hu.shape} like fixed_hu, got "
            f"{fixed_mask.shape}; resample it first"
        )
