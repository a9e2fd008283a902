"""conv3d: the CPU form against XLA's own convolution, SciPy and PyTorch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import ndimage

from unireg_jax.ops import conv

# Input channels of either form of a tile on a CPU: by the definition, by Winograd.
THIN, WIDE = 3, 20
assert THIN <= conv._THIN < WIDE
SHAPES = [((1, 5, 6, 7), WIDE, 4), ((2, 8, 9, 5), THIN, 5), ((1, 4, 3, 2), 1, 1)]

both_forms = pytest.mark.parametrize("channels", [THIN, WIDE])


def _inputs(key, shape, channels, features):
    x = jax.random.normal(key, (*shape, channels))
    kernel = jax.random.normal(
        jax.random.fold_in(key, 1), (3, 3, 3, channels, features)
    )
    return x, kernel


@both_forms
@pytest.mark.parametrize("impl", ["direct", "winograd", "planes"])
def test_conv3d_single_tap_shifts(impl, channels):
    x = jnp.zeros((1, 5, 6, 7, channels)).at[0, 2, 3, 4, -1].set(1.0)
    kernel = jnp.zeros((3, 3, 3, channels, 1)).at[0, 1, 2, -1, 0].set(2.0)
    y = conv.conv3d(x, kernel, impl=impl)
    # Correlation: tap (0, 1, 2) reads x at (-1, 0, +1): the point moves by (+1, 0, -1).
    expected = np.zeros((1, 5, 6, 7, 1))
    expected[0, 3, 3, 3, 0] = 2.0
    np.testing.assert_allclose(y, expected, atol=1e-6)  # float32, small constants


@pytest.mark.parametrize(("shape", "channels", "features"), SHAPES)
@pytest.mark.parametrize("impl", ["direct", "winograd", "planes"])
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


def _assert_agree(got, expected, atol=3e-5):
    """Leaf by leaf, relative to the largest value.

    The transforms amplify float32 rounding to about 1e-5.
    """
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.dtype == e.dtype
        scale = float(jnp.abs(e).max())
        np.testing.assert_allclose(g / scale, e / scale, atol=atol)


@pytest.mark.parametrize(("shape", "channels", "features"), SHAPES[:2])
def test_conv3d_winograd_gradients_match_direct(key, shape, channels, features):
    x, kernel = _inputs(key, shape, channels, features)

    def loss(impl):
        return lambda x, w: jnp.sin(conv.conv3d(x, w, impl=impl) * 0.1).sum()

    expected = jax.jit(jax.grad(loss("direct"), (0, 1)))(x, kernel)
    got = jax.jit(jax.grad(loss("winograd"), (0, 1)))(x, kernel)
    _assert_agree(got, expected)


def _block(key, shape, coarse, parts, features):
    """A whole block: coarse map (none of 0 channels), several inputs, kernel, bias."""
    keys = jax.random.split(key, 4)
    half = tuple(n // 2 for n in shape[1:])
    channels = coarse + sum(parts)
    low = jax.random.normal(keys[1], (shape[0], *half, coarse))
    return {
        "inputs": tuple(
            jax.random.normal(k, (*shape, c))
            for k, c in zip(jax.random.split(keys[0], len(parts)), parts, strict=True)
        ),
        "coarse": low if coarse else None,
        "kernel": jax.random.normal(keys[2], (3, 3, 3, channels, features)) * 0.2,
        "bias": jax.random.normal(keys[3], (features,)),
    }


def _apply(block, impl, slope):
    return conv.conv3d(
        block["inputs"],
        block["kernel"],
        block["bias"],
        coarse=block["coarse"],
        slope=slope,
        impl=impl,
    )


def _weights(y):
    """Of a sum over y: none where y is so near zero that rounding decides the slope."""
    weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return jnp.where(jnp.abs(y) > 1e-3, weights, 0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _value_and_gradient(run, block, weights, impl):
    """(run(block, impl), the gradient to the block of its sum with these weights)."""
    y, pull = jax.vjp(lambda block: run(block, impl), block)
    return y, pull(weights)


# Two tiles and more along X; a rest of two slices; a batch.
BLOCKS = [((1, 8, 6, 10), 3, (2, 4), 5), ((2, 6, 4, 8), 2, (1,), 3)]


def test_conv3d_is_the_convolution_of_the_concatenation(key):
    """Against the definition, with the up-sampled map made and everything joined."""
    block = _block(key, *BLOCKS[0])
    joined = jnp.concatenate(
        [conv.upsample_nearest(block["coarse"]), *block["inputs"]], axis=-1
    )
    y = np.asarray(conv.conv3d(joined, block["kernel"], impl="direct"))
    y = y + np.asarray(block["bias"])
    expected = np.where(y > 0, y, 0.2 * y)
    for impl in ("direct", "winograd", "planes"):
        got = _apply(block, impl, 0.2)
        np.testing.assert_allclose(got, expected, atol=1e-4)  # sums of 243 products


@pytest.mark.parametrize(
    ("block", "slope"), [(BLOCKS[0], 0.2), (BLOCKS[1], 1.0), (BLOCKS[1], 0.2)]
)
def test_conv3d_forms_agree_in_value_and_gradient(key, block, slope):
    block = _block(key, *block)
    run = functools.partial(_apply, slope=slope)
    weights = _weights(run(block, "direct"))
    expected = _value_and_gradient(run, block, weights, "direct")
    for impl in ("winograd", "planes"):
        _assert_agree(_value_and_gradient(run, block, weights, impl), expected)


def test_conv3d_thin_gradient_matches_direct(key):
    """Few channels and no coarse map: inputs, kernel and bias; a rest of two slices."""
    block = _block(key, (1, 6, 5, 7), 0, (1, THIN - 1), 4)
    run = functools.partial(_apply, slope=0.2)
    weights = _weights(run(block, "direct"))
    expected = _value_and_gradient(run, block, weights, "direct")
    eager = _value_and_gradient.__wrapped__
    for function in (_value_and_gradient, eager):
        _assert_agree(function(run, block, weights, "winograd"), expected)


@both_forms
def test_conv3d_gradient_keeps_bfloat16(key, channels):
    block = _block(key, (1, 8, 6, 5), 0, (channels,), 3)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), block)
    block = jax.tree.map(lambda x: x.astype(jnp.float32), half)  # the same numbers
    run = functools.partial(_apply, slope=0.2)
    weights = _weights(run(block, "direct")).astype(jnp.bfloat16)
    got = _value_and_gradient(run, half, weights, "winograd")
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    expected = _value_and_gradient(run, block, weights.astype(jnp.float32), "direct")
    got = jax.tree.map(lambda x: x.astype(jnp.float32), got)
    # Computed in float32 and rounded to 8 bits, slices that two tiles share twice.
    _assert_agree(got, expected, atol=2 * 2**-8)


@pytest.mark.parametrize(
    ("size", "coarse", "parts"),
    [
        (8, 0, (1, THIN - 1)),
        (6, 0, (WIDE,)),  # a rest of two slices
        (8, 2, (WIDE,)),
        (6, 2, (WIDE,)),  # the coarse map is up-sampled for the rest
        (6, 2, (THIN,)),
    ],
)
def test_conv3d_of_slices_with_their_neighbours(key, size, coarse, parts):
    """What a device computes of a split volume, which has slices on both sides."""
    block = _block(key, (1, size + 4, 4, 6), coarse, parts, 3)

    def of_slab(block, impl):
        # Of two fine slices on either side one is read, and the coarse one above them.
        inputs = tuple(x[:, 1:-1] for x in block["inputs"])
        args = inputs, block["coarse"], block["kernel"], block["bias"]
        return conv._formulated(args, impl, slope=0.2, halo=1)

    def of_whole(block, impl):
        return _apply(block, impl, 0.2)[:, 2:-2]

    weights = _weights(of_whole(block, "direct"))
    expected = _value_and_gradient(of_whole, block, weights, "direct")
    for impl in ("winograd", "planes"):
        _assert_agree(_value_and_gradient(of_slab, block, weights, impl), expected)


def test_conv3d_gradient_matches_finite_differences(key):
    block = _block(key, (1, 4, 4, 6), 1, (1,), 2)
    check_grads(
        jax.jit(lambda b: _apply(b, "winograd", 1.0)),
        (block,),
        order=1,
        modes=("rev",),
        atol=1e-2,  # float32 differences of sums of 192 values
        rtol=1e-2,
    )


@pytest.mark.slow
def test_conv3d_needs_scratch_for_slices_only(key):
    """At 96 x 32 x 32 no map of the volume's size but the result and gradients."""
    block = _block(key, (1, 96, 32, 32), 8, (8,), 8)
    block = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), block)
    if jax.default_backend() != "cpu":
        pytest.skip("the CPU form")
    large = 96 * 32 * 32 * 8 * 4
    program = jax.jit(lambda b: _apply(b, "winograd", 0.2)).lower(block).compile()
    assert program.memory_analysis().temp_size_in_bytes < large
    grad = jax.grad(lambda b: jnp.square(_apply(b, "winograd", 0.2)).sum())
    program = jax.jit(grad).lower(block).compile()
    # The result, its own gradient and what the loops work on.
    assert program.memory_analysis().temp_size_in_bytes < 3.5 * large


def test_upsample_nearest_repeats(key):
    x = jax.random.normal(key, (1, 2, 3, 4, 5))
    y = np.asarray(x).repeat(2, 1).repeat(2, 2).repeat(2, 3)
    np.testing.assert_array_equal(conv.upsample_nearest(x), y)


@both_forms
def test_conv3d_matches_torch(key, channels):
    torch = pytest.importorskip("torch")
    x, kernel = _inputs(key, (2, 6, 5, 9), channels, 4)
    with torch.no_grad():
        y = torch.nn.functional.conv3d(
            torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy()),
            torch.tensor(np.asarray(kernel).transpose(4, 3, 0, 1, 2).copy()),
            padding=1,
        ).numpy()
    got = conv.conv3d(x, kernel, impl="winograd")
    scale = np.abs(y).max()
    np.testing.assert_allclose(got / scale, np.moveaxis(y, 1, -1) / scale, atol=2e-5)


# Sums of 81 unit normals; of 540, up to 100, whose rounding Winograd amplifies.
both_forms_and_bounds = pytest.mark.parametrize(
    ("channels", "atol"), [(THIN, 1e-4), (WIDE, 3e-4)]
)


@both_forms_and_bounds
def test_conv3d_auto_equals_direct_above_the_small_size(key, channels, atol):
    x, kernel = _inputs(key, (1, 16, 17, 18), channels, 3)
    y = jax.jit(conv.conv3d)(x, kernel)
    expected = conv.conv3d(x, kernel, impl="direct")
    np.testing.assert_allclose(y, expected, atol=atol)


@both_forms
def test_conv3d_compiled_cpu_program_holds_no_3d_convolution(key, channels):
    x, kernel = _inputs(key, (1, 16, 16, 16), channels, 4)

    def text(impl):
        def loss(x, w):
            return jnp.square(conv.conv3d(x, w, impl=impl)).sum()

        grad = jax.value_and_grad(loss, (0, 1))
        return jax.jit(grad).lower(x, kernel).compile().as_text()

    if jax.default_backend() != "cpu":
        pytest.skip("the CPU form")
    window = re.compile(r"window={size=\d+x\d+x\d+")
    assert window.search(text("direct"))
    assert not window.search(text("auto"))


@both_forms_and_bounds
@pytest.mark.parametrize("shape", [(1, 16, 17, 18), (1, 4, 6, 8)])
def test_conv3d_of_a_cpu_equals_direct_at_all_sizes(key, shape, channels, atol):
    x, kernel = _inputs(key, shape, channels, 3)
    expected = conv.conv3d(x, kernel, impl="direct")
    program = jax.jit(functools.partial(conv.conv3d, impl="cpu"))
    np.testing.assert_allclose(program(x, kernel), expected, atol=atol)
    assert ("while" in program.lower(x, kernel).as_text()) == (shape[1] == 16)


@both_forms
def test_conv3d_keeps_bfloat16(key, channels):
    x, kernel = _inputs(key, (1, 8, 6, 5), channels, 3)
    expected = conv.conv3d(x, kernel, impl="direct")
    for impl in ("direct", "winograd", "planes"):
        y = conv.conv3d(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), impl=impl)
        assert y.dtype == jnp.bfloat16
        y, scale = np.asarray(y, np.float32), float(jnp.abs(expected).max())
        # bfloat16 keeps 8 bits of inputs, kernel and result.
        np.testing.assert_allclose(y / scale, expected / scale, atol=1.5e-2)


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


def test_conv3d_rejects_what_does_not_belong_together(key):
    block = _block(key, *BLOCKS[0])
    with pytest.raises(ValueError, match="coarse must be"):
        _apply(block | {"coarse": block["coarse"][:, 1:]}, "auto", 1.0)
    with pytest.raises(ValueError, match=r"bias must be \(5,\), got \(4,\)"):
        _apply(block | {"bias": jnp.zeros(4)}, "auto", 1.0)
    other = (block["inputs"][0], jnp.zeros((1, 8, 6, 9, 4)))
    with pytest.raises(ValueError, match="on one grid"):
        _apply(block | {"inputs": other}, "auto", 1.0)


@pytest.mark.parametrize("impl", ["direct", "planes"])
@pytest.mark.parametrize(
    ("size", "stride"),
    [((3, 7, 7), (1, 1, 1)), ((3, 3, 3), (2, 2, 1)), ((1, 3, 3), (1, 2, 2))],
)
def test_strided_conv3d_matches_a_sum_of_taps(key, size, stride, impl):
    x = jax.random.normal(key, (2, 6, 9, 8, 3))
    kernel = jax.random.normal(jax.random.fold_in(key, 1), (*size, 3, 4))
    pads = [(0, 0), *((n // 2, n // 2) for n in size), (0, 0)]
    padded = np.pad(np.asarray(x, np.float64), pads)
    expected = 0
    counts = [-(-n // s) for n, s in zip(x.shape[1:4], stride, strict=True)]
    for tap in np.ndindex(*size):
        ends = (
            slice(t, t + s * (n - 1) + 1, s)
            for t, s, n in zip(tap, stride, counts, strict=True)
        )
        part = padded[(slice(None), *ends)]
        expected = expected + part @ np.asarray(kernel[tap], np.float64)
    run = jax.jit(functools.partial(conv.strided_conv3d, stride=stride, impl=impl))
    np.testing.assert_allclose(run(x, kernel), expected, atol=2e-4)  # 441 products
    with_halo = np.pad(np.asarray(x), [(0, 0), pads[1], (0, 0), (0, 0), (0, 0)])
    got = conv.strided_conv3d(
        jnp.asarray(with_halo), kernel, stride=stride, halo=True, impl=impl
    )
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_strided_conv3d_gradients_agree(key):
    x = jax.random.normal(key, (1, 6, 8, 6, 2))
    kernel = jax.random.normal(jax.random.fold_in(key, 1), (3, 3, 3, 2, 3))

    def loss(x, kernel, impl):
        y = conv.strided_conv3d(x, kernel, stride=(2, 2, 2), impl=impl)
        return jnp.sum(jnp.sin(y))

    grads = [jax.grad(loss, (0, 1))(x, kernel, i) for i in ("direct", "planes")]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "impl", "match"),
    [
        ((2, 3, 3, 3, 4), "direct", "odd sizes"),
        ((3, 3, 3, 2, 4), "direct", "kernel must take 3 channels"),
        ((3, 3, 3, 3, 4), "fft", "impl must be"),
    ],
)
def test_strided_conv3d_rejects_what_does_not_fit(shape, impl, match):
    with pytest.raises(ValueError, match=match):
        conv.strided_conv3d(jnp.zeros((1, 4, 4, 4, 3)), jnp.zeros(shape), impl=impl)
