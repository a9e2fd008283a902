"""The embedding's objective: correspondence, negatives, and the training step."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unireg_jax.models.features import sam
from unireg_jax.tasks import OUTSIDE_HU, ViewBatch
from unireg_jax.training import contrastive, embedding, optimizer
from unireg_jax.training import mesh as train_mesh

SHAPE = (16, 32, 16)
RECIPE = contrastive.Recipe(
    anchors=12, positive_mm=4.0, ignore_mm=8.0, hard=64, negatives=32, others=20
)


def rotation(degrees):
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])


def make_batch(count=2, shift=(8.0, -6.0, 4.0), degrees=10.0, far=False):
    """Two views of noise; the second is rotated, larger and elsewhere."""
    rng = np.random.default_rng(0)
    matrices = np.zeros((count, 2, 4, 4), np.float32)
    matrices[..., 3, 3] = 1
    matrices[:, 0, :3, :3] = 2 * np.eye(3)
    matrices[:, 1, :3, :3] = 2.2 * rotation(degrees)
    matrices[:, 1, :3, 3] = np.array(shift) + (1000 if far else 0)
    hu = rng.integers(-900, 400, (count, 2, *SHAPE, 1)).astype(np.int16)
    body = np.ones((count, 2, *SHAPE), bool)
    body[:, :, :2] = False
    return ViewBatch(hu, body, matrices, np.arange(count, dtype=np.int32))


@functools.partial(jax.jit, static_argnames="recipe")
def loss(fine, coarse, batch, key, recipe=RECIPE):
    """In one program: operation by operation it compiles for ten times as long."""
    return contrastive.loss(fine, coarse, batch, key, recipe=recipe)


with_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))


def unit(key, shape):
    x = jax.random.normal(key, shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def maps(key, count=2):
    keys = jax.random.split(key)
    fine = unit(keys[0], (count, 2, *(n // 2 for n in SHAPE), 6))
    coarse = unit(keys[1], (count, 2, SHAPE[0] // 8, SHAPE[1] // 8, SHAPE[2] // 4, 6))
    return fine, coarse


def cells_of(batch, shape):
    one = jax.tree.map(lambda x: x[0], batch)
    return contrastive._cells(jnp.zeros((2, *shape, 6)), one)


def test_cells_match_the_nearest_one_by_search():
    """Against all distances, for cells that are cubes and for cells that are not."""
    for shape in ((8, 16, 8), (2, 4, 4)):
        batch = make_batch()
        cells = cells_of(batch, shape)
        for view in range(2):
            other = np.asarray(cells.mm[1 - view])
            gaps = np.linalg.norm(other[None] - cells.mm[view][:, None], axis=-1)
            good = np.isfinite(np.asarray(cells.gap_mm[view]).sum(-1))
            assert good.any()
            found = np.linalg.norm(cells.gap_mm[view], axis=-1)
            np.testing.assert_allclose(found[good], gaps.min(axis=1)[good], atol=1e-3)
            chosen = np.asarray(cells.body[1 - view])[np.asarray(cells.match[view])]
            assert chosen[good].all()


def test_cell_centres_are_those_of_their_voxels():
    batch = make_batch()
    cells = cells_of(batch, (8, 16, 8))
    # The first cell averages voxels 0 and 1 of each axis: centre at 0.5.
    expected = batch.vox2mm[0, :, :3, :3] @ np.full(3, 0.5) + batch.vox2mm[0, :, :3, 3]
    np.testing.assert_allclose(cells.mm[:, 0], expected, atol=1e-4)
    assert not cells.body[:, 0].any() and cells.body[:, -1].all()


@pytest.mark.slow
def test_loss_prefers_features_that_follow_the_place(key):
    """Features that are a smooth function of mm beat random ones, and hit."""
    batch = make_batch()
    random = maps(key)
    turn = jax.random.normal(key, (3, 6)) * 0.05
    placed = []
    for m in random:
        shape = m.shape[2:5]
        cells = jax.vmap(contrastive._cells)(m, batch)
        f = jnp.cos(cells.mm @ turn + jnp.expand_dims(jnp.arange(6.0), (0, 1, 2)))
        f = f / jnp.linalg.norm(f, axis=-1, keepdims=True)
        placed.append(f.reshape(2, 2, *shape, 6))
    worse, before = loss(*random, batch, key)
    better, after = loss(*placed, batch, key)
    assert float(better) < float(worse) - 0.3
    assert float(after["fine_hit"]) > float(before["fine_hit"]) + 0.2


def test_loss_of_equal_features_counts_the_negatives(key):
    """All cosines 1: -log(1 / (1 + n)), n the negatives; none are nearer than asked."""
    batch = make_batch()
    fine, coarse = (jnp.ones_like(m) / 6**0.5 for m in maps(key))
    everything = RECIPE._replace(hard=10**6, negatives=10**6)
    _, scalars = loss(fine, coarse, batch, key, everything)
    cells = cells_of(batch, (8, 16, 8))
    places = np.asarray(cells.mm).reshape(-1, 3)
    counts = []
    for view in range(2):
        gap = np.linalg.norm(cells.gap_mm[view], axis=-1)
        shown = np.asarray(cells.body[view]) & (gap <= RECIPE.positive_mm)
        own = np.asarray(cells.mm[view])[shown]
        far = np.linalg.norm(own[:, None] - places[None], axis=-1) >= RECIPE.ignore_mm
        counts += list(np.log1p(far.sum(axis=1)))
    assert min(counts) - 1e-4 <= float(scalars["fine"]) <= max(counts) + 1e-4


def test_views_apart_still_teach(key):
    """No common point: anchors against themselves, negatives of their own view."""
    batch = make_batch(far=True)
    fine, coarse = maps(key)
    (_, scalars), gradient = with_gradient(fine, coarse, batch, key)
    assert float(scalars["fine_hit"]) == 1.0  # nothing is nearer to a point than itself
    assert float(scalars["coarse"]) == 0.0 and jnp.isnan(scalars["coarse_hit"])
    assert bool(jnp.isfinite(gradient).all()) and float(jnp.abs(gradient).max()) > 0


def test_views_apart_are_no_coarse_misses(key):
    """The share of a batch is that of the pairs with a common point."""
    fine, coarse = maps(key)
    coarse = coarse.at[:, 1].set(coarse[:, 0])
    near = make_batch(shift=(2.0, 0.0, 0.0), degrees=0.0)
    places = {"near": near.vox2mm[0], "far": make_batch(far=True).vox2mm[0]}

    def hit(*kinds):
        batch = near._replace(vox2mm=np.stack([places[kind] for kind in kinds]))
        return float(loss(fine, coarse, batch, key)[1]["coarse_hit"])

    first, second = hit("near", "far"), hit("far", "near")
    both = hit("near", "near")
    assert both > 0
    np.testing.assert_allclose((first + second) / 2, both, rtol=1e-6)  # float32 means


def test_no_body_gives_zero_and_a_finite_gradient(key):
    batch = make_batch()
    batch = batch._replace(body=np.zeros_like(batch.body))
    fine, coarse = maps(key)
    (value, scalars), gradient = with_gradient(fine, coarse, batch, key)
    assert jnp.isnan(scalars["fine_hit"]) and jnp.isnan(scalars["coarse_hit"])
    assert float(value) == 0.0 and float(jnp.abs(gradient).max()) == 0.0


def test_hardest_takes_the_highest_scores(key):
    score = jax.random.uniform(key, (5, 200), minval=-1.0, maxval=1.0)
    allowed = jnp.ones((5, 200), bool).at[:, ::3].set(False)
    picked = contrastive._hardest(score, allowed, 40, 40, key)
    assert not bool((picked & ~allowed).any())
    ranks = np.sort(np.where(allowed, score, 0.0), axis=1)[:, -40]
    clear = np.abs(np.asarray(score) - ranks[:, None]) > 2e-3  # of the bisection
    expected = np.asarray(allowed) & (np.asarray(score) > ranks[:, None])
    np.testing.assert_array_equal(np.asarray(picked)[clear], expected[clear])
    some = contrastive._hardest(score, allowed, 40, 10, key)
    assert 0 < int(some.sum()) < int(picked.sum())


@pytest.fixture(scope="module")
def trainer():
    network = sam.Sam(
        stem=4, stages=(4, 4, 6, 6), channels=6, norm="batch", conv_impl="direct"
    )
    tx = optimizer.make_optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
    mesh = train_mesh.make_mesh(jax.devices()[:1])
    step = embedding.make_train_step(network, tx, recipe=RECIPE, mesh=mesh)
    return network, tx, step


@pytest.mark.slow
def test_step_trains_updates_statistics_and_traces_once(trainer):
    network, tx, step = trainer
    state = embedding.make_state(network, tx, seed=0)
    before = jax.tree.map(np.array, state.params)
    state, first = step(state, make_batch())
    for _ in range(8):
        state, last = step(state, make_batch())
    assert int(state.step) == 9
    assert float(last["loss"]) < float(first["loss"])
    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != np.asarray(b))), before, state.params
    )
    assert all(jax.tree.leaves(moved["batch_stats"]))
    assert step._cache_size() <= 2  # the first state has no sharding yet


def test_step_holds_no_scatter(trainer):
    """Bit-exact resume on accelerators: the backward pass adds in a fixed order."""
    network, tx, step = trainer
    state = jax.eval_shape(lambda: embedding.make_state(network, tx, seed=0))
    text = step.lower(state, make_batch()).as_text()
    assert "stablehlo.gather" in text and "scatter" not in text


def test_outside_counts_as_air():
    hu = jnp.array([OUTSIDE_HU, -1024], jnp.int16)
    assert float(jnp.diff(sam.scale(hu))[0]) == 0.0


_TWO_DEVICES = """
import jax, numpy as np
from tests.training import test_contrastive as t
from unireg_jax.models.features import sam
from unireg_jax.training import embedding, mesh as m, optimizer
assert len(jax.devices()) == 2
network = sam.Sam(
    stem=4, stages=(4, 4, 6, 6), channels=6, norm="batch", conv_impl="direct"
)
tx = optimizer.make_optimizer("sgd", lr=0.05)
results = []
for devices in (jax.devices()[:1], jax.devices()):
    mesh = m.make_mesh(devices)
    step = embedding.make_train_step(network, tx, recipe=t.RECIPE, mesh=mesh)
    state = embedding.make_state(network, tx, seed=0)
    state = jax.device_put(state, m.replicated(mesh))
    for _ in range(2):
        batch = jax.device_put(t.make_batch(), m.batch_sharding(mesh))
        state, scalars = step(state, batch)
    results.append((float(scalars["loss"]), jax.device_get(state.params)))
(a, p), (b, q) = results
np.testing.assert_allclose(a, b, rtol=1e-4)
jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), p, q)
print("same")
"""


@pytest.mark.slow
def test_two_devices_train_as_one():
    """Normalisation and negatives reach over both devices."""
    done = subprocess.run(
        [sys.executable, "-c", _TWO_DEVICES],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]
