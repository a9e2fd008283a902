"""Penalties and means of a field against closed forms, loops, finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests import analytic, oracles
from unireg_jax.ops import smoothness as ops

bending, diffusion = jax.jit(ops.bending), jax.jit(ops.diffusion)

SHAPES = [(5, 6, 7), (3, 4, 5)]


def test_diffusion_by_hand():
    disp = np.zeros((1, 2, 2, 2, 3), np.float32)
    disp[0, 1, 1, 1, 2] = 6.0
    # Along each axis one of 4 x 3 differences is 6: mean 36 / 12, and so for all three.
    np.testing.assert_allclose(diffusion(disp), [3.0], rtol=1e-6)


def test_diffusion_of_a_ramp():
    disp = np.zeros((1, 5, 6, 7, 3), np.float32)
    disp[..., 1] = 0.5 * np.arange(7)
    np.testing.assert_allclose(diffusion(disp), [0.25 / 9.0], rtol=1e-6)


def test_bending_by_hand():
    x, y, _ = np.moveaxis(analytic.positions((5, 6, 7)), -1, 0)
    disp = np.zeros((1, 5, 6, 7, 3), np.float32)
    disp[0, ..., 0] = 1.5 * x**2  # pure second derivative 3
    disp[0, ..., 2] = 2.0 * x * y  # mixed second derivative 2, counted twice
    np.testing.assert_allclose(bending(disp), [(9.0 + 2 * 4.0) / 3.0], rtol=1e-6)


@pytest.mark.parametrize("function", [diffusion, bending])
def test_constant_field_costs_nothing(function):
    disp = analytic.shift_disp((5, 6, 7), (1.0, -2.0, 3.0))
    np.testing.assert_array_equal(function(disp), [0.0])


def test_bending_of_affine_is_zero():
    linear = np.array([[0.1, -0.2, 0.3], [0.05, 0.2, -0.1], [0.4, 0.0, -0.3]])
    disp = analytic.linear_disp((5, 6, 7), linear)
    # Squares of float32 rounding at values around 1.
    np.testing.assert_allclose(bending(disp), [0.0], atol=1e-12)


@pytest.mark.parametrize("name", ["diffusion", "bending"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_loops(shape, name):
    function = getattr(ops, name)
    disp = analytic.random_disp(shape, batch=2)
    expected = getattr(oracles, name)(disp)
    np.testing.assert_allclose(jax.jit(function)(disp), expected, rtol=1e-5)
    if shape == SHAPES[0]:
        np.testing.assert_allclose(function(disp), expected, rtol=1e-5)


@pytest.mark.parametrize("function", [diffusion, bending])
def test_gradient_equals_finite_differences(function):
    disp = analytic.random_disp((3, 4, 5), batch=2)
    # Quadratic: central differences are exact at any step, float32 decides.
    check_grads(function, (disp,), 1, modes=["rev"], eps=0.5, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("function", [diffusion, bending])
def test_gradient_has_no_scatter(function):
    disp = analytic.random_disp((5, 6, 7))
    assert not oracles.has_scatter(jax.grad(lambda d: jnp.sum(function(d))), disp)


@pytest.mark.parametrize(("function", "power"), [(diffusion, 2), (bending, 4)])
def test_scales_with_resolution(function, power):
    def value(scale):
        shape = tuple(scale * n + 1 for n in (12, 16, 20))
        # The same vectors in voxels over twice the voxels: derivatives halve.
        return float(function(analytic.bump_disp(shape, width=0.2)[0])[0])

    # Differences are second order on grids this coarse, and the border weighs in.
    assert value(1) / value(2) == pytest.approx(2.0**power, rel=0.15)


@pytest.mark.parametrize(("function", "least"), [(diffusion, 2), (bending, 3)])
def test_rejects_thin_grid(function, least):
    with pytest.raises(ValueError, match=f"at least {least} voxels along each axis"):
        function(np.zeros((1, 5, least - 1, 7, 3), np.float32))


@pytest.mark.parametrize("function", [diffusion, bending])
def test_rejects_channels_first(function):
    with pytest.raises(ValueError, match=r"disp must be \(B, X, Y, Z, 3\)"):
        function(np.zeros((1, 3, 5, 6, 7), np.float32))


@pytest.mark.parametrize("edge", [1, 3, 5])
def test_box_mean_equals_a_loop(edge):
    rng = np.random.default_rng(0)
    disp = rng.normal(size=(2, 4, 6, 7, 3)).astype(np.float32)
    half, expected = edge // 2, np.empty_like(disp)
    for place in np.ndindex(4, 6, 7):
        cube = tuple(slice(max(i - half, 0), i + half + 1) for i in place)
        expected[(slice(None), *place)] = disp[(slice(None), *cube)].mean((1, 2, 3))
    for function in (ops.box_mean, jax.jit(ops.box_mean, static_argnums=1)):
        np.testing.assert_allclose(function(disp, edge), expected, atol=1e-6)


def test_box_mean_keeps_a_constant_up_to_the_border():
    disp = analytic.shift_disp((5, 6, 7), (1.0, -2.0, 3.0))
    np.testing.assert_allclose(ops.box_mean(disp, 5), disp, rtol=1e-6)


def test_box_mean_refuses_an_even_edge():
    with pytest.raises(ValueError, match="odd and positive"):
        ops.box_mean(analytic.shift_disp((5, 6, 7), (1.0, 0.0, 0.0)), 4)
