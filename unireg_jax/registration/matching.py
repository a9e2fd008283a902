"""Corresponding points by feature matching, and the maps that fit them.

SAM-affine and SAM-coarse of SAMReg (L. Tian et al., "SAME++", 2023) for any features
with a fine and a coarse map: of every query the most similar place anywhere in the
other scan, kept if the way back ends where it began; a least-squares affine through
these pairs; a smooth displacement through them on a coarse grid.

score(p, q) = (cos(fine(p), fine(q)) + cos(coarse(p), coarse(q))) / 2, the coarse map
resized to the fine grid and normalised again.

Points are voxels of the fine grid, int32; voxel i of it has its centre at 2 i + 1/2 of
the network's grid. The mask of a scan says where its points may lie.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unireg_jax.ops import resample, smoothness
from unireg_jax.ops.warp import sample

# Least score of a pair, by backend: SAMReg's for SAM. Of stable pairs of head-neck
# patients MIND's lie between 0.83 and 0.99 whether right or wrong (within 20 mm of a
# rigid map: 16 % of pairs above 0.7, 18 % above 0.9), so that no limit sorts them.
MIN_SCORE = {"mind": 0.7, "none": 0.7, "sam": 0.7}
_QUERY_MM = 16.0
_LEVEL = 2  # voxels of the network's grid per voxel of the fine grid


class Plan(NamedTuple):
    """How to match; a static argument, so a change compiles anew.

    Attributes:
        stride: voxels of the network's grid between queries along an axis, even.
        start: first query along an axis, voxels of the network's grid.
        queries: most queries; of more within the body, as many evenly chosen ones.
        rounds: searches there and back; the returned points are the next queries.
        min_score: least score of a pair, in [-1, 1].
        chunk: candidates compared at once.
        block: queries compared at once.
    """

    stride: int = 8
    start: int = 3
    queries: int = 4096
    rounds: int = 5
    min_score: float = 0.7
    chunk: int = 4096
    block: int = 256


class Matches(NamedTuple):
    """Pairs of points; those that are not `valid` are padding.

    Attributes:
        fixed: [N, 3] int32, voxels of the fixed fine grid.
        moving: [N, 3] int32, voxels of the moving fine grid.
        score: [N] float32, in [-1, 1].
        valid: [N] bool.
    """

    fixed: jax.Array
    moving: jax.Array
    score: jax.Array
    valid: jax.Array


class CoarsePlan(NamedTuple):
    """How `coarse_disp` optimises; SAMReg's numbers. A static argument.

    Attributes:
        divisor: voxels of the network's grid per voxel of the displacement's.
        iterations: Adam steps.
        lr: learning rate, in [-1, 1] units of the grid.
        smoothness: weight of the diffusion, in these units per voxel, squared.
    """

    divisor: int = 16
    iterations: int = 100
    lr: float = 0.05
    smoothness: float = 0.04


def plan_for(backend: str, spacing_mm: Sequence[float]) -> Plan:
    """SAMReg's plan, whose 8 voxels are of 2 mm, for another backend and grid.

    Args:
        backend: row of MIN_SCORE.
        spacing_mm: voxel edge lengths of the network's grid.

    Returns:
        Plan with queries about every 16 mm.
    """
    voxels = _QUERY_MM / float(np.prod(spacing_mm)) ** (1 / 3)
    stride = _LEVEL * max(1, round(voxels / _LEVEL))
    return Plan(stride, stride // 2 - 1, min_score=MIN_SCORE[backend])


def find_matches(
    fixed: tuple[jax.Array, jax.Array],
    moving: tuple[jax.Array, jax.Array],
    fixed_mask: jax.Array,
    moving_mask: jax.Array,
    *,
    plan: Plan,
) -> Matches:
    """Finds stable pairs of points: each is the other's best match.

    Queries start on a regular grid within the fixed mask; SAMReg's start in the moving
    scan. Here fixed, because the map is fitted from fixed to moving: its points cover
    the scan that reads it. In every round queries go to their best match in the moving
    scan and from there back to the fixed one, which gives the next queries. Kept are
    those that the last round brings back exactly, each place once.

    Args:
        fixed: fine [1, X, Y, Z, C] and coarse [1, X', Y', Z', C'] float, any length of
            vectors; one of 0 is like nothing.
        moving: the same, on its own grids of any shapes.
        fixed_mask: [X, Y, Z] bool, on the fine grid.
        moving_mask: the same for moving.
        plan: static.

    Returns:
        Matches of N = min(plan.queries, grid points) pairs.

    Raises:
        ValueError: shapes do not fit, or a plan out of range.
    """
    _check_plan(plan)
    _check_maps("fixed", fixed, fixed_mask)
    _check_maps("moving", moving, moving_mask)
    shape = fixed_mask.shape
    queries, valid = _queries(fixed_mask, plan)
    ends = [_candidates(mask) for mask in (fixed_mask, moving_mask)]
    # One empty mask leaves nothing to match.
    valid &= (ends[0][1] > 0) & (ends[1][1] > 0)
    count = jnp.sum(valid)

    def there_and_back(_, carry):
        query = carry[3]
        there, score = _best(fixed, moving, query, count, ends[1], plan)
        back, _ = _best(moving, fixed, there, count, ends[0], plan)
        return query, there, score, back

    carry = (queries, queries, jnp.zeros(len(queries), jnp.float32), queries)
    query, there, score, back = jax.lax.fori_loop(0, plan.rounds, there_and_back, carry)
    valid &= (back == query) & (score > plan.min_score)
    valid &= _first(query, valid, int(np.prod(shape)))
    return Matches(
        _unravel(query, shape), _unravel(there, moving_mask.shape), score, valid
    )


def match(
    source: tuple[jax.Array, jax.Array],
    target: tuple[jax.Array, jax.Array],
    points: jax.Array,
    mask: jax.Array,
    *,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """Finds the most similar place of the whole target for points of the source.

    Of equal scores the first place in memory order wins. The scores of `plan.chunk`
    candidates and `plan.block` queries are all that is in memory at once.

    Args:
        source: fine and coarse map, see `find_matches`.
        target: the same.
        points: [N, 3] int32, voxels of source's fine grid.
        mask: [X, Y, Z] bool, on target's fine grid.
        plan: static; only chunk and block are read.

    Returns:
        Points [N, 3] int32, voxels of target's fine grid, and scores [N] float32;
        (0, 0, 0) and -inf where the mask is empty.

    Raises:
        ValueError: shapes do not fit.
    """
    _check_maps("target", target, mask)
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype != jnp.int32:
        raise ValueError(
            f"points must be (N, 3) int32 in voxels of the fine grid, got "
            f"{points.shape} {points.dtype}"
        )
    query = _ravel(points, source[0].shape[1:4])
    index, score = _best(source, target, query, len(query), _candidates(mask), plan)
    return _unravel(index, mask.shape), score


def coarse_disp(
    points: jax.Array,
    targets: jax.Array,
    valid: jax.Array,
    *,
    shape: tuple[int, int, int],
    plan: CoarsePlan,
) -> jax.Array:
    """Fits a smooth displacement on a coarse grid to pairs of points.

    cost(d) = mean_i |p_i + d(p_i) - q_i|^2 + smoothness * diffusion(d)

    in [-1, 1] units of the grid, d on a grid with the same corners. The cheapest d of
    the iterations is taken, 0 if none is cheaper: Adam's steps do not shrink with the
    gradient, and leave points that fit already.

    Args:
        points: [N, 3] float32, voxels of the fixed network grid.
        targets: [N, 3] float32, where they shall go, voxels of the same grid: the
            matches pulled back through the affine, as this displacement acts before it.
        valid: [N] bool.
        shape: (X, Y, Z), the network's grid.
        plan: static.

    Returns:
        [1, X, Y, Z, 3] float32, voxels.

    Raises:
        ValueError: shapes do not fit.
    """
    count = points.shape[0]
    expected = ((count, 3), (count, 3), (count,))
    if (points.shape, targets.shape, valid.shape) != expected or valid.dtype != bool:
        raise ValueError(
            f"points, targets and valid must be (N, 3), (N, 3) and (N,) bool, got "
            f"{points.shape}, {targets.shape} and {valid.shape} {valid.dtype}"
        )
    grid = tuple(max(2, -(-n // plan.divisor)) for n in shape)
    half = (jnp.array(shape, jnp.float32) - 1) / 2
    # Hat functions of the coarse grid at the points: no scatter in the gradient.
    place = points / (2 * half)[None]
    hats = [
        jnp.maximum(
            1 - jnp.abs(place[:, axis, None] * (n - 1) - jnp.arange(n)[None]), 0.0
        )
        for axis, n in enumerate(grid)
    ]
    gap = (targets - points) / half[None]
    total = jnp.maximum(jnp.sum(valid), 1)

    def cost(d):
        moved = d[0]
        moved = jnp.einsum("ni,ijkc->njkc", hats[0], moved, precision=_EXACT)
        moved = jnp.einsum("nj,njkc->nkc", hats[1], moved, precision=_EXACT)
        moved = jnp.einsum("nk,nkc->nc", hats[2], moved, precision=_EXACT)
        square = jnp.sum(jnp.square(moved - gap), axis=1)
        distance = jnp.sum(jnp.where(valid, square, 0.0)) / total
        return distance + plan.smoothness * smoothness.diffusion(d)[0]

    optimizer = optax.adam(plan.lr)

    def step(_, carry):
        d, state, best, least = carry
        value, slope = jax.value_and_grad(cost)(d)
        best, least = jnp.where(value < least, d, best), jnp.minimum(value, least)
        update, state = optimizer.update(slope, state)
        return d + update, state, best, least

    still = jnp.zeros((1, *grid, 3), jnp.float32)
    carry = (still, optimizer.init(still), still, jnp.float32(jnp.inf))
    d, _, best, least = jax.lax.fori_loop(0, plan.iterations, step, carry)
    d = jnp.where(cost(d) < least, d, best)
    voxels = (jnp.array(grid, jnp.float32) - 1) / 2
    return resample.resize_disp(d * jnp.expand_dims(voxels, (0, 1, 2, 3)), shape)


def network_points(points: np.ndarray) -> np.ndarray:
    """Centres of fine voxels in voxels of the network's grid.

    Args:
        points: [N, 3], voxels of the fine grid.

    Returns:
        [N, 3] float64.
    """
    return _LEVEL * np.asarray(points, np.float64) + (_LEVEL - 1) / 2


_EXACT = jax.lax.Precision.HIGHEST


def _queries(mask, plan):
    """Flat indices [N] of a regular grid within the mask, valid ones first."""
    axes = [
        np.arange(plan.start // _LEVEL, n, plan.stride // _LEVEL) for n in mask.shape
    ]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    flat = jnp.asarray(np.ravel_multi_index(grid.T, mask.shape), jnp.int32)
    inside = mask.reshape(-1)[flat]
    order, total = jnp.argsort(~inside, stable=True), jnp.sum(inside)
    size = min(plan.queries, len(grid))
    step = jnp.maximum(total / size, 1.0)
    pick = jnp.floor(jnp.arange(size) * step).astype(jnp.int32)
    pick = jnp.minimum(pick, len(grid) - 1)
    return flat[order[pick]], jnp.arange(size) < total


def _candidates(mask):
    """Flat indices with those of the mask first, in memory order, and their number."""
    flat = mask.reshape(-1)
    return jnp.argsort(~flat, stable=True).astype(jnp.int32), jnp.sum(flat)


def _rows(maps, index):
    """Descriptors [N, C + C'] whose product is the score; rows of other N the same."""
    fine, coarse = maps
    shape = fine.shape[1:4]
    near = fine.reshape(-1, fine.shape[-1])[index].astype(jnp.float32)
    # The resized coarse map would take as much memory as the fine one.
    scale = [
        (c - 1) / max(n - 1, 1) for c, n in zip(coarse.shape[1:4], shape, strict=True)
    ]
    coords = _unravel(index, shape).astype(jnp.float32) * jnp.array(scale)[None]
    far = sample(coarse, coords[None])[0].astype(jnp.float32)
    return jnp.concatenate([_unit(near), _unit(far)], axis=-1) * np.float32(0.5**0.5)


def _unit(rows):
    length = jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True))
    return rows / jnp.broadcast_to(jnp.maximum(length, 1e-6), rows.shape)


def _best(source, target, query, count, candidates, plan):
    """Best candidate of each of the first `count` queries: flat index and score."""
    order, total = candidates
    chunk = min(plan.chunk, len(order))
    block = min(plan.block, len(query))
    rows = _rows(source, query)
    pad = -len(query) % block
    rows = jnp.pad(rows, ((0, pad), (0, 0)))
    order = jnp.pad(order, (0, -len(order) % chunk))

    def one_chunk(i, carry):
        index = jax.lax.dynamic_slice(order, (i * chunk,), (chunk,))
        theirs = _rows(target, index)
        outside = i * chunk + jnp.arange(chunk) >= total

        def one_block(j, carry):
            best, least = carry
            ours = jax.lax.dynamic_slice(rows, (j * block, 0), (block, rows.shape[1]))
            # Candidates along the first axis: a maximum over the last is not vectorised
            # on CPU.
            scores = jnp.matmul(theirs, ours.T, precision=_EXACT)
            scores = jnp.where(outside[:, None], -jnp.inf, scores)
            value = jnp.max(scores, axis=0)
            first = jnp.where(
                scores == value[None], jnp.arange(chunk)[:, None], chunk - 1
            )
            found = index[jnp.min(first, axis=0)]
            place = (j * block,)
            old = jax.lax.dynamic_slice(least, place, (block,))
            kept = jax.lax.dynamic_slice(best, place, (block,))
            # Not >=: the earlier chunk keeps a tie.
            found = jnp.where(value > old, found, kept)
            value = jnp.maximum(value, old)
            return (
                jax.lax.dynamic_update_slice(best, found, place),
                jax.lax.dynamic_update_slice(least, value, place),
            )

        return jax.lax.fori_loop(0, -(-count // block), one_block, carry)

    carry = (
        jnp.zeros(len(rows), jnp.int32),
        jnp.full(len(rows), -jnp.inf, jnp.float32),
    )
    best, score = jax.lax.fori_loop(0, -(-total // chunk), one_chunk, carry)
    return best[: len(query)], score[: len(query)]


def _first(index, valid, limit):
    """Marks the first of equal indices among valid ones."""
    key = jnp.where(valid, index, limit)
    order = jnp.argsort(key, stable=True)
    ordered = key[order]
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(len(index), bool).at[order].set(new)


def _ravel(points, shape):
    return (points[:, 0] * shape[1] + points[:, 1]) * shape[2] + points[:, 2]


def _unravel(index, shape):
    area = shape[1] * shape[2]
    return jnp.stack([index // area, index % area // shape[2], index % shape[2]], -1)


def _check_plan(plan):
    for name in ("queries", "rounds", "chunk", "block"):
        if getattr(plan, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(plan, name)}")
    if plan.stride < _LEVEL or plan.stride % _LEVEL or plan.start < 0:
        raise ValueError(
            f"stride must be a positive multiple of {_LEVEL} and start at least 0, in "
            f"voxels of the network's grid, got {plan.stride} and {plan.start}"
        )


def _check_maps(name, maps, mask):
    fine, coarse = maps
    if fine.ndim != 5 or coarse.ndim != 5 or fine.shape[0] != 1 or coarse.shape[0] != 1:
        raise ValueError(
            f"{name} must be fine and coarse maps (1, X, Y, Z, C), got {fine.shape} "
            f"and {coarse.shape}; one volume at a time"
        )
    if mask.shape != fine.shape[1:4] or mask.dtype != bool:
        raise ValueError(
            f"the mask of {name} must be {fine.shape[1:4]} bool, on the fine grid, got "
            f"{mask.shape} {mask.dtype}"
        )
