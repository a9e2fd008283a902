"""Feature correlation against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import analytic, oracles
from unireg_jax.ops import correlation as ops

SHAPES = [(1, 5, 6, 7, 4), (2, 3, 8, 4, 12)]
EPS = 1e-4


# Compiled once per shape; eager calls would compile their loop anew every time.
correlation = jax.jit(ops.correlation, static_argnames=("radius", "eps"))


def oracle_correlation(fixed, moving, radius, eps=EPS):
    """Normalised copies, one clamped index per offset; float64."""
    f, m = (np.asarray(v, np.float64) for v in (fixed, moving))
    f, m = (
        v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), eps) for v in (f, m)
    )
    out = []
    for offset in np.ndindex(*(2 * radius + 1,) * 3):
        axes = (
            np.clip(np.arange(n) + k - radius, 0, n - 1)
            for n, k in zip(f.shape[1:4], offset, strict=True)
        )
        x, y, z = np.ix_(*axes)
        out.append((f * m[:, x, y, z]).sum(axis=-1))
    return np.stack(out, axis=-1)


def features(shape, seed):
    """Random features of random norms, float32."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 10.0, (*shape[:-1], 1))
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


def test_offsets_are_row_major():
    assert ops.offsets()[:4] == [(-1, -1, -1), (-1, -1, 0), (-1, -1, 1), (-1, 0, -1)]
    assert ops.offsets()[13] == (0, 0, 0)
    assert len(ops.offsets(2)) == 125


def test_correlation_by_hand():
    fixed = jnp.zeros((1, 2, 2, 2, 2)).at[..., 0].set(2.0)
    moving = jnp.zeros((1, 2, 2, 2, 2)).at[..., 1].set(5.0)
    moving = moving.at[0, 1, 0, 1].set(jnp.asarray([3.0, 4.0]))
    out = correlation(fixed, moving)
    # Only the voxel (1, 0, 1) is not orthogonal: cos = 3 / 5, seen from (0, 0, 0) at
    # offset (1, 0, 1) and, the edge repeated, at (1, -1, 1).
    seen = [o for o, c in zip(ops.offsets(), out[0, 0, 0, 0], strict=True) if c != 0]
    assert seen == [(1, -1, 1), (1, 0, 1)]
    np.testing.assert_allclose(jnp.max(out[0, 0, 0, 0]), 0.6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_correlation_of_identical_maps_is_one_at_no_offset(shape):
    fixed = features(shape, 0)
    out = correlation(fixed, fixed)
    np.testing.assert_allclose(out[..., 13], 1.0, atol=1e-6)
    assert float(jnp.max(jnp.abs(out))) <= 1.0 + 1e-6


@pytest.mark.parametrize("offset", [(1, 0, 0), (0, -1, 0), (0, 0, 1), (-1, 1, -1)])
def test_correlation_finds_an_integer_shift(offset):
    fixed = features((1, 6, 7, 5, 8), 0)
    moving = jnp.roll(fixed, offset, axis=(1, 2, 3))  # m(p + offset) = f(p)
    out = correlation(fixed, moving)[0, 1:-1, 1:-1, 1:-1]
    found = ops.offsets().index(offset)
    np.testing.assert_array_equal(jnp.argmax(out, axis=-1), found)
    np.testing.assert_allclose(out[..., found], 1.0, atol=1e-6)


@pytest.mark.parametrize("index, radius", [(0, 1), (1, 1), (1, 2)])
def test_correlation_matches_oracle(index, radius):
    shape = SHAPES[index]
    fixed, moving = features(shape, 0), features(shape, 1)
    out = correlation(fixed, moving, radius=radius)
    assert out.dtype == jnp.float32
    assert out.shape == (*shape[:-1], (2 * radius + 1) ** 3)
    expected = oracle_correlation(fixed, moving, radius)
    np.testing.assert_allclose(out, expected, atol=1e-6)  # float32 sums of 12 products


def test_correlation_of_zero_and_tiny_features():
    fixed = features(SHAPES[0], 0).at[0, 2].set(0.0)
    moving = features(SHAPES[0], 1).at[0, 3].multiply(1e-6)
    out = correlation(fixed, moving)
    np.testing.assert_array_equal(out[0, 2], 0.0)
    np.testing.assert_allclose(out, oracle_correlation(fixed, moving, 1), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda f: jnp.sum(correlation(f, moving))))(fixed)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["fixed", "moving"])
@pytest.mark.parametrize("shape", SHAPES)
def test_correlation_gradient_matches_finite_differences(shape, name):
    maps = {"fixed": features(shape, 0), "moving": features(shape, 1)}
    # Some features below eps, where the divisor is a constant.
    maps = {key: value.at[:, 1, 2].multiply(1e-7) for key, value in maps.items()}
    point = np.asarray(maps[name], np.float64)
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((*shape[:-1], 27))
    # In proportion to the feature, so that no norm crosses eps.
    norm = np.linalg.norm(point, axis=-1, keepdims=True)
    direction = rng.uniform(-0.5, 0.5, shape) * norm

    def loss(value):
        out = correlation(**{**maps, name: value})
        return jnp.sum(out * jnp.asarray(weights, jnp.float32))

    def oracle(value):
        values = {**maps, name: value}
        return np.sum(weights * oracle_correlation(*values.values(), 1))

    gradient = np.asarray(jax.jit(jax.grad(loss))(maps[name]), np.float64)
    expected = oracles.slope(oracle, point, direction)
    # float32 sums of up to 27 000 terms that partly cancel.
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-4)


def test_correlation_error_of_its_expansion_is_fourth_order():
    """1 - out(o) tends to |d F . o|^2 / 2, F the unit feature of a smooth map."""
    turns = np.array([[0.18, -0.1, 0.06], [-0.04, 0.14, 0.22]])  # per voxel at scale 1

    def error(scale):
        shape = tuple(scale * n + 1 for n in (4, 5, 6))
        angle = analytic.positions(shape) @ (turns / scale).T
        unit = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
        # A bump of the norm, which must not matter.
        bump, _ = analytic.bump_disp(shape, vector=(2.0, 0.0, 0.0))
        maps = jnp.asarray((1.0 + bump[0, ..., :1]) * unit, jnp.float32)[None]
        out = np.asarray(correlation(maps, maps), np.float64)[:, 1:-1, 1:-1, 1:-1]
        step = np.asarray(ops.offsets()) @ (turns / scale).T
        return np.abs(out - (1.0 - 0.25 * np.sum(step**2, axis=-1))).max()

    # 16 in the limit; these grids are coarse enough for float32 to see 6e-4 and 4e-5.
    assert 14.0 < error(1) / error(2) < 17.0


def test_correlation_sums_bfloat16_in_float32():
    fixed, moving = (features(SHAPES[1], k).astype(jnp.bfloat16) for k in (0, 1))
    out = correlation(fixed, moving)
    assert out.dtype == jnp.float32
    expected = oracle_correlation(*(v.astype(jnp.float32) for v in (fixed, moving)), 1)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_correlation_examples_are_independent():
    fixed, moving = features(SHAPES[1], 0), features(SHAPES[1], 1)
    together = correlation(fixed, moving)
    for b in range(2):
        alone = correlation(fixed[b : b + 1], moving[b : b + 1])
        np.testing.assert_allclose(together[b], alone[0], atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_correlation_jit_equals_eager(shape):
    fixed, moving = features(shape, 0), features(shape, 1)
    np.testing.assert_allclose(
        correlation(fixed, moving),
        ops.correlation(fixed, moving),
        atol=1e-6,
    )


@pytest.mark.parametrize("values", [1, 400])
def test_correlation_does_not_depend_on_the_chunks(monkeypatch, values):
    fixed, moving = features(SHAPES[1], 0), features(SHAPES[1], 1)
    expected = correlation(fixed, moving)
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", values)
    # A new function object: the compiled one above keeps the old chunks.
    out = jax.jit(lambda f, m: ops.correlation(f, m))(fixed, moving)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_correlation_never_holds_the_shifted_maps(monkeypatch):
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 2**14)
    fixed = jax.ShapeDtypeStruct((1, 24, 20, 16, 32), jnp.float32)
    compiled = jax.jit(lambda f, m: ops.correlation(f, m)).lower(fixed, fixed).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        pytest.skip("this backend reports no memory")
    assert analysis.temp_size_in_bytes < fixed.size * 4  # less than one of 27 copies


def test_correlation_rejects_bad_input():
    fixed = features(SHAPES[0], 0)
    with pytest.raises(ValueError, match=r"fixed must be \(B, X, Y, Z, C\)"):
        correlation(fixed[0], fixed[0])
    with pytest.raises(ValueError, match="moving must be .* as fixed"):
        correlation(fixed, fixed[..., 1:])
    with pytest.raises(ValueError, match="moving must be float"):
        correlation(fixed, fixed.astype(jnp.int32))
    with pytest.raises(ValueError, match="radius must be >= 1"):
        correlation(fixed, fixed, radius=0)
