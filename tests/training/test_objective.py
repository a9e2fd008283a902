"""The objective: weights per region, units, validity, what its gradient may hold."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build
from unireg_jax.models.features import Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.ops import ncc, resample, smoothness, warp
from unireg_jax.tasks import OUTSIDE_HU, PairBatch
from unireg_jax.training import mesh as train_mesh
from unireg_jax.training import objective, optimizer
from unireg_jax.training import state as train_state
from unireg_jax.training import step as train_step

SHAPE = (16, 32, 48)
SMALL = {"encoder": (4, 6, 6, 6), "decoder": (6, 6, 6, 6), "remaining": (4,)}
LAMBDA = (0.05, 1.0, 0.1, 10.0)  # Table 8

# Eager calls would compile every operation on its own.
prepare = jax.jit(objective.prepare)
judged = jax.jit(objective.objective, static_argnames="weights")


def _batch(seed=0, batch=1, region=0):
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, 1000, (2, batch, *SHAPE, 1)).astype(np.int16)
    labels = rng.integers(0, 3, (2, batch, *SHAPE)).astype(np.uint8)
    return PairBatch(
        fixed=jnp.asarray(hu[0]),
        moving=jnp.asarray(hu[1]),
        fixed_labels=jnp.asarray(labels[0]),
        moving_labels=jnp.asarray(labels[1]),
        fixed_more=jnp.zeros((batch, 0, *SHAPE), jnp.uint8),
        moving_more=jnp.zeros((batch, 0, *SHAPE), jnp.uint8),
        align=jnp.tile(jnp.eye(4), (batch, 1, 1)),
        region=jnp.full((batch,), region, jnp.int32),
        pair_type=jnp.zeros((batch,), jnp.int32),
        pair=jnp.zeros((batch,), jnp.int32),
    )


def _weights(**options):
    return objective.Weights(smoothness=LAMBDA, num_labels=3, **options)


@pytest.mark.parametrize(("region", "strength"), list(enumerate(LAMBDA)))
def test_objective_lambda_follows_the_region(key, region, strength):
    """Task -> lambda -> loss, for every row of Table 8."""
    pair = prepare(_batch(region=region), Extractor("none"))
    disp = 0.3 * jax.random.normal(key, (1, *SHAPE, 3))
    loss, scalars = judged(disp, pair, weights=_weights(dice=0.0, reg_units="voxel"))
    expected = 1 - scalars["ncc"] + strength * smoothness.diffusion(disp)[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_objective_normalized_units_divide_by_half_the_grid(key):
    pair = prepare(_batch(), Extractor("none"))
    disp = jax.random.normal(key, (1, *SHAPE, 3))
    _, scalars = judged(disp, pair, weights=_weights())
    unit = disp * (2 / (np.array(SHAPE, np.float32) - 1))[None, None, None, None]
    expected = smoothness.diffusion(unit)[0]
    np.testing.assert_allclose(scalars["smoothness"], expected, rtol=1e-5)


def test_objective_takes_the_mean_ncc_of_several_grids():
    """By a shift that is seen differently at each resolution, and its gradient."""
    batch = _batch()
    batch = batch._replace(moving=jnp.roll(batch.fixed, 1, 3).at[:, :8].set(OUTSIDE_HU))
    pair = prepare(batch, Extractor("none"))
    images = pair.fixed, pair.moving, pair.fixed_valid * pair.moving_valid
    expected = []
    for _ in range(3):
        fixed, moving, mask = images
        expected.append(ncc.local_ncc(fixed, moving, window=3, mask=mask[..., 0])[0])
        images = [resample.downsample_mean(image, 2) for image in images]
    assert np.ptp(expected) > 0.02
    disp = jnp.zeros((1, *SHAPE, 3))
    for scales in (1, 3):
        weights = _weights(dice=0.0, ncc_window=3, ncc_scales=scales)
        _, scalars = judged(disp, pair, weights=weights)
        np.testing.assert_allclose(
            scalars["ncc"], np.mean(expected[:scales]), rtol=1e-5
        )

    # The gradient is that of all grids.
    def loss(shift, scales=3):
        weights = _weights(dice=0.0, ncc_window=3, ncc_scales=scales)
        return judged(disp.at[..., 2].add(shift), pair, weights=weights)[0]

    step = 0.02
    slope = (loss(0.4 + step) - loss(0.4 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(0.4), slope, rtol=0.02)
    assert abs(slope - jax.grad(loss)(0.4, 1)) > 0.1 * abs(slope)


def test_objective_perfect_pair_costs_nothing():
    batch = _batch()
    batch = batch._replace(moving=batch.fixed, moving_labels=batch.fixed_labels)
    pair = prepare(batch, Extractor("none"))
    loss, scalars = judged(jnp.zeros((1, *SHAPE, 3)), pair, weights=_weights())
    np.testing.assert_allclose(scalars["dice"], 1.0, atol=1e-6)
    np.testing.assert_allclose(loss, 0.0, atol=1e-3)  # eps of the windowed NCC


def test_objective_counts_labels_either_way_to_the_same_bits():
    pair = prepare(_batch(), Extractor("none"))
    disp = jnp.full((1, *SHAPE, 3), 0.3)
    losses = [
        judged(disp, pair, weights=_weights(dice_counting=counting))
        for counting in ("scatter", "compare")
    ]
    assert losses[0][0] == losses[1][0] > 0
    assert losses[0][1]["dice"] == losses[1][1]["dice"] < 1


def test_objective_without_common_labels_leaves_dice_out():
    batch = _batch()
    batch = batch._replace(moving_labels=jnp.zeros_like(batch.moving_labels))
    pair = prepare(batch, Extractor("none"))
    disp = jnp.zeros((1, *SHAPE, 3))
    loss, scalars = judged(disp, pair, weights=_weights())
    plain, _ = judged(disp, pair, weights=_weights(dice=0.0))
    assert np.isnan(scalars["dice"])
    np.testing.assert_allclose(loss, plain, rtol=1e-6)


def test_objective_ignores_what_lies_beyond_either_scan(key):
    """Voxels outside the moving scan change neither value nor gradient."""
    batch = _batch()
    cut = batch.moving.at[:, :, :, 24:].set(OUTSIDE_HU)
    other = cut.at[:, :, :, 24:].set(OUTSIDE_HU)
    fixed = batch.fixed.at[:, :, :, 36:].set(777)  # far from what the mask admits
    pairs = [
        prepare(batch._replace(moving=cut), Extractor("none")),
        prepare(batch._replace(moving=other, fixed=fixed), Extractor("none")),
    ]
    disp = jnp.zeros((1, *SHAPE, 3))
    values = [judged(disp, p, weights=_weights(dice=0.0))[0] for p in pairs]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)


def test_dice_ends_where_a_scan_ends(key):
    """An organ that is cut through is no stump to press the other one into."""
    batch = _batch()
    batch = batch._replace(moving=batch.moving.at[:, :, :, 24:].set(OUTSIDE_HU))
    fixed = batch.fixed_labels.at[:, :, :, 30:].set(2)
    moving = batch.moving_labels.at[:, :, :, 30:].set(1)
    disp = 0.3 * jax.random.normal(key, (1, *SHAPE, 3))
    found = [
        judged(disp, prepare(b, Extractor("none")), weights=_weights())[1]["dice"]
        for b in (batch, batch._replace(fixed_labels=fixed, moving_labels=moving))
    ]
    assert found[0] == found[1]


def test_objective_ignores_what_is_led_beyond_the_grid():
    """A scan that fills its grid has no edge in its voxels, yet ends there."""
    batch = _batch()
    batch = batch._replace(
        fixed=jnp.maximum(batch.fixed, 0), moving=jnp.maximum(batch.moving, 0)
    )
    disp = jnp.zeros((1, *SHAPE, 3)).at[..., 2].set(6.0)
    other = batch._replace(
        fixed=batch.fixed.at[:, :, :, 46:].set(777),  # far from what the mask admits
        fixed_labels=batch.fixed_labels.at[:, :, :, 42:].set(2),
    )
    found = [
        judged(disp, prepare(b, Extractor("none")), weights=_weights())
        for b in (batch, other)
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    assert found[0][1]["dice"] == found[1][1]["dice"] < 1


def test_prepare_applies_the_alignment():
    """align maps fixed voxels to moving voxels: a shift by (1, 2, 3) is undone."""
    batch = _batch()
    moving = jnp.roll(batch.fixed, (1, 2, 3), (1, 2, 3))
    labels = jnp.roll(batch.fixed_labels, (1, 2, 3), (1, 2, 3))
    align = jnp.eye(4).at[:3, 3].set(jnp.array([1.0, 2.0, 3.0]))[None]
    pair = prepare(
        batch._replace(moving=moving, moving_labels=labels, align=align),
        Extractor("none"),
    )
    inner = (slice(None), slice(1, -4), slice(2, -4), slice(3, -4))
    np.testing.assert_allclose(pair.moving[inner], pair.fixed[inner], atol=1e-6)
    np.testing.assert_array_equal(pair.moving_labels[inner], pair.fixed_labels[inner])
    # Beyond the moving grid: not valid, air, and no label.
    assert float(pair.moving_valid[0, -1, 0, 0, 0]) == 0
    assert float(pair.moving[0, -1, 0, 0, 0]) == -1
    assert not pair.moving_labels[:, -1].any()


def test_prepare_reads_the_moving_scan_where_a_field_leads():
    """align(x + disp(x)): an affine that turns, of a field that differs by place."""
    batch, rng = _batch(), np.random.default_rng(1)
    align = np.array(
        [[0, 0.6, 0, -3], [1.5, 0, 0.1, 2], [0.2, 0, 0.9, 1], [0, 0, 0, 1]]
    )
    places = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    slopes = np.array([9.0, 5.0, 4.0])  # HU: what is linear is read exactly
    hu = np.rint(places @ slopes - 300).astype(np.int16)
    disp = rng.uniform(-2, 2, (1, *SHAPE, 3)).astype(np.float32)
    batch = batch._replace(
        moving=jnp.asarray(hu[None, ..., None]),
        align=jnp.asarray(align[None], jnp.float32),
    )
    pair = jax.jit(objective.prepare)(batch, Extractor("none"), disp)
    coords = (places + disp[0]) @ align[:3, :3].T + align[:3, 3]
    inside = ((coords >= 0) & (coords <= np.array(SHAPE) - 1)).all(-1)
    inside &= ((places + disp[0] > -0.5).all(-1)) & (
        (places + disp[0] < np.array(SHAPE) - 0.5).all(-1)
    )
    expected = (coords @ slopes - 300 + 800) / 600 - 1
    assert inside.mean() > 0.3
    found = np.asarray(pair.moving[0, ..., 0])
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-3)
    np.testing.assert_array_equal(pair.fixed, prepare(batch, Extractor("none")).fixed)


def test_prepare_keeps_the_outer_slices_of_a_scan_that_hardly_moves():
    """As in registration: a layer of air there would be heeded in a second pass."""
    batch = _batch()
    for shift, kept in ((0.4, True), (-0.4, True), (0.6, False)):
        disp = jnp.full((1, *SHAPE, 3), shift)
        pair = jax.jit(objective.prepare)(batch, Extractor("none"), disp)
        assert bool(pair.moving_valid.all()) == kept


def test_a_second_pass_sees_the_warped_scan_and_is_judged_with_the_first():
    batch, extractor, weights = _batch(), Extractor("none"), _weights()
    x, y = (jnp.arange(n, dtype=jnp.float32) / n for n in SHAPE[:2])
    # The first field is along X and grows with Y, the second the other way round.
    fields = [
        jnp.zeros((1, *SHAPE, 3)).at[..., 0].set(2 * y[:, None]),
        jnp.zeros((1, *SHAPE, 3)).at[..., 1].set(3 * x[:, None, None]),
    ]
    seen = []

    def apply_fn(scale, fixed, moving, *_, train):
        assert train
        seen.append(moving)
        return scale * fields[len(seen) - 1]

    loss = objective.make_loss(apply_fn, weights=weights, passes=2)
    gradient, scalars = jax.grad(loss, has_aux=True)(0.8, batch, extractor)
    pair = prepare(batch, extractor)

    def first(scale):
        return objective.objective(scale * fields[0], pair, weights=weights)[0]

    def second(scale):
        total = warp.compose(scale * fields[1], 0.8 * fields[0])
        return objective.objective(total, pair, weights=weights)[0]

    (one, slope), (two, other) = (jax.value_and_grad(f)(0.8) for f in (first, second))
    np.testing.assert_allclose(scalars["loss"], (one + two) / 2, rtol=1e-5)
    np.testing.assert_allclose(gradient, (slope + other) / 2, rtol=1e-4)
    expected = prepare(batch, extractor, 0.8 * fields[0]).moving
    np.testing.assert_allclose(seen[1], expected, atol=1e-5)


def test_a_pass_without_common_labels_leaves_the_overlap_of_the_other():
    batch = _batch()
    away = jnp.full((1, *SHAPE, 3), 100.0)

    def apply_fn(scale, *_, train):
        calls.append(train)
        return scale * away * (len(calls) - 1)

    calls = []
    both = objective.make_loss(apply_fn, weights=_weights(), passes=2)
    _, scalars = both(1.0, batch, Extractor("none"))
    calls = []
    one = objective.make_loss(apply_fn, weights=_weights())
    _, alone = one(1.0, batch, Extractor("none"))
    np.testing.assert_allclose(scalars["dice"], alone["dice"], rtol=1e-6)
    assert np.isfinite(scalars["loss"])


def test_dice_leaves_out_an_organ_that_is_cut_away():
    batch = _batch()
    batch = batch._replace(moving=batch.moving.at[:, :, :, 24:].set(OUTSIDE_HU))
    ends = {
        "fixed_labels": batch.fixed_labels.at[:].set(1).at[:, :, :, 20:].set(2),
        "moving_labels": batch.moving_labels.at[:].set(1).at[:, :, :, 26:].set(2),
    }
    pair = prepare(batch._replace(**ends), Extractor("none"))
    _, scalars = judged(jnp.zeros((1, *SHAPE, 3)), pair, weights=_weights())
    # Label 2 is in the fixed scan, and of the moving one in cut slices alone.
    assert 0.85 < float(scalars["dice"]) < 1


@pytest.mark.slow
def test_compiled_training_step_holds_no_scatter_but_the_label_counts():
    """Gathers and reshapes only: bit-exact on every backend, and the fastest form.

    The scatters of the step are the forward label counts of the soft Dice (integer
    adds into labels per slice, exact in any order); the backward pass adds none.
    """
    model = UniReg(**SMALL)
    loss = objective.make_loss(
        functools.partial(build.apply, model),
        weights=_weights(),
    )
    tx = optimizer.make_optimizer("sgd", lr=1e-3)
    step = train_step.make_train_step(loss, tx, mesh=train_mesh.make_mesh())
    state = jax.eval_shape(lambda: train_state.make_state(model, tx, seed=0))
    batch = _batch()
    text = step.lower(state, batch, Extractor("mind")).compile().as_text()
    assert not re.search(r"\bselect-and-scatter\(", text)
    forward = (
        jax.jit(loss).lower(state.params, batch, Extractor("mind")).compile().as_text()
    )
    counts = [len(re.findall(r"\bscatter\(", t)) for t in (forward, text)]
    assert counts[0] >= 1  # the search finds what is there
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (objective.Weights(LAMBDA, reg_units="mm"), "reg_units must be one of"),
        (objective.Weights((1.0, 1.0)), "one weight per region"),
        (objective.Weights(LAMBDA, ncc_scales=0), "ncc_scales must be 1 or more"),
        (objective.Weights(LAMBDA, ncc_scales=6), "can be halved"),
    ],
)
def test_objective_rejects_bad_weights(weights, match):
    pair = prepare(_batch(), Extractor("none"))
    with pytest.raises(ValueError, match=match):
        judged(jnp.zeros((1, *SHAPE, 3)), pair, weights=weights)
