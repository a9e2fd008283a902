"""Local and global NCC against NumPy in float64, with gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests import analytic
from unireg_jax.ops import ncc

SHAPES = [(1, 5, 6, 7, 1), (2, 8, 4, 9, 1)]
LOCAL_EPS, GLOBAL_EPS = 1e-5, 1e-8


# Compiled once per shape: quicker than the operators one by one.
local_ncc = jax.jit(ncc.local_ncc, static_argnames=("window", "eps"))
global_ncc = jax.jit(ncc.global_ncc, static_argnames="eps")


def oracle_cc_map(fixed, moving, window, eps=LOCAL_EPS):
    """cc of every voxel by cutting out its window; float64."""
    f, m = (np.asarray(v, np.float64)[..., 0] for v in (fixed, moving))
    half, cc = window // 2, np.zeros(f.shape)
    for b, x, y, z in itertools.product(*map(range, f.shape)):
        cut = (b, *(slice(max(i - half, 0), i + half + 1) for i in (x, y, z)))
        df, dm = f[cut] - f[cut].mean(), m[cut] - m[cut].mean()
        product = (df * dm).sum()
        cc[b, x, y, z] = product**2 / ((df**2).sum() * (dm**2).sum() + eps)
    return cc


def oracle_local(fixed, moving, window, mask=None, eps=LOCAL_EPS):
    """Mean of the map over the mask, 0 where it is empty."""
    cc = oracle_cc_map(fixed, moving, window, eps)
    weight = np.ones(cc.shape) if mask is None else np.asarray(mask, np.float64)
    total = weight.sum(axis=(1, 2, 3))
    return (cc * weight).sum(axis=(1, 2, 3)) / np.where(total > 0, total, 1.0)


def oracle_global(fixed, moving, mask=None, eps=GLOBAL_EPS):
    """Weighted covariance over the root of the weighted variances."""
    out = []
    for b in range(len(fixed)):
        f, m = (np.asarray(v[b], np.float64).ravel() for v in (fixed, moving))
        w = np.ones(f.size) if mask is None else np.asarray(mask[b], float).ravel()
        w = w / max(w.sum(), 1e-30)
        f, m = f - (w * f).sum(), m - (w * m).sum()
        variances = (w * f * f).sum() * (w * m * m).sum()
        out.append((w * f * m).sum() / np.sqrt(variances + eps))
    return np.asarray(out)


def plain_local(fixed, moving, window, weight, eps=LOCAL_EPS):
    """The direct form, one 3-D window per moment, for autodiff to differentiate."""
    f, m = fixed[..., 0], moving[..., 0]

    def box(volume):
        size = (1, window, window, window)
        return lax.reduce_window(volume, 0.0, lax.add, size, (1, 1, 1, 1), "SAME")

    count = box(jnp.ones_like(f))
    c = box(f * m) - box(f) * box(m) / count
    vf = box(f * f) - box(f) ** 2 / count
    vm = box(m * m) - box(m) ** 2 / count
    return jnp.sum(weight * c * c / (vf * vm + eps)) / jnp.sum(weight)


def pair(shape, seed=0):
    """Two correlated random images in about [-1, 1], float32."""
    rng = np.random.default_rng(seed)
    fixed = rng.uniform(-1, 1, shape)
    moving = 0.6 * fixed + 0.4 * rng.uniform(-1, 1, shape)
    return jnp.asarray(fixed, jnp.float32), jnp.asarray(moving, jnp.float32)


def random_mask(shape, seed=1):
    """About two thirds of the voxels."""
    return jnp.asarray(np.random.default_rng(seed).random(shape[:-1]) < 0.67)


# --- local: values --------------------------------------------------------------------


def test_local_ncc_by_hand():
    x, y, _ = np.indices((2, 2, 2)).astype(np.float32)
    fixed, moving = (jnp.asarray(v)[None, ..., None] for v in (x, x + y))
    # Every window is the whole cube: c = 2, vf = 2, vm = 4, so cc = 4 / 8.
    np.testing.assert_allclose(local_ncc(fixed, moving, window=3), [0.5], rtol=1e-5)


@pytest.mark.parametrize("slope", [2.5, -0.5])
def test_local_ncc_invariant_to_affine_intensity(slope):
    fixed, _ = pair(SHAPES[1])
    out = local_ncc(fixed, slope * fixed + 0.25, window=5)
    np.testing.assert_allclose(out, 1.0, atol=1e-5)  # eps / (vf vm) and float32 sums


@pytest.mark.parametrize("index, window", [(0, 3), (0, 9), (1, 5), (1, 9)])
def test_local_ncc_matches_oracle(index, window):
    shape = SHAPES[index]
    fixed, moving = pair(shape)
    out = local_ncc(fixed, moving, window=window)
    assert out.dtype == jnp.float32 and out.shape == shape[:1]
    # float32 sums over up to 729 voxels, then the difference of two of them.
    np.testing.assert_allclose(out, oracle_local(fixed, moving, window), atol=2e-6)


@pytest.mark.parametrize("index, kind", [(0, bool), (1, jnp.float32)])
def test_local_ncc_mask_weighs_the_map(index, kind):
    shape = SHAPES[index]
    fixed, moving = pair(shape)
    mask = random_mask(shape).astype(kind)
    out = local_ncc(fixed, moving, window=3, mask=mask)
    np.testing.assert_allclose(out, oracle_local(fixed, moving, 3, mask), atol=2e-6)


def test_local_ncc_fractional_mask_matches_oracle():
    fixed, moving = pair(SHAPES[1])
    mask = np.random.default_rng(2).random(SHAPES[1][:-1]).astype(np.float32)
    out = local_ncc(fixed, moving, window=3, mask=jnp.asarray(mask))
    np.testing.assert_allclose(out, oracle_local(fixed, moving, 3, mask), atol=2e-6)


def test_local_ncc_pads_nothing_into_border_windows():
    fixed, moving = pair(SHAPES[0])
    moved = local_ncc(fixed + 3.0, moving + 3.0, window=5)
    # A zero beyond the border would be an edge of height 3 in both images.
    np.testing.assert_allclose(
        moved, local_ncc(fixed, moving, window=5), atol=1e-4
    )  # sums of squares 10 times as large


def test_local_ncc_matches_torch_pooling():
    torch = pytest.importorskip("torch")
    fixed, moving = pair((2, 8, 6, 9, 1))
    window = 5

    def mean(volume, **options):
        return torch.nn.functional.avg_pool3d(
            volume, window, 1, window // 2, **{"count_include_pad": False, **options}
        )

    f, m = (torch.tensor(np.asarray(v, np.float64)[..., 0]) for v in (fixed, moving))
    f, m = f[:, None], m[:, None]
    count = mean(torch.ones_like(f), count_include_pad=True) * window**3
    c = count * (mean(f * m) - mean(f) * mean(m))
    vf = count * (mean(f * f) - mean(f) ** 2)
    vm = count * (mean(m * m) - mean(m) ** 2)
    expected = (c * c / (vf * vm + LOCAL_EPS)).mean(dim=(1, 2, 3, 4)).numpy()
    out = local_ncc(fixed, moving, window=window)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_local_ncc_does_not_drift_over_many_voxels():
    fixed, _ = pair((1, 90, 60, 70, 1))
    # A single float32 sum of 378 000 equal shares of 1 is off by 2e-5.
    np.testing.assert_allclose(local_ncc(fixed, fixed, window=3), 1.0, atol=1e-6)


# --- local: gradients -----------------------------------------------------------------


@pytest.mark.parametrize(
    "index, window, masked", [(0, 9, False), (0, 3, True), (1, 5, True)]
)
def test_local_ncc_gradient_matches_finite_differences(index, window, masked):
    shape = SHAPES[index]
    fixed, moving = pair(shape)
    mask = random_mask(shape) if masked else None
    gradient = jax.grad(
        lambda m: jnp.sum(local_ncc(fixed, m, window=window, mask=mask))
    )(moving)
    direction = np.random.default_rng(3).standard_normal(shape)
    step, base = 1e-4, np.asarray(moving, np.float64)
    up, down = (
        oracle_local(fixed, base + s * direction, window, mask).sum()
        for s in (step, -step)
    )
    slope = np.sum(np.asarray(gradient, np.float64) * direction)
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5, 6, 7, 1), (1, 10, 8, 9, 1)])
def test_local_ncc_gradient_matches_autodiff_of_plain_form(shape):
    fixed, moving = pair(shape)
    mask = random_mask(shape)

    def fast(m):
        return jnp.sum(local_ncc(fixed, m, window=5, mask=mask))

    def plain(m):
        return plain_local(fixed, m, 5, mask.astype(jnp.float32))

    (value, gradient), expected = (
        jax.jit(jax.value_and_grad(f))(moving) for f in (fast, plain)
    )
    assert gradient.dtype == moving.dtype
    np.testing.assert_allclose(value, expected[0], atol=1e-6)
    scale = np.abs(expected[1]).max()
    np.testing.assert_allclose(gradient, expected[1], atol=2e-6 * max(scale, 1.0))


def test_local_ncc_scales_with_the_cotangent():
    fixed, moving = pair(SHAPES[1])
    _, pull = jax.vjp(lambda m: local_ncc(fixed, m, window=3), moving)
    one, other = (
        pull(jnp.asarray(c, jnp.float32))[0] for c in ([1.0, 1.0], [2.0, 0.0])
    )
    np.testing.assert_allclose(other[0], 2.0 * one[0], rtol=1e-6)
    np.testing.assert_array_equal(other[1], 0.0)


def test_local_ncc_gives_fixed_and_mask_no_gradient():
    fixed, moving = pair(SHAPES[0])
    mask = random_mask(SHAPES[0]).astype(jnp.float32)
    gradients = jax.grad(
        lambda f, w: jnp.sum(local_ncc(f, moving, window=3, mask=w)), (0, 1)
    )(fixed, mask)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def test_local_ncc_gradient_lowers_without_scatter():
    fixed, moving = pair(SHAPES[0])
    gradient = jax.jit(jax.value_and_grad(lambda m: jnp.sum(local_ncc(fixed, m))))
    assert "scatter" not in gradient.lower(moving).as_text()


# --- local: refinement ----------------------------------------------------------------


def slanted_bump(shape, tilt, width):
    """A slope and a bump on the unit cube: image [1, X, Y, Z, 1], gradient in voxels.

    The slope is steep enough that the gradient vanishes nowhere.
    """
    size = np.asarray(shape) - 1.0
    s = (analytic.unit_positions(shape) - 0.5) / width
    bump = 0.2 * np.exp(-0.5 * np.sum(s**2, axis=-1))
    gradient = (np.asarray(tilt) - bump[..., None] * s / width) / size
    image = analytic.unit_positions(shape) @ np.asarray(tilt) + bump
    return jnp.asarray(image, jnp.float32)[None, ..., None], gradient


def test_local_ncc_error_is_second_order():
    """On smooth images it tends to the squared cosine between their gradients."""

    def error(scale):
        shape = tuple(scale * n + 1 for n in (12, 15, 9))
        fixed, slope_f = slanted_bump(shape, (1.0, 0.4, -0.6), 0.25)
        moving, slope_m = slanted_bump(shape, (0.5, -0.7, -0.9), 0.35)
        # Windows with a voxel all around: those of the border are not symmetric.
        mask = np.zeros((1, *shape), bool)
        inner = (0, *(slice(scale, -scale),) * 3)
        mask[inner] = True
        # In voxels, since a window is a cube of voxels.
        dot, square_f, square_m = (
            np.sum(a * b, axis=-1)[inner[1:]]
            for a, b in ((slope_f, slope_m), (slope_f, slope_f), (slope_m, slope_m))
        )
        expected = np.mean(dot**2 / (square_f * square_m))
        # eps far below (27 voxels * variance)^2, which falls with the fourth power.
        out = local_ncc(fixed, moving, window=3, mask=jnp.asarray(mask), eps=1e-12)
        return abs(float(out[0]) - expected)

    # 4 in the limit.
    assert 3.3 < error(1) / error(2) < 4.7


# --- local: degenerate points, transforms, bad input ----------------------------------


@pytest.mark.parametrize("flat", ["fixed", "moving", "both"])
def test_local_ncc_of_constant_image_is_zero_and_finite(flat):
    fixed, moving = pair(SHAPES[0])
    constant = jnp.full(SHAPES[0], -0.7)
    fixed = fixed if flat == "moving" else constant
    moving = moving if flat == "fixed" else constant
    value, gradient = jax.value_and_grad(lambda m: jnp.sum(local_ncc(fixed, m)))(moving)
    np.testing.assert_allclose(value, 0.0, atol=1e-4)  # rounding of the variances / eps
    assert np.isfinite(gradient).all()


def test_local_ncc_of_empty_mask_is_zero_and_touches_no_other_example():
    fixed, moving = pair(SHAPES[1])
    mask = random_mask(SHAPES[1]).at[0].set(False)

    def total(m):
        return jnp.sum(local_ncc(fixed, m, window=3, mask=mask))

    out = local_ncc(fixed, moving, window=3, mask=mask)
    alone = local_ncc(fixed[1:], moving[1:], window=3, mask=mask[1:])
    gradient = jax.grad(total)(moving)
    assert out[0] == 0.0
    np.testing.assert_allclose(out[1:], alone, rtol=1e-6)
    np.testing.assert_array_equal(gradient[0], 0.0)
    assert np.isfinite(gradient).all() and np.abs(gradient[1]).max() > 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_local_ncc_jit_equals_eager(shape):
    fixed, moving = pair(shape)
    mask = random_mask(shape)

    eager, jitted = (
        function(fixed, moving, window=5, mask=mask)
        for function in (ncc.local_ncc, local_ncc)
    )
    np.testing.assert_allclose(jitted, eager, atol=1e-6)


def test_local_ncc_computes_bfloat16_in_float32():
    fixed, moving = (v.astype(jnp.bfloat16) for v in pair(SHAPES[0]))
    out, pull = jax.vjp(lambda m: local_ncc(fixed, m, window=3), moving)
    expected = oracle_local(
        fixed.astype(jnp.float32), moving.astype(jnp.float32), window=3
    )
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert pull(jnp.ones_like(out))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("window", [1, 4, 9.0])
def test_local_ncc_rejects_window(window):
    fixed, moving = pair(SHAPES[0])
    with pytest.raises(ValueError, match="window must be an odd int"):
        local_ncc(fixed, moving, window=window)


@pytest.mark.parametrize("function", [ncc.local_ncc, ncc.global_ncc])
def test_rejects_bad_images(function):
    fixed, moving = pair(SHAPES[0])
    with pytest.raises(ValueError, match=r"fixed must be \(B, X, Y, Z, 1\)"):
        function(fixed[..., 0], moving[..., 0])
    with pytest.raises(ValueError, match="moving must be .* as fixed"):
        function(fixed, moving[:, 1:])
    with pytest.raises(ValueError, match="moving must be float"):
        function(fixed, jnp.ones(moving.shape, jnp.int16))
    with pytest.raises(ValueError, match="mask must be .*drop the channel axis"):
        function(fixed, moving, mask=jnp.ones(fixed.shape))


# --- global ---------------------------------------------------------------------------


def test_global_ncc_by_hand():
    x, y, _ = np.indices((2, 2, 2)).astype(np.float32)
    fixed, moving = (jnp.asarray(v)[None, ..., None] for v in (x, x + y))
    np.testing.assert_allclose(global_ncc(fixed, moving), [np.sqrt(0.5)], rtol=1e-6)


@pytest.mark.parametrize("slope", [2.5, -0.5])
def test_global_ncc_of_affine_intensity_is_its_sign(slope):
    fixed, _ = pair(SHAPES[1])
    out = global_ncc(fixed, slope * fixed + 0.25)
    np.testing.assert_allclose(out, np.sign(slope), atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_global_ncc_matches_oracle(shape, masked):
    fixed, moving = pair(shape)
    mask = random_mask(shape) if masked else None
    out = global_ncc(fixed, moving, mask=mask)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, oracle_global(fixed, moving, mask), atol=1e-6)
    if not masked:
        expected = [
            np.corrcoef(np.ravel(f), np.ravel(m))[0, 1]
            for f, m in zip(fixed, moving, strict=True)
        ]
        np.testing.assert_allclose(out, expected, atol=2e-6)  # eps against 0.01


@pytest.mark.parametrize("masked", [False, True])
def test_global_ncc_gradient_matches_finite_differences(masked):
    fixed, moving = pair(SHAPES[1])
    mask = random_mask(SHAPES[1]) if masked else None
    gradients = jax.grad(lambda *v: jnp.sum(global_ncc(*v, mask=mask)), (0, 1))(
        fixed, moving
    )
    step, images = 1e-4, [np.asarray(v, np.float64) for v in (fixed, moving)]
    direction = np.random.default_rng(3).standard_normal(SHAPES[1])
    for k, gradient in enumerate(gradients):
        up, down = (
            oracle_global(
                *(v + s * direction * (k == i) for i, v in enumerate(images)), mask
            ).sum()
            for s in (step, -step)
        )
        slope = np.sum(np.asarray(gradient, np.float64) * direction)
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-4)


def test_global_ncc_error_is_second_order():
    """Sums over voxels tend to the integrals over the cube, by the midpoint rule."""
    bumps = ((0.3, 0.4, 0.6), 0.35), ((0.4, 0.55, 0.45), 0.45)  # centre, width

    def line(points, bump, axis):
        return np.exp(-0.5 * ((points - bump[0][axis]) / bump[1]) ** 2)

    nodes, weights = np.polynomial.legendre.leggauss(30)

    def integral(*factors):
        """Of a product of bumps over the unit cube, exact to 1e-14."""
        return np.prod(
            [
                np.sum(
                    np.prod([line(0.5 + 0.5 * nodes, b, j) for b in factors], axis=0)
                    * weights
                    / 2
                )
                for j in range(3)
            ]
        )

    f, m = bumps
    c, vf, vm = (
        integral(a, b) - integral(a) * integral(b) for a, b in ((f, m), (f, f), (m, m))
    )
    assert c / np.sqrt(vf * vm) > 0.5  # far from 0, where a wrong scale would not show

    def error(scale):
        shape = tuple(scale * n for n in (8, 9, 7))
        points = [(np.arange(n) + 0.5) / n for n in shape]
        images = (
            np.einsum("x,y,z->xyz", *(line(p, b, j) for j, p in enumerate(points)))
            for b in bumps
        )
        fixed, moving = (jnp.asarray(v, jnp.float32)[None, ..., None] for v in images)
        return abs(float(global_ncc(fixed, moving)[0]) - c / np.sqrt(vf * vm))

    # 4 in the limit.
    assert 3.5 < error(1) / error(2) < 4.5


def test_global_ncc_degenerate_points_are_zero_and_finite():
    fixed, moving = pair(SHAPES[0])
    empty = jnp.zeros(SHAPES[0][:-1], bool)
    constant = jnp.full(SHAPES[0], -0.7)
    for m, mask in ((constant, None), (moving, empty)):
        value, gradient = jax.value_and_grad(
            lambda v, w=mask: jnp.sum(global_ncc(fixed, v, mask=w))
        )(m)
        np.testing.assert_allclose(value, 0.0, atol=1e-4)
        assert np.isfinite(gradient).all()


def test_global_ncc_jit_equals_eager():
    fixed, moving = pair(SHAPES[1])
    np.testing.assert_allclose(
        global_ncc(fixed, moving),
        ncc.global_ncc(fixed, moving),
        atol=1e-6,
    )
