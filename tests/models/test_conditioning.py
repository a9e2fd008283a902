"""The contract of every conditioning scheme, over the table HEADS."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unireg_jax.models.conditioning import HEADS, dynamic
from unireg_jax.tasks import PairType, Region

SHAPE = (5, 6, 7)


@pytest.fixture(params=sorted(HEADS))
def head(request, key):
    """Name, module, parameters and features of each scheme."""
    module = HEADS[request.param]()
    features = jax.random.normal(key, (2, *SHAPE, 8))
    params = module.init(key, features, _cond(0, 0), train=True)
    return request.param, module, params, features


def _cond(region, pair_type):
    return (
        jnp.full((2,), region, jnp.int32),
        jnp.full((2,), pair_type, jnp.int32),
    )


def _one_step(module, params, features, region=0):
    """One step towards a constant field, so that the condition gets a say."""

    def loss(params):
        field = module.apply(params, features, _cond(region, 0), train=True)
        return ((field - 0.3) ** 2).sum()

    # Large, because the controller starts at zero.
    tx = optax.adam(1e-2)
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params))
    return optax.apply_updates(params, updates), loss


def test_head_shape_and_dtype(head):
    _, module, params, features = head
    field = module.apply(params, features, _cond(1, 1), train=False)
    assert field.shape == (2, *SHAPE, 3) and field.dtype == jnp.float32


def test_head_starts_near_zero(head):
    _, module, params, features = head
    field = module.apply(params, features, _cond(2, 0), train=False)
    # 0.1 voxel on the longest axis of the paper, 192.
    assert 0 < float(jnp.abs(field).max()) < 0.1 / 95.5


def test_head_every_parameter_learns(head):
    """Gradient everywhere: at once, but for the pooled norm, whose path runs through
    the controller's kernel, zero at the start by design; it follows a step later."""
    _, module, params, features = head
    stepped, loss = _one_step(module, params, features)
    now = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params))
    later = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(stepped))
    for (path, first), (_, second) in zip(now, later, strict=True):
        if "pool_norm" not in jax.tree_util.keystr(path):
            assert float(jnp.abs(first).max()) > 0, path
        assert float(jnp.abs(second).max()) > 0, path


def test_head_condition_matters_after_one_step(head):
    name, module, params, features = head
    stepped, _ = _one_step(module, params, features)
    fields = [
        module.apply(stepped, features, _cond(r, p), train=False)
        for r in Region
        for p in PairType
    ]
    for other in fields[1:]:
        same = np.allclose(fields[0], other)
        assert same if name == "static" else not same


def test_head_one_trace_over_all_conditions(head):
    _, module, params, features = head
    traces = []

    @jax.jit
    def run(cond):
        traces.append(1)
        return module.apply(params, features, cond, train=False)

    for region in Region:
        for pair_type in PairType:
            run(_cond(region, pair_type))
    assert len(traces) == 1


def test_controller_generates_171_numbers():
    assert dynamic.NUM_GENERATED == 171
    params = dynamic.Head().init(
        jax.random.key(0), jnp.ones((2, *SHAPE, 8)), _cond(0, 0), train=True
    )["params"]
    assert params["controller"]["kernel"].shape == (14, 171)


def test_encode_condition_is_the_papers():
    code = dynamic.encode_condition(
        jnp.array([Region.CHEST, Region.LIVER]),
        jnp.array([PairType.INTER, PairType.INTRA]),
    )
    # eq. 3; eq. 4: inter [0, 1], intra [1, 0]
    np.testing.assert_array_equal(code, [[0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]])


def test_apply_head_equals_hand_written_layers(key):
    """Weights first, each (out, in), then biases; LeakyReLU 0.2 but after the last."""
    omega = np.asarray(jax.random.normal(key, (171,)), np.float64)
    e = np.asarray(jax.random.normal(key, (*SHAPE, 8)), np.float64)
    w1, w2, w3 = omega[:64], omega[64:128], omega[128:152]
    b1, b2, b3 = omega[152:160], omega[160:168], omega[168:]

    def leaky(x):
        return np.where(x > 0, x, 0.2 * x)

    h = leaky(e @ w1.reshape(8, 8).T + b1)
    h = leaky(h @ w2.reshape(8, 8).T + b2)
    expected = h @ w3.reshape(3, 8).T + b3
    got = dynamic.apply_head(jnp.asarray(e, jnp.float32), jnp.asarray(omega))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)  # float32


def test_static_head_starts_as_the_dynamic_one(key):
    """Same draw, so that the ablation compares schemes and not starts."""
    np.testing.assert_array_equal(
        HEADS["static"]()
        .init(key, jnp.ones((2, *SHAPE, 8)), _cond(0, 0), train=True)["params"][
            "kernels"
        ]
        .shape,
        (171,),
    )
