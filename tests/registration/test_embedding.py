"""Extractors by name or file: found, verified, refused."""

import jax
import numpy as np
import pytest

from unireg_jax.errors import CHECKPOINT, UserError
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.models.features import sam
from unireg_jax.registration import embedding, weights
from unireg_jax.registration.network import load_model

FIELDS = {"stem": 4, "stages": [4, 4, 6, 6], "channels": 5, "last_stride": [2, 2, 2]}


def save(path, **changes):
    """A small embedding with its card."""
    network = sam.Sam(norm="batch", conv_impl="direct", **FIELDS)
    variables = jax.jit(embedding.initializer(network))(jax.random.key(0))
    spec = {
        "kind": "sam",
        "architecture": FIELDS,
        "features": "sam",
        "preprocess": PreprocessSpec().to_json(),
    }
    weights.save_weights(path, jax.tree.map(np.asarray, variables), spec | changes)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("embedding") / "sam.safetensors")


def test_names_need_no_file():
    extractor = embedding.load_extractor("mind", window=(-100, 200), combine="sum")
    assert (extractor.backend, extractor.window, extractor.combine) == (
        "mind",
        (-100, 200),
        "sum",
    )
    assert extractor.network is None


def test_file_argument_and_variable_give_the_same(saved, monkeypatch):
    by_path = embedding.load_extractor(saved)
    monkeypatch.setenv(embedding.VARIABLE, str(saved))
    by_name = embedding.load_extractor("sam")
    assert by_path.network == by_name.network
    jax.tree.map(np.testing.assert_array_equal, by_path.params, by_name.params)


def test_kernels_may_be_stored_in_half_precision(saved, tmp_path):
    params, spec = weights.load_weights(saved)
    half = jax.tree.map(lambda x: x.astype(np.float16) if x.ndim > 1 else x, params)
    spec = {k: v for k, v in spec.items() if k not in ("sha256", "format")}
    weights.save_weights(tmp_path / "half.safetensors", half, spec)
    exact = embedding.load_extractor(saved)
    rough = embedding.load_extractor(tmp_path / "half.safetensors")
    for a, b in zip(*map(jax.tree.leaves, (exact.params, rough.params)), strict=True):
        assert b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_missing_embedding_names_both_remedies(monkeypatch, tmp_path):
    monkeypatch.setenv(embedding.VARIABLE, str(tmp_path / "absent.safetensors"))
    with pytest.raises(UserError) as caught:
        embedding.load_extractor("sam")
    assert caught.value.reason == "checkpoint_missing"
    assert caught.value.exit_code == CHECKPOINT
    told = str(caught.value)
    for part in ("absent.safetensors", "none found", "weights convert", "train_sam"):
        assert part in told
    assert told.startswith(f"${embedding.VARIABLE} ")
    other = tmp_path / "scan.nii"
    other.touch()
    monkeypatch.setenv(embedding.VARIABLE, str(other))
    with pytest.raises(UserError, match="scan.nii: .* got another file"):
        embedding.load_extractor("sam")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "unireg"}, "kind 'sam'"),
        ({"architecture": {**FIELDS, "channels": 6}}, "do not fit"),
        ({"architecture": {**FIELDS, "width": 6}}, "embedding of this package"),
        ({"architecture": {**FIELDS, "stages": [4, 4]}}, "embedding of this package"),
    ],
)
def test_other_files_are_refused(changes, match, tmp_path):
    path = save(tmp_path / "other.safetensors", **changes)
    with pytest.raises(UserError, match=match) as caught:
        embedding.load_extractor(path)
    assert caught.value.reason == "checkpoint_other"


def test_network_weights_and_embedding_are_told_apart(saved):
    with pytest.raises(UserError, match="UNIREG_SAM") as caught:
        load_model(saved)
    assert caught.value.reason == "checkpoint_other"
