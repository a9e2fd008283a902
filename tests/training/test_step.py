"""Options of the training step: mean, accumulation, precision, remat, skipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from tests import oracles
from unireg_jax.errors import USAGE, UserError
from unireg_jax.models import backbone
from unireg_jax.models.features import Extractor
from unireg_jax.ops import warp
from unireg_jax.tasks import OUTSIDE_HU, PairBatch
from unireg_jax.training import mesh as train_mesh
from unireg_jax.training import objective
from unireg_jax.training import step as train_step
from unireg_jax.training.state import TrainState

SHAPE = (16, 16, 32)  # of every validation: compiled once


def _batch(values):
    """Pairs that a loss reads only `region` of, as floats."""
    count = len(values)
    hu = np.zeros((count, 2, 2, 2, 1), np.int16)
    labels = np.zeros((count, 2, 2, 2), np.uint8)
    layers = np.zeros((count, 0, 2, 2, 2), np.uint8)
    kind = np.zeros(count, np.int32)
    return PairBatch(
        fixed=hu,
        moving=hu,
        fixed_labels=labels,
        moving_labels=labels,
        fixed_more=layers,
        moving_more=layers,
        align=np.zeros((count, 4, 4), np.float32),
        region=np.asarray(values, np.int32),
        pair_type=kind,
        pair=kind,
    )


def _scans(fixed, moving, fixed_labels=None, moving_labels=None):
    """One pair [1, X, Y, Z, 1] that lies aligned; without labels unless given."""
    shape = fixed.shape[1:4]
    empty = np.zeros((1, *shape), np.uint8)
    layers = np.zeros((1, 0, *shape), np.uint8)
    return _batch([0])._replace(
        fixed=fixed,
        moving=moving,
        fixed_labels=empty if fixed_labels is None else fixed_labels,
        moving_labels=empty if moving_labels is None else moving_labels,
        fixed_more=layers,
        moving_more=layers,
        align=np.eye(4, dtype=np.float32)[None],
    )


def _loss(params, batch, extractor):
    """Mean of (w - region)^2 / 2, whose gradient is w - mean region."""
    del extractor
    loss = jnp.mean((params["w"] - batch.region.astype(jnp.float32)) ** 2) / 2
    odd = (batch.region % 2).sum()
    return loss, {"loss": loss, "odd": jnp.where(odd > 0, 1.0, jnp.nan)}


def _state(tx, w, averaged):
    params = {"w": jnp.array(w)}
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key)
    return state._replace(ema={"w": jnp.array(w)}) if averaged else state


def _make(**options):
    tx = optax.sgd(0.5)
    mesh = train_mesh.make_mesh(jax.devices()[:1])
    return tx, train_step.make_train_step(_loss, tx, mesh=mesh, **options)


def test_running_mean_follows_its_formula():
    tx, step = _make(ema=0.3)
    state, w, mean = _state(tx, 8.0, True), 8.0, 8.0
    for n in range(6):
        state, _ = step(state, _batch([0, 2]), None)
        w = w - 0.5 * (w - 1.0)
        keep = min(0.3, (1 + n) / (10 + n))
        mean = keep * mean + (1 - keep) * w
        np.testing.assert_allclose(state.ema["w"], mean, rtol=1e-5)
        np.testing.assert_allclose(state.weights["w"], mean, rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)


@pytest.fixture(scope="module")
def evaluate():
    """Judges, in place of a network's, the field that it is given as parameters."""
    step = train_step.make_eval_step(lambda disp, *_: disp, num_labels=5)
    return lambda disp, batch: step(disp, batch, Extractor("none"))


def test_validation_counts_labels_that_both_scans_have(evaluate):
    """One drawn in one scan alone is undefined, one that the field loses counts 0."""
    fixed = np.zeros((1, *SHAPE), np.uint8)
    moving = fixed.copy()
    fixed[0, 4:8, 4:8, 4:8], moving[0, 4:8, 4:8, 4:8] = 1, 1
    fixed[0, 10:12], moving[0, 14:] = 2, 3
    moving[0, 0], fixed[0, 9] = 4, 4
    hu = np.random.default_rng(0).integers(-900, 300, (1, *SHAPE, 1)).astype(np.int16)
    found = evaluate(jnp.zeros((1, *SHAPE, 3)), _scans(hu, hu, fixed, moving))
    np.testing.assert_array_equal(found["dsc"], [[1.0, np.nan, np.nan, 0.0]])
    np.testing.assert_array_equal(found["dsc"], found["dsc_before"])


def test_validation_compares_what_both_scans_show(evaluate, key):
    """The field brings into view what was cut, and leads out of it at the far end."""
    rough = np.asarray(jax.random.randint(key, (1, *SHAPE, 1), -900, 900))
    moving = rough.astype("i2")
    fixed = np.roll(moving, -8, 3)  # fixed(z) = moving(z + 8), for z < 24
    moving[:, :, :, :8] = OUTSIDE_HU
    shift = jnp.zeros((1, *SHAPE, 3)).at[..., 2].set(8.0)
    found = evaluate(shift, _scans(fixed, moving))
    # Windows reach beyond what counts.
    assert found["ncc"] > 0.9 > 0.2 > found["ncc_before"]


def test_validation_reports_each_regularity_under_its_own_name(evaluate):
    """And over the fixed scan: what lies beyond it does not count."""
    rng = np.random.default_rng(0)
    moving = rng.integers(-900, 300, (1, *SHAPE, 1)).astype(np.int16)
    fixed = moving.copy()
    fixed[:, 10:] = OUTSIDE_HU
    disp = rng.uniform(-1.5, 1.5, (1, *SHAPE, 3)).astype(np.float32)
    found = evaluate(disp, _scans(fixed, moving))
    inside = fixed[..., 0] != OUTSIDE_HU
    folds = oracles.determinant(disp) <= 0
    expected = {
        "sdlogj": oracles.sdlogj(disp, inside)[0],
        "sdlogj_l2r": oracles.sdlogj_l2r(disp, inside)[0],
        "folding_fraction": folds[inside[:, 1:-1, 1:-1, 1:-1]].mean(),
    }
    assert len({round(value, 2) for value in expected.values()}) == 3
    assert abs(folds.mean() - expected["folding_fraction"]) > 1e-3
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], [value], rtol=1e-4, err_msg=name)


def test_without_running_mean_the_parameters_are_released():
    tx, step = _make()
    state, _ = step(_state(tx, 8.0, False), _batch([0, 2]), None)
    assert state.ema is None and state.weights is state.params


def test_new_start_moves_the_running_mean_too():
    stored = {"w": np.array(3.0, np.float32)}
    state = _state(optax.sgd(0.5), 8.0, True).start_from(stored)
    assert state.params["w"].dtype == state.ema["w"].dtype == jnp.float32
    assert float(state.ema["w"]) == 3.0 and state.ema["w"] is not state.params["w"]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_of_a_batch_add_up_to_it(accumulate):
    """Gradient of the whole batch; scalars without the parts that have none."""
    values = [0, 2, 4, 8, 1, 3, 5, 7]
    tx, step = _make(accumulate=accumulate)
    state, scalars = step(_state(tx, 2.0, False), _batch(values), None)
    mean = np.mean(values)
    np.testing.assert_allclose(state.params["w"], 2 - 0.5 * (2 - mean), rtol=1e-6)
    np.testing.assert_allclose(scalars["grad_norm"], abs(2 - mean), rtol=1e-6)
    expected = np.mean((2 - np.array(values)) ** 2) / 2
    np.testing.assert_allclose(scalars["loss"], expected, rtol=1e-6)
    assert float(scalars["odd"]) == 1.0  # NaN in the first parts
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("default", "DEFAULT"), ("tensorfloat32", "HIGH"), ("float32", "HIGHEST")],
)
def test_precision_reaches_the_products(precision, expected):
    mesh = train_mesh.make_mesh(jax.devices()[:1])

    def product(a):
        with train_mesh.traced_on(mesh, precision=precision):
            return a @ a

    text = jax.jit(product).lower(jnp.ones((3, 3))).as_text()
    assert (f"[{expected}, {expected}]" in text) or expected == "DEFAULT"
    assert expected != "DEFAULT" or "HIGH" not in text


@pytest.mark.parametrize("remat", ["last", "all"])
def test_remat_changes_no_number_and_computes_again(remat, key):
    image = jax.random.normal(key, (1, 16, 32, 16, 1))
    corr = jax.random.normal(key, (1, 8, 16, 8, 27))
    sizes = {"encoder": (4, 4), "decoder": (4, 4), "remaining": (4,)}
    plain = backbone.Backbone(**sizes, conv_impl="direct")
    other = backbone.Backbone(**sizes, conv_impl="direct", remat=remat)
    variables = jax.jit(plain.init)(key, image, image, corr)

    def gradient(model):
        return jax.grad(lambda v: (model.apply(v, image, image, corr) ** 2).sum())

    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(jnp.shape, variables),
        jax.tree.map(jnp.shape, jax.eval_shape(other.init, key, image, image, corr)),
    )
    counts = [
        str(jax.make_jaxpr(gradient(m))(variables)).count("conv_general_dilated[")
        for m in (plain, other)
    ]
    assert counts[1] > counts[0]
    one, two = (jax.jit(gradient(m))(variables) for m in (plain, other))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, two
    )


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "match"),
    [
        (12, 1, r"a multiple of 8 \(8 devices along the data axis\) expected, got 12"),
        (8, 2, r"a multiple of 16 .*accumulate 2\) expected, got 8"),
    ],
)
def test_batches_that_do_not_divide_are_refused(batch_size, accumulate, match):
    mesh = AbstractMesh((8, 1), ("data", "space"))
    with pytest.raises(UserError, match=match) as error:
        train_mesh.local_rows(mesh, batch_size, accumulate=accumulate)
    assert error.value.exit_code == USAGE


def test_devices_that_cannot_share_a_volume_are_refused():
    with pytest.raises(UserError, match="a divisor of the 1 devices") as error:
        train_mesh.make_mesh(jax.devices()[:1], space=2)
    assert error.value.exit_code == USAGE


def _poisoned(params, batch, extractor):
    """As `_loss`; infinite where the batch holds region 3."""
    loss, scalars = _loss(params, batch, extractor)
    value = loss * jnp.where((batch.region == 3).any(), jnp.inf, 1.0)
    return value, scalars | {"loss": value}


def test_step_that_is_not_finite_changes_its_count_alone():
    tx = optax.adam(0.5)
    mesh = train_mesh.make_mesh(jax.devices()[:1])
    options = {"mesh": mesh, "ema": 0.5, "skip_nonfinite": True}
    step = train_step.make_train_step(_poisoned, tx, **options)
    state, scalars = step(_state(tx, 8.0, True), _batch([0, 2]), None)
    assert float(scalars["skipped"]) == 0
    before = jax.device_get(state)
    state, scalars = step(state, _batch([0, 3]), None)
    assert float(scalars["skipped"]) == 1 and not np.isfinite(scalars["loss"])
    after = jax.device_get(state)
    assert int(after.step) == int(before.step) + 1
    jax.tree.map(
        np.testing.assert_array_equal, after._replace(step=0), before._replace(step=0)
    )


def test_steps_that_may_be_skipped_are_those_of_a_plain_run():
    results = []
    for skip in (False, True):
        tx, step = _make(skip_nonfinite=skip)
        state = _state(tx, 8.0, False)
        for values in ([0, 2], [1, 3], [2, 2]):
            state, scalars = step(state, _batch(values), None)
        results.append(float(state.params["w"]))
        assert ("skipped" in scalars) == skip
    assert results[0] == results[1]


def test_part_of_a_batch_without_a_loss_is_not_averaged_away():
    def loss(params, batch, extractor):
        value, scalars = _loss(params, batch, extractor)
        gone = jnp.where((batch.region == 3).any(), jnp.nan, value)
        return value, scalars | {"loss": gone}

    tx = optax.sgd(0.5)
    mesh = train_mesh.make_mesh(jax.devices()[:1])
    step = train_step.make_train_step(loss, tx, mesh=mesh, accumulate=2)
    _, scalars = step(_state(tx, 2.0, False), _batch([0, 2, 3, 1]), None)
    assert np.isnan(scalars["loss"]) and float(scalars["odd"]) == 1.0


def test_mid_planes_are_those_of_the_volumes(key):
    shape = (2, 6, 4, 8)
    keys = jax.random.split(key, 4)
    labels = jax.random.randint(keys[0], (2, *shape), 0, 5).astype(jnp.uint8)
    more = jnp.zeros((2, 0, *shape[1:]), jnp.uint8)
    images = jax.random.normal(keys[1], (2, *shape, 1))
    disp = jax.random.normal(keys[2], (*shape, 3))
    valid = jnp.ones((*shape, 1))
    one = jnp.zeros(2, jnp.int32)
    pair = objective.Pair(
        *images, jnp.zeros(2), valid, valid, *labels, more, more, one, one
    )
    planes = jax.jit(train_step.mid_planes)(disp, pair)
    whole = {
        "fixed": images[0, ..., 0],
        "moving": images[1, ..., 0],
        "warped": warp.warp(images[1], disp)[..., 0],
        "fixed_labels": labels[0],
        "moving_labels": labels[1],
        "warped_labels": warp.warp(labels[1][..., None], disp, order=0)[..., 0],
        "disp": disp,
    }
    assert planes.keys() == whole.keys()
    for name, volume in whole.items():
        expected = volume[:, 3], volume[:, :, 2], volume[:, :, :, 4]
        for found, one in zip(planes[name], expected, strict=True):
            np.testing.assert_allclose(found, one, atol=1e-6, err_msg=name)
