"""conv3d: the Winograd form against XLA's own convolution, SciPy and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from unireg_jax.ops import conv

SHAPES = [((1, 5, 6, 7), 3, 4), ((2, 8, 9, 5), 2, 5), ((1, 4, 3, 2), 1, 1)]


def _inputs(key, shape, channels, features):
    x = jax.random.normal(key, (*shape, channels))
    kernel = jax.random.normal(
        jax.random.fold_in(key, 1), (3, 3, 3, channels, features)
    )
    return x, kernel


@pytest.mark.parametrize("impl", ["direct", "winograd"])
def test_conv3d_single_tap_shifts(impl):
    x = jnp.zeros((1, 5, 6, 7, 1)).at[0, 2, 3, 4, 0].set(1.0)
    kernel = jnp.zeros((3, 3, 3, 1, 1)).at[0, 1, 2, 0, 0].set(2.0)
    y = conv.conv3d(x, kernel, impl=impl)
    # Correlation: tap (0, 1, 2) reads x at (-1, 0, +1): the point moves by (+1, 0, -1).
    expected = np.zeros((1, 5, 6, 7, 1))
    expected[0, 3, 3, 3, 0] = 2.0
    np.testing.assert_allclose(y, expected, atol=1e-6)  # float32, small constants


@pytest.mark.parametrize(("shape", "channels", "features"), SHAPES)
@pytest.mark.parametrize("impl", ["direct", "winograd"])
def test_conv3d_matches_scipy(key, shape, channels, features, impl):
    x, kernel = _inputs(key, shape, channels, features)
    y = conv.conv3d(x, kernel, impl=impl)
    expected = np.zeros((*shape, features))
    for b in range(shape[0]):
        for c in range(channels):
            for k in range(features):
                expected[b, ..., k] += ndimage.correlate(
                    np.asarray(x[b, ..., c], np.float64),
                    np.asarray(kernel[..., c, k], np.float64),
                    mode="constant",
                )
    # Winograd's transforms amplify float32 rounding to about 1e-5 of the largest value.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y / scale, expected / scale, atol=2e-5)


@pytest.mark.parametrize(("shape", "channels", "features"), SHAPES[:2])
def test_conv3d_winograd_gradients_match_direct(key, shape, channels, features):
    x, kernel = _inputs(key, shape, channels, features)

    def loss(impl):
        return lambda x, w: jnp.sin(conv.conv3d(x, w, impl=impl) * 0.1).sum()

    expected = jax.jit(jax.grad(loss("direct"), (0, 1)))(x, kernel)
    got = jax.jit(jax.grad(loss("winograd"), (0, 1)))(x, kernel)
    for e, g in zip(expected, got, strict=True):
        assert g.dtype == e.dtype
        scale = float(jnp.abs(e).max())
        np.testing.assert_allclose(g / scale, e / scale, atol=3e-5)  # as above


def test_conv3d_matches_torch(key):
    torch = pytest.importorskip("torch")
    x, kernel = _inputs(key, (2, 6, 5, 9), 3, 4)
    with torch.no_grad():
        y = torch.nn.functional.conv3d(
            torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy()),
            torch.tensor(np.asarray(kernel).transpose(4, 3, 0, 1, 2).copy()),
            padding=1,
        ).numpy()
    got = conv.conv3d(x, kernel, impl="winograd")
    scale = np.abs(y).max()
    np.testing.assert_allclose(got / scale, np.moveaxis(y, 1, -1) / scale, atol=2e-5)


def test_conv3d_auto_equals_direct_above_the_small_size(key):
    x, kernel = _inputs(key, (1, 16, 17, 18), 2, 3)
    y = jax.jit(conv.conv3d)(x, kernel)
    expected = conv.conv3d(x, kernel, impl="direct")
    np.testing.assert_allclose(y, expected, atol=1e-4)  # sums of 54 unit normals


def test_conv3d_compiled_cpu_program_holds_no_3d_convolution(key):
    x, kernel = _inputs(key, (1, 16, 16, 16), 4, 4)

    def loss(x, w):
        return conv.conv3d(x, w).sum()

    if jax.default_backend() != "cpu":
        pytest.skip("the CPU form")
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile().as_text()
    assert "window={size=3x3x3" not in text


def test_conv3d_keeps_bfloat16(key):
    x, kernel = _inputs(key, (1, 8, 6, 5), 2, 3)
    y = conv.conv3d(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), impl="direct")
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("x", "kernel", "impl", "match"),
    [
        ((2, 5, 6, 7), (3, 3, 3, 7, 4), "auto", "channels go last"),
        ((1, 5, 6, 7, 2), (3, 3, 5, 2, 4), "auto", r"kernel \[3, 3, 3, C, K\]"),
        ((1, 5, 6, 7, 2), (3, 3, 3, 4, 2), "auto", "must take 2 channels, got 4"),
        ((1, 5, 6, 7, 2), (3, 3, 3, 2, 2), "fft", "impl must be"),
    ],
)
def test_conv3d_rejects_bad_input(x, kernel, impl, match):
    with pytest.raises(ValueError, match=match):
        conv.conv3d(jnp.zeros(x), jnp.zeros(kernel), impl=impl)
