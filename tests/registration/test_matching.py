"""Matching of features: exact against NumPy, stable both ways, bounded in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unireg_jax.models.features import Maps
from unireg_jax.ops import resample
from unireg_jax.registration import matching
from unireg_jax.registration.matching import CoarsePlan, Plan

SHAPE = (22, 18, 20)  # fine grid
OTHER = (19, 21, 17)
PLAN = Plan(stride=4, start=1, queries=400, min_score=0.0, chunk=500, block=64)


def find(fixed, moving, fixed_mask, moving_mask, *, plan=PLAN):
    program = jax.jit(matching.find_matches, static_argnames="plan")
    return jax.device_get(program(fixed, moving, fixed_mask, moving_mask, plan=plan))


def best(source, target, points, mask, *, plan=PLAN):
    program = jax.jit(matching.match, static_argnames="plan")
    return jax.device_get(program(source, target, points, mask, plan=plan))


def random_maps(seed, shape, *, channels=(5, 4)):
    rng = np.random.default_rng(seed)
    coarse = tuple(n // 4 for n in shape)
    return Maps(
        *(
            jnp.asarray(rng.normal(size=(1, *grid, count)).astype(np.float32))
            for grid, count in zip((shape, coarse), channels, strict=True)
        )
    )


def anatomy(shape, matrix=None, *, seed=0):
    """Smooth functions of position, read at matrix @ x; coarse ones vary less."""
    rng = np.random.default_rng(seed)
    maps = []
    for grid, per_voxel, channels in (
        (shape, 0.25, 24),
        (tuple(n // 4 for n in shape), 0.08, 12),
    ):
        ends = [np.linspace(0, n - 1, g) for n, g in zip(shape, grid, strict=True)]
        x = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1)
        if matrix is not None:
            x = x @ matrix[:3, :3].T + matrix[:3, 3]
        waves = rng.normal(size=(3, channels)) * per_voxel
        phase = rng.uniform(0, 2 * np.pi, channels)
        maps.append(jnp.asarray(np.cos(x @ waves + phase)[None].astype(np.float32)))
    return Maps(*maps)


def everywhere(shape=SHAPE):
    return np.ones(shape, bool)


def oracle(source, target, points, mask):
    """Descriptors side by side and one full product."""

    def rows(maps):
        fine = np.asarray(maps.fine[0], np.float64)
        coarse = resample.resize_volume(maps.coarse, maps.fine.shape[1:4])
        parts = fine, np.asarray(coarse[0], np.float64)
        parts = [p / np.linalg.norm(p, axis=-1, keepdims=True) for p in parts]
        return np.concatenate(parts, axis=-1).reshape(
            -1, sum(p.shape[-1] for p in parts)
        )

    index = np.ravel_multi_index(points.T, source.fine.shape[1:4])
    scores = 0.5 * rows(source)[index] @ rows(target).T
    scores[:, ~mask.reshape(-1)] = -np.inf
    found = scores.argmax(axis=1)
    return np.stack(np.unravel_index(found, mask.shape), -1), scores.max(axis=1)


@pytest.mark.parametrize(
    ("chunk", "block"), [(10**6, 10**6), (500, 64), (7, 3)], ids=str
)
def test_match_is_the_best_of_all_places(chunk, block):
    source, target = random_maps(0, SHAPE), random_maps(1, OTHER)
    rng = np.random.default_rng(2)
    mask = rng.random(OTHER) < 0.6
    points = rng.integers(0, SHAPE, size=(50, 3)).astype(np.int32)
    plan = PLAN._replace(chunk=chunk, block=block)
    found, score = best(source, target, points, mask, plan=plan)
    expected, scores = oracle(source, target, points, mask)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(score, scores, atol=1e-6)  # float32 over 9 channels
    assert mask[tuple(found.T)].all() and found.dtype == np.int32


def test_match_of_equal_scores_takes_the_first_place():
    fine = jnp.ones((1, *SHAPE, 3))
    maps = Maps(fine, jnp.ones((1, 5, 4, 5, 2)))
    mask = np.zeros(SHAPE, bool)
    mask[4:, 5:, 6:] = True
    points = np.array([[9, 9, 9], [0, 0, 0]], np.int32)
    found, _ = best(maps, maps, points, mask, plan=PLAN._replace(chunk=100))
    np.testing.assert_array_equal(found, [(4, 5, 6)] * 2)


def test_match_of_an_empty_mask_has_no_score():
    maps = random_maps(0, SHAPE)
    points = np.array([[1, 2, 3]], np.int32)
    _, score = best(maps, maps, points, ~everywhere())
    np.testing.assert_array_equal(score, [-np.inf])
    for masks in ((everywhere(), ~everywhere()), (~everywhere(), everywhere())):
        assert not find(maps, maps, *masks).valid.any()


def test_matches_of_a_scan_with_itself_are_the_grid():
    maps = anatomy(SHAPE)
    found = find(maps, maps, everywhere(), everywhere())
    np.testing.assert_array_equal(found.fixed, found.moving)
    grid = np.stack(
        np.meshgrid(*(np.arange(0, n, 2) for n in SHAPE), indexing="ij"), -1
    ).reshape(-1, 3)
    assert found.valid.all() and len(grid) > 400 == len(found.valid)
    # 400 of 990, evenly: the first and nearly the last of the grid.
    np.testing.assert_array_equal(found.fixed[0], grid[0])
    assert found.fixed[-1, 0] == grid[-1, 0]
    np.testing.assert_allclose(found.score, 1.0, atol=1e-5)


def test_matches_are_stable_unique_and_inside_both_masks():
    fixed, moving = random_maps(3, SHAPE), random_maps(4, OTHER)
    rng = np.random.default_rng(5)
    masks = rng.random(SHAPE) < 0.7, rng.random(OTHER) < 0.5
    found = find(fixed, moving, *masks)
    ours, theirs = found.fixed[found.valid], found.moving[found.valid]
    assert 100 < len(ours) < 400
    assert len(np.unique(ours, axis=0)) == len(ours)
    np.testing.assert_array_equal(best(fixed, moving, ours, masks[1])[0], theirs)
    np.testing.assert_array_equal(best(moving, fixed, theirs, masks[0])[0], ours)
    assert masks[0][tuple(ours.T)].all() and masks[1][tuple(theirs.T)].all()


def test_matches_of_many_queries_in_one_place_count_once():
    fixed, moving = anatomy(SHAPE), anatomy(OTHER, seed=1)
    few = np.zeros(OTHER, bool)
    few[3, 4, 5:8] = True
    found = find(fixed, moving, everywhere(), few)
    moved = found.moving[found.valid]
    assert 1 <= len(moved) <= 3
    assert len(np.unique(moved, axis=0)) == len(moved)


def test_matches_of_more_rounds_are_more():
    fixed, moving = random_maps(3, SHAPE), random_maps(4, OTHER)
    masks = everywhere(), everywhere(OTHER)
    one, five = (
        find(fixed, moving, *masks, plan=PLAN._replace(rounds=rounds)).valid.sum()
        for rounds in (1, 5)
    )
    assert 1.5 * one < five


def test_matches_are_better_than_the_least_score():
    fixed, moving = random_maps(3, SHAPE), random_maps(4, OTHER)
    masks = everywhere(), everywhere(OTHER)
    every = find(fixed, moving, *masks)
    limit = float(np.median(every.score[every.valid]))
    some = find(fixed, moving, *masks, plan=PLAN._replace(min_score=limit))
    np.testing.assert_array_equal(some.valid, every.valid & (every.score > limit))
    assert 0 < some.valid.sum() < every.valid.sum()


def test_matches_trace_once_for_pairs_of_one_shape(monkeypatch):
    traces = []
    candidates = matching._candidates

    def counted(mask):
        traces.append(1)
        return candidates(mask)

    monkeypatch.setattr(matching, "_candidates", counted)
    plan = PLAN._replace(rounds=2)
    for seed in (0, 1):
        mask = np.random.default_rng(seed).random(SHAPE) < 0.5
        find(anatomy(SHAPE, seed=seed), anatomy(SHAPE), mask, mask, plan=plan)
    assert len(traces) == 2  # one trace, two masks


def test_matching_holds_no_product_of_two_grids():
    of = jax.ShapeDtypeStruct
    fine = (96, 96, 80)  # of a network grid of 192 x 192 x 160
    maps = Maps(of((1, *fine, 128), jnp.float32), of((1, 12, 12, 40, 128), jnp.float32))
    mask = of(fine, bool)
    program = jax.jit(matching.find_matches, static_argnames="plan")
    program = program.lower(maps, maps, mask, mask, plan=Plan(queries=11520)).compile()
    # Descriptors of 11520 queries take 11 MiB, of 4096 candidates 4, their scores with
    # 256 queries 4. All scores at once would take 31 GiB.
    assert program.memory_analysis().temp_size_in_bytes < 96 * 2**20


@pytest.mark.parametrize(
    ("spacing", "stride", "start"),
    [((2.0, 2.0, 2.0), 8, 3), ((4.0, 4.0, 4.0), 4, 1), ((8.0, 9.0, 7.0), 2, 0)],
)
def test_plan_asks_about_every_16_mm(spacing, stride, start):
    plan = matching.plan_for("mind", spacing)
    assert (plan.stride, plan.start) == (stride, start)
    assert plan.min_score == matching.MIN_SCORE["mind"]


def test_network_points_are_the_middles_of_fine_voxels():
    """A fine voxel spans two of the network's, 2 i and 2 i + 1."""
    found = matching.network_points(np.array([[0, 1, 5]]))
    np.testing.assert_array_equal(found, [[0.5, 2.5, 10.5]])


# --- the displacement through points ------------------------------------------------


def smooth_field(points, shape):
    """Some voxels long, one wave over the grid."""
    x = points / (np.array(shape) - 1)
    waves = [
        np.sin(np.pi * x[:, i]) * np.cos(np.pi * x[:, (i + 1) % 3]) for i in (0, 1, 2)
    ]
    return np.stack(waves, axis=1) * (4.0, 3.0, -5.0)


def coarse(points, targets, valid, shape):
    plan = CoarsePlan()
    program = jax.jit(matching.coarse_disp, static_argnames=("shape", "plan"))
    args = (a.astype(np.float32) for a in (points, targets))
    return np.asarray(program(*args, valid, shape=shape, plan=plan))[0]


def test_coarse_disp_follows_a_smooth_field():
    shape = (64, 48, 80)
    rng = np.random.default_rng(0)
    points = rng.uniform(0, np.array(shape) - 1, size=(600, 3))
    valid = rng.random(600) < 0.8
    targets = points + smooth_field(points, shape)
    targets[~valid] += 1e4  # padding has no say
    disp = coarse(points, targets, valid, shape)
    assert disp.shape == (*shape, 3) and disp.dtype == np.float32
    inner = np.stack(
        np.meshgrid(*(np.arange(8, n - 8, 4) for n in shape), indexing="ij"), -1
    ).reshape(-1, 3)
    gap = disp[tuple(inner.T)] - smooth_field(inner, shape)
    before = np.abs(smooth_field(inner, shape)).mean()
    # Bends between voxels of 16, and the smoothness.
    assert np.abs(gap).mean() < 0.3 * before


def test_coarse_disp_of_points_that_fit_is_zero():
    shape = (40, 33, 50)  # no multiples of 16
    points = np.random.default_rng(0).uniform(0, 32, size=(50, 3)).astype(np.float32)
    disp = coarse(points, points, np.ones(50, bool), shape)
    np.testing.assert_array_equal(disp, np.zeros((*shape, 3)))
    away = coarse(points, points + 3, np.zeros(50, bool), shape)
    np.testing.assert_array_equal(away, np.zeros((*shape, 3)))


# --- bad input ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (Plan(queries=0), "queries must be at least 1"),
        (Plan(stride=3), "stride must be a positive multiple of 2"),
    ],
)
def test_find_matches_rejects_a_plan(plan, match):
    maps = random_maps(0, (4, 5, 6))
    masks = (everywhere((4, 5, 6)),) * 2
    with pytest.raises(ValueError, match=match):
        matching.find_matches(maps, maps, *masks, plan=plan)


def test_matching_rejects_wrong_shapes():
    maps = random_maps(0, (4, 5, 6))
    good = everywhere((4, 5, 6))
    call = functools.partial(matching.find_matches, plan=PLAN)
    with pytest.raises(ValueError, match=r"mask of moving must be \(4, 5, 6\) bool"):
        call(maps, maps, good, good[1:])
    two = Maps(*(jnp.concatenate([m, m]) for m in maps))
    with pytest.raises(ValueError, match="one volume at a time"):
        call(two, maps, good, good)
    with pytest.raises(ValueError, match=r"points must be \(N, 3\) int32"):
        matching.match(maps, maps, jnp.zeros((2, 3)), good, plan=PLAN)
    flat = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=r"must be \(N, 3\), \(N, 3\) and \(N,\) bool"):
        matching.coarse_disp(
            flat, flat, jnp.ones(4, bool), shape=(16, 16, 16), plan=CoarsePlan()
        )
