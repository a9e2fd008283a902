"""Scaling and squaring against matrix powers, the exponential and small Euler steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tests import analytic, oracles
from unireg_jax.ops import integrate as ops
from unireg_jax.ops.warp import compose

integrate = jax.jit(ops.integrate, static_argnames="steps")

# A flow towards the middle never leaves the grid, where edge values would count.
INWARDS = np.array([[-0.6, 0.2, 0.0], [-0.2, -0.5, 0.1], [0.0, -0.1, -0.7]])


def test_integrate_zero_is_zero():
    velocity = np.zeros((2, 5, 6, 7, 3), np.float32)
    np.testing.assert_array_equal(integrate(velocity), velocity)


def test_integrate_no_steps_returns_the_velocity():
    velocity = analytic.random_disp((5, 6, 7))
    np.testing.assert_array_equal(integrate(velocity, steps=0), velocity)


def test_integrate_constant_is_a_shift():
    velocity = analytic.shift_disp((5, 6, 7), (1.5, -0.75, 0.25))
    # Sums of powers of two: the doubling itself is exact, the blend is not.
    np.testing.assert_allclose(integrate(velocity), velocity, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_integrate_linear_field_is_a_matrix_power(steps):
    velocity = analytic.linear_disp((5, 6, 7), INWARDS)
    count = 2**steps
    matrix = np.linalg.matrix_power(np.eye(3) + INWARDS / count, count)
    expected = analytic.linear_disp((5, 6, 7), matrix - np.eye(3))
    # Linear sampling is exact on a linear field: float32 only.
    np.testing.assert_allclose(integrate(velocity, steps=steps), expected, atol=1e-5)


def test_integrate_error_halves_with_each_step():
    velocity = analytic.linear_disp((5, 6, 7), INWARDS)
    exact = analytic.linear_disp(
        (5, 6, 7), scipy.linalg.expm(INWARDS) - np.eye(3), (0.0, 0.0, 0.0)
    )
    errors = [
        np.abs(np.asarray(integrate(velocity, steps=steps)) - exact).max()
        for steps in (4, 5)
    ]
    assert 1.8 < errors[0] / errors[1] < 2.2  # Euler: first order in 2^-steps


def test_integrate_equals_repeated_composition():
    shape = (9, 8, 7)
    velocity, _ = analytic.bump_disp(shape)
    small = velocity.astype(np.float64) / 4.0
    two = oracles.compose(small, small)
    # float32 blends of values below 1.
    expected = oracles.compose(two, two)
    np.testing.assert_allclose(integrate(velocity, steps=2), expected, atol=1e-6)


def test_integrate_inverse_composes_to_identity():
    def left(scale):
        shape = tuple(scale * n + 1 for n in (8, 9, 10))
        vector = scale * np.array([0.75, -0.5, 0.4])
        velocity, _ = analytic.bump_disp(shape, vector=vector, width=0.15)
        there, back = integrate(velocity), integrate(-velocity)
        assert np.abs(np.asarray(there)).max() > 0.6 * scale
        return np.abs(np.asarray(compose(there, back))).max() / scale

    coarse, fine = left(1), left(2)
    # What is left is interpolation: a few percent of a bump only 1.3 voxels wide, and
    # second order in the voxel (4 in the limit).
    assert coarse < 0.15
    assert coarse / fine > 3.0


def test_integrate_eager_equals_jit():
    velocity = analytic.random_disp((5, 6, 7), batch=2)
    np.testing.assert_allclose(integrate(velocity), ops.integrate(velocity), atol=1e-6)


def test_integrate_gradient_equals_finite_differences():
    velocity, _ = analytic.bump_disp((5, 6, 7))
    weights = analytic.noise((5, 6, 7), channels=3)

    @jax.jit
    def loss(velocity):
        return jnp.sum(integrate(velocity, steps=3) * weights)

    gradient = np.asarray(jax.jit(jax.grad(loss))(velocity))
    direction = analytic.noise((5, 6, 7), channels=3, seed=4)
    # Along a direction, step 0.002: float32 differences are good to about 1 percent.
    step = np.float32(2e-3)
    ahead = loss(velocity + step * direction)
    behind = loss(velocity - step * direction)
    numeric = float(ahead - behind) / (2 * float(step))
    assert float(np.sum(gradient * direction)) == pytest.approx(numeric, rel=0.02)


def test_integrate_rejects_channels_first():
    with pytest.raises(ValueError, match=r"velocity must be \(B, X, Y, Z, 3\)"):
        integrate(np.zeros((1, 3, 5, 6, 7), np.float32))


def test_integrate_rejects_negative_steps():
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        integrate(analytic.random_disp((5, 6, 7)), steps=-1)
