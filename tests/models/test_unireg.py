"""The network: size, arithmetic, start, conditioning as data."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline import synthetic
from experiments import timing
from unireg_jax import registration
from unireg_jax.models import features, layers
from unireg_jax.models.features import Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.ops import intensity

SHAPE = (32, 16, 48)
# Smaller than the paper's, and XLA's own convolution: they compile in seconds.
SMALL = {
    "encoder": (4, 6, 6, 6),
    "decoder": (6, 6, 6, 6),
    "remaining": (6, 4, 4),
    "conv_impl": "direct",
}


def _inputs(key, batch=1, shape=SHAPE):
    keys = jax.random.split(key, 3)
    images = [jax.random.uniform(k, (batch, *shape, 1), minval=-1) for k in keys[:2]]
    half = tuple(n // 2 for n in shape)
    corr = jax.random.uniform(keys[2], (batch, *half, 27))
    region = jnp.arange(batch, dtype=jnp.int32) % 4
    return (*images, corr, region, region % 2)


def test_network_is_float32_in_x64_too(key):
    module = UniReg(**SMALL)
    of = jax.ShapeDtypeStruct
    hu, code = of((1, *SHAPE, 1), jnp.int16), of((1,), jnp.int32)
    variables = jax.eval_shape(module.init, key, *_inputs(key))

    def predict(variables, hu, code):
        maps = features.describe(hu, Extractor("mind"))
        corr = features.correlate(maps, maps)
        image = intensity.window(hu, low=-800.0, high=400.0)
        return module.apply(variables, image, image, corr, code, code)

    with jax.enable_x64(True):
        disp = jax.eval_shape(predict, variables, hu, code)
    assert disp.shape == (1, *SHAPE, 3) and disp.dtype == jnp.float32


def test_unireg_bfloat16_field_stays_within_a_quarter_millimetre():
    """The shipped network in bfloat16: convolutions alone, fields stay float32."""
    model = registration.load_model()
    scans = [
        synthetic.phantom("chest", shape=(64, 48, 64), spacing_mm=5.0, seed=s).hu
        for s in range(2)
    ]
    fixed, moving = (
        intensity.window(jnp.asarray(hu)[None, ..., None], low=-800.0, high=400.0)
        for hu in scans
    )
    corr = features.correlate(
        *(
            features.describe(jnp.asarray(hu)[None, ..., None], Extractor("mind"))
            for hu in scans
        )
    )
    cond = jnp.ones(1, jnp.int32)
    fields = []
    for dtype in ("float32", "bfloat16"):
        module = model.module.clone(dtype=dtype, conv_impl="direct")
        apply = jax.jit(module.apply)
        fields.append(apply({"params": model.params}, fixed, moving, corr, cond, cond))
    assert all(f.dtype == jnp.float32 for f in fields)
    spacing_mm = 4.0  # what the network was trained at
    assert spacing_mm * float(jnp.abs(fields[0]).max()) > 5  # mm: there is a field
    gap = spacing_mm * jnp.linalg.norm(fields[1] - fields[0], axis=-1)
    assert float(gap.max()) < 0.25  # 0.09 measured


@functools.cache
def _paper_jaxpr():
    model = UniReg(conv_impl="direct")
    shape = (192, 192, 160)
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    corr = jax.ShapeDtypeStruct((1, *(n // 2 for n in shape), 27), jnp.float32)
    cond = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(
        model.init, jax.random.key(0), image, image, corr, cond, cond
    )
    args = (params, image, image, corr, cond, cond)
    return params, jax.make_jaxpr(model.apply)(*args).jaxpr


def test_unireg_has_355405_parameters():
    params, _ = _paper_jaxpr()
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == 355_405


def test_unireg_needs_470_gmacs_at_the_papers_size():
    _, jaxpr = _paper_jaxpr()
    assert round(timing.count_macs(jaxpr) / 1e9, 1) == 470.1


def test_unireg_field_is_near_zero_at_initialisation(key):
    model = UniReg(**SMALL)
    args = _inputs(key)
    params = model.init(key, *args)
    disp = model.apply(params, *args)
    assert disp.shape == (1, *SHAPE, 3) and disp.dtype == jnp.float32
    assert float(jnp.abs(disp).max()) < 0.1  # voxels
    assert float(jnp.abs(disp).max()) > 0


def test_unireg_field_does_not_depend_on_the_convolution_form(key):
    args = _inputs(key)
    model = UniReg(**SMALL | {"conv_impl": "winograd"})
    params = UniReg(**SMALL).init(key, *args)
    # A field of some voxels: the initial one is 1e-3.
    params["params"]["head"]["controller"]["bias"] *= 100
    disp, expected = (jax.jit(m.apply)(params, *args) for m in (model, UniReg(**SMALL)))
    scale = float(jnp.abs(expected).max())
    assert scale > 0.01
    # Each of eleven layers rounds to some 1e-5 of its largest value.
    np.testing.assert_allclose(disp, expected, atol=1e-3 * scale)


@pytest.mark.parametrize("conditioner", ["dynamic", "static"])
def test_unireg_every_parameter_has_a_gradient_at_initialisation(key, conditioner):
    """Near the identity, yet nothing starts dead.

    But the norm before the controller's pooling: the controller's weights begin at
    zero (its bias is the base head), so that nothing flows back through them until
    they have moved, after the first step.
    """
    model = UniReg(**SMALL, conditioner=conditioner)
    args = _inputs(key)
    params = model.init(key, *args)
    gradient = jax.jit(jax.grad(lambda p: jnp.sin(model.apply(p, *args)).sum()))
    grads = gradient(params)
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]
        if not (jnp.isfinite(g).all() and jnp.abs(g).max() > 0)
    ]
    assert all("pool_norm" in name for name in dead), dead
    if conditioner == "dynamic":
        moved = jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, grads)
        norm = gradient(moved)["params"]["head"]["pool_norm"]
        assert all(float(jnp.abs(g).max()) > 0 for g in norm.values())


def test_unireg_one_trace_serves_every_task(key):
    model = UniReg(**SMALL)
    fixed, moving, corr, _, _ = _inputs(key)
    params = model.init(key, fixed, moving, corr, jnp.zeros(1, int), jnp.zeros(1, int))
    traces = []

    @jax.jit
    def run(region, pair_type):
        traces.append(1)
        return model.apply(params, fixed, moving, corr, region, pair_type)

    for region in range(4):
        for pair_type in range(2):
            run(jnp.array([region], jnp.int32), jnp.array([pair_type], jnp.int32))
    assert len(traces) == 1


def test_unireg_samples_of_a_batch_are_independent(key):
    model = UniReg(**SMALL)
    args = _inputs(key, batch=2)
    params = model.init(key, *args)
    # A trained controller: without it the condition has no say.
    params["params"]["head"]["controller"]["kernel"] += 0.1
    both = model.apply(params, *args)
    for b in range(2):
        one = model.apply(params, *(a[b : b + 1] for a in args))
        np.testing.assert_allclose(both[b], one[0], atol=1e-4)  # float32, other order


@pytest.mark.parametrize("options", [{}, {"field_level": 1}])
def test_unireg_one_encoding_serves_every_condition(key, options):
    model = UniReg(**SMALL, **options)
    fixed, moving, corr, _, _ = _inputs(key)
    cond = jnp.zeros(1, jnp.int32)
    params = model.init(key, fixed, moving, corr, cond, cond)
    # A trained controller: without it the condition has no say.
    controller = params["params"]["head"]["controller"]
    controller["kernel"] += 0.1 * jax.random.normal(key, controller["kernel"].shape)
    features = model.apply(params, fixed, moving, corr, method="encode")
    assert features.dtype == jnp.float32 and features.shape[-1] == 8
    fields = []
    for region, pair_type in ((0, 0), (2, 0), (2, 1)):
        args = jnp.full(1, region, jnp.int32), jnp.full(1, pair_type, jnp.int32)
        fields.append(model.apply(params, features, *args, method="decode"))
        whole = model.apply(params, fixed, moving, corr, *args)
        np.testing.assert_array_equal(fields[-1], whole)
    assert float(jnp.abs(fields[0] - fields[1]).max()) > 0
    assert float(jnp.abs(fields[1] - fields[2]).max()) > 0


@pytest.mark.parametrize("options", [{"field_level": 1}, {"svf_steps": 4}])
def test_unireg_variants_return_a_full_field(key, options):
    model = UniReg(**SMALL, **options)
    args = _inputs(key)
    disp = model.apply(model.init(key, *args), *args)
    assert disp.shape == (1, *SHAPE, 3)
    assert np.isfinite(disp).all() and float(jnp.abs(disp).max()) < 0.1


def test_unireg_field_in_unit_coordinates_does_not_depend_on_the_axis(key):
    """1 unit is (n - 1) / 2 voxels: a constant head gives a field in that ratio."""
    model = UniReg(**SMALL, conditioner="static")
    args = _inputs(key)
    params = model.init(key, *args)
    kernels = params["params"]["head"]["kernels"]
    params["params"]["head"]["kernels"] = jnp.zeros_like(kernels).at[-3:].set(0.1)
    disp = model.apply(params, *args)
    expected = 0.1 * (np.array(SHAPE) - 1) / 2
    np.testing.assert_allclose(disp, np.broadcast_to(expected, disp.shape), rtol=1e-5)


def test_max_pool_gradient_has_no_select_and_scatter(key):
    x = jax.random.normal(key, (1, 4, 6, 8, 2))
    pooled = layers.max_pool(x)
    assert pooled.shape == (1, 2, 3, 4, 2)
    assert float(pooled[0, 0, 0, 0, 0]) == float(x[0, :2, :2, :2, 0].max())
    text = jax.jit(jax.grad(lambda x: layers.max_pool(x).sum())).lower(x).as_text()
    assert "select_and_scatter" not in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_max_pool_equals_its_plain_form(key, dtype):
    """Value and gradient; of equal maxima the first one, in C order, has it all."""
    x = jax.random.normal(key, (2, 4, 6, 8, 3)).astype(dtype)
    slope = jax.random.normal(jax.random.key(1), (2, 2, 3, 4, 3)).astype(dtype)

    def plain(x):
        return x.reshape(2, 2, 2, 3, 2, 4, 2, 3).max(axis=(2, 4, 6))

    for run in (lambda f: f, jax.jit):
        pooled, pull = jax.vjp(run(layers.max_pool), x)
        expected, plain_pull = jax.vjp(run(plain), x)
        assert pooled.dtype == expected.dtype
        np.testing.assert_array_equal(pooled, expected)
        np.testing.assert_array_equal(layers.max_pool(x), expected)
        if dtype == "float32":  # of bfloat16 some are equal
            np.testing.assert_array_equal(pull(slope)[0], plain_pull(slope)[0])
    same = jnp.ones((1, 2, 2, 2, 1), dtype)
    (slope,) = jax.vjp(layers.max_pool, same)[1](jnp.ones((1, 1, 1, 1, 1), dtype))
    assert slope.sum() == slope[0, 0, 0, 0, 0] == 1


@pytest.mark.parametrize(
    ("fixed", "moving", "corr", "match"),
    [
        (
            (1, 1, 32, 16, 48),
            (1, 1, 32, 16, 48),
            (1, 16, 8, 24, 27),
            "channels go last",
        ),
        ((1, 32, 16, 48, 1), (1, 32, 16, 32, 1), (1, 16, 8, 24, 27), "of one shape"),
        ((1, 30, 16, 48, 1), (1, 30, 16, 48, 1), (1, 15, 8, 24, 27), "multiples of 16"),
        ((1, 32, 16, 48, 1), (1, 32, 16, 48, 1), (1, 32, 16, 48, 27), "corr must be"),
    ],
)
def test_unireg_rejects_bad_shapes(key, fixed, moving, corr, match):
    cond = jnp.zeros(1, jnp.int32)
    args = (jnp.zeros(fixed), jnp.zeros(moving), jnp.zeros(corr), cond, cond)
    with pytest.raises(ValueError, match=match):
        UniReg(**SMALL).init(key, *args)
