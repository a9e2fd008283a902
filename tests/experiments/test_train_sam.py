"""Training of the embedding from prepared scans to weights that registration takes."""

import json
import math
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from data_pipeline import loader, store, synthetic, views
from experiments import sam, train_sam
from unireg_jax import registration
from unireg_jax.errors import NOTHING, UserError
from unireg_jax.registration import weights


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    synthetic.write_dataset(
        root,
        shape=(32, 32, 32),
        spacing_mm=12.0,
        subjects_per_task=4,
        seed=0,
        tasks=["chest"],
    )
    return root


def small(data, steps=4):
    config = sam.get_config("lite")
    with config.unlocked():
        config.data.root = str(data)
        config.views.update({"shape": (16, 16, 16), "spacing_mm": 10.0})
        config.model.update(
            {"stem": 4, "stages": (4, 4, 6, 6), "channels": 6, "conv_impl": "direct"}
        )
        config.loss.update({"anchors": 16, "positive_mm": 12.0, "ignore_mm": 30.0})
        config.optim.update({"warmup_steps": 0, "decay_steps": 0})
        config.train.update(
            {"steps": steps, "log_every": 2, "eval_every": 4, "eval_batches": 1}
        )
        config.train.checkpoint_every = 2
    return config.lock()


def test_run_ends_in_weights_and_resumes_exactly(data, tmp_path):
    path = train_sam.train(small(data), tmp_path / "whole")
    params, card = weights.load_weights(path)
    assert card["kind"] == "sam" and card["training"]["steps"] == 4
    # Of the views, not of the volumes (12 mm): what the network knows.
    assert card["preprocess"]["spacing_mm"] == [10.0] * 3
    train_sam.train(small(data, steps=2), tmp_path / "halves")
    again = train_sam.train(small(data), tmp_path / "halves")
    resumed, _ = weights.load_weights(again)
    jax.tree.map(np.testing.assert_array_equal, params, resumed)
    extractor = registration.load_extractor(path)
    assert extractor.backend == "sam" and extractor.network.channels == 6
    assert extractor.spacing_mm == (10.0,) * 3 and extractor.digest == card["sha256"]
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 2, 4, 4]
    assert np.isfinite(rows[-1]["val/loss"]) and "train/loss/chest" in rows[1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": {"root": ""}}, "config.data.root expected"),
        ({"views": {"shape": (20, 16, 16)}}, "multiples of"),
        ({"optim": {"lr": -1.0}}, "lr must be positive"),
        ({"optim": {"clip_norm": -1.0}}, "optim.clip_norm: 0 or more expected"),
        ({"data": {"weights": {"lung": math.nan}}}, "data.weights.lung: a number from"),
        ({"optim": {"name": "lion"}}, "optimizer must be one of"),
        ({"views": {"spacing_mm": 0.0}}, "views.spacing_mm: more than 0 expected"),
        ({"views": {"scales": (1.2, 0.8)}}, "views.scales"),
        ({"train": {"eval_batches": 0}}, "train.eval_batches: 1 or more"),
        ({"train": {"log_every": 0}}, "train.log_every: 1 or more"),
        ({"data": {"batch_size": 0}}, "data.batch_size: 1 or more"),
        ({"model": {"stages": (4, 4, 6)}}, "model.stages: four channel numbers"),
        ({"model": {"dtype": "float8"}}, "float32 or bfloat16 expected, got 'float8'"),
        ({"loss": {"anchors": 5000}}, "at most 512, the fine cells of a view"),
    ],
)
def test_mistakes_are_one_line(change, match, data, tmp_path):
    config = small(data)
    with config.unlocked():
        for section, fields in change.items():
            config[section].update(fields)
    with pytest.raises(UserError, match=match):
        train_sam.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_split_without_volumes_is_refused_before_any_work(data, tmp_path):
    root = tmp_path / "prepared"
    shutil.copytree(data, root)
    index = json.loads((root / store.INDEX_NAME).read_text())
    for volume in index["volumes"]:
        volume["split"] = "train"
    (root / store.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match="split val") as error:
        train_sam.train(small(root), tmp_path / "run")
    assert error.value.exit_code == NOTHING
    assert not (tmp_path / "run").exists()


def test_validation_means_the_hits_there_are_and_every_loss(data, monkeypatch):
    found = iter([(math.nan, 1.0), (0.5, math.nan)])

    def evaluate(*args):
        hit, loss = next(found)
        return {"coarse_hit": hit, "fine_hit": hit, "loss": loss}

    monkeypatch.setattr(
        train_sam, "embedding", SimpleNamespace(make_eval_step=lambda *a, **k: evaluate)
    )
    monkeypatch.setattr(train_sam.train_mesh, "put", lambda batch, split: batch)
    spec = views.ViewSpec((16, 16, 16), 10.0)
    config = small(data)
    with config.unlocked():
        config.train.eval_batches = 2
    judge = train_sam._judge(
        config, loader.Dataset(data), None, None, {"batch_size": 1, "spec": spec}, None
    )
    scalars = judge(None, lambda: None, brief=False).scalars
    assert scalars["val/coarse_hit"] == scalars["val/fine_hit"] == 0.5
    assert math.isnan(scalars["val/loss"])


def test_presets_name_their_own_fields():
    for preset in sam.PRESETS:
        config = sam.get_config(preset)
        assert config.preset == preset and config.is_locked
    with pytest.raises(ValueError, match="preset must be one of"):
        sam.get_config("huge")
