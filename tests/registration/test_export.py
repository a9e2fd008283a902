"""The exported program: the CPU's convolutions inside, any batch, the same field."""

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.models.features import Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.registration import selftest
from unireg_jax.registration.compiled import compile_register
from unireg_jax.registration.export import export_register
from unireg_jax.registration.network import Model, initializer, load_model

SHAPE = (32, 16, 32)


@pytest.fixture(scope="module")
def model():
    """Large enough that conv_impl "auto" is not the direct form on a CPU."""
    module = UniReg(
        encoder=(4, 4, 4, 4), decoder=(4, 4, 4, 4), remaining=(4,), field_level=1
    )
    # Any numbers will do; an initialisation would have to be compiled.
    shapes = jax.eval_shape(initializer(module), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), s.dtype), shapes
    )
    spec = PreprocessSpec(shape=SHAPE, spacing_mm=(8.0, 9.0, 8.0))
    return Model(module, params, spec, Extractor("mind"), {"licence": "Apache-2.0"})


def test_export_equals_the_library_at_any_batch(model, tmp_path):
    path = tmp_path / "net.stablehlo"
    card = export_register(path, weights=model)
    assert card == json.loads(path.with_suffix(".json").read_text())
    assert card["weights"] == {"sha256": None, "licence": "Apache-2.0"}
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda")
    # What the description says is what the program takes and gives.
    for arrays, avals in (
        (card["inputs"], exported.in_avals),
        (card["outputs"], exported.out_avals),
    ):
        assert [a["dtype"] for a in arrays] == [str(a.dtype) for a in avals]
        for array, aval in zip(arrays, avals, strict=True):
            assert [str(n) for n in array["shape"]] == [str(n) for n in aval.shape]
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 600, (2, 2, *SHAPE)).astype(np.int16)
    program = compile_register(model)
    codes = np.array([2, 1], np.int32), np.array([1, 0], np.int32)
    expected = np.concatenate(
        [program(*hu[:, i], codes[0][i], codes[1][i]) for i in range(2)]
    )
    assert np.abs(expected).max() > 0.1  # voxels
    for batch in (1, 2):
        got = exported.call(
            *hu[:, :batch, ..., None], *(code[:batch] for code in codes)
        )
        np.testing.assert_allclose(got, expected[:batch], atol=1e-4)


def test_export_of_another_shape_keeps_the_length_of_a_vector(model, tmp_path):
    """As register in a window of that many voxels of the same size."""
    shape = (*SHAPE[:2], 2 * SHAPE[2])
    path = tmp_path / "net.stablehlo"
    card = export_register(path, weights=model, shape=shape)
    assert card["preprocess"]["shape"] == list(shape)
    assert card["preprocess"]["spacing_mm"] == list(model.preprocess.spacing_mm)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    hu = np.random.default_rng(0).integers(-1000, 600, (2, 1, *shape)).astype(np.int16)
    program = compile_register(model, shape, unit_shape=SHAPE)
    expected = program(*hu[:, 0], 2, 1)
    got = exported.call(*hu[..., None], np.array([2], "i4"), np.array([1], "i4"))
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.slow
def test_export_of_the_packaged_weights_equals_the_library(tmp_path):
    path = tmp_path / "net.stablehlo"
    packaged = load_model()
    export_register(path, weights=packaged)
    # Padded to the grid of the weights; their voxels are smaller, which is no matter.
    room = [
        (0, n - k) for n, k in zip(packaged.preprocess.shape, (60, 46, 52), strict=True)
    ]
    fixed, moving = (
        np.pad(selftest.torso(shift), room, constant_values=-1000)
        for shift in ((0.0, 0.0, 0.0), selftest.SHIFT_MM)
    )
    expected = compile_register(packaged)(fixed, moving, 1, 0)
    assert np.abs(expected).max() > 1  # voxels
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    codes = np.array([1], np.int32), np.array([0], np.int32)
    got = exported.call(fixed[None, ..., None], moving[None, ..., None], *codes)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_export_rejects_a_shape(model, tmp_path):
    with pytest.raises(ValueError, match="multiples of 16"):
        export_register(tmp_path / "a.stablehlo", weights=model, shape=(32, 20, 32))
