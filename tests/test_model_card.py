"""docs/weights.md says of the package's weights what their files say."""

import json
import re

import numpy as np
import pytest

from experiments import model_card, real_pairs, release
from unireg_jax.errors import UserError
from unireg_jax.registration import weights

ROOT = model_card.PAGE.parents[1]
SOURCES = {
    "unireg": "unireg_sources",
    "unireg_heldout": "heldout_sources",
    "sam_lite": "sam_lite_sources",
}


def test_page_states_the_packages_own_files():
    page = model_card.PAGE.read_text(encoding="utf-8")
    _, inside, _ = model_card.block(page)
    told = "docs/weights.md is of other weights: run `python -m experiments.model_card`"
    assert inside == model_card.facts(), told
    shipped = {
        weights.load_weights(path)[1]["sha256"]
        for path in weights.PACKAGE.glob("*.safetensors")
    }
    assert set(re.findall(r"\b[0-9a-f]{64}\b", page)) == shipped


def test_facts_follow_the_files(monkeypatch, tmp_path):
    path = tmp_path / "tiny.safetensors"
    spec = weights.load_weights(weights.PACKAGE / weights.DEFAULT)[1]
    spec |= {
        "licence": "CC BY 4.0",
        "held_out": "patient 7",
        "sources": [{"scans": "two scans", "licence": "CC0"}],
        "features": "sam",
        "embedding": {"name": "eyes.safetensors", "sha256": "0" * 64},
    }
    weights.save_weights(path, {"a": np.ones((2, 3), np.float32)}, spec)
    monkeypatch.setattr(weights, "PACKAGE", tmp_path)
    text = model_card.facts()
    digest = weights.load_weights(path)[1]["sha256"]
    size = path.stat().st_size
    assert f"| `tiny.safetensors` | unireg | 6 | {size} | `{digest}` |" in text
    assert "- Licence: CC BY 4.0." in text and "Held out of it: patient 7." in text
    assert "- Data: two scans: CC0." in text
    assert "features sam of `eyes.safetensors`." in text


@pytest.mark.parametrize("name", SOURCES)
def test_card_holds_what_the_sources_file_says(name):
    path = ROOT / "experiments" / f"{SOURCES[name]}.json"
    sources = json.loads(path.read_text(encoding="utf-8"))
    card = json.loads((weights.PACKAGE / f"{name}.json").read_text(encoding="utf-8"))
    assert release.complete(card, sources) == card


def test_every_card_says_what_it_is_for_and_where_it_fails():
    cards = sorted(weights.PACKAGE.glob("*.json"))
    assert {path.stem for path in cards} == {*SOURCES}
    page = model_card.PAGE.read_text(encoding="utf-8")
    for path in cards:
        card = json.loads(path.read_text(encoding="utf-8"))
        assert card["intended_use"] and card["known_failures"] and card["results"]
        # Figures of failures stand on the page, too.
        for figure in re.findall(r"\d+\.\d+", " ".join(card["known_failures"])):
            whole = rf"(?<![\d.]){re.escape(figure)}(?!\d)"  # 2.7 is no part of 12.7
            assert re.search(whole, page), (path.name, figure)


@pytest.fixture
def run_on_the_packages_embedding(tmp_path):
    """A finished run whose network was trained on it, under another name."""
    _, spec = weights.load_weights(weights.PACKAGE / weights.DEFAULT)
    _, card = weights.load_weights(weights.PACKAGE / weights.EMBEDDING)
    named = {"name": "embedding.safetensors", "sha256": card["sha256"]}
    spec = {key: spec[key] for key in ("architecture", "preprocess")}
    spec |= {"features": "sam", "embedding": named, "training": {"steps": 7}}
    kernel, bias = np.full((2, 2), 1 / 3, np.float32), np.full(2, 1e-6, np.float32)
    params = {"kernel": kernel, "bias": bias}
    run = tmp_path / "run"
    run.mkdir()
    weights.save_weights(run / "weights.safetensors", params, spec)
    return run


def test_release_names_the_embedding_that_lies_beside_it(
    run_on_the_packages_embedding, tmp_path
):
    run, target = run_on_the_packages_embedding, tmp_path / "new" / "mine.safetensors"
    sources = {"held_out": "patient 7", "training": {"cores": 2}}
    with pytest.raises(UserError, match="release that first") as caught:
        release.release(run, sources, target)
    assert caught.value.reason == "checkpoint_missing"
    assert not target.exists()
    packaged = weights.PACKAGE / weights.EMBEDDING
    digest = weights.load_weights(packaged)[1]["sha256"]
    target.parent.mkdir(exist_ok=True)
    weights.copy_weights(packaged, target.with_name("eyes.safetensors"), sha256=digest)
    for half in (False, True):
        assert release.release(run, sources, target, half) == target
        params, card = weights.load_weights(target)
        assert card["embedding"] == {"name": "eyes.safetensors", "sha256": digest}
        assert card["training"] == {"steps": 7, "cores": 2}
        assert card["licence"] == release.LICENCE
        kernel = np.float32(1 / 3).astype(np.float16 if half else np.float32)
        assert (params["kernel"] == np.float32(kernel)).all()
        assert (params["bias"] == np.float32(1e-6)).all()  # none in half


@pytest.mark.parametrize("path", sorted(real_pairs.PARTS.glob("*.safetensors")))
def test_weights_of_a_part_leave_its_patients_out(path):
    fold = int(path.stem.removeprefix("fold"))
    assert real_pairs.weights_of(path.stem) == str(path)
    _, card = weights.load_weights(path)
    named = set(card["held_out"].removeprefix("OpenKBP patients ").split(", "))
    assert named == {p for pair in real_pairs.SPLITS[path.stem] for p in pair}
    assert card["held_out"] == release.patients(fold)
    assert path.stat().st_size < 7e5  # bytes, half precision
    sources = json.loads((ROOT / "experiments" / "part_sources.json").read_text())
    assert release.complete(card, sources) == card


def test_weights_of_the_other_splits_are_the_packages():
    parts = {"fold1", "fold2", "fold3"}
    assert {path.stem for path in real_pairs.PARTS.glob("*.safetensors")} == parts
    for split in set(real_pairs.SPLITS) - parts:
        assert real_pairs.weights_of(split) == "unireg_heldout"


def test_complete_merges_dicts_within_dicts():
    card = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    merged = release.complete(card, {"a": {"c": {"f": 3}}, "e": [2]})
    assert merged == {"a": {"b": 1, "c": {"d": 2, "f": 3}}, "e": [2]}
    assert card == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}


def test_weights_of_the_package_are_small():
    files = [path for path in weights.PACKAGE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6  # bytes
