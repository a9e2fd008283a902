"""docs/weights.md says of the package's weights what their files say."""

import re

import numpy as np

from experiments import model_card
from unireg_jax.registration import weights


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
    }
    weights.save_weights(path, {"a": np.ones((2, 3), np.float32)}, spec)
    monkeypatch.setattr(weights, "PACKAGE", tmp_path)
    text = model_card.facts()
    digest = weights.load_weights(path)[1]["sha256"]
    size = path.stat().st_size
    assert f"| `tiny.safetensors` | unireg | 6 | {size} | `{digest}` |" in text
    assert "- Licence: CC BY 4.0." in text and "Held out of it: patient 7." in text
    assert "- Data: two scans: CC0." in text
