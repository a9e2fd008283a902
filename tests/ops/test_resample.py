"""Resizing volumes and fields against hand-made cases, SciPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests import analytic, oracles
from unireg_jax.ops import resample as ops
from unireg_jax.ops.warp import warp

resize_volume = jax.jit(ops.resize_volume, static_argnums=1)
resize_disp = jax.jit(ops.resize_disp, static_argnums=1)
downsample_mean = jax.jit(ops.downsample_mean, static_argnums=1)


def test_resize_volume_by_hand():
    volume = jnp.arange(8.0).reshape(1, 2, 2, 2, 1)  # 4 x + 2 y + z
    out = resize_volume(volume, (3, 2, 5))
    x, y, z = np.moveaxis(analytic.positions((3, 2, 5)), -1, 0)
    np.testing.assert_array_equal(out[0, ..., 0], 4 * x / 2 + 2 * y + z / 4)


def test_resize_volume_same_shape_is_exact():
    volume = analytic.noise((5, 6, 7), channels=2)
    np.testing.assert_array_equal(resize_volume(volume, (5, 6, 7)), volume)


def test_resize_volume_keeps_constants_and_corners():
    volume = analytic.noise((5, 6, 7))
    out = np.asarray(resize_volume(volume, (8, 3, 11)))
    np.testing.assert_array_equal(out[:, ::7, ::2, ::10], volume[:, ::4, ::5, ::6])
    constant = np.full((1, 5, 6, 7, 1), 3.7, np.float32)
    # Two weights per axis summing to 1 within float32.
    np.testing.assert_allclose(
        resize_volume(constant, (8, 3, 11)), np.full((1, 8, 3, 11, 1), 3.7), rtol=1e-6
    )


def test_resize_volume_to_and_from_one_voxel():
    volume = analytic.noise((5, 6, 7))
    np.testing.assert_array_equal(
        resize_volume(volume, (1, 6, 7)), volume[:, :1]
    )  # the first voxel
    wide = resize_volume(volume[:, :1], (4, 6, 7))
    np.testing.assert_array_equal(wide, np.repeat(volume[:, :1], 4, axis=1))


@pytest.mark.parametrize("new", [(10, 12, 14), (9, 11, 13), (3, 4, 5), (8, 3, 7)])
@pytest.mark.parametrize("shape", [(5, 6, 7), (9, 4, 6)])
def test_resize_volume_equals_scipy(shape, new):
    volume = analytic.noise(shape, channels=3, batch=2)
    expected = oracles.resize(volume, new)
    out = resize_volume(volume, new)
    np.testing.assert_allclose(out, expected, atol=1e-5)  # float32 blends of 8


def test_resize_volume_equals_torch():
    torch = pytest.importorskip("torch")
    volume = analytic.noise((5, 6, 7), channels=2)
    image = torch.tensor(np.moveaxis(volume, -1, 1))
    expected = torch.nn.functional.interpolate(
        image, size=(8, 9, 4), mode="trilinear", align_corners=True
    )
    expected = np.moveaxis(expected.numpy(), 1, -1)
    np.testing.assert_allclose(resize_volume(volume, (8, 9, 4)), expected, atol=1e-5)


def test_resize_eager_equals_jit():
    disp = analytic.random_disp((5, 6, 7), batch=2)
    for new in ((8, 9, 4), (4, 7, 9)):
        eager = ops.resize_disp(disp, new)
        np.testing.assert_allclose(resize_disp(disp, new), eager, atol=1e-6)


def test_resize_volume_keeps_dtype():
    volume = jnp.asarray(analytic.noise((5, 6, 7)), jnp.bfloat16)
    assert resize_volume(volume, (4, 4, 9)).dtype == jnp.bfloat16


def test_resize_disp_rescales_its_vectors():
    disp = analytic.shift_disp((5, 6, 7), (1.0, 1.0, 1.0))
    out = resize_disp(disp, (9, 4, 13))
    expected = np.broadcast_to(np.array([8 / 4, 3 / 5, 12 / 6]), (1, 9, 4, 13, 3))
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_resize_disp_is_the_same_map():
    # An affine field is linear, so resizing is exact: x' + disp'(x') = r (x + disp(x)).
    linear = np.array([[0.1, -0.2, 0.3], [0.05, 0.2, -0.1], [0.4, 0.0, -0.3]])
    shape, new = (5, 6, 7), (9, 4, 10)
    ratio = (np.asarray(new) - 1) / (np.asarray(shape) - 1)
    scaled = np.diag(ratio) @ linear @ np.diag(1.0 / ratio)
    offset = np.array([1.0, -2.0, 0.5])
    expected = analytic.linear_disp(new, scaled, ratio * offset)
    out = resize_disp(analytic.linear_disp(shape, linear, offset), new)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_resize_disp_there_and_back():
    disp = analytic.random_disp((5, 6, 7))
    # Every second voxel of the fine grid is one of the coarse grid.
    back = resize_disp(resize_disp(disp, (9, 11, 13)), (5, 6, 7))
    np.testing.assert_allclose(back, disp, atol=1e-6)


def test_resize_disp_commutes_with_warp():
    fine, coarse = (17, 15, 19), (9, 8, 10)
    volume = analytic.waves(analytic.unit_positions(fine))[None, ..., None]
    volume = volume.astype(np.float32)
    disp, _ = analytic.bump_disp(coarse, width=0.2)
    at_fine = resize_volume(jax.jit(warp)(volume, resize_disp(disp, fine)), coarse)
    at_coarse = jax.jit(warp)(resize_volume(volume, coarse), disp)
    # Interpolation error of the coarse grid: curvature 4 over a step of 1/7, an eighth.
    np.testing.assert_allclose(at_fine, at_coarse, atol=0.02)


def test_resize_volume_error_is_second_order():
    def error(scale):
        shape = tuple(scale * n + 1 for n in (4, 5, 6))
        new = (19, 23, 17)
        volume = analytic.waves(analytic.unit_positions(shape))[None, ..., None]
        out = resize_volume(volume.astype(np.float32), new)[0, ..., 0]
        exact = analytic.waves(analytic.unit_positions(new))
        return np.abs(np.asarray(out) - exact).max()

    assert 3.3 < error(2) / error(4) < 4.7  # 4 in the limit


def test_downsample_mean_by_hand():
    volume = jnp.arange(16.0).reshape(1, 4, 2, 2, 1)
    np.testing.assert_array_equal(
        downsample_mean(volume, 2)[..., 0], [[[[3.5]], [[11.5]]]]
    )
    np.testing.assert_array_equal(
        downsample_mean(volume, (4, 1, 2))[..., 0], [[[[6.5], [8.5]]]]
    )


def test_downsample_mean_equals_numpy():
    volume = analytic.noise((4, 6, 8), channels=3, batch=2)
    expected = np.zeros((2, 2, 3, 4, 3))
    for x, y, z in np.ndindex(2, 2, 2):
        expected += volume[:, x::2, y::2, z::2] / 8.0
    np.testing.assert_allclose(downsample_mean(volume, 2), expected, atol=1e-6)
    eager = ops.downsample_mean(volume, 2)
    np.testing.assert_allclose(eager, expected, atol=1e-6)
    assert downsample_mean(jnp.asarray(volume, jnp.bfloat16), 2).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "function",
    [lambda v: resize_volume(v, (6, 3, 7)), lambda v: resize_disp(v, (6, 3, 7))],
)
def test_resize_gradient_equals_finite_differences(function):
    volume = analytic.noise((3, 4, 5), channels=3)
    # Linear: central differences are exact at any step, float32 decides.
    check_grads(function, (volume,), 1, modes=["rev"], eps=0.5, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("new", [(9, 12, 13), (4, 6, 1)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_resize_volume_equals_matrix_form(new, dtype, compiled):
    volume = jnp.asarray(analytic.noise((5, 6, 7), channels=2, batch=2), dtype)
    weight = jnp.asarray(analytic.noise(new, channels=2, batch=2, seed=5))

    def matrices(volume):
        out = volume.astype(jnp.float32)
        for axis, size in enumerate(new, start=1):
            out = ops._interpolate_axis(out, axis, size)
        return out.astype(volume.dtype)

    def with_gradient(function):
        def loss(volume):
            return jnp.sum(function(volume).astype(jnp.float32) * weight)

        def both(volume):
            return function(volume), jax.grad(loss)(volume)

        return (jax.jit(both) if compiled else both)(volume)

    fast = with_gradient(lambda v: ops.resize_volume(v, new))
    plain = with_gradient(matrices)
    # float32 sums in another order; bfloat16 results round to 8 bits.
    atol = 2e-6 if dtype == jnp.float32 else 0.02
    for a, b in zip(fast, plain, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("new", [(10, 12, 14), (3, 4, 5)])
def test_resize_gradient_has_no_scatter(new):
    disp = analytic.random_disp((5, 6, 7))
    gradient = jax.grad(lambda d: jnp.sum(resize_disp(d, new) ** 2))
    assert not oracles.has_scatter(gradient, disp)


def test_resize_rejects_labels():
    with pytest.raises(ValueError, match="volume must be floating, got int32"):
        resize_volume(jnp.zeros((1, 5, 6, 7, 1), jnp.int32), (3, 3, 3))


def test_resize_rejects_missing_channel():
    with pytest.raises(ValueError, match=r"volume must be \(B, X, Y, Z, C\)"):
        resize_volume(jnp.zeros((1, 5, 6, 7)), (3, 3, 3))


def test_resize_rejects_bad_shape():
    with pytest.raises(ValueError, match=r"shape must be \(X, Y, Z\)"):
        resize_volume(jnp.zeros((1, 5, 6, 7, 1)), (3, 3))


def test_resize_disp_rejects_one_voxel():
    with pytest.raises(ValueError, match="at least 2 voxels along each axis"):
        resize_disp(analytic.random_disp((5, 6, 7)), (5, 1, 7))


def test_downsample_mean_rejects_remainders():
    with pytest.raises(ValueError, match=r"multiples of \(2, 2, 2\) voxels.*crop it"):
        downsample_mean(jnp.zeros((1, 4, 5, 6, 1)), 2)


def test_upsample_disp_by_hand():
    line = np.zeros((1, 2, 1, 1, 3), np.float32)
    line[0, :, 0, 0, 0] = [1.0, 5.0]
    out = np.asarray(jax.jit(ops.upsample_disp, static_argnums=1)(line, 2))
    assert out.shape == (1, 4, 2, 2, 3)
    # Blocks of two voxels: the edge holds, then a quarter and three quarters; doubled.
    np.testing.assert_array_equal(out[0, :, 1, 1, 0], [2.0, 4.0, 8.0, 10.0])
    np.testing.assert_array_equal(out[..., 1:], 0.0)


def test_upsample_disp_is_undone_by_downsample_disp():
    disp = analytic.linear_disp((6, 8, 10), 0.1 * np.eye(3), (0.4, -0.3, 0.2))
    fine = ops.upsample_disp(jnp.asarray(disp), 2)
    back = ops.downsample_disp(fine, 2)
    inner = (slice(None), *(slice(1, -1),) * 3)  # the edge value holds outside
    np.testing.assert_allclose(back[inner], disp[inner], atol=1e-6)  # float32 blends
    np.testing.assert_array_equal(ops.upsample_disp(jnp.asarray(disp), 1), disp)


def test_upsample_disp_gradient_is_exact_and_has_no_scatter():
    disp = jnp.asarray(analytic.random_disp((4, 5, 6)))
    check_grads(lambda d: ops.upsample_disp(d, 2), (disp,), order=1, atol=1e-2)

    def loss(disp):
        return jnp.sum(ops.upsample_disp(disp, 2) ** 2)

    assert not oracles.has_scatter(jax.value_and_grad(loss), disp)


def test_upsample_disp_rejects_bad_factor():
    with pytest.raises(ValueError, match="factor must be at least 1"):
        ops.upsample_disp(jnp.zeros((1, 4, 5, 6, 3)), 0)
