"""One grid compiled ahead: the same numbers, one program, nothing moved unasked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.models import features
from unireg_jax.models.features import Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.ops import intensity, jacobian, ncc, warp
from unireg_jax.registration import compiled
from unireg_jax.registration.compiled import compile_register
from unireg_jax.registration.network import Model, initializer
from unireg_jax.tasks import OUTSIDE_HU, PairType, Region

SHAPE = (32, 16, 48)


@pytest.fixture(scope="module")
def model():
    """A small network whose head listens to the condition."""
    module = UniReg(
        encoder=(4, 4, 4, 4),
        decoder=(4, 4, 4, 4),
        remaining=(8,),
        field_level=1,
        conv_impl="direct",
    )
    params = jax.jit(initializer(module))(jax.random.key(0))
    controller = params["head"]["controller"]
    noise = jax.random.normal(jax.random.key(1), controller["kernel"].shape)
    controller["kernel"] += 0.01 * noise
    spec = PreprocessSpec(shape=SHAPE, spacing_mm=(8.0, 9.0, 8.0))
    return Model(module, params, spec, Extractor("mind"), {})


@pytest.fixture(scope="module")
def volumes():
    """Two int16 volumes with a border outside the scan."""
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 600, (2, *SHAPE)).astype(np.int16)
    hu[1, :3] = OUTSIDE_HU
    return hu


def plain(model, fixed_hu, moving_hu, region, pair_type):
    """Images and field of the network in one piece, as training calls it."""

    @jax.jit
    def run(*hu):
        hu = [h[None, ..., None] for h in hu]
        fixed, moving = (intensity.window(h) for h in hu)
        maps = (features.describe(h, model.extractor) for h in hu)
        corr = features.correlate(*maps)
        codes = (jnp.full(1, c, jnp.int32) for c in (region, pair_type))
        params = {"params": model.params}
        return fixed, moving, model.module.apply(params, fixed, moving, corr, *codes)

    return run(fixed_hu, moving_hu)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_compiled_equals_the_plain_network(model, volumes, dtype):
    program = compile_register(model, dtype=dtype)
    got = program(*volumes.astype(dtype), Region.ABDOMEN, PairType.INTRA)
    _, _, expected = plain(model, *volumes, Region.ABDOMEN, PairType.INTRA)
    assert got.shape == (1, *SHAPE, 3) and got.dtype == jnp.float32
    assert float(jnp.abs(expected).max()) > 0.1  # voxels
    np.testing.assert_allclose(got, expected, atol=1e-4)  # another order of sums


def test_compiled_judges_as_the_operators(model, volumes):
    program = compile_register(model)
    scans = [program.describe(hu) for hu in volumes]
    body = np.zeros(SHAPE, bool)
    body[4:28, 3:14, 5:40] = True
    disp = program(*scans, Region.CHEST, PairType.INTER)
    got = program.judge(*scans, body, disp)
    fixed, moving, _ = plain(model, *volumes, Region.CHEST, PairType.INTER)
    valid = jnp.asarray(volumes[1] != OUTSIDE_HU)[None, ..., None]
    coords = warp.identity_coords(SHAPE)[None] + disp
    reached = warp.sample(valid, coords, order=0)[..., 0] & warp.inside(disp)
    mask = jnp.asarray(body)[None]
    warped = warp.warp(moving, disp)
    expected = {
        "fold_percent_network": 100 * jacobian.folding_fraction(disp, mask=mask),
        "sdlogj_network": jacobian.sdlogj(disp, mask=mask),
        "ncc_before": ncc.global_ncc(fixed, moving, mask=mask & valid[..., 0]),
        "ncc_after": ncc.global_ncc(fixed, warped, mask=mask & reached),
    }
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)


def test_compiled_conditions_share_one_backbone_pass(model, volumes, monkeypatch):
    passes = []
    encode = compiled.encode_described

    def counted(*args, **kwargs):
        passes.append(1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(compiled, "encode_described", counted)
    # An own shape, so that nothing compiled before is found.
    shape = (16, 16, 32)
    fixed, moving = np.ascontiguousarray(volumes[:, :16, :, :32])
    conditions = [(r, p) for r in Region for p in PairType]
    program = compile_register(model, shape, conditions=len(conditions))
    together = program(fixed, moving, *np.array(conditions).T)
    assert len(passes) == 1
    assert together.shape == (8, *shape, 3)
    single = compile_register(model, shape)
    for field, condition in zip(together, conditions, strict=True):
        expected = single(fixed, moving, *condition)[0]
        np.testing.assert_allclose(field, expected, atol=1e-4)
    fields = np.asarray(together).reshape(8, -1)
    assert len(np.unique(fields, axis=0)) == 8
    scans = [program.describe(hu) for hu in (fixed, moving)]
    scores = program.judge(*scans, np.ones(shape, bool), together)
    assert {value.shape for value in scores.values()} == {(8,)}


def test_compiled_same_grid_is_traced_once(model, monkeypatch):
    traces = []
    predict = compiled._predict

    def counted(*args, **kwargs):
        traces.append(1)
        return predict(*args, **kwargs)

    monkeypatch.setattr(compiled, "_predict", counted)
    small = (16, 16, 32)
    first, second = compile_register(model, small), compile_register(model, small)
    assert len(traces) == 1
    assert first._predict.runtime_executable() is second._predict.runtime_executable()
    compile_register(model, (16, 32, 16))
    assert len(traces) == 2


def test_compiled_moves_nothing_implicitly(model, volumes):
    program = compile_register(model)
    body = np.ones(SHAPE, bool)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
            jnp.sin(volumes[0])  # the guard works on this platform
        scans = [program.describe(hu) for hu in volumes]
        disp = program(*scans, Region.LIVER, PairType.INTRA)
        scores = program.judge(*scans, body, disp)
        disp, scores = jax.device_get((disp, scores))
    assert np.isfinite(disp).all() and np.isfinite(scores["ncc_after"]).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shape": (32, 24, 48)}, "multiples of 16"),
        ({"shape": (32, 32)}, "three multiples"),
        ({"shape": (0, 16, 16)}, "three multiples"),
        ({"dtype": np.uint8}, "int16 or float32"),
        ({"conditions": 0}, "at least 1"),
    ],
)
def test_compile_register_rejects(model, options, match):
    with pytest.raises(ValueError, match=match):
        compile_register(model, **options)


def test_compiled_rejects_other_inputs(model, volumes):
    program = compile_register(model)
    with pytest.raises(ValueError, match="compile_register fixes both"):
        program.describe(volumes[0][:16])
    with pytest.raises(ValueError, match="float32; compile_register fixes both"):
        program(*volumes.astype(np.float32), 0, 0)
    with pytest.raises(ValueError, match=r"must be \(1,\), got \(2,\)"):
        program(*volumes, [0, 1], [0, 1])
    scans = [program.describe(hu) for hu in volumes]
    with pytest.raises(ValueError, match="bool"):
        program.judge(*scans, volumes[0], jnp.zeros((1, *SHAPE, 3)))


def test_compiled_larger_window_keeps_the_length_of_a_vector(model, volumes):
    # The same weights through a window of twice the height.
    tall = np.full((32, 16, 96), OUTSIDE_HU, np.int16)
    tall[..., 24:72] = volumes[0]
    codes = Region.LIVER, PairType.INTRA
    own = compile_register(model, (32, 16, 96))(tall, tall, *codes)
    kept = compile_register(model, (32, 16, 96), unit_shape=SHAPE)(tall, tall, *codes)
    assert float(jnp.abs(own).max()) > 0.1
    # Units of (n - 1) / 2 voxels: 95 against 47 along the third axis alone.
    scaled = np.asarray(own) * np.array([1, 1, 47 / 95])
    np.testing.assert_allclose(kept, scaled, atol=1e-5)  # float32
    svf = model._replace(module=model.module.clone(svf_steps=3))
    moved = compile_register(svf, (32, 16, 96), unit_shape=SHAPE)(tall, tall, *codes)
    # A velocity of the right length, integrated: near the plain one where it is small.
    assert float(jnp.abs(moved - kept).max()) < 0.5 * float(jnp.abs(kept).max())


def test_judge_field_measures_as_the_program_of_a_grid(model, volumes):
    program = compile_register(model)
    scans = [program.describe(hu) for hu in volumes]
    body = np.zeros(SHAPE, bool)
    body[4:28, 3:14, 5:40] = True
    disp = program(*scans, Region.CHEST, PairType.INTER)
    spec = model.preprocess
    got = compiled.judge_field(
        *volumes, body, np.asarray(disp[0]), window=(spec.hu_low, spec.hu_high)
    )
    expected = program.judge(*scans, body, disp)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)


@pytest.mark.parametrize("code", [99, -1, 4, 1.5, True, None, [0, 1], 1e40])
def test_compiled_refuses_conditions_that_do_not_exist(model, volumes, code):
    program = compile_register(model)
    with pytest.raises(ValueError, match="region must be"):
        program(*volumes, code, PairType.INTER)
    with pytest.raises(ValueError, match="pair_type must be"):
        program(*volumes, Region.LIVER, code)
