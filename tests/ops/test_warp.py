"""Warp, compose, invert against hand-made cases, exact identities and other tools."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests import analytic, oracles
from unireg_jax.ops import warp as ops

SHAPES = analytic.SHAPES

# Compiled as in use; test_warp_eager_equals_jit compares.
warp = jax.jit(ops.warp, static_argnames="order")
sample = jax.jit(ops.sample, static_argnames="order")
inside = jax.jit(ops.inside, static_argnames="shape")
within = jax.jit(ops.within, static_argnames=("shape", "margin"))
compose = jax.jit(ops.compose)
invert = jax.jit(ops.invert, static_argnames="iterations")
residual = jax.jit(ops.residual)
affine_coords = jax.jit(ops.affine_coords, static_argnums=1)
affine_disp = jax.jit(ops.affine_disp, static_argnums=1)


def _away_from_voxels(shape, seed=3):
    """A field whose samples keep 0.2 voxels from the kinks at integer positions."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(-1, 2, (1, *shape, 3))
    return (whole + rng.uniform(0.2, 0.8, whole.shape)).astype(np.float32)


# --- by hand --------------------------------------------------------------------------


def test_identity_coords_by_hand():
    coords = ops.identity_coords((2, 3, 4))
    assert coords.dtype == jnp.float32
    np.testing.assert_array_equal(coords, analytic.positions((2, 3, 4)))


def test_sample_by_hand():
    volume = jnp.arange(8.0).reshape(1, 2, 2, 2, 1)  # 4 x + 2 y + z
    coords = jnp.array([[[0.5, 0.5, 0.5], [0.25, 1.0, 0.5], [-3.0, 9.0, 0.0]]])
    # Trilinear is exact for a linear image; the last point clamps to (0, 1, 0).
    np.testing.assert_array_equal(
        sample(volume, coords)[0, :, 0], [3.5, 1.0 + 2.0 + 0.5, 2.0]
    )


def test_sample_nearest_by_hand():
    volume = jnp.arange(8, dtype=jnp.uint8).reshape(1, 2, 2, 2, 1)
    coords = jnp.array([[[0.4, 0.6, 0.0], [0.5, 0.0, 0.0], [7.0, -1.0, 0.9]]])
    out = sample(volume, coords, order=0)
    assert out.dtype == jnp.uint8
    np.testing.assert_array_equal(out[0, :, 0], [2, 4, 5])  # halves round up


def test_warp_by_hand():
    volume = jnp.arange(8.0).reshape(1, 2, 2, 2, 1)
    disp = jnp.zeros((1, 2, 2, 2, 3)).at[0, 0, 1, 0].set(jnp.array([0.5, -0.25, 1.0]))
    expected = np.arange(8.0).reshape(1, 2, 2, 2, 1)
    expected[0, 0, 1, 0, 0] = 4 * 0.5 + 2 * 0.75 + 1 * 1.0
    np.testing.assert_array_equal(warp(volume, disp), expected)


# --- exact identities -----------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_warp_zero_field_is_exact(shape, order):
    volume = analytic.noise(shape, channels=2, batch=2)
    disp = jnp.zeros((2, *shape, 3))
    np.testing.assert_array_equal(warp(volume, disp, order=order), volume)


@pytest.mark.parametrize("order", [0, 1])
def test_warp_integer_shift_is_exact(order):
    volume = analytic.noise((5, 6, 7), channels=2)
    disp = analytic.shift_disp((5, 6, 7), (1, -2, 3))
    index = np.indices((5, 6, 7)) + np.array([1, -2, 3])[:, None, None, None]
    x, y, z = (np.clip(i, 0, n - 1) for i, n in zip(index, (5, 6, 7), strict=True))
    expected = volume[:, x, y, z]
    np.testing.assert_array_equal(warp(volume, disp, order=order), expected)


def test_warp_constant_stays_constant():
    volume = np.full((1, 5, 6, 7, 1), 3.7, np.float32)
    disp = analytic.random_disp((5, 6, 7), size=9.0)
    # Eight weights summing to 1 within float32.
    np.testing.assert_allclose(warp(volume, disp), volume, rtol=1e-6)


def test_warp_axis_of_one_voxel():
    volume = analytic.noise((1, 6, 1))
    disp = analytic.random_disp((1, 6, 1))
    expected = oracles.warp(volume, disp)
    np.testing.assert_allclose(warp(volume, disp), expected, atol=1e-6)


def test_warp_far_outside_takes_the_edge():
    volume = analytic.noise((5, 6, 7))
    disp = analytic.shift_disp((5, 6, 7), (1e9, -1e9, 1e9))
    out = warp(volume, disp)
    np.testing.assert_array_equal(out, np.full_like(volume, volume[0, 4, 0, 6, 0]))


# --- oracles --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.7, 6.0])
@pytest.mark.parametrize(
    ("shape", "channels"), list(zip(SHAPES, (1, 3, 2), strict=True))
)
def test_warp_equals_scipy(shape, channels, size):
    volume = analytic.noise(shape, channels=channels, batch=2)
    disp = analytic.random_disp(shape, size=size, batch=2)
    expected = oracles.warp(volume, disp)
    # float32 blends of values around 1; positions below 16 carry 1e-6 themselves.
    np.testing.assert_allclose(warp(volume, disp), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_warp_nearest_equals_scipy(shape):
    labels = np.random.default_rng(0).integers(0, 200, (2, *shape, 1), np.uint8)
    disp = analytic.random_disp(shape, size=4.0, batch=2)
    out = warp(labels, disp, order=0)
    assert out.dtype == jnp.uint8
    np.testing.assert_array_equal(out, oracles.warp(labels, disp, order=0))


def test_sample_points_equals_scipy():
    volume = analytic.noise((5, 6, 7), channels=2, batch=2)
    coords = np.random.default_rng(2).uniform(-1, 8, (2, 4, 3, 3)).astype(np.float32)
    out = sample(volume, coords)
    np.testing.assert_allclose(out, oracles.sample(volume, coords), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_warp_equals_simpleitk(shape):
    volume = analytic.noise(shape)
    disp = analytic.random_disp(shape)
    expected = oracles.itk_warp(volume[0, ..., 0], disp[0])
    kept = np.asarray(inside(disp)[0])
    assert kept.any()
    # ITK fills with 0 outside, so only there-and-inside voxels are comparable.
    out = np.asarray(warp(volume, disp)[0, ..., 0])
    np.testing.assert_allclose(out[kept], expected[kept], atol=1e-5)


def test_warp_and_gradient_equal_torch():
    volume = analytic.noise((5, 6, 7), channels=2, batch=2)
    disp = analytic.random_disp((5, 6, 7), size=3.0, batch=2)
    expected, expected_gradient = oracles.torch_warp(volume, disp)
    gradient = jax.jit(jax.grad(lambda d: jnp.sum(warp(volume, d) ** 2)))(disp)
    # torch goes through [-1, 1] and back, which costs a few 1e-6 of a position.
    np.testing.assert_allclose(warp(volume, disp), expected, atol=2e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-4)


def test_warp_halves_keep_dtype():
    volume = analytic.noise((5, 6, 7))
    disp = analytic.random_disp((5, 6, 7))
    out = warp(jnp.asarray(volume, jnp.bfloat16), disp)
    assert out.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits; the blend itself is float32.
    np.testing.assert_allclose(
        out.astype(jnp.float32), oracles.warp(volume, disp), atol=0.03
    )


@pytest.mark.parametrize("order", [0, 1])
def test_warp_is_bit_equal_over_batch_places(order):
    volume = analytic.noise((5, 6, 7), batch=3)
    disp = analytic.random_disp((5, 6, 7), batch=3)
    together = warp(volume, disp, order=order)
    for b in range(3):
        alone = warp(volume[b : b + 1], disp[b : b + 1], order=order)
        np.testing.assert_array_equal(together[b], alone[0])


# --- gradients ------------------------------------------------------------------------


def test_warp_gradients_equal_finite_differences():
    volume, disp = analytic.noise((3, 4, 5), channels=2), _away_from_voxels((3, 4, 5))
    # Linear in the volume: central differences are exact, float32 decides. In disp a
    # step of 0.02 stays between the kinks; float32 sums leave 1e-4, the cubic term
    # less.
    check_grads(lambda v: warp(v, disp), (volume,), 1, ["rev"], 1e-3, 1e-3, eps=0.5)
    check_grads(lambda d: warp(volume, d), (disp,), 1, ["rev"], 0.01, 0.01, eps=0.02)


def test_warp_gradient_of_linear_image_is_its_slope():
    slope = np.array([0.5, -2.0, 3.0], np.float32)
    volume = (analytic.positions((5, 6, 7)) @ slope)[None, ..., None]
    volume = jnp.asarray(volume, jnp.float32)
    disp = jnp.zeros((1, 5, 6, 7, 3))

    gradient = jax.jit(jax.grad(lambda d: jnp.sum(warp(volume, d))))
    # A zero field sits on the kinks: the one-sided slope must hold on the border too.
    expected = np.broadcast_to(slope, disp.shape)
    np.testing.assert_allclose(gradient(disp), expected, atol=1e-5)


def test_warp_gradient_is_zero_outside():
    volume = analytic.noise((5, 6, 7))
    disp = analytic.shift_disp((5, 6, 7), (9.0, 9.0, 9.0))
    gradient = jax.jit(jax.grad(lambda d: jnp.sum(warp(volume, d))))(disp)
    np.testing.assert_array_equal(gradient, np.zeros_like(disp))


def _plain(volume, disp):
    """warp as one expression that XLA differentiates by itself."""
    blend = jax.vmap(lambda v, d: ops._blend(v, d, True))
    return blend(volume, disp)


@pytest.mark.parametrize(
    "shape, channels, dtype",
    [
        ((5, 6, 7), 1, jnp.float32),
        ((1, 9, 4), 3, jnp.float32),
        ((5, 6, 7), 1, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_warp_and_gradients_equal_plain_form(shape, channels, dtype, compiled):
    volume = jnp.asarray(analytic.noise(shape, channels=channels, batch=2), dtype)
    # Large enough that some samples lie beyond the grid.
    disp = jnp.asarray(analytic.random_disp(shape, size=3.0, batch=2))
    weight = jnp.asarray(analytic.noise(shape, channels=channels, batch=2, seed=5))

    def with_gradients(function):
        def loss(volume, disp):
            return jnp.sum(function(volume, disp).astype(jnp.float32) * weight)

        def both(volume, disp):
            gradients = jax.grad(loss, argnums=(0, 1))(volume, disp)
            return function(volume, disp), *gradients

        return (jax.jit(both) if compiled else both)(volume, disp)

    fast, plain = with_gradients(ops.warp), with_gradients(_plain)
    for name, a, b in zip(("value", "volume", "disp"), fast, plain, strict=True):
        assert a.dtype == b.dtype
        # float32 products in another order; bfloat16 results round to 8 bits, and the
        # scatter to the volume adds in bfloat16.
        atol = 1e-5 if name == "disp" or dtype == jnp.float32 else 0.1
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=atol, err_msg=name
        )


def test_warp_forward_derivative_equals_plain_form():
    volume = analytic.noise((5, 6, 7))
    disp, direction = (analytic.random_disp((5, 6, 7), seed=s) for s in (1, 2))
    for tangents in (
        (np.zeros_like(volume), direction),
        (analytic.noise((5, 6, 7), seed=4), direction),
    ):
        fast = jax.jvp(ops.warp, (volume, disp), tangents)
        plain = jax.jvp(_plain, (volume, disp), tangents)
        np.testing.assert_allclose(fast, plain, atol=1e-5)  # float32, another order


def test_warp_gradient_keeps_no_scratch():
    shape = (24, 20, 28)
    volume, disp = analytic.noise(shape), analytic.random_disp(shape)

    def pull(volume, disp, cotangent):
        return jax.vjp(lambda d: ops.warp(volume, d), disp)[1](cotangent)

    compiled = jax.jit(pull).lower(volume, disp, volume).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < volume.nbytes


def test_warp_read_twice_is_stored_once():
    shape = (24, 20, 28)
    volume, disp = analytic.noise(shape), analytic.random_disp(shape)

    def reads_twice(volume, disp):
        warped = ops.warp(volume, disp)
        return jnp.cumsum(warped, axis=1) + jnp.cumsum(warped * warped, axis=1)

    compiled = jax.jit(reads_twice).lower(volume, disp).compile()
    # warped, its square and their sums at most, not the eight corners.
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * volume.nbytes


@pytest.mark.parametrize("batch", [1, 2])
def test_warp_gradient_to_disp_has_no_scatter(batch):
    volume = analytic.noise((5, 6, 7), batch=batch)
    disp = analytic.random_disp((5, 6, 7), batch=batch)

    def loss(disp, volume):
        return jnp.sum(warp(jax.lax.stop_gradient(volume), disp) ** 2)

    assert not oracles.has_scatter(jax.value_and_grad(loss), disp, volume)
    # The check sees one where there is one: the gradient to the volume.
    both = jax.grad(lambda v, d: jnp.sum(warp(v, d) ** 2), argnums=(0, 1))
    assert oracles.has_scatter(both, volume, disp)


@pytest.mark.parametrize("order", [0, 1])
def test_warp_eager_equals_jit(order):
    volume = analytic.noise((5, 6, 7), channels=2, batch=2)
    disp = analytic.random_disp((5, 6, 7), batch=2)
    eager = ops.warp(volume, disp, order=order)
    # float32, products fused or not.
    np.testing.assert_allclose(warp(volume, disp, order=order), eager, atol=1e-6)


def test_warp_forward_keeps_no_scratch():
    shape = (24, 20, 28)
    volume, disp = analytic.noise(shape), analytic.random_disp(shape)
    compiled = warp.lower(volume, disp).compile()
    # All eight gathers in one loop: not one array of the volume's size on the side.
    assert compiled.memory_analysis().temp_size_in_bytes < volume.nbytes


# --- refinement -----------------------------------------------------------------------


def test_warp_error_is_second_order():
    def error(scale):
        shape = tuple(scale * n + 1 for n in (4, 5, 6))
        points = analytic.unit_positions(shape)
        volume = analytic.waves(points)[None, ..., None].astype(np.float32)
        cell = 1.0 / (np.asarray(shape) - 1.0)
        # Half a voxel along each axis, towards the middle so that it stays inside.
        half = np.where(points < 0.5, 0.5, -0.5)
        out = warp(volume, half[None].astype(np.float32))[0, ..., 0]
        return np.abs(np.asarray(out) - analytic.waves(points + half * cell)).max()

    ratio = error(2) / error(4)
    # 4 in the limit; the grids are coarse.
    assert 3.5 < ratio < 4.5


# --- inside, compose, invert, affine --------------------------------------------------


def test_inside_by_hand():
    disp = analytic.shift_disp((2, 3, 4), (0.0, 0.5, -1.0))
    expected = np.zeros((1, 2, 3, 4), bool)
    expected[:, :, :2, 1:] = True  # y + 0.5 <= 2, z - 1 >= 0, the border counts
    np.testing.assert_array_equal(inside(disp), expected)


def test_inside_of_another_grid():
    disp = analytic.shift_disp((2, 3, 4), (3.0, 0.0, 0.0))
    assert not np.any(inside(disp))
    assert np.all(inside(disp, shape=(5, 3, 4)))


def test_within_ends_where_the_margin_does():
    coords = np.array([[-0.5, 0, 0], [-0.6, 0, 0], [1, 2.5, 3], [1, 2, 3.6]], "f4")
    found = within(coords, (2, 3, 4), margin=0.5)
    np.testing.assert_array_equal(found, [True, False, True, False])
    np.testing.assert_array_equal(within(coords[2:], (2, 3, 4)), [False, False])
    assert np.all(within(np.array([[0, 0, 0], [1, 2, 3]], "f4"), (2, 3, 4)))


def test_compose_of_shifts_adds_them():
    first = analytic.shift_disp((5, 6, 7), (1.0, -0.5, 0.25))
    second = analytic.shift_disp((5, 6, 7), (0.5, 2.0, -1.0))
    np.testing.assert_allclose(compose(first, second), first + second, rtol=1e-6)


def test_compose_with_zero_is_exact():
    disp = analytic.random_disp((5, 6, 7))
    zero = np.zeros_like(disp)
    np.testing.assert_array_equal(compose(disp, zero), disp)
    np.testing.assert_array_equal(compose(zero, disp), disp)


def test_compose_of_affines_multiplies_them_in_order():
    # Shrinking maps never leave the grid, and linear sampling is exact on them.
    shape = (5, 6, 7)
    a = 0.7 * analytic.rotation(0.3, 2)
    b = np.diag([0.5, 0.8, 0.9])
    first, second = (analytic.linear_disp(shape, m - np.eye(3)) for m in (a, b))
    assert np.all(inside(first))
    expected = analytic.linear_disp(shape, b @ a - np.eye(3))
    assert np.abs(expected - analytic.linear_disp(shape, a @ b - np.eye(3))).max() > 0.1
    np.testing.assert_allclose(compose(first, second), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_compose_equals_scipy(shape):
    first = analytic.random_disp(shape, batch=2)
    second = analytic.random_disp(shape, batch=2, seed=5)
    out = compose(first, second)
    np.testing.assert_allclose(out, oracles.compose(first, second), atol=1e-5)


def test_compose_warps_like_two_warps():
    shape = (17, 15, 19)
    points = analytic.unit_positions(shape)
    volume = analytic.waves(points)[None, ..., None].astype(np.float32)
    first, _ = analytic.bump_disp(shape, width=0.15)
    second, _ = analytic.bump_disp(shape, vector=(-0.4, 0.7, 0.6), width=0.15)
    once = warp(volume, compose(first, second))
    twice = warp(warp(volume, second), first)
    # They differ by interpolation only: curvature 4 over a step of 1/14, eighth of it.
    np.testing.assert_allclose(once, twice, atol=6e-3)


def test_compose_gradients_equal_finite_differences():
    shape = (3, 4, 5)
    first, second = _away_from_voxels(shape), analytic.random_disp(shape, seed=5)
    weights = np.random.default_rng(4).standard_normal(first.shape)

    def loss(*fields):
        return jnp.sum(compose(*fields) * jnp.asarray(weights, jnp.float32))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(first, second)
    for place, gradient in enumerate(gradients):

        def oracle(field, place=place):
            fields = [first, second]
            fields[place] = field
            return np.sum(weights * oracles.compose(*fields))

        direction = np.random.default_rng(6 + place).uniform(-1, 1, first.shape)
        # The step stays between the kinks; float32 sums of 180 terms.
        expected = oracles.slope(oracle, (first, second)[place], direction)
        found = np.sum(np.asarray(gradient, np.float64) * direction)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_invert_shift_is_exact():
    disp = analytic.shift_disp((5, 6, 7), (1.5, -2.0, 0.25))
    np.testing.assert_array_equal(invert(disp, iterations=1), -disp)


def test_invert_zero_is_zero():
    disp = np.zeros((1, 5, 6, 7, 3), np.float32)
    np.testing.assert_array_equal(invert(disp), disp)


def test_invert_affine_is_the_inverse_matrix():
    # Growing maps: the inverse shrinks, so no sample of disp leaves the grid.
    shape = (7, 8, 9)
    matrix = 1.3 * analytic.rotation(0.2, 1)
    disp = analytic.linear_disp(shape, matrix - np.eye(3))
    expected = analytic.linear_disp(shape, np.linalg.inv(matrix) - np.eye(3))
    kept = np.asarray(inside(expected))
    assert kept.mean() > 0.9
    out = np.asarray(invert(disp))
    # Lipschitz constant |1.3 R - I| = 0.38: below 1e-7 after 20 steps.
    np.testing.assert_allclose(out[kept], expected[kept], atol=1e-5)


def test_invert_bump_leaves_no_residual():
    disp, detj = analytic.bump_disp((13, 14, 15), vector=(1.5, -1.0, 0.8), width=0.2)
    assert detj.min() > 0.3
    inverse = invert(disp)
    # Contraction 0.5: 2^-20 of the largest displacement is 2e-6, float32 as much.
    assert float(jnp.max(residual(disp, inverse))) < 1e-5
    assert float(jnp.max(residual(disp, -disp))) > 0.1  # not the first-order one


def test_invert_error_shrinks_with_iterations():
    disp, _ = analytic.bump_disp((13, 14, 15), vector=(1.5, -1.0, 0.8), width=0.2)
    few, many = (
        float(jnp.max(residual(disp, invert(disp, iterations=n)))) for n in (2, 4)
    )
    assert many < few * 0.5**2 * 1.5  # the contraction above, twice


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_invert_gradient_equals_finite_differences(iterations):
    shape = (4, 3, 5)
    # 0.2 voxels from the kinks at integer positions, in every step.
    disp = analytic.shift_disp(shape, (0.4, -0.35, 0.45))
    disp = disp + analytic.random_disp(shape, size=0.1)
    weights = np.random.default_rng(4).standard_normal(disp.shape)

    def loss(field):
        inverse = invert(field, iterations=iterations)
        return jnp.sum(inverse * jnp.asarray(weights, jnp.float32))

    def oracle(field):
        inverse = np.zeros_like(field)
        for _ in range(iterations):
            inverse = -oracles.warp(field, inverse)
        return np.sum(weights * inverse)

    value, gradient = jax.jit(jax.value_and_grad(loss))(disp)
    np.testing.assert_allclose(value, oracle(disp), rtol=1e-4)
    direction = np.random.default_rng(5).uniform(-1, 1, disp.shape)
    expected = oracles.slope(oracle, disp, direction)
    found = np.sum(np.asarray(gradient, np.float64) * direction)
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32 sums


def test_invert_gradient_is_that_of_the_matrix_inverse():
    """d(M^-1) = -M^-1 dM M^-1, where no sample leaves the grid: M grows."""
    shape = (6, 5, 7)
    matrix = 1.3 * analytic.rotation(0.2, 1)
    change = np.random.default_rng(3).uniform(-1, 1, (3, 3))
    disp = analytic.linear_disp(shape, matrix - np.eye(3))
    tangent = analytic.linear_disp(shape, change)
    _, found = jax.jit(lambda d, t: jax.jvp(invert, (d,), (t,)))(disp, tangent)
    inverse = np.linalg.inv(matrix)
    kept = np.asarray(inside(analytic.linear_disp(shape, inverse - np.eye(3))))
    assert kept.mean() > 0.9
    expected = analytic.linear_disp(shape, -inverse @ change @ inverse)
    # Lipschitz constant 0.38: 20 steps leave 20 * 0.38^20 of it.
    np.testing.assert_allclose(np.asarray(found)[kept], expected[kept], atol=1e-4)


def test_residual_of_nothing_is_zero():
    disp = np.zeros((2, 5, 6, 7, 3), np.float32)
    np.testing.assert_array_equal(residual(disp, disp), np.zeros((2, 5, 6, 7)))


def test_affine_identity_is_exactly_zero():
    matrix = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    np.testing.assert_array_equal(
        affine_disp(matrix, (5, 6, 7)), np.zeros((2, 5, 6, 7, 3))
    )


def test_affine_equals_matrix_product():
    rng = np.random.default_rng(0)
    matrix = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    matrix[:, :3] += rng.standard_normal((2, 3, 4)).astype(np.float32)
    x = analytic.positions((5, 6, 7))
    expected = np.einsum("bij,xyzj->bxyzi", matrix[:, :3, :3].astype(float), x)
    expected += matrix[:, None, None, None, :3, 3]
    coords = affine_coords(matrix, (5, 6, 7))
    # float32 at coordinates up to 40.
    np.testing.assert_allclose(coords, expected, atol=1e-5)
    disp = affine_disp(matrix, (5, 6, 7))
    np.testing.assert_allclose(disp, expected - x, atol=1e-5)


def test_affine_shift_moves_the_image():
    matrix = np.eye(4, dtype=np.float32)[None]
    matrix[0, :3, 3] = [1, 0, -2]
    volume = analytic.noise((5, 6, 7))
    out = warp(volume, affine_disp(matrix, (5, 6, 7)))
    np.testing.assert_array_equal(out[:, :4, :, 2:], volume[:, 1:, :, :5])


# --- bad input ------------------------------------------------------------------------


def test_warp_rejects_channels_first():
    volume = analytic.noise((5, 6, 7))
    disp = np.zeros((1, 3, 5, 6, 7), np.float32)
    with pytest.raises(ValueError, match=r"disp must be \(B, X, Y, Z, 3\).*go last"):
        ops.warp(volume, disp)


def test_warp_rejects_another_grid():
    volume = analytic.noise((5, 6, 7))
    disp = np.zeros((1, 7, 6, 5, 3), np.float32)
    expected = r"disp must be \(1, 5, 6, 7, 3\) in voxels, got \(1, 7, 6, 5, 3\)"
    with pytest.raises(ValueError, match=expected):
        ops.warp(volume, disp)


def test_warp_rejects_half_precision_positions():
    volume = analytic.noise((5, 6, 7))
    disp = jnp.zeros((1, 5, 6, 7, 3), jnp.bfloat16)
    with pytest.raises(ValueError, match="disp must be float32, got bfloat16"):
        ops.warp(volume, disp)


def test_warp_rejects_linear_labels():
    labels = np.zeros((1, 5, 6, 7, 1), np.uint8)
    with pytest.raises(ValueError, match="floating for order=1, got uint8.*order=0"):
        ops.warp(labels, np.zeros((1, 5, 6, 7, 3), np.float32))


def test_warp_rejects_unknown_order():
    volume, disp = analytic.noise((5, 6, 7)), analytic.random_disp((5, 6, 7))
    with pytest.raises(ValueError, match="order must be 1 .* got 3"):
        ops.warp(volume, disp, order=3)


def test_warp_rejects_missing_batch():
    with pytest.raises(ValueError, match=r"volume must be \(B, X, Y, Z, C\)"):
        ops.warp(np.zeros((5, 6, 7, 1), np.float32), analytic.random_disp((5, 6, 7)))


def test_sample_rejects_other_batch():
    with pytest.raises(ValueError, match=r"coords must be \(1, ..., 3\)"):
        ops.sample(analytic.noise((5, 6, 7)), np.zeros((2, 4, 3), np.float32))


def test_compose_rejects_different_grids():
    first, second = np.zeros((1, 5, 6, 7, 3), "f4"), np.zeros((1, 5, 6, 8, 3), "f4")
    with pytest.raises(ValueError, match="second must be"):
        ops.compose(first, second)


def test_invert_rejects_no_iterations():
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        ops.invert(analytic.random_disp((5, 6, 7)), iterations=0)


def test_affine_disp_rejects_missing_batch():
    with pytest.raises(ValueError, match=r"matrix must be \(B, 4, 4\), got \(4, 4\)"):
        ops.affine_disp(jnp.eye(4), (5, 6, 7))
