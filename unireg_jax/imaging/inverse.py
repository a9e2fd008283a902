"""The map back: from the moving scan to the fixed one, and how well it leads back."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from unireg_jax.errors import NUMERICAL, bad_file
from unireg_jax.imaging import grids
from unireg_jax.imaging.grids import Field, Grid
from unireg_jax.imaging.mapping import Mapping, compose

NAN = float("nan")


class Inverse(NamedTuple):
    """A map back, and how well it leads back.

    Attributes:
        mapping: one field on the grid asked for, then the inverse of the map's affines
            if it has any, which acts beyond the grid too; or one affine.
        residual_mm: [X, Y, Z] float32 on that grid, |T(S(y)) - y| for the map T and its
            inverse S; NaN where no voxel of T's fields leads: there S is continued.
        stats: see `invert`.
    """

    mapping: Mapping
    residual_mm: np.ndarray
    stats: dict[str, float]


def invert(
    mapping: Mapping,
    grid: Grid,
    *,
    tolerance_mm: float = 0.01,
    iterations: int = 30,
    threads: int | None = None,
) -> Inverse:
    """Finds the map from the moving scan back to the fixed one.

    Solves T(x) = y for every voxel y by the fixed point x <- x - A^-1 (T(x) - y), A
    the affine nearest to T, a step halved where it leads away; what is left after
    `iterations` by Newton's method. While solving, a field's edge is continued, so that
    the inverse has no seam. Never by negation.

    Args:
        mapping: T, fixed -> moving.
        grid: of the moving scan; unused for an affine, whose inverse is exact.
        tolerance_mm: largest |T(x) - y| that counts as solved.
        iterations: of the fixed point, and a third as many of Newton's.
        threads: workers; None for one per core, 8 at most.

    Returns:
        Inverse. stats: tolerance_mm; covered_percent, voxels that some point within T's
        fields reaches; of these unsolved_percent, residual_mean_mm, residual_p95_mm,
        residual_max_mm; and between_mean_mm, between_max_mm, the same halfway between
        voxels, where the inverse field is interpolated. NaN where none is covered.
    """
    if not mapping.fields:
        matrix = np.linalg.inv(compose([mapping]).parts[0]) if mapping.parts else None
        exact = Mapping(() if matrix is None else (matrix,))
        zero = np.broadcast_to(np.float32(0), grid.shape)
        return Inverse(exact, zero, _residual_stats(zero, zero, tolerance_mm))
    nearest = np.linalg.inv(_nearest_affine(mapping))
    affines = np.eye(4)
    for matrix in (p for p in mapping.parts if not isinstance(p, Field)):
        affines = matrix @ affines
    after = np.linalg.inv(affines)
    disp_mm = np.empty((*grid.shape, 3), np.float32)
    residual = np.empty(grid.shape, np.float32)

    def work(part: slice) -> None:
        y = grids.positions(grid, part)
        x = _solve(mapping.parts, y, nearest, tolerance_mm, iterations)
        # The residual of what is stored, float32.
        stored = (grids.apply(affines, x) - y).astype(np.float32)
        moved, covered = grids.through(
            mapping.parts, grids.apply(after, y + stored), edge=True
        )
        gap = np.where(covered, np.linalg.norm(moved - y, axis=0), np.nan)
        disp_mm[part] = stored.T.reshape(disp_mm[part].shape)
        residual[part] = gap.reshape(residual[part].shape)

    grids.slabs(work, grid.shape, threads)
    back = (Field(disp_mm, grid.vox2world), after)
    inverse = Mapping(back if len(mapping.parts) > len(mapping.fields) else back[:1])
    between = _between(mapping, inverse, grid, threads)
    return Inverse(inverse, residual, _residual_stats(residual, between, tolerance_mm))


def check_inverse(inverse: Inverse, path: str, limit_percent: float) -> None:
    """Refuses an inverse that leads back for too few voxels.

    Args:
        inverse: of `invert`.
        path: of the transform, for the message.
        limit_percent: largest share of covered voxels that may stay unsolved.

    Raises:
        UserError: `folding`, exit code 8; `no_overlap` when nothing is covered.
    """
    stats = inverse.stats
    if not stats["covered_percent"] > 0:
        raise bad_file(
            path,
            "no_overlap",
            "a grid that the transform leads to",
            "none of its voxels",
            "name the moving scan as --reference",
        )
    if stats["unsolved_percent"] > limit_percent:
        raise bad_file(
            path,
            "folding",
            f"at most {limit_percent:g} % of voxels off by more than "
            f"{stats['tolerance_mm']:g} mm",
            f"{stats['unsolved_percent']:.3g} %: the map folds or is too steep to be "
            "inverted",
            "register again with more smoothness, or raise --max-unsolved",
            NUMERICAL,
        )


def doubts(stats: dict[str, float]) -> list[str]:
    """Says where a map back is a guess, or leads elsewhere.

    Args:
        stats: of `invert`.

    Returns:
        Lines that begin with `no_overlap` or `folding`; none of a good one.
    """
    lines = []
    if stats["covered_percent"] < 50:
        lines.append(
            f"no_overlap: the transform leads to {stats['covered_percent']:.4g} % of "
            "the moving scan, the rest of its inverse is a guess"
        )
    if stats["unsolved_percent"] > 0:
        lines.append(
            f"folding: {stats['unsolved_percent']:.4g} % of the covered voxels of the "
            f"inverse are off by more than {stats['tolerance_mm']:g} mm, at most "
            f"{stats['residual_max_mm']:.4g} mm"
        )
    return lines


def _solve(
    parts: Iterable[Field | np.ndarray],
    y: np.ndarray,
    nearest: np.ndarray,
    tolerance_mm: float,
    iterations: int,
) -> np.ndarray:
    """x [3, N] with T(x) = y, as near as it gets."""

    def fixed_point(x, gap):
        return nearest[:3, :3] @ gap

    def newton(x, gap):
        return _newton_step(parts, x, gap, nearest)

    x = grids.apply(nearest, y)
    # Well below the tolerance, so that the error of most voxels is no matter at all.
    x = _descend(parts, x, y, fixed_point, 0.1 * tolerance_mm, iterations)
    return _descend(parts, x, y, newton, tolerance_mm, iterations // 3)


def _descend(
    parts: Iterable[Field | np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    direction: Callable[[np.ndarray, np.ndarray], np.ndarray],
    goal_mm: float,
    iterations: int,
) -> np.ndarray:
    """Steps each point while |T(x) - y| falls; a step that fails is halved."""
    gap = grids.through(parts, x, edge=True)[0] - y
    size = np.linalg.norm(gap, axis=0)
    step = np.ones(size.shape)
    for _ in range(iterations):
        left = np.flatnonzero((size > goal_mm) & (step > 1e-3))
        if not left.size:
            break
        here, was = x[:, left], gap[:, left]
        tried = here - step[left] * direction(here, was)
        gaps = grids.through(parts, tried, edge=True)[0] - y[:, left]
        sizes = np.linalg.norm(gaps, axis=0)
        better = sizes < size[left]
        won = left[better]
        x[:, won], gap[:, won], size[won] = (
            tried[:, better],
            gaps[:, better],
            sizes[better],
        )
        step[left] = np.where(better, np.minimum(1, 2 * step[left]), step[left] / 2)
    return x


def _newton_step(
    parts: Iterable[Field | np.ndarray],
    x: np.ndarray,
    gap: np.ndarray,
    nearest: np.ndarray,
) -> np.ndarray:
    """J^-1 gap, J by differences; the affine's where J is singular."""
    columns = []
    for shift in 0.05 * np.eye(3):  # mm: within one voxel, where a field is smooth
        ahead, behind = (
            grids.through(parts, x + sign * shift[:, None], edge=True)[0]
            for sign in (1, -1)
        )
        columns.append((ahead - behind) / 0.1)
    jac = np.moveaxis(np.stack(columns, axis=1), -1, 0)  # [N, component, axis]
    singular = np.abs(np.linalg.det(jac)) < 1e-3
    jac[singular] = np.linalg.inv(nearest[:3, :3])
    return np.linalg.solve(jac, gap.T[..., None])[..., 0].T


def _nearest_affine(mapping: Mapping) -> np.ndarray:
    """An affine near the map: the product of each part's best fit."""
    whole = np.eye(4)
    for part in mapping.parts:
        matrix = _fit(part) if isinstance(part, Field) else part
        whole = matrix @ whole
    return whole


def _fit(part: Field) -> np.ndarray:
    """Least squares over some 12 voxels along each axis."""
    axes = [np.arange(0, n, -(-n // 12)) for n in part.grid.shape]
    index = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    disp_mm = part.disp_mm[tuple(index.T)].astype(np.float64)
    xyz = grids.apply(part.vox2world, index.T).T
    middle = xyz.mean(axis=0)
    known = np.hstack([xyz - middle, np.ones((len(xyz), 1))])
    fit = np.linalg.lstsq(known, disp_mm, rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3, :3] += fit[:3].T
    matrix[:3, 3] = fit[3] - fit[:3].T @ middle
    # A field that folds as a whole has no such affine: the shift alone.
    if np.linalg.det(matrix[:3, :3]) < 0.05:
        matrix = np.eye(4)
        matrix[:3, 3] = fit[3]
    return matrix


def _between(
    mapping: Mapping, inverse: Mapping, grid: Grid, threads: int | None
) -> np.ndarray:
    """|T(S(y)) - y| halfway between voxels, NaN where S leads out of T's fields."""
    shape = tuple(max(n - 1, 1) for n in grid.shape)
    middle = grid.vox2world.copy()
    middle[:3, 3] += grid.vox2world[:3, :3] @ (np.array(grid.shape) > 1) / 2
    # Every second one along each axis: an eighth of the work, the same statistics.
    half = Grid(tuple(-(-n // 2) for n in shape), middle @ np.diag([2, 2, 2, 1]))
    out = np.empty(half.shape, np.float32)

    def work(part: slice) -> None:
        y = grids.positions(half, part)
        x, _ = grids.through(inverse.parts, y)
        back, covered = grids.through(mapping.parts, x)
        gap = np.where(covered, np.linalg.norm(back - y, axis=0), np.nan)
        out[part] = gap.reshape(out[part].shape)

    grids.slabs(work, half.shape, threads)
    return out


def _residual_stats(
    residual: np.ndarray, between: np.ndarray, tolerance_mm: float
) -> dict[str, float]:
    """Numbers of `invert`."""
    known = residual[~np.isnan(residual)]
    halfway = between[~np.isnan(between)]
    some = known.size > 0
    return {
        "tolerance_mm": tolerance_mm,
        "covered_percent": 100 * known.size / residual.size,
        "unsolved_percent": 100 * float((known > tolerance_mm).mean()) if some else NAN,
        "residual_mean_mm": float(known.mean(dtype=np.float64)) if some else NAN,
        "residual_p95_mm": float(np.percentile(known, 95)) if some else NAN,
        "residual_max_mm": float(known.max()) if some else NAN,
        "between_mean_mm": float(halfway.mean(dtype=np.float64))
        if halfway.size
        else NAN,
        "between_max_mm": float(halfway.max()) if halfway.size else NAN,
    }
