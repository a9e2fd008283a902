"""Determinant, folding and SDlogJ against closed forms, NumPy and SimpleITK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests import analytic, oracles
from unireg_jax.ops import jacobian as ops
from unireg_jax.ops import stencil

SHAPES = [(5, 6, 7), (9, 5, 6), (3, 7, 4)]


def _mask(shape, batch, seed=7):
    return np.random.default_rng(seed).random((batch, *shape)) < 0.6


determinant = jax.jit(ops.determinant)
folding_fraction = jax.jit(ops.folding_fraction)
sdlogj = jax.jit(ops.sdlogj)
sdlogj_l2r = jax.jit(ops.sdlogj_l2r)


# --- stencil --------------------------------------------------------------------------


def test_stencil_by_hand():
    field = jnp.array([[1.0, 3.0, 9.0, 4.0]])
    forward = stencil.forward_difference(field, 1)
    np.testing.assert_array_equal(forward, [[2.0, 6.0, -5.0]])
    central = stencil.central_difference(field, 1)
    np.testing.assert_array_equal(central, [[4.0, 0.5]])
    second = stencil.second_difference(field, 1)
    np.testing.assert_array_equal(second, [[4.0, -11.0]])
    np.testing.assert_array_equal(stencil.crop_interior(field, (1,)), [[3.0, 9.0]])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stencil_equals_numpy_along_each_axis(axis):
    field = analytic.noise((5, 6, 7))[0, ..., 0]
    np.testing.assert_array_equal(
        stencil.forward_difference(field, axis), np.diff(field, axis=axis)
    )
    inner = [slice(None)] * 3
    inner[axis] = slice(1, -1)
    expected = np.gradient(field, axis=axis)[tuple(inner)]
    central = stencil.central_difference(field, axis)
    np.testing.assert_allclose(central, expected, atol=1e-6)


def test_stencil_rejects_short_axis():
    with pytest.raises(ValueError, match="at least 3 values along axis 1"):
        stencil.central_difference(jnp.zeros((5, 2)), 1)
    with pytest.raises(ValueError, match="at least 5 values along axis 1"):
        stencil.crop_interior(jnp.zeros((5, 4)), (0, 1), width=2)


# --- determinant ----------------------------------------------------------------------


def test_determinant_by_hand():
    disp = np.zeros((1, 3, 3, 3, 3), np.float32)
    disp[0, 2, 1, 1, 0] = 1.0  # d disp_0 / d x = 1 / 2
    disp[0, 1, 2, 1, 0] = 4.0  # d disp_0 / d y = 2
    disp[0, 0, 1, 1, 1] = -2.0  # d disp_1 / d x = 1
    np.testing.assert_array_equal(determinant(disp), [[[[1.5 * 1.0 - 2.0 * 1.0]]]])


def test_determinant_of_zero_field_is_one():
    detj = determinant(np.zeros((2, 5, 6, 7, 3), np.float32))
    np.testing.assert_array_equal(detj, np.ones((2, 3, 4, 5)))


def test_determinant_of_affine_is_its_matrix_determinant():
    linear = np.array([[0.1, -0.2, 0.3], [0.05, 0.2, -0.1], [0.4, 0.0, -0.3]])
    detj = determinant(analytic.linear_disp((5, 6, 7), linear, (1.0, 2.0, 3.0)))
    expected = np.full((1, 3, 4, 5), np.linalg.det(np.eye(3) + linear))
    np.testing.assert_allclose(detj, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_determinant_equals_numpy(shape):
    disp = analytic.random_disp(shape, batch=2)
    # Products of three entries of size 2 in float32.
    expected = oracles.determinant(disp)
    np.testing.assert_allclose(determinant(disp), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_determinant_equals_simpleitk_inside(shape):
    sitk = pytest.importorskip("SimpleITK")
    disp = analytic.random_disp(shape)
    field = oracles.itk_image(disp[0].astype(np.float64), vector=True)
    image = sitk.DisplacementFieldJacobianDeterminant(field, True)
    # ITK has a border rule of its own, so the interior is what can agree.
    expected = oracles.itk_array(image)[1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(determinant(disp)[0], expected, atol=1e-5)


def test_determinant_error_is_second_order():
    def error(scale):
        shape = tuple(scale * n + 1 for n in (16, 20, 12))
        disp, detj = analytic.bump_disp(
            shape, vector=scale * np.array([0.8, -0.6, 0.5])
        )
        inner = detj[:, 1:-1, 1:-1, 1:-1]
        return np.abs(np.asarray(determinant(disp)) - inner).max()

    # 4 in the limit; the vector grows with the resolution so that the map is the same.
    assert 3.3 < error(1) / error(2) < 4.5


def test_determinant_gradient_equals_finite_differences():
    disp = analytic.random_disp((4, 3, 5), size=0.5)
    # A polynomial of degree 3: a step of 0.05 leaves 1e-4, float32 a little more.
    check_grads(determinant, (disp,), 1, modes=["rev"], eps=0.05, atol=5e-3)


def test_determinant_gradient_has_no_scatter():
    disp = analytic.random_disp((5, 6, 7))

    def loss(disp):
        return jnp.mean(jnp.maximum(-determinant(disp), 0.0))

    assert not oracles.has_scatter(jax.grad(loss), disp)


# --- folding and SDlogJ ---------------------------------------------------------------


def test_folding_fraction_by_hand():
    disp = np.zeros((2, 5, 6, 7, 3), np.float32)
    disp[1, 3, 2, 2, 0] = -3.0  # detj -0.5 at (2, 2, 2), else 1
    np.testing.assert_allclose(folding_fraction(disp), [0.0, 1.0 / 60.0], rtol=1e-6)


def test_folding_fraction_counts_inside_the_mask():
    disp = analytic.random_disp((5, 6, 7), size=2.0, batch=2)
    mask = _mask((5, 6, 7), 2)
    folds = oracles.determinant(disp) <= 0
    inner = mask[:, 1:-1, 1:-1, 1:-1]
    expected = [f[m].mean() for f, m in zip(folds, inner, strict=True)]
    assert min(expected) > 0.05
    out = folding_fraction(disp, mask=jnp.asarray(mask))
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_mirror_folds_everywhere():
    disp = analytic.linear_disp((5, 6, 7), np.diag([-2.0, 0.0, 0.0]))
    np.testing.assert_array_equal(folding_fraction(disp), [1.0])


@pytest.mark.parametrize("function", [sdlogj, sdlogj_l2r])
def test_sdlogj_of_affine_is_zero(function):
    disp = analytic.linear_disp((6, 7, 8), np.diag([0.3, -0.2, 0.5]))
    # Rounding of the differences, all else being constant.
    np.testing.assert_allclose(function(disp), [0.0], atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [0.2, 1.5])
@pytest.mark.parametrize("shape", [(6, 7, 8), (9, 6, 7)])
def test_sdlogj_equals_numpy(shape, size, masked):
    disp = analytic.random_disp(shape, size=size, batch=2)
    mask = _mask(shape, 2) if masked else np.ones((2, *shape), bool)
    given = jnp.asarray(mask) if masked else None
    # With folds single logs reach -20, so the sums carry 1e-5.
    np.testing.assert_allclose(
        sdlogj(disp, mask=given), oracles.sdlogj(disp, mask), rtol=1e-4
    )
    np.testing.assert_allclose(
        sdlogj_l2r(disp, mask=given), oracles.sdlogj_l2r(disp, mask), rtol=1e-4
    )


def test_sdlogj_floor_sets_the_value_of_folds():
    disp = np.zeros((1, 5, 6, 7, 3), np.float32)
    disp[0, 3, 2, 2, 0] = -3.0  # one voxel of detj -0.5, 59 of 1
    logs = np.zeros(60)
    logs[0] = np.log(1e-9)
    np.testing.assert_allclose(sdlogj(disp), [np.std(logs)], rtol=1e-6)
    logs[0] = np.log(2.5)  # one voxel of -0.5 + 3, the rest log 4
    disp = np.pad(disp, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    logs[1:] = np.log(4.0)
    np.testing.assert_allclose(sdlogj_l2r(disp), [np.std(logs)], rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "function, oracle", [(sdlogj, oracles.sdlogj), (sdlogj_l2r, oracles.sdlogj_l2r)]
)
def test_sdlogj_gradient_equals_finite_differences(function, oracle, masked):
    shape = (6, 7, 8)
    disp = analytic.random_disp(shape, size=0.25, batch=2)
    assert oracles.determinant(disp).min() > 0.05  # the floor is a kink
    mask = _mask(shape, 2) if masked else np.ones((2, *shape), bool)
    given = jnp.asarray(mask) if masked else None
    weights = np.array([1.0, -2.0])

    def loss(field):
        return jnp.sum(function(field, mask=given) * jnp.asarray(weights, jnp.float32))

    gradient = np.asarray(jax.jit(jax.grad(loss))(disp), np.float64)
    direction = np.random.default_rng(3).uniform(-1, 1, disp.shape)
    expected = oracles.slope(
        lambda field: np.sum(weights * oracle(field, mask)), disp, direction
    )
    # float32: a determinant near 0.1 keeps six digits, and so does its log's slope.
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3)


@pytest.mark.parametrize(
    "function, offset, rim", [(sdlogj, 0.0, 1), (sdlogj_l2r, 3.0, 2)]
)
def test_sdlogj_error_is_second_order(function, offset, rim):
    def error(scale):
        shape = tuple(scale * n + 1 for n in (16, 20, 12))
        disp, detj = analytic.bump_disp(
            shape, vector=scale * np.array([1.6, -1.2, 1.0])
        )
        inner = detj[(0, *(slice(rim, -rim),) * 3)]
        return abs(float(function(disp)[0]) - np.std(np.log(inner + offset)))

    # 4 in the limit; the vector grows with the resolution so that the map is the same.
    assert 3.3 < error(1) / error(2) < 4.7


def test_sdlogj_is_accurate_when_the_mean_dominates():
    # log detj is 3.3 everywhere with a spread of 1e-3: moments would cancel.
    shape = (24, 20, 28)
    disp = analytic.linear_disp(shape, 2.0 * np.eye(3))
    disp = disp + 0.002 * analytic.random_disp(shape)
    expected = oracles.sdlogj(disp, np.ones((1, *shape), bool))
    np.testing.assert_allclose(sdlogj(disp), expected, rtol=1e-2)


def test_empty_mask_gives_nan():
    disp = analytic.random_disp((6, 7, 8))
    mask = jnp.zeros((1, 6, 7, 8), bool)
    for function in (folding_fraction, sdlogj, sdlogj_l2r):
        assert np.isnan(function(disp, mask=mask)).all()


def test_statistics_eager_equals_jit():
    disp = analytic.random_disp((6, 7, 8), batch=2)
    mask = jnp.asarray(_mask((6, 7, 8), 2))
    eager = ops.sdlogj_l2r(disp, mask=mask)  # the longest way through the module
    np.testing.assert_allclose(sdlogj_l2r(disp, mask=mask), eager, rtol=1e-5)


# --- bad input ------------------------------------------------------------------------


def test_determinant_rejects_thin_grid():
    with pytest.raises(ValueError, match="at least 3 voxels along each axis"):
        ops.determinant(np.zeros((1, 5, 2, 7, 3), np.float32))


def test_determinant_rejects_channels_first():
    with pytest.raises(ValueError, match=r"disp must be \(B, X, Y, Z, 3\)"):
        ops.determinant(np.zeros((1, 3, 5, 6, 7), np.float32))


def test_sdlogj_l2r_rejects_thin_grid():
    with pytest.raises(ValueError, match="at least 5 voxels along each axis"):
        ops.sdlogj_l2r(np.zeros((1, 5, 4, 7, 3), np.float32))


def test_mask_with_channels_is_rejected():
    disp = np.zeros((1, 5, 6, 7, 3), np.float32)
    with pytest.raises(ValueError, match=r"mask must be bool \(1, 5, 6, 7\)"):
        ops.sdlogj(disp, mask=jnp.ones((1, 5, 6, 7, 1), bool))
    with pytest.raises(ValueError, match="got float32"):
        ops.sdlogj(disp, mask=jnp.ones((1, 5, 6, 7)))
