"""Soft Dice and DSC against one-hot NumPy and SciPy forms in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from tests import analytic
from unireg_jax.ops import dice

SHAPES = [(1, 5, 6, 7), (2, 8, 4, 9)]
LABELS = 5

# Compiled once per shape; eager calls would compile their loops anew every time.
soft_dice = jax.jit(dice.soft_dice, static_argnames="num_labels")
dsc = jax.jit(dice.dsc, static_argnames="num_labels")


@functools.partial(jax.jit, static_argnames="num_labels")
def gradient(fixed, moving, disp, num_labels=LABELS):
    """Gradient to disp of a scalar of all dice values, no two weighted alike."""
    return jax.grad(weighted, 2)(fixed, moving, disp, num_labels)


def weighted(fixed, moving, disp, num_labels=LABELS, function=dice.soft_dice):
    """The scalar that `gradient` differentiates."""
    value, _ = function(fixed, moving, disp, num_labels=num_labels)
    weights = jnp.arange(1.0, value.size + 1.0).reshape(value.shape)
    return jnp.sum(weights * value)


def oracle_soft(fixed, moving, disp, num_labels):
    """One-hot channels warped by SciPy, edge repeated; float64."""
    fixed, moving = np.asarray(fixed), np.asarray(moving)
    out = np.zeros((len(fixed), num_labels - 1))
    for b in range(len(fixed)):
        grid = np.indices(fixed.shape[1:], np.float64)
        coords = grid + np.moveaxis(np.asarray(disp[b], np.float64), -1, 0)
        for k in range(1, num_labels):
            warped = scipy.ndimage.map_coordinates(
                (moving[b] == k).astype(np.float64), coords, order=1, mode="nearest"
            )
            f = fixed[b] == k
            total = f.sum() + warped.sum()
            out[b, k - 1] = 2 * (f * warped).sum() / total if total > 0 else 0.0
    return out


def plain_soft(fixed, moving, disp, num_labels, mask=None):
    """One-hot warp in jnp, for autodiff to differentiate; one example."""
    shape = fixed.shape[1:]
    onehot = jax.nn.one_hot(moving[0], num_labels, dtype=jnp.float32)
    warped = jnp.zeros(onehot.shape)
    start = jnp.stack([jnp.asarray(i, jnp.float32) for i in np.indices(shape)], axis=-1)
    top = jnp.broadcast_to(jnp.asarray(shape, jnp.float32) - 1.0, start.shape)
    coords = jnp.clip(start + disp[0], 0.0, top)
    low = jnp.clip(jnp.floor(coords), 0.0, top - 1.0)
    fraction = coords - low
    low = low.astype(jnp.int32)
    for x, y, z in np.ndindex(2, 2, 2):
        corner = onehot[low[..., 0] + x, low[..., 1] + y, low[..., 2] + z]
        weight = 1.0
        for axis, bit in enumerate((x, y, z)):
            f = fraction[..., axis]
            weight = weight * (f if bit else 1.0 - f)
        warped = warped + weight[..., None] * corner
    onehot_f = jax.nn.one_hot(fixed[0], num_labels, dtype=jnp.float32)
    if mask is not None:
        warped, onehot_f = (a * jnp.expand_dims(mask, -1) for a in (warped, onehot_f))
    overlap = jnp.sum(onehot_f * warped, axis=(0, 1, 2))
    total = jnp.sum(onehot_f, axis=(0, 1, 2)) + jnp.sum(warped, axis=(0, 1, 2))
    return (2.0 * overlap / total)[None, 1:]


def blocks(shape, seed=0, dtype=np.uint8, num_labels=LABELS):
    """Random label blocks of 2 voxels, background among them."""
    coarse = np.random.default_rng(seed).integers(
        0, num_labels, (shape[0], *((n + 1) // 2 for n in shape[1:]))
    )
    for axis in (1, 2, 3):
        coarse = np.repeat(coarse, 2, axis=axis)
    return jnp.asarray(coarse[:, : shape[1], : shape[2], : shape[3]].astype(dtype))


def random_disp(shape, size=2.0, seed=2):
    """Rough field, voxels; part of it leaves the grid."""
    field = np.random.default_rng(seed).uniform(-size, size, (*shape, 3))
    return jnp.asarray(field, jnp.float32)


def away_from_voxels(shape, seed=3):
    """Keeps 0.2 voxels from the kinks at integer positions."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(-2, 2, (*shape, 3))
    return jnp.asarray(whole + rng.uniform(0.2, 0.8, whole.shape), jnp.float32)


# --- soft Dice: values ----------------------------------------------------------------


def test_soft_dice_by_hand():
    fixed = jnp.zeros((1, 2, 2, 2), jnp.uint8).at[0, 0].set(1)
    moving = jnp.zeros((1, 2, 2, 2), jnp.uint8).at[0, 1].set(1)
    disp = jnp.zeros((1, 2, 2, 2, 3)).at[..., 0].set(0.25)
    value, present = soft_dice(fixed, moving, disp, num_labels=3)
    # Slice x = 0 samples 0.25 of the label, slice 1 (clamped) all of it:
    # 2 * 4 * 0.25 / (4 + 4 * 1.25).
    np.testing.assert_allclose(value, [[2.0 / 9.0, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(present, [[True, False]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_dice_of_identical_maps_is_exactly_one(shape, dtype):
    labels = blocks(shape, dtype=dtype)
    value, present = soft_dice(
        labels, labels, jnp.zeros((*shape, 3)), num_labels=LABELS
    )
    assert value.dtype == jnp.float32 and present.dtype == bool
    np.testing.assert_array_equal(value, 1.0)
    assert present.all()


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, -2, 0), (0, 1, 2)])
def test_soft_dice_integer_shift_is_exact(shift):
    moving = jnp.pad(
        blocks((1, 5, 6, 7)), ((0, 0), (3, 3), (3, 3), (3, 3))
    )  # background all around
    fixed = jnp.roll(moving, shift, axis=(1, 2, 3))
    disp = jnp.broadcast_to(-jnp.asarray(shift, jnp.float32), (*fixed.shape, 3))
    value, _ = soft_dice(fixed, moving, disp, num_labels=LABELS)
    np.testing.assert_array_equal(value, 1.0)


@pytest.mark.parametrize("size", [0.7, 2.0, 20.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_dice_matches_oracle(shape, size):
    fixed, moving = blocks(shape, 0), blocks(shape, 1)
    disp = random_disp(shape, size)
    value, present = soft_dice(fixed, moving, disp, num_labels=LABELS)
    assert present.all()
    # float32 positions: 1e-6 voxels, averaged over a label.
    expected = oracle_soft(fixed, moving, disp, LABELS)
    np.testing.assert_allclose(value, expected, atol=1e-6)


def test_soft_dice_takes_an_axis_of_one_voxel():
    shape = (1, 1, 6, 5)
    fixed, moving, disp = blocks(shape), blocks(shape, 1), random_disp(shape)
    value, _ = soft_dice(fixed, moving, disp, num_labels=LABELS)
    expected = oracle_soft(fixed, moving, disp, LABELS)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_array_equal(gradient(fixed, moving, disp)[..., 0], 0.0)


def test_soft_dice_of_large_labels_keeps_float64_precision():
    shape = (1, 40, 72, 64)
    halves = np.zeros(shape, np.uint8)
    halves[:, 3:38, 2:70] = 1
    halves[:, :, :, 40:] = 2
    disp = random_disp(shape, 0.9)
    value, _ = soft_dice(
        jnp.asarray(halves), jnp.roll(jnp.asarray(halves), 1, 2), disp, num_labels=3
    )
    expected = oracle_soft(halves, np.roll(halves, 1, 2), disp, 3)
    # One float32 bin per label, 1e5 voxels and more, is off by 1e-4.
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_soft_dice_does_not_depend_on_the_chunks(monkeypatch):
    shape = SHAPES[1]
    fixed, moving, disp = blocks(shape), blocks(shape, 1), random_disp(shape)
    arrays = fixed, moving, disp
    expected = weighted(*arrays, function=soft_dice), gradient(*arrays)
    monkeypatch.setattr(dice, "_CHUNK_VOXELS", 4 * 9 * 2)  # two slices
    # A new function object: the compiled ones above keep the old chunks.
    out = jax.jit(lambda *a: jax.value_and_grad(weighted, 2)(*a))(*arrays)
    # The counts agree to the bit; the last sum, of 8 dice values, is fused or not.
    np.testing.assert_allclose(out[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(out[1], expected[1], rtol=1e-5, atol=1e-7)


def test_soft_dice_counts_unknown_ids_as_background():
    shape = SHAPES[0]
    fixed, moving, disp = blocks(shape), blocks(shape, 1), random_disp(shape)
    value, present = soft_dice(fixed, moving, disp, num_labels=3)
    full, _ = soft_dice(fixed, moving, disp, num_labels=LABELS)
    np.testing.assert_array_equal(value, full[:, :2])
    negative = jnp.where(fixed == 0, -1, fixed.astype(jnp.int32))
    out, _ = soft_dice(negative, moving, disp, num_labels=3)
    np.testing.assert_array_equal(out, value)


# --- soft Dice and DSC: refinement ----------------------------------------------------


def ball(points, center, radius):
    """Label 1 in a ball of the unit cube, [B, X, Y, Z] uint8."""
    inside = np.sum((points - np.asarray(center)) ** 2, axis=-1) < radius**2
    return jnp.asarray(inside, jnp.uint8)


def test_soft_dice_error_of_a_known_field_is_first_order():
    """1 in the limit; what is lost is the rim, a voxel wide, that linear weights blur.

    The field is a bump: fixed(x) = moving(x + disp(x)) for the ball, in closed form.
    """

    def error(scale):
        shape = tuple(scale * n for n in (20, 24, 28))
        # Several voxels long at the rim, so that its fractions are of all sizes.
        disp, _ = analytic.bump_disp(
            shape, vector=scale * np.array([3.4, -4.4, 4.8]), width=0.35
        )
        points = (analytic.positions(shape)[None] + 0.5) / np.asarray(shape)
        center, radius = (0.52, 0.47, 0.51), 0.3
        fixed = ball(points + disp / np.asarray(shape), center, radius)
        moving = ball(points, center, radius)
        value, _ = soft_dice(fixed, moving, jnp.asarray(disp), num_labels=2)
        at_rest, _ = soft_dice(fixed, moving, jnp.zeros(disp.shape), num_labels=2)
        assert value[0, 0] > at_rest[0, 0] + 0.05
        return 1.0 - float(value[0, 0])

    # 2 in the limit.
    assert 1.8 < error(1) / error(2) < 2.2


def test_dsc_error_of_two_balls_is_second_order():
    """Of two shifted balls it tends to lens over ball.

    Counting the voxels of a ball of radius R is off by about R, hence by 1 / R^2 of
    them: as the root mean square over 32 places, for the single errors scatter.
    """
    radius, apart = 0.3, np.array([0.1, -0.06, 0.08])
    d = np.linalg.norm(apart)
    lens = np.pi * (2 * radius - d) ** 2 * (d**2 + 4 * d * radius) / (12 * d)
    expected = lens / (4.0 / 3.0 * np.pi * radius**3)
    places = 0.5 + np.random.default_rng(0).uniform(-0.05, 0.05, (32, 1, 1, 1, 3))

    def error(scale):
        shape = tuple(scale * n for n in (12, 10, 14))
        points = (analytic.positions(shape)[None] + 0.5) / np.asarray(shape)
        fixed, moving = (
            ball(points, places + sign * apart / 2, radius) for sign in (1, -1)
        )
        value = np.asarray(dsc(fixed, moving, num_labels=2), np.float64)
        return np.sqrt(np.mean((value - expected) ** 2))

    # 4 over all places; 32 of them gave 2.3 to 5.3 under 30 seeds, and 3.7 here.
    assert 2.5 < error(1) / error(2) < 5.5


# --- soft Dice: gradient --------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_dice_gradient_matches_finite_differences(shape):
    fixed, moving = blocks(shape, 0), blocks(shape, 1)
    disp = away_from_voxels(shape)
    direction = np.random.default_rng(4).uniform(-1, 1, disp.shape)
    step, base = 1e-5, np.asarray(disp, np.float64)
    weights = np.arange(1.0, shape[0] * (LABELS - 1) + 1.0).reshape(shape[0], -1)
    up, down = (
        (weights * oracle_soft(fixed, moving, base + s * direction, LABELS)).sum()
        for s in (step, -step)
    )
    out = np.asarray(gradient(fixed, moving, disp), np.float64)
    slope = np.sum(out * direction)
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=2e-5)


@pytest.mark.parametrize("shape", [(1, 5, 6, 7), (1, 10, 4, 8)])
def test_soft_dice_gradient_matches_autodiff_of_one_hot_warp(shape):
    fixed, moving, disp = blocks(shape, 0), blocks(shape, 1), random_disp(shape)

    def plain(d):
        value = plain_soft(fixed, moving, d, LABELS)
        return jnp.sum(jnp.arange(1.0, LABELS).reshape(1, -1) * value)

    value = weighted(fixed, moving, disp, function=soft_dice)
    out = gradient(fixed, moving, disp)
    expected = jax.jit(jax.value_and_grad(plain))(disp)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(
        out, expected[1], atol=1e-6 * np.abs(expected[1]).max() + 1e-8
    )


@pytest.mark.parametrize("counting", ["scatter", "compare"])
def test_soft_dice_sums_over_the_mask(counting):
    shape = (1, 10, 4, 8)
    fixed, moving = blocks(shape), blocks(shape, seed=1)
    disp = away_from_voxels(shape)
    mask = jnp.asarray(np.random.default_rng(5).random(shape) > 0.4)

    def masked(fixed, moving, disp, num_labels):
        options = {"mask": mask, "counting": counting}
        return dice.soft_dice(fixed, moving, disp, num_labels=num_labels, **options)

    def plain(fixed, moving, disp, num_labels):
        return plain_soft(fixed, moving, disp, num_labels, mask[0].astype("f4")), None

    found, present = masked(fixed, moving, disp, LABELS)
    expected, _ = plain(fixed, moving, disp, LABELS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    grads = [
        jax.grad(weighted, 2)(fixed, moving, disp, LABELS, function)
        for function in (masked, plain)
    ]
    np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-6)
    assert not np.asarray(grads[0])[~np.asarray(mask)].any()
    # A fixed label outside of the mask alone is not there.
    none = dice.soft_dice(
        fixed, moving, disp, num_labels=LABELS, mask=jnp.zeros(shape, bool)
    )
    assert present.any() and not none[1].any() and not none[0].any()
    with pytest.raises(ValueError, match="mask must be"):
        dice.soft_dice(
            fixed, moving, disp, num_labels=LABELS, mask=jnp.ones(shape, jnp.float32)
        )


def test_soft_dice_gradient_at_the_border_is_one_sided():
    shape = SHAPES[0]
    fixed, moving = blocks(shape, 0), blocks(shape, 1)
    at_rest = gradient(fixed, moving, jnp.zeros((*shape, 3)))
    within = np.full(shape, 1e-3, np.float32)
    within[:, -1] = -1e-3
    nudged = jnp.zeros((*shape, 3)).at[..., 0].set(within)
    np.testing.assert_allclose(
        at_rest[..., 0], gradient(fixed, moving, nudged)[..., 0], atol=2e-3
    )
    outside = jnp.full((*shape, 3), 50.0)
    np.testing.assert_array_equal(gradient(fixed, moving, outside), 0.0)


def test_soft_dice_gradient_adds_no_scatter():
    shape = SHAPES[0]
    arrays = blocks(shape, 0), blocks(shape, 1), random_disp(shape)
    forward, both = (
        jax.jit(f).lower(*arrays).as_text()
        for f in (weighted, jax.value_and_grad(weighted, 2))
    )
    assert "select_and_scatter" not in both
    assert forward.count("stablehlo.scatter") > 0
    assert both.count("stablehlo.scatter") == forward.count("stablehlo.scatter")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_soft_dice_counted_by_comparison_is_bit_equal(shape, compiled):
    arrays = blocks(shape, 0), blocks(shape, 1), random_disp(shape)

    def with_gradient(counting):
        def loss(fixed, moving, disp):
            values, _ = dice.soft_dice(
                fixed, moving, disp, num_labels=4, counting=counting
            )
            return jnp.sum(values**2)

        both = jax.value_and_grad(loss, 2)
        return (jax.jit(both) if compiled else both)(*arrays)

    scatter, compare = with_gradient("scatter"), with_gradient("compare")
    for a, b in zip(scatter, compare, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_soft_dice_counted_by_comparison_holds_no_scatter():
    shape = SHAPES[0]
    arrays = blocks(shape, 0), blocks(shape, 1), random_disp(shape)

    def loss(fixed, moving, disp):
        values, _ = dice.soft_dice(
            fixed, moving, disp, num_labels=4, counting="compare"
        )
        return jnp.sum(values)

    text = jax.jit(jax.value_and_grad(loss, 2)).lower(*arrays).as_text()
    assert "scatter" not in text


def test_soft_dice_rejects_unknown_counting():
    labels = jnp.zeros((1, 2, 3, 4), jnp.int32)
    with pytest.raises(ValueError, match="counting must be one of"):
        dice.soft_dice(
            labels, labels, jnp.zeros((1, 2, 3, 4, 3)), num_labels=2, counting="sort"
        )


# --- soft Dice: degenerate points, transforms, bad input ------------------------------


@pytest.mark.parametrize("empty", ["fixed", "moving", "both"])
def test_soft_dice_of_empty_label_is_zero_absent_and_finite(empty):
    shape = SHAPES[0]
    fixed, moving, disp = blocks(shape, 0), blocks(shape, 1), random_disp(shape)
    fixed = fixed if empty == "moving" else jnp.where(fixed == 2, 0, fixed)
    moving = moving if empty == "fixed" else jnp.where(moving == 2, 0, moving)
    fixed, moving = fixed.astype(jnp.uint8), moving.astype(jnp.uint8)
    value, present = soft_dice(fixed, moving, disp, num_labels=LABELS)
    assert value[0, 1] == 0.0
    np.testing.assert_array_equal(present, [[True, False, True, True]])
    assert np.isfinite(gradient(fixed, moving, disp)).all()


def test_soft_dice_without_any_label_is_zero_with_zero_gradient():
    empty = jnp.zeros(SHAPES[0], jnp.uint8)
    disp = random_disp(SHAPES[0])
    value, present = soft_dice(empty, empty, disp, num_labels=LABELS)
    np.testing.assert_array_equal(value, 0.0)
    assert not present.any()
    np.testing.assert_array_equal(gradient(empty, empty, disp), 0.0)


def test_soft_dice_present_looks_at_the_unwarped_moving_map():
    fixed = jnp.zeros(SHAPES[0], jnp.uint8).at[0, 0].set(1)
    disp = jnp.zeros((*SHAPES[0], 3)).at[..., 0].set(2.0)  # no voxel samples label 1
    value, present = soft_dice(fixed, fixed, disp, num_labels=LABELS)
    assert value[0, 0] == 0.0 and present[0, 0]


def test_soft_dice_examples_are_independent():
    shape = SHAPES[1]
    fixed, moving, disp = blocks(shape), blocks(shape, 1), random_disp(shape)
    together, present = soft_dice(fixed, moving, disp, num_labels=LABELS)
    for b in range(2):
        cut = slice(b, b + 1)
        alone, here = soft_dice(fixed[cut], moving[cut], disp[cut], num_labels=LABELS)
        np.testing.assert_array_equal(together[cut], alone)
        np.testing.assert_array_equal(present[cut], here)


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_dice_jit_equals_eager(shape):
    fixed, moving, disp = blocks(shape), blocks(shape, 1), random_disp(shape)
    eager, _ = dice.soft_dice(fixed, moving, disp, num_labels=LABELS)
    jitted, _ = soft_dice(fixed, moving, disp, num_labels=LABELS)
    np.testing.assert_allclose(jitted, eager, rtol=1e-6)
    if shape == SHAPES[0]:  # once: it compiles for seconds
        np.testing.assert_allclose(
            gradient(fixed, moving, disp),
            jax.grad(weighted, 2)(fixed, moving, disp),
            atol=1e-6,
        )


def test_soft_dice_rejects_bad_input():
    labels, disp = blocks(SHAPES[0]), random_disp(SHAPES[0])
    with pytest.raises(ValueError, match=r"fixed_labels must be \(B, X, Y, Z\)"):
        soft_dice(labels[..., None], labels, disp, num_labels=LABELS)
    with pytest.raises(ValueError, match="moving_labels must be .* as fixed_labels"):
        soft_dice(labels, labels[:, 1:], disp, num_labels=LABELS)
    with pytest.raises(ValueError, match="fixed_labels must be integer ids"):
        soft_dice(labels.astype(jnp.float32), labels, disp, num_labels=LABELS)
    with pytest.raises(ValueError, match="disp must be .* float32 in voxels"):
        channels_first = jnp.moveaxis(disp, -1, 1)
        soft_dice(labels, labels, channels_first, num_labels=LABELS)
    with pytest.raises(ValueError, match="disp must be .* float32 in voxels"):
        half = disp.astype(jnp.bfloat16)
        soft_dice(labels, labels, half, num_labels=LABELS)
    with pytest.raises(ValueError, match="num_labels must be an int >= 2"):
        soft_dice(labels, labels, disp, num_labels=1)


# --- DSC ------------------------------------------------------------------------------


def test_dsc_by_hand():
    fixed = jnp.asarray([0, 1, 1, 1, 2, 2, 0, 0], jnp.uint8).reshape(1, 2, 2, 2)
    warped = jnp.asarray([1, 1, 1, 0, 0, 0, 3, 0], jnp.uint8).reshape(1, 2, 2, 2)
    out = dsc(fixed, warped, num_labels=5)
    # 2 * 2 / (3 + 3); label 2 only in fixed, 3 only in warped, 4 in neither.
    np.testing.assert_allclose(out, [[2.0 / 3.0, 0.0, 0.0, np.nan]], rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_dsc_matches_counting(shape):
    fixed, warped = np.asarray(blocks(shape, 0)), np.asarray(blocks(shape, 1))
    out = dsc(jnp.asarray(fixed), jnp.asarray(warped, jnp.int32), num_labels=LABELS)
    assert out.dtype == jnp.float32
    for b in range(shape[0]):
        for k in range(1, LABELS):
            f, w = fixed[b] == k, warped[b] == k
            expected = 2 * (f & w).sum() / (f.sum() + w.sum())
            np.testing.assert_allclose(out[b, k - 1], expected, rtol=1e-6)


def test_dsc_of_identical_maps_is_one_and_unknown_ids_count_nowhere():
    labels = blocks(SHAPES[1])
    np.testing.assert_array_equal(dsc(labels, labels, num_labels=LABELS), 1.0)
    fewer = dsc(labels, blocks(SHAPES[1], 1), num_labels=3)
    full = dsc(labels, blocks(SHAPES[1], 1), num_labels=LABELS)
    np.testing.assert_array_equal(fewer, full[:, :2])


def test_dsc_equals_soft_dice_of_whole_voxel_shift():
    shape = SHAPES[0]
    fixed, moving = blocks(shape, 0), blocks(shape, 1)
    soft, _ = soft_dice(fixed, moving, jnp.zeros((*shape, 3)), num_labels=LABELS)
    hard = jax.jit(lambda f, m: dsc(f, m, num_labels=LABELS))(fixed, moving)
    np.testing.assert_allclose(soft, hard, rtol=1e-6)


def test_dsc_rejects_bad_input():
    labels = blocks(SHAPES[0])
    with pytest.raises(ValueError, match="warped_labels must be integer ids"):
        dsc(labels, labels.astype(jnp.float32), num_labels=LABELS)
    with pytest.raises(ValueError, match="warped_labels must be .* as fixed_labels"):
        dsc(labels, labels[..., 1:], num_labels=LABELS)


# --- layers: organs that overlap ------------------------------------------------------

NESTED = (1, 5, 6, 7)


def nested(shape, seed):
    """Masks [K, B, X, Y, Z] bool of labels 1 ... K - 1 that overlap, 2 layers of 3."""
    rng = np.random.default_rng(seed)
    masks = rng.random((LABELS, *shape)) < 0.45
    masks[0] = False
    # Three at most at a voxel: all that two further layers can hold.
    masks[1] &= masks[2:].sum(axis=0) < 3
    return masks


def layered(masks):
    """The masks as labels and [B, 2, X, Y, Z], the least id first."""
    ids = np.where(masks, np.arange(len(masks))[:, None, None, None, None], len(masks))
    found = np.sort(ids, axis=0)[:3]
    found = np.where(found == len(masks), 0, found).astype(np.uint8)
    return jnp.asarray(found[0]), jnp.asarray(np.moveaxis(found[1:], 0, 1))


def oracle_nested(fixed, moving, disp):
    """Soft Dice of one-hot masks, each of which is warped by SciPy; float64."""
    singles = zip(fixed[1:], moving[1:], strict=True)
    columns = [oracle_soft(f, m, disp, 2)[:, 0] for f, m in singles]
    return np.stack(columns, axis=1)


@functools.partial(jax.jit, static_argnames="counting")
def soft_nested(fixed, moving, disp, counting="scatter"):
    (fixed, fixed_more), (moving, moving_more) = fixed, moving
    return dice.soft_dice(
        fixed,
        moving,
        disp,
        num_labels=LABELS,
        fixed_more=fixed_more,
        moving_more=moving_more,
        counting=counting,
    )


@pytest.mark.parametrize("shape", [NESTED, (2, 8, 4, 9)])
def test_layers_count_as_the_one_hot_masks_they_hold(shape):
    masks = nested(shape, 0), nested(shape, 1)
    assert (masks[0].sum(axis=0) == 3).any()
    disp = random_disp(shape)
    fixed, moving = map(layered, masks)
    value, present = soft_nested(fixed, moving, disp)
    np.testing.assert_allclose(value, oracle_nested(*masks, disp), atol=1e-6)
    assert present.all()
    compared, _ = soft_nested(fixed, moving, disp, counting="compare")
    np.testing.assert_array_equal(value, compared)
    hard = dice.dsc(
        fixed[0],
        moving[0],
        num_labels=LABELS,
        fixed_more=fixed[1],
        warped_more=moving[1],
    )
    both = (masks[0] & masks[1])[1:].sum(axis=(2, 3, 4))
    total = sum(m[1:].sum(axis=(2, 3, 4)) for m in masks)
    np.testing.assert_allclose(hard, (2 * both / total).T, rtol=1e-6)


def test_gradient_of_layers_is_that_of_one_hot_masks():
    masks = nested(NESTED, 2), nested(NESTED, 3)
    fixed, moving = map(layered, masks)
    disp = away_from_voxels(NESTED)
    weights = np.arange(1.0, LABELS)[None]
    out = jax.grad(lambda d: jnp.sum(weights * soft_nested(fixed, moving, d)[0]))(disp)
    base = np.asarray(disp, np.float64)
    for seed in (4, 5, 6):
        direction = np.random.default_rng(seed).uniform(-1, 1, disp.shape)
        up, down = (
            (weights * oracle_nested(*masks, base + step * direction)).sum()
            for step in (1e-5, -1e-5)
        )
        slope = np.sum(np.asarray(out, np.float64) * direction)
        np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=2e-5)


def test_no_layers_and_empty_layers_change_no_bit():
    fixed, moving = blocks(NESTED, 0), blocks(NESTED, 1)
    disp = random_disp(NESTED)
    plain, _ = soft_dice(fixed, moving, disp, num_labels=LABELS)
    for count in (0, 2):
        more = jnp.zeros((1, count, *NESTED[1:]), jnp.uint8)
        value, _ = soft_nested((fixed, more), (moving, more), disp)
        np.testing.assert_array_equal(value, plain)


def test_layers_on_another_grid_or_in_another_place_are_refused():
    labels, disp = blocks(NESTED), random_disp(NESTED)
    for more in (labels, jnp.zeros((1, 5, 2, 6, 7), jnp.uint8), labels[:, None] / 2):
        with pytest.raises(ValueError, match="moving_more must be integer ids"):
            dice.soft_dice(labels, labels, disp, num_labels=3, moving_more=more)
    with pytest.raises(ValueError, match="warped_more must be integer ids"):
        dice.dsc(labels, labels, num_labels=3, warped_more=labels[:, None, 1:])
