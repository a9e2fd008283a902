"""HU window and validity: end points by hand, an oracle, types and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unireg_jax.ops import intensity
from unireg_jax.tasks import OUTSIDE_HU

SHAPES = [(1, 5, 6, 7, 1), (2, 3, 8, 4, 1)]


def oracle_window(hu, low, high):
    """np.interp holds the end values outside the window."""
    return np.interp(np.asarray(hu, np.float64), [low, high], [-1.0, 1.0])


def random_hu(shape):
    """Integers across and beyond the window."""
    return np.random.default_rng(0).integers(-1500, 3000, shape).astype(np.int16)


def test_window_by_hand():
    hu = jnp.asarray([OUTSIDE_HU, -1024, -800, -500, -200, 100, 400, 3071], jnp.int16)
    expected = [-1.0, -1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.0]
    np.testing.assert_allclose(intensity.window(hu), expected, atol=1e-7)


def test_window_ends_are_exact():
    ends = jnp.asarray([-800.0, 400.0, -1e9, 1e9])
    np.testing.assert_array_equal(intensity.window(ends), [-1.0, 1.0, -1.0, 1.0])


@pytest.mark.parametrize("low, high", [(-800.0, 400.0), (-160.0, 240.0)])
@pytest.mark.parametrize(
    "index, dtype",
    [(0, jnp.int16), (1, jnp.int32), (1, jnp.float32), (0, jnp.bfloat16)],
)
def test_window_matches_oracle(index, dtype, low, high):
    shape = SHAPES[index]
    hu = jnp.asarray(random_hu(shape)).astype(dtype)
    scaled = intensity.window(hu, low=low, high=high)
    assert scaled.dtype == jnp.float32
    expected = oracle_window(np.asarray(hu.astype(jnp.float32)), low, high)
    # float32: a few roundings of numbers up to 2.
    np.testing.assert_allclose(scaled, expected, atol=5e-7)


def test_window_gradient_is_slope_inside_and_zero_outside():
    gradient = jax.grad(lambda hu: jnp.sum(intensity.window(hu)))
    hu = jnp.asarray([-900.0, -100.0, 300.0, 500.0])
    slope = 2.0 / 1200.0
    np.testing.assert_allclose(gradient(hu), [0.0, slope, slope, 0.0], rtol=1e-6)


def test_valid_marks_all_but_outside():
    hu = jnp.asarray([OUTSIDE_HU, -1024, 0, 3071], jnp.int16)
    for values in (hu, hu.astype(jnp.float32)):
        np.testing.assert_array_equal(
            intensity.valid(values), [False, True, True, True]
        )


@pytest.mark.parametrize("function", [intensity.window, intensity.valid])
def test_jit_equals_eager(function):
    hu = jnp.asarray(random_hu(SHAPES[0]))
    np.testing.assert_allclose(jax.jit(function)(hu), function(hu), atol=5e-7)


@pytest.mark.parametrize("function", [intensity.window, intensity.valid])
@pytest.mark.parametrize("dtype", [bool, jnp.uint8, jnp.int8])
def test_rejects_types_that_hold_no_hu(function, dtype):
    with pytest.raises(ValueError, match="hu must be int16, int32 or float"):
        function(jnp.zeros((2, 3), dtype))


@pytest.mark.parametrize("limits", [(400.0, -800.0), (0.0, 0.0), (-40000.0, 0.0)])
def test_window_rejects_limits(limits):
    with pytest.raises(ValueError, match="low and high must satisfy"):
        intensity.window(jnp.zeros((2,)), low=limits[0], high=limits[1])
