"""MIND-SSC against SciPy and PyTorch forms in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from tests import analytic, oracles
from unireg_jax.ops import mind

SHAPES = [(1, 5, 6, 7, 1), (2, 9, 4, 8, 1)]


# Compiled once per shape; eager calls would compile their loop anew every time.
mind_ssc = jax.jit(mind.mind_ssc, static_argnames=("radius", "dilation"))


def finish(ssd):
    """Patch distances [X, Y, Z, 12] -> descriptors of one example; float64."""
    distance = ssd - ssd.min(axis=-1, keepdims=True)
    variance = distance.mean(axis=-1, keepdims=True)
    level = variance.mean()
    return np.exp(-distance / np.clip(variance, 0.001 * level, 1000.0 * level))


def oracle_mind(volume, radius, dilation):
    """Shifts by clamped indices, patches by SciPy's box filter."""
    out = []
    for image in np.asarray(volume, np.float64)[..., 0]:

        def shifted(step, image=image):
            axes = (
                np.clip(np.arange(n) + dilation * k, 0, n - 1)
                for n, k in zip(image.shape, step, strict=True)
            )
            return image[np.ix_(*axes)]

        ssd = [
            scipy.ndimage.uniform_filter(
                (shifted(s) - shifted(t)) ** 2, 2 * radius + 1, mode="nearest"
            )
            for s, t in mind.offset_pairs()
        ]
        out.append(finish(np.stack(ssd, axis=-1)))
    return np.stack(out)


def smooth_noise(shape, seed=0):
    """A random image with some structure, float32."""
    image = np.random.default_rng(seed).standard_normal(shape)
    blurred = scipy.ndimage.gaussian_filter(image, (0, 1, 1, 1, 0))
    return jnp.asarray(blurred + 0.1 * image, jnp.float32)


def test_offset_pairs_are_the_right_angles():
    pairs = mind.offset_pairs()
    assert len(set(pairs)) == 12
    for s, t in pairs:
        # Unit vectors whose distance is the diagonal of a unit square.
        assert np.abs(s).sum() == np.abs(t).sum() == 1
        assert np.square(np.subtract(s, t)).sum() == 2


def test_mind_by_hand_of_a_ramp():
    ramp = jnp.broadcast_to(jnp.arange(9.0)[None, :, None, None, None], (1, 9, 8, 7, 1))
    middle = mind_ssc(ramp)[0, 4, 4, 3]
    # Along x the patches differ by 2, else not at all: 8 distances of 4, 4 of 0, so
    # the variance is 8/3 and exp(-4 / (8/3)) = exp(-1.5).
    expected = [
        np.exp(-1.5) if s[0] != 0 or t[0] != 0 else 1.0 for s, t in mind.offset_pairs()
    ]
    np.testing.assert_allclose(middle, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "index, radius, dilation", [(0, 1, 2), (1, 1, 2), (0, 2, 1), (1, 1, 3)]
)
def test_mind_matches_oracle(index, radius, dilation):
    shape = SHAPES[index]
    volume = smooth_noise(shape)
    out = mind_ssc(volume, radius=radius, dilation=dilation)
    assert out.dtype == jnp.float32 and out.shape == (*shape[:-1], 12)
    # float32: distances keep 6 digits, the exponent is at most 12.
    np.testing.assert_allclose(out, oracle_mind(volume, radius, dilation), atol=1e-5)


def test_mind_matches_torch_pooling():
    torch = pytest.importorskip("torch")
    radius, dilation = 1, 2
    volume = smooth_noise((1, 9, 8, 7, 1))
    image = torch.tensor(np.asarray(volume, np.float64)[None, ..., 0])
    padded = torch.nn.ReplicationPad3d(dilation)(image)

    def shifted(step):
        cut = (
            slice(dilation * (1 + k), dilation * (1 + k) + n)
            for n, k in zip(image.shape[2:], step, strict=True)
        )
        return padded[(slice(None), slice(None), *cut)]

    ssd = [
        torch.nn.functional.avg_pool3d(
            torch.nn.ReplicationPad3d(radius)((shifted(s) - shifted(t)) ** 2),
            2 * radius + 1,
            stride=1,
        )
        for s, t in mind.offset_pairs()
    ]
    expected = finish(torch.cat(ssd, dim=1)[0].permute(1, 2, 3, 0).numpy())
    np.testing.assert_allclose(mind_ssc(volume)[0], expected, atol=1e-5)


def test_mind_lies_in_unit_interval_and_reaches_one():
    out = mind_ssc(smooth_noise(SHAPES[1]))
    assert float(jnp.min(out)) > 0.0
    np.testing.assert_array_equal(jnp.max(out, axis=-1), 1.0)


@pytest.mark.parametrize("scale, shift", [(3.0, 0.0), (-0.5, 2.0), (400.0, -100.0)])
def test_mind_invariant_to_linear_intensity(scale, shift):
    volume = smooth_noise(SHAPES[1])
    # float32: the shift costs digits of the differences.
    np.testing.assert_allclose(
        mind_ssc(scale * volume + shift), mind_ssc(volume), atol=1e-4
    )


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_mind_follows_a_shift(axis):
    volume = smooth_noise((1, 14, 12, 13, 1))
    rolled = mind_ssc(jnp.roll(volume, 1, axis))
    # Off the border, where neither padding nor the wrap is seen. Only the clamp knows
    # the whole volume, and here it is not active.
    inner = (0, *(slice(5, n - 4) for n in volume.shape[1:4]))
    np.testing.assert_allclose(
        rolled[inner], jnp.roll(mind_ssc(volume), 1, axis)[inner], atol=1e-6
    )


def test_mind_axes_are_told_apart():
    volume = smooth_noise((1, 6, 6, 6, 1))
    swapped = mind_ssc(jnp.swapaxes(volume, 1, 3))
    pairs = mind.offset_pairs()
    order = [pairs.index(tuple(sorted((s[::-1], t[::-1])))) for s, t in pairs]
    expected = jnp.swapaxes(mind_ssc(volume), 1, 3)[..., np.asarray(order)]
    np.testing.assert_allclose(swapped, expected, atol=1e-5)


def test_mind_of_constant_volume_is_one_with_finite_gradient():
    volume = jnp.full(SHAPES[0], -0.7)
    np.testing.assert_array_equal(mind_ssc(volume), 1.0)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(mind_ssc(v))))(volume)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("faint", [1.0, 3e-3], ids=["plain", "clamped"])
def test_mind_gradient_matches_finite_differences(faint):
    """Clamped: one half is so faint that its variance is the floor, a mean of all."""
    volume = smooth_noise((1, 10, 6, 7, 1)).at[:, 5:].multiply(faint)
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((*volume.shape[:-1], 12))
    direction = rng.uniform(-1, 1, volume.shape)
    direction[:, 5:] *= faint

    def loss(value):
        return jnp.sum(mind_ssc(value) * jnp.asarray(weights, jnp.float32))

    def oracle(value):
        return np.sum(weights * oracle_mind(value, 1, 2))

    gradient = np.asarray(jax.jit(jax.grad(loss))(volume), np.float64)
    # The step changes no channel that is the smallest.
    expected = oracles.slope(oracle, volume, direction, step=1e-7)
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3)


def test_mind_error_is_first_order():
    """On a smooth image a patch distance tends to the slope along s - t, squared.

    First order only: s and t lie beside the voxel, on one side of it.
    """
    tilt = np.array([1.0, -0.7, 0.5])
    ways = np.array([np.subtract(s, t) for s, t in mind.offset_pairs()])

    def error(scale):
        shape = tuple(8 * scale * n + 9 for n in (1, 2, 1))
        size = np.array([8.0, 16.0, 8.0]) * scale
        s = 3.0 * (analytic.positions(shape) - analytic.centre(shape)) / size
        bump = 0.4 * np.exp(-0.5 * np.sum(s**2, axis=-1))
        volume = (s @ tilt + bump)[None, ..., None].astype(np.float32)
        slope = (tilt - bump[..., None] * s) * 3.0 / size
        squares = (slope @ ways.T) ** 2
        excess = squares - squares.min(axis=-1, keepdims=True)
        expected = np.exp(-excess / excess.mean(axis=-1, keepdims=True))
        # Off the border, where edges repeat: the same place of the image both times.
        inner = (slice(4, -4),) * 3
        out = np.asarray(mind_ssc(jnp.asarray(volume)))[0]
        return np.abs(out - expected)[inner].mean()

    assert 1.7 < error(1) / error(2) < 2.3


def test_mind_examples_are_independent():
    volume = smooth_noise(SHAPES[1]) * jnp.asarray([1.0, 100.0]).reshape(2, 1, 1, 1, 1)
    together = mind_ssc(volume)
    for b in range(2):
        np.testing.assert_allclose(
            together[b], mind_ssc(volume[b : b + 1])[0], atol=1e-6
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_mind_jit_equals_eager(shape):
    volume = smooth_noise(shape)
    np.testing.assert_allclose(mind_ssc(volume), mind.mind_ssc(volume), atol=1e-5)


def test_mind_computes_bfloat16_in_float32():
    volume = smooth_noise(SHAPES[0]).astype(jnp.bfloat16)
    out = mind_ssc(volume)
    assert out.dtype == jnp.float32
    expected = oracle_mind(volume.astype(jnp.float32), 1, 2)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_mind_rejects_bad_input():
    with pytest.raises(ValueError, match=r"volume must be \(B, X, Y, Z, 1\)"):
        mind_ssc(jnp.zeros((1, 5, 6, 7)))
    with pytest.raises(ValueError, match="volume must be float"):
        mind_ssc(jnp.zeros((1, 5, 6, 7, 1), jnp.int16))
    for radius, dilation in itertools.permutations((0, 1)):
        with pytest.raises(ValueError, match="radius and dilation must be >= 1"):
            mind_ssc(jnp.zeros(SHAPES[0]), radius=radius, dilation=dilation)
