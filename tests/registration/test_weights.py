"""Released parameters: what is saved is what is loaded, and nothing else is."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.registration import weights

SPEC = {
    "architecture": {"encoder": [4, 8]},
    "features": "none",
    "preprocess": PreprocessSpec(shape=(48, 32, 32)).to_json(),
    "licence": "Apache-2.0",
}


def params():
    return {
        "head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "backbone": {"down": {"bias": np.array([0.5, -1.0], np.float32)}},
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny.safetensors"
    weights.save_weights(path, params(), SPEC)
    return path


def refusal(path, *, reason):
    """The message of the UserError that loading must raise."""
    with pytest.raises(UserError) as caught:
        weights.load_weights(path)
    assert caught.value.exit_code == errors.CHECKPOINT
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path, change):
    """Rewrites the description."""
    card = path.with_suffix(".json")
    spec = json.loads(card.read_text())
    change(spec)
    card.write_text(json.dumps(spec))


def replace(path, data):
    """Other tensors under a description that fits them."""
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(path, lambda spec: spec.update(sha256=digest))


def test_weights_round_trip_is_exact(saved):
    loaded, spec = weights.load_weights(saved)
    assert set(loaded) == {"head", "backbone"}
    np.testing.assert_array_equal(loaded["head"]["kernel"], params()["head"]["kernel"])
    np.testing.assert_array_equal(loaded["backbone"]["down"]["bias"], [0.5, -1.0])
    assert spec["format"] == weights.FORMAT
    assert spec["licence"] == "Apache-2.0"
    assert spec["architecture"] == SPEC["architecture"]
    assert spec["sha256"] == hashlib.sha256(saved.read_bytes()).hexdigest()


def test_weights_round_trip_keeps_scalars_and_order(tmp_path):
    path = tmp_path / "a.safetensors"
    tree = {"scale": np.float32(2.5), "turned": np.arange(6.0).reshape(2, 3).T}
    weights.save_weights(path, tree, SPEC)
    loaded, _ = weights.load_weights(path)
    weights.check_tensors(loaded, tree, path)
    assert loaded["scale"] == 2.5
    np.testing.assert_array_equal(loaded["turned"], tree["turned"])


def test_load_weights_gives_float32_of_any_float(saved):
    tensors = safetensors.numpy.load_file(saved)
    for dtype in (np.float16, np.float64):
        stored = {name: x.astype(dtype) for name, x in tensors.items()}
        replace(saved, safetensors.numpy.save(stored))
        loaded, _ = weights.load_weights(saved)
        assert loaded["head"]["kernel"].dtype == np.float32
        np.testing.assert_array_equal(loaded["head"]["kernel"], tensors["head/kernel"])


def test_load_weights_refuses_what_float32_cannot_hold(saved):
    tensors = safetensors.numpy.load_file(saved)
    large = tensors["backbone/down/bias"].astype(np.float64) * 1e300
    replace(saved, safetensors.numpy.save({**tensors, "backbone/down/bias": large}))
    assert "backbone/down/bias" in refusal(saved, reason="checkpoint_nonfinite")
    whole = tensors["head/kernel"].astype(np.int32)
    replace(saved, safetensors.numpy.save({**tensors, "head/kernel": whole}))
    assert "int32 in head/kernel" in refusal(saved, reason="checkpoint_other")


@pytest.mark.parametrize(
    "named", [None, "sam.safetensors", {"name": "sam.safetensors"}, {"sha256": 7}]
)
def test_load_weights_refuses_an_embedding_without_name_and_digest(saved, named):
    edit(saved, lambda spec: spec.update(embedding=named))
    assert "name and sha256" in refusal(saved, reason="checkpoint_torn")


def test_find_own_takes_the_file_of_the_digest_wherever_it_is(
    saved, tmp_path, monkeypatch
):
    """Beside the network, then in the package, then by the variable."""
    digest = weights.load_weights(saved)[1]["sha256"]
    network = tmp_path / "run" / "weights.safetensors"
    beside = network.with_name("eyes.safetensors")
    packaged = tmp_path / "package" / "own.safetensors"
    spec = {"embedding": {"name": beside.name, "sha256": digest}}
    monkeypatch.setattr(weights, "PACKAGE", packaged.parent)
    monkeypatch.delenv(weights.EMBEDDING_VARIABLE, raising=False)

    def refused():
        with pytest.raises(UserError, match="copy eyes.safetensors") as caught:
            weights.find_own(spec, network)
        assert caught.value.reason == "checkpoint_missing"
        assert caught.value.exit_code == errors.CHECKPOINT
        return digest[:16] in str(caught.value)

    assert refused()
    monkeypatch.setenv(weights.EMBEDDING_VARIABLE, str(saved))
    assert weights.find_own(spec, network) == saved
    for there in (packaged, beside):
        there.parent.mkdir()
        weights.copy_weights(saved, there, sha256=digest)
        assert weights.find_own(spec, network) == there
    # A file of the name that is another, or whose description is torn, is passed over.
    edit(beside, lambda spec: spec.update(sha256="0" * 64))
    assert weights.find_own(spec, network) == packaged
    packaged.with_suffix(".json").write_text("{")
    assert weights.find_own(spec, network) == saved
    # Never another one, whatever the variable names.
    other = tmp_path / "other.safetensors"
    weights.save_weights(other, {"a": np.ones(2, np.float32)}, SPEC)
    for named in (str(other), "a" * 300, "", ".", "/"):
        monkeypatch.setenv(weights.EMBEDDING_VARIABLE, named)
        assert refused()


def test_save_weights_leaves_two_files_and_takes_tuples(tmp_path):
    path = tmp_path / "a.safetensors"
    spec = {**SPEC, "architecture": {"encoder": (4, 8)}}
    weights.save_weights(path, params(), spec)
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.safetensors"]
    assert weights.load_weights(path)[1]["architecture"] == {"encoder": [4, 8]}


@pytest.mark.parametrize(
    ("name", "spec", "match"),
    [
        ("a.npz", SPEC, "must end in .safetensors"),
        ("a.safetensors", {"features": "none"}, "architecture"),
        ("a.safetensors", {**SPEC, "note": float("nan")}, "JSON"),
    ],
)
def test_save_weights_rejects(tmp_path, name, spec, match):
    with pytest.raises(ValueError, match=match):
        weights.save_weights(tmp_path / name, params(), spec)
    assert os.listdir(tmp_path) == []


def test_load_weights_names_both_digests_of_changed_tensors(saved):
    data = bytearray(saved.read_bytes())
    wanted = hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    saved.write_bytes(data)
    message = refusal(saved, reason="checkpoint_changed")
    assert wanted[:16] in message
    assert hashlib.sha256(data).hexdigest()[:16] in message
    assert "again" in message


def test_load_weights_refuses_every_single_bit_flip(saved):
    clean = saved.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 8 * len(clean), 50):
        data = bytearray(clean)
        data[position // 8] ^= 1 << (position % 8)
        saved.write_bytes(data)
        refusal(saved, reason="checkpoint_changed")


def test_load_weights_refuses_a_newer_format(saved):
    edit(saved, lambda spec: spec.update(format=7, features=["a", "b"]))
    message = refusal(saved, reason="checkpoint_format")
    assert "1 or older" in message and "got 7" in message and "update" in message


def test_load_weights_refuses_a_newer_preprocess(saved):
    edit(saved, lambda spec: spec["preprocess"].update(version=9))
    assert "9" in refusal(saved, reason="checkpoint_format")


@pytest.mark.parametrize("name", ["architecture", "features", "preprocess", "sha256"])
def test_load_weights_names_a_missing_field(saved, name):
    edit(saved, lambda spec: spec.pop(name))
    assert name in refusal(saved, reason="checkpoint_torn")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": NaN}', '{"a": 1, "a": 2}', "[" * 100_000]
)
def test_load_weights_refuses_a_torn_description(saved, text):
    saved.with_suffix(".json").write_text(text)
    refusal(saved, reason="checkpoint_torn")


def test_load_weights_refuses_a_lone_file(saved):
    saved.with_suffix(".json").unlink()
    assert "tiny.json" in refusal(saved, reason="checkpoint_missing")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 7,
        b"\xff" * 64,  # a header of 2^64 bytes
        safetensors.numpy.save(params()["head"])[:-4],
        safetensors.numpy.save(params()["head"]) + b"more",
        b"\x80\x04\x95",  # a pickle
    ],
)
def test_load_weights_refuses_what_is_no_safetensors(saved, data):
    replace(saved, data)
    refusal(saved, reason="checkpoint_torn")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_load_weights_refuses_nonfinite_tensors(saved, value):
    spoiled = np.array([0.0, value], np.float32)
    replace(saved, safetensors.numpy.save({"head/bias": spoiled}))
    assert "head/bias" in refusal(saved, reason="checkpoint_nonfinite")


def test_load_weights_refuses_a_tensor_inside_another(saved):
    one = np.zeros(1, np.float32)
    replace(saved, safetensors.numpy.save({"a": one, "a/b": one}))
    refusal(saved, reason="checkpoint_torn")


def test_copy_weights_is_what_was_loaded(saved, tmp_path):
    _, spec = weights.load_weights(saved)
    copy = tmp_path / "copy.safetensors"
    weights.copy_weights(saved, copy, sha256=spec["sha256"])
    weights.copy_weights(copy, copy, sha256=spec["sha256"])
    for suffix in (".safetensors", ".json"):
        assert (
            copy.with_suffix(suffix).read_bytes()
            == saved.with_suffix(suffix).read_bytes()
        )
    other = {"head": {"kernel": np.zeros((2, 3), np.float32)}}
    weights.save_weights(saved, other, SPEC)
    with pytest.raises(UserError, match="as when it was loaded, got") as caught:
        weights.copy_weights(saved, copy, sha256=spec["sha256"])
    assert caught.value.reason == "checkpoint_changed"
    assert weights.load_weights(copy)[1] == spec


def test_check_tensors_names_missing_extra_and_misshapen(saved):
    expected = params()
    weights.check_tensors(params(), expected, saved)
    expected["head"]["kernel"] = np.zeros((2, 4))
    expected["head"]["bias"] = np.zeros(3)
    del expected["backbone"]
    with pytest.raises(UserError, match=r"head/kernel: \(2, 4\) expected") as caught:
        weights.check_tensors(params(), expected, saved)
    message = str(caught.value)
    assert "got (2, 3)" in message
    assert "head/bias: (3,) expected, got nothing" in message
    assert "backbone/down/bias: nothing expected" in message
    assert caught.value.exit_code == errors.CHECKPOINT


def test_find_weights_prefers_argument_to_variable(saved, tmp_path, monkeypatch):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"x")
    monkeypatch.setenv(weights.VARIABLE, str(other))
    assert weights.find_weights(saved) == saved
    assert weights.find_weights() == other


def test_find_weights_knows_the_package_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PACKAGE", tmp_path)
    for name in ("unireg", "other"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    assert weights.find_weights().stem == "unireg"
    assert weights.find_weights("other").stem == "other"
    monkeypatch.setenv(weights.VARIABLE, "other")
    assert weights.find_weights().stem == "other"
    assert weights.find_weights("unireg").stem == "unireg"
    with pytest.raises(UserError, match="--weights third.* `unireg weights list`"):
        weights.find_weights("third")


def test_find_weights_takes_a_file_before_the_package(saved, tmp_path, monkeypatch):
    """A name with its ending is the package's where no such file is."""
    package = tmp_path / "package"
    package.mkdir()
    (package / saved.name).write_bytes(b"x")
    monkeypatch.setattr(weights, "PACKAGE", package)
    monkeypatch.chdir(package.parent)
    assert weights.find_weights(saved.name) == Path(saved.name)
    saved.unlink()
    assert weights.find_weights(saved.name) == package / saved.name


@pytest.mark.parametrize("name", ["absent.safetensors", "", "tiny.json", "a" * 5000])
def test_find_weights_names_the_remedies(saved, name):
    with pytest.raises(UserError) as caught:
        weights.find_weights(saved.parent / name)
    message = str(caught.value)
    assert caught.value.exit_code == errors.CHECKPOINT
    assert "--weights" in message and "experiments.train" in message
    assert "\n" not in message


def test_find_weights_names_the_variable_that_is_wrong(monkeypatch):
    monkeypatch.setenv(weights.VARIABLE, "/nowhere/a.safetensors")
    with pytest.raises(UserError, match=r"\$UNIREG_WEIGHTS /nowhere"):
        weights.find_weights()


def test_weights_import_no_jax():
    code = "import sys, unireg_jax.registration.weights; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
