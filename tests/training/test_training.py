"""The training loop: one trace, exact resume, several devices, refusals."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import flags
from ml_collections import config_flags

from data_pipeline import loader, store, synthetic
from data_pipeline.augment import AugmentSpec
from experiments import build, cli, loop, train, unireg
from unireg_jax.errors import CHECKPOINT, NUMERICAL, PREEMPTED, USAGE, UserError
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.models.features import sam
from unireg_jax.registration import embedding, load_model, weights
from unireg_jax.tasks import PairType, Region
from unireg_jax.training import checkpoint, evaluate, log
from unireg_jax.training import mesh as train_mesh
from unireg_jax.training import state as train_state
from unireg_jax.training import step as train_step

SHAPE = (32, 16, 16)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Prepared folder of tiny phantoms of two tasks."""
    return synthetic.write_dataset(
        tmp_path_factory.mktemp("phantoms"),
        shape=SHAPE,
        spacing_mm=12.0,
        subjects_per_task=4,
        tasks=("headneck", "lung"),
    )


@pytest.fixture
def config(phantoms):
    """A run of four steps of a small network."""
    config = unireg.get_config("demo")
    with config.unlocked():
        config.train.init_from = ""
        config.data.root = str(phantoms)
        config.data.weights.headneck = 1.0
        config.data.shape = SHAPE
        config.data.spacing_mm = 12.0
        config.model.update(
            {"encoder": (4, 4, 4, 4), "decoder": (4, 4, 4, 4), "remaining": (4,)}
        )
        config.model.conv_impl = "direct"  # compiles in a third of the time
        config.train.update(
            {"steps": 4, "log_every": 2, "eval_every": 4, "eval_pairs": 1}
        )
        config.train.checkpoint_every = 2
    return config.lock()


def _params(workdir, config):
    experiment = build.build(config, workdir)
    state = train_state.make_state(experiment.model, experiment.tx, seed=config.seed)
    saved = checkpoint.Checkpoints(workdir)
    restored = saved.restore(state)
    saved.close()
    return restored


def _lines(workdir):
    """The log, without what is allowed to differ."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    parsed = map(json.loads, lines)
    return [{k: v for k, v in x.items() if not k.startswith("time/")} for x in parsed]


def _train_whole_and_in_parts(config, folder):
    """Two runs that end in the same bits, in `whole` and `parts`."""
    train.train(config, folder / "whole")
    with config.unlocked():
        config.train.steps = 2
    train.train(config, folder / "parts")
    with config.unlocked():
        config.train.steps = 4
    train.train(config, folder / "parts")
    whole, parts = (_params(folder / n, config) for n in ("whole", "parts"))
    assert int(whole.step) == int(parts.step) == 4
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_resume_equals_uninterrupted(config, tmp_path):
    """Four steps at once, and two plus two after a restart: bit-identical."""
    _train_whole_and_in_parts(config, tmp_path)
    whole, parts = (_lines(tmp_path / n) for n in ("whole", "parts"))
    # The shorter of the two runs also validated at its end, step 2.
    assert whole == [x for x in parts if (x["step"], "val/ncc/lung" in x) != (2, True)]


@pytest.mark.slow
def test_resume_with_made_pairs_equals_uninterrupted(config, tmp_path):
    """A run of which every pair but a quarter is made on the fly, killed between."""
    with config.unlocked():
        config.data.streams.update({"phantoms": 0.25, "painted": 0.25})
        config.data.streams.deformed = 0.25
        config.train.log_every = 1
    _train_whole_and_in_parts(config, tmp_path)
    text = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert len(set(re.findall(r"train/loss/(phantoms|painted|deformed)_", text))) == 3


def test_shares_of_made_pairs_that_no_run_can_have_are_refused(config, tmp_path):
    with config.unlocked():
        config.data.streams.update({"phantoms": 0.6, "painted": 0.5})
    with pytest.raises(UserError, match="data.streams.painted: 0 or more, .* got 0.5"):
        build.build(config, tmp_path)


def test_weights_are_asked_with_the_window_that_they_saw(config, tmp_path):
    with config.unlocked():
        config.data.hu_window = (-200, 300)
    card = build.build(config, tmp_path).spec["preprocess"]
    assert (card["hu_low"], card["hu_high"]) == (-200.0, 300.0)


def test_run_leaves_weights_config_and_metrics(config, tmp_path):
    path = train.train(config, tmp_path)
    assert path.is_file() and path.with_suffix(".json").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["preset"] == "demo"
    lines = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().split("\n") if x
    ]
    judged = [line for line in lines if "val/mean_dsc/headneck" in line]
    assert [line["step"] for line in judged] == [0, 4]  # what it started from, and end
    index = json.loads((Path(config.data.root) / "index.json").read_text())
    for task in ("headneck", "lung"):
        wanted = {f"val/dsc/{task}/{x}" for x in index["tasks"][task]["labels"]}
        found = {k for k in judged[-1] if k.startswith(f"val/dsc/{task}/")}
        assert found == wanted
        values = [judged[-1][k] for k in found if judged[-1][k] is not None]
        mean = judged[-1][f"val/mean_dsc/{task}"]
        np.testing.assert_allclose(np.mean(values), mean)  # of one pair
    assert all(line["train/loss"] > 0 for line in lines if "train/loss" in line)
    (board,) = (tmp_path / "tb").iterdir()
    assert all(f"pair/{x}".encode() in board.read_bytes() for x in ("headneck", "lung"))
    assert lines[-2]["time/total_s"] > lines[-2]["time/useful_s"] > 0


def _asks_of_host(lowered):
    """What of a program leaves the device while it runs."""
    traffic = r"callback|infeed|outfeed|\bsend\b|\brecv\b"
    return re.findall(traffic, lowered.as_text())


def test_train_step_traces_once_donates_and_needs_no_host(config, tmp_path):
    """Over all regions and pair types; parameters and optimiser are kept in place."""
    experiment = build.build(config, tmp_path)
    traces = []

    def loss(*args):
        traces.append(1)
        return experiment.loss(*args)

    mesh = train_mesh.make_mesh()
    step = train_step.make_train_step(loss, experiment.tx, mesh=mesh)
    state = train_state.make_state(experiment.model, experiment.tx, seed=0)
    state = jax.device_put(state, train_mesh.replicated(mesh))
    stream = loader.make_iterator(
        experiment.dataset, "train", batch_size=mesh.shape["data"], seed=0
    )
    for region, pair_type in itertools.product(Region, PairType):
        batch = next(stream)
        batch = batch._replace(
            region=np.full_like(batch.region, region),
            pair_type=np.full_like(batch.pair_type, pair_type),
        )
        batch = jax.device_put(batch, train_mesh.pair_sharding(mesh))
        before = state
        with jax.transfer_guard("disallow"):
            state, _ = step(before, batch, experiment.extractor)
    lowered = step.lower(state, batch, experiment.extractor)
    assert len(traces) == 1
    assert not _asks_of_host(lowered)
    given = jax.tree.leaves((before.params, before.opt_state))
    assert all(x.is_deleted() for x in given)
    in_place = lowered.compile().memory_analysis().alias_size_in_bytes
    assert in_place >= sum(x.nbytes for x in given)

    def calling_back(params, batch, extractor):
        jax.debug.callback(print, batch.region)
        return optax.tree.norm(params), {"loss": optax.tree.norm(params)}

    step = train_step.make_train_step(calling_back, experiment.tx, mesh=mesh)
    assert _asks_of_host(step.lower(state, batch, experiment.extractor))


def test_run_without_validation_needs_no_such_pairs(config, tmp_path):
    """Weights for use are trained on everyone; else a missing split is refused."""
    root = tmp_path / "prepared"
    shutil.copytree(config.data.root, root)
    path = root / store.INDEX_NAME
    index = json.loads(path.read_text())
    for volume in index["volumes"]:
        volume["split"] = "train"
    path.write_text(json.dumps(index))
    with config.unlocked():
        config.data.root = str(root)
        config.train.update({"steps": 1, "image_every": 1})
    with pytest.raises(UserError, match="split val"):
        train.train(config, tmp_path / "judged")
    assert not (tmp_path / "judged" / "config.json").exists()  # before any work
    with config.unlocked():
        config.train.eval_pairs = 0
    assert train.train(config, tmp_path / "run").is_file()
    assert not any("val/" in key for line in _lines(tmp_path / "run") for key in line)


def test_config_drift_is_refused_with_the_difference(config, tmp_path):
    checkpoint.write_config(tmp_path, config.to_dict())
    with config.unlocked():
        config.train.steps = 9  # may change
        config.train.eval_pairs = 7
        config.data.root = "/moved/elsewhere"
    checkpoint.check_config(tmp_path, config.to_dict())
    with config.unlocked():
        config.optim.lr = 0.5  # may not
    match = r"another config \(optim.lr: 0.0005 -> 0.5\)"
    with pytest.raises(UserError, match=match) as error:
        checkpoint.check_config(tmp_path, config.to_dict())
    assert error.value.exit_code == USAGE


def test_refused_run_leaves_its_workdir_usable(config, tmp_path):
    """The remedy that a refusal names must work in the same folder."""
    root, lr = config.data.root, config.optim.lr
    with config.unlocked():
        config.data.update({"root": "", "phantoms": 0})
        config.optim.lr = -1.0
        config.train.steps = 1
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="lr must be positive"):
        train.train(config, workdir)
    with config.unlocked():
        config.optim.lr = lr
    with pytest.raises(UserError, match="data.root expected"):
        train.train(config, workdir)
    assert not workdir.exists()
    with config.unlocked():
        config.data.root = root
    assert train.train(config, workdir).is_file()


def test_checkpoint_of_another_model_is_refused(config, tmp_path):
    train.train(config, tmp_path)
    with config.unlocked():
        config.model.encoder = (8, 4, 4, 4)
    match = r"does not fit this model.*encoder_0/bias: \(8,\) expected, got \(4,\)"
    with pytest.raises(UserError, match=match) as error:
        _params(tmp_path, config)
    assert error.value.exit_code == CHECKPOINT


def test_nonfinite_loss_stops_naming_step_and_task(config, tmp_path):
    with config.unlocked():
        config.optim.lr = 1e30
        config.optim.clip_norm = 0.0
        config.optim.warmup_steps = 0
    with pytest.raises(UserError, match=r"step \d: loss .* on pair \d+ \(") as error:
        train.train(config, tmp_path)
    assert error.value.exit_code == NUMERICAL


@pytest.mark.parametrize("lr", [1e30, 1e15])  # at once; after a step of finite numbers
def test_checkpoints_of_a_diverging_run_are_finite(config, tmp_path, lr):
    """Saving comes before logging here: a step is checked before it is saved."""
    with config.unlocked():
        config.optim.update({"lr": lr, "clip_norm": 0.0, "warmup_steps": 0})
        config.train.update({"log_every": 10, "checkpoint_every": 1})
    with pytest.raises(UserError, match="nothing of it was saved") as error:
        train.train(config, tmp_path)
    assert error.value.exit_code == NUMERICAL
    folders = [x for x in (tmp_path / "checkpoints").iterdir() if x.name.isdigit()]
    assert bool(folders) == (lr == 1e15)
    for folder in folders:
        with ocp.StandardCheckpointer() as reader:
            params = reader.restore(folder / "state")["params"]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)), folder


def test_paper_preset_without_data_says_so(tmp_path):
    with pytest.raises(UserError, match="config.data.root expected, none given") as e:
        build.build(unireg.get_config(), tmp_path)
    assert e.value.exit_code == USAGE


def test_data_on_another_grid_is_refused(config, tmp_path):
    with config.unlocked():
        config.data.spacing_mm = 2.0
    with pytest.raises(UserError, match="at 2.0 mm expected by the config") as error:
        build.build(config, tmp_path)
    assert error.value.exit_code == USAGE


def test_paper_preset_states_the_papers_numbers():
    config = unireg.get_config()
    assert tuple(config.data.shape) == (192, 192, 160)
    assert tuple(config.loss.smoothness) == (0.05, 1.0, 0.1, 10.0)
    assert config.optim.to_dict() | {} == {
        "name": "sgd",
        "lr": 5e-5,
        "momentum": 0.99,
        "clip_norm": 0.0,
        "warmup_steps": 0,
        "decay_steps": 0,
        "head_scale": 1.0,
    }
    assert config.train.steps == 120_000 and config.data.batch_size == 1


def test_augmentation_is_off_unless_asked_for(config, tmp_path):
    assert not build.build(config, tmp_path).augment.on
    changing = {
        preset
        for preset in unireg.PRESETS
        if AugmentSpec(**unireg.get_config(preset).data.augment).on
    }
    assert changing == {"real_small_varied"}
    config.data.augment.flip = 0.5
    config.data.augment.elastic_mm = 8.0
    expected = AugmentSpec(flip=0.5, elastic_mm=8.0)
    assert build.build(config, tmp_path).augment == expected


def test_misspelt_field_stops_the_run():
    config = unireg.get_config("demo")
    with pytest.raises((AttributeError, KeyError), match="optim_lr|optim.lrr|lrr"):
        config.optim.lrr = 1.0


def test_log_drops_lines_past_the_resume_step(tmp_path):
    writer = log.Log(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"x": float(step), "bad": float("nan")})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "x"')  # torn by a kill
    writer = log.Log(tmp_path, resume_step=2)
    writer.write(3, {"x": 30.0})
    writer.close()
    lines = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(x["step"], x["x"]) for x in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert lines[0]["bad"] is None


def test_log_of_a_run_that_starts_again_is_empty(tmp_path):
    """Killed before its first checkpoint, it validates at step 0 again."""
    for value in (1.0, 2.0):
        writer = log.Log(tmp_path, resume_step=0)
        writer.write(0, {"x": value})
        writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["x"] for x in lines] == [2.0]


def test_per_label_means_over_the_pairs_that_show_the_label():
    nan = float("nan")
    rows = [
        {"task": "chest", "dsc": [0.5, nan, nan]},
        {"task": "lung", "dsc": [0.1, 0.2, 0.3]},
        {"task": "chest", "dsc": [0.7, 0.4, nan]},
    ]
    names = {"chest": ("heart", "aorta"), "lung": ("lobe", "airway", "vessel")}
    found = evaluate.per_label(rows, names.__getitem__)
    assert found["lung"] == {"lobe": 0.1, "airway": 0.2, "vessel": 0.3}
    assert found["chest"] == pytest.approx({"heart": 0.6, "aorta": 0.4})


@pytest.mark.parametrize("preset", ["paper", "real_small", "real_small_varied"])
def test_presets_validate_during_the_run(preset):
    train_config = unireg.get_config(preset).train
    assert train_config.eval_every <= train_config.steps / 5


def test_summarize_skips_undefined():
    row = dict.fromkeys(evaluate.PER_PAIR, 1.0)
    rows = [
        {"task": "chest", "mean_dsc": 0.5, "mean_dsc_before": 0.25, **row},
        {"task": "chest", "mean_dsc": float("nan"), "mean_dsc_before": 0.75, **row},
    ]
    summary = evaluate.summarize(rows)["chest"]
    assert summary["mean_dsc"] == 0.5 and summary["mean_dsc_before"] == 0.5


_TWO_DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
from experiments import build, unireg
from unireg_jax.training import mesh as m, step as s, state as st
from data_pipeline import loader
assert len(jax.devices()) == 2
c = unireg.get_config("demo")
with c.unlocked():
    c.train.init_from = ""
    c.data.root, c.data.shape, c.data.spacing_mm = sys.argv[1], (32, 16, 16), 12.0
    c.model.update({"encoder": (4,) * 4, "decoder": (4,) * 4, "remaining": (4,)})
    c.model.conv_impl = "direct"
e = build.build(c, Path(sys.argv[1]))
results = []
for devices in (jax.devices()[:1], jax.devices()):
    mesh = m.make_mesh(devices)
    step = s.make_train_step(e.loss, e.tx, mesh=mesh)
    state = jax.device_put(st.make_state(e.model, e.tx, seed=0), m.replicated(mesh))
    stream = loader.make_iterator(e.dataset, "train", batch_size=2, seed=0)
    for _ in range(2):
        batch = jax.device_put(next(stream), m.pair_sharding(mesh))
        state, scalars = step(state, batch, e.extractor)
    results.append((float(scalars["loss"]), jax.device_get(state.params)))
(a, p), (b, q) = results
np.testing.assert_allclose(a, b, rtol=1e-4)
jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-4), p, q)
print("same")
"""


@pytest.mark.slow
def test_two_devices_train_as_one(phantoms):
    """Data parallel over two simulated devices: same loss, parameters within Adam's
    amplification of rounding."""
    done = subprocess.run(
        [sys.executable, "-c", _TWO_DEVICES, str(phantoms)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_signal_saves_and_the_same_command_goes_on(config, tmp_path, monkeypatch):
    """SIGTERM in mid-run: exit 75 after a save; the rerun ends as if undisturbed."""
    with config.unlocked():
        config.train.checkpoint_every = 100
    report = loop._report

    def interrupt(bar, n, total, scalars):
        report(bar, n, total, scalars)
        if n == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_report", interrupt)
    with pytest.raises(SystemExit) as stopped:
        train.train(config, tmp_path / "hit")
    assert stopped.value.code == PREEMPTED
    monkeypatch.undo()
    train.train(config, tmp_path / "hit")
    train.train(config, tmp_path / "whole")
    hit, whole = (_params(tmp_path / n, config) for n in ("hit", "whole"))
    jax.tree.map(np.testing.assert_array_equal, hit, whole)


def test_init_from_starts_at_the_given_weights(config, tmp_path):
    """The card of the new weights names them, also when a continued run writes it."""
    first = train.train(config, tmp_path / "first")
    digest = json.loads(first.with_suffix(".json").read_text())["sha256"]
    with config.unlocked():
        config.train.update({"init_from": str(first), "steps": 0})
    second = train.train(config, tmp_path / "second")
    assert second.read_bytes() == first.read_bytes()  # no step: still those weights
    with config.unlocked():
        config.train.steps = 2
    train.train(config, tmp_path / "second")
    first.unlink()  # no longer needed once there is a checkpoint
    with config.unlocked():
        config.train.steps = 3
    train.train(config, tmp_path / "second")
    card = json.loads(second.with_suffix(".json").read_text())
    assert card["training"] == {
        "steps": 3,
        "preset": "demo",
        "seed": 0,
        "init_from": {"name": "weights.safetensors", "sha256": digest},
    }


def test_scans_without_any_label_are_trained_without_dice(config, phantoms, tmp_path):
    """As docs/datasets.md promises: nothing else has to be set for them."""
    root = tmp_path / "unlabelled"
    shutil.copytree(phantoms, root)
    index = json.loads((root / store.INDEX_NAME).read_text())
    for task in index["tasks"].values():
        task["labels"] = []
    for volume in index["volumes"]:
        volume["labels"] = None
        volume["sha256"].pop("labels")
    (root / store.INDEX_NAME).write_text(json.dumps(index))
    with config.unlocked():
        config.data.root = str(root)
    assert config.loss.dice > 0
    assert train.train(config, tmp_path / "run").is_file()
    lines = _lines(tmp_path / "run")
    steps = [line for line in lines if "train/loss" in line]
    assert steps and all(np.isfinite(line["train/loss"]) for line in steps)
    assert not any("train/dice" in line for line in steps)
    judged = [line for line in lines if "val/ncc/lung" in line]
    assert judged and all(line["val/mean_dsc/lung"] is None for line in judged)


def test_init_from_weights_with_other_features_is_told(config, tmp_path, capsys):
    first = train.train(config, tmp_path / "first")
    for name, features, combine in (
        ("same", "mind", "concat"),
        ("less", "none", "concat"),
        ("sum", "mind", "sum"),
    ):
        with config.unlocked():
            config.train.update({"init_from": str(first), "steps": 0})
            config.model.update({"features": features, "combine": combine})
        train.train(config, tmp_path / name)
        said = capsys.readouterr().err
        told = f"joined features mind concat, this run has {features} {combine}:"
        assert (told in said) == (name != "same")
        assert ("warning: " + first.name in said) == (name != "same")


def test_init_from_package_is_what_was_shipped(monkeypatch):
    """Whatever the user's own default is: perhaps the run that is to be repeated."""
    monkeypatch.setenv(weights.VARIABLE, "mine.safetensors")
    asked = []

    def load(path):
        asked.append(path)
        raise UserError("checkpoint_missing", "enough")

    monkeypatch.setattr(weights, "load_weights", load)
    with pytest.raises(UserError, match="enough"):
        train._init_from("package", None, {})
    assert asked == [weights.PACKAGE / "unireg.safetensors"]


def _save_embedding(path):
    """A tiny one; its digest."""
    fields = {"stem": 4, "stages": [4, 4, 6, 6], "channels": 5}
    network = sam.Sam(norm="batch", conv_impl="direct", **fields)
    variables = jax.jit(embedding.initializer(network))(jax.random.key(0))
    spec = {"kind": "sam", "features": "sam", "architecture": fields}
    spec["preprocess"] = PreprocessSpec().to_json()
    path.parent.mkdir()
    weights.save_weights(path, jax.tree.map(np.asarray, variables), spec)
    return json.loads(path.with_suffix(".json").read_text())["sha256"]


@pytest.mark.parametrize("own", [False, True], ids=["another file", "the copy itself"])
def test_embedding_that_is_replaced_meanwhile_stays_with_its_run(
    config, tmp_path, monkeypatch, own
):
    path = tmp_path / ("run/embedding.safetensors" if own else "sam/any.safetensors")
    digest = _save_embedding(path)
    copy = tmp_path / "run" / "embedding.safetensors"
    with config.unlocked():
        config.model.update({"features": "sam", "embedding": str(path)})

    def run(step, state, *args, **kwargs):
        assert weights.load_weights(copy)[1]["sha256"] == digest  # from the start
        if not own:
            weights.save_weights(path, {"other": np.zeros(1, np.float32)}, kept)
        return state

    kept = weights.load_weights(path)[1]
    monkeypatch.setattr(loop, "run", run)
    trained = train.train(config, tmp_path / "run")
    assert weights.load_weights(trained)[1]["embedding"]["sha256"] == digest
    assert weights.load_weights(copy)[1]["sha256"] == digest


def test_run_on_an_embedding_keeps_the_two_together(config, tmp_path, monkeypatch):
    """The embedding's own file may have any name, that of the weights too."""
    path = tmp_path / "sam" / "weights.safetensors"
    digest = _save_embedding(path)
    with config.unlocked():
        config.model.update({"features": "sam", "embedding": str(path)})
        config.train.steps = 1
    trained = train.train(config, tmp_path / "run")
    monkeypatch.setenv(embedding.VARIABLE, str(tmp_path / "absent.safetensors"))
    model = load_model(trained)
    assert model.extractor.digest == digest
    # Alone it says which embedding belongs to it, and takes no other.
    (trained.parent / "embedding.safetensors").unlink()
    with pytest.raises(UserError, match="the embedding it was trained on") as caught:
        load_model(trained)
    assert caught.value.reason == "checkpoint_missing"
    monkeypatch.delenv(embedding.VARIABLE)  # the package has another one
    with pytest.raises(UserError, match="the embedding it was trained on"):
        load_model(trained)
    monkeypatch.setenv(embedding.VARIABLE, str(path))
    assert load_model(trained).extractor.digest == digest
    card = trained.with_suffix(".json")
    spec = json.loads(card.read_text())
    del spec["embedding"]
    card.write_text(json.dumps(spec))
    with pytest.raises(UserError, match="name and digest of the embedding"):
        load_model(trained)


def test_init_from_of_another_model_is_refused(config, tmp_path):
    with config.unlocked():
        config.train.steps = 0
    path = train.train(config, tmp_path / "first")
    with config.unlocked():
        config.train.init_from = str(path)
        config.model.encoder = (8, 4, 4, 4)
    with pytest.raises(UserError, match="expected, got.*set config.model") as error:
        train.train(config, tmp_path / "second")
    assert error.value.exit_code == CHECKPOINT
    assert not (tmp_path / "second" / "config.json").exists()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model.conditioner", "foo", "one of dynamic, static expected, got 'foo'"),
        ("model.features", "sift", "one of mind, none, sam expected, got 'sift'"),
        ("model.dtype", "int8", "one of float32, bfloat16 expected"),
        ("model.encoder", (4, 4, 4, 4, 4), "1 to 4 channel numbers expected"),
        ("model.decoder", (4, 4, 4), "as many channel numbers as model.encoder"),
        ("model.remaining", (4, 0), "channel numbers expected"),
        ("model.field_level", 4, "a level of model.encoder, from 0 expected, got 4"),
        ("loss.reg_units", "mm", "one of normalized, voxel expected"),
        ("loss.smoothness", (1.0,), "4 numbers from 0, one per region expected"),
        ("loss.smoothness", (1.0, 1.0, -1.0, 1.0), "4 numbers from 0, one per region"),
        ("loss.dice", -1.0, "0 or more expected, got -1.0"),
        ("loss.dice_counting", "foo", "one of scatter, compare expected, got 'foo'"),
        ("loss.ncc_window", 8, "an odd number expected, got 8"),
        ("loss.ncc_scales", 5, "1 to 4 expected, got 5"),
        ("data.shape", (40, 32, 32), "three multiples of 16 expected"),
        ("data.augment.flip", 2.0, "0 to 1 expected, got 2.0"),
        ("data.weights.lung", -1.0, "a number from 0 expected, got -1.0"),
        ("data.weights.lung", float("nan"), "a number from 0 expected, got nan"),
        ("model.embedding", "a.safetensors", "'' or model.features=sam expected, got"),
        ("optim.name", "rmsprop", "one of sgd, adam expected"),
        ("optim.clip_norm", -1.0, "0 or more expected, got -1.0"),
        ("optim.warmup_steps", -1, "0 or more expected, got -1"),
        ("optim.head_scale", -0.05, "0 or more expected, got -0.05"),
        ("optim.momentum", 1.0, "from 0 to less than 1 expected, got 1.0"),
        ("optim.decay_steps", -1, "0, or more than .*_steps, 5 expected, got -1"),
        ("optim.decay_steps", 3, "0, or more than optim.warmup_steps, 5 expected"),
        ("train.log_every", 0, "1 or more expected, got 0"),
        ("data.batch_size", 0, "1 or more expected, got 0"),
        ("data.batch_size", -1, "1 or more expected, got -1"),
        ("train.checkpoint_every", 0, "1 or more expected, got 0"),
    ],
)
def test_config_value_that_no_run_can_have_is_refused(
    config, tmp_path, field, value, expected
):
    with config.unlocked():
        config.data.update({"root": "", "phantoms": 4})
        config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"config: {field}: {expected}") as error:
        build.build(config, tmp_path)
    assert (error.value.reason, error.value.exit_code) == ("schema", USAGE)
    assert not list(tmp_path.iterdir())


_PRESETS = "--config=experiments/unireg.py"


@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections'
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (f"{_PRESETS}:foo", "preset must be one of .* got 'foo'"),
        (f"{_PRESETS}:demo --config.optim.lr=abc", "optim.lr=abc: could not convert"),
        (f"{_PRESETS}:demo --config.optim=1", "not a dict"),
        (f"{_PRESETS}:demo --speed=1", "Unknown command line flag 'speed'"),
        (f"{_PRESETS}:demo extra", "--name=value expected, got extra"),
        ("--config=none.py", "No such file or directory: 'none.py'"),
    ],
)
def test_flags_that_cannot_be_parsed_are_one_line(
    monkeypatch, capsys, arguments, expected
):
    monkeypatch.chdir(ROOT)
    argv = ["train", *arguments.split()]
    own = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", own)
    config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
    with pytest.raises(SystemExit) as stopped:
        cli.one_line_errors(cli._parse_flags)(argv)
    assert stopped.value.code == USAGE
    assert re.fullmatch(
        f"error: schema: flags: .*{expected}.*\n", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("train", f"{_PRESETS} --workdir=run", "config.data.root expected, none given"),
        ("train", f"{_PRESETS} --workdir=run --config.optim.lrr=1", 'mean "lr"'),
        ("train", f"{_PRESETS}:demo --workdir=", "--workdir=: a folder expected"),
        ("train_sam", "--config=experiments/sam.py --workdir=", "a folder expected"),
    ],
)
def test_mistake_on_the_command_line_exits_2_with_one_line(
    tmp_path, module, arguments, expected
):
    done = subprocess.run(
        [
            *(sys.executable, "-m", f"experiments.{module}"),
            *(
                word.replace("=", f"={ROOT}/", 1) if i == 0 else word
                for i, word in enumerate(arguments.split())
            ),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # where a run without a folder would write
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    assert done.returncode == USAGE, done.stderr
    assert re.fullmatch(f"error: schema: .*{expected}.*\n", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_fault_of_ours_keeps_its_trace_and_exits_1(tmp_path):
    """docs/errors.md, code 1."""
    code = "from experiments import cli; cli.run(lambda argv: 1 // 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_batch_of_another_task_than_its_pair_is_refused(config, tmp_path):
    """Before it reaches the step; and every row says what it holds."""
    experiment = build.build(config, tmp_path)
    stream = loader.make_iterator(
        experiment.dataset, "train", batch_size=2, seed=0, num_threads=0
    )
    batch = next(stream)
    names = train._names(experiment, stream)
    for row, place in zip(names(batch), batch.pair, strict=True):
        pair = experiment.dataset.pairs("train")[place]
        volumes = experiment.dataset.index["volumes"]
        assert row.name == f"pair {place}" and row.task == pair.task
        assert row.volumes == (volumes[pair.fixed]["id"], volumes[pair.moving]["id"])
    wrong = batch._replace(region=(batch.region + 1) % 4)
    with pytest.raises(ValueError, match="region and pair type of .* expected, got"):
        names(wrong)


def test_process_names_the_pairs_of_all(config, tmp_path, monkeypatch):
    """Else a batch that is split among them would be of one task in its log."""
    experiment = build.build(config, tmp_path)
    streams = [
        loader.make_iterator(
            experiment.dataset, "train", batch_size=1, seed=0, shard=(i, 2)
        )
        for i in range(2)
    ]
    batches = [[next(stream) for stream in streams] for _ in range(3)][-1]
    alone = [train._names(experiment, None)(batch) for batch in batches]
    assert {row.task for rows in alone for row in rows} == {"headneck", "lung"}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for stream, batch in zip(streams, batches, strict=True):
        assert train._names(experiment, stream)(batch) == sum(alone, [])


def test_learning_rate_of_a_step_is_that_of_the_schedule(config):
    """For the dump of a step that is not finite."""
    with config.unlocked():
        config.optim.update({"lr": 0.5, "warmup_steps": 5, "decay_steps": 0})
    rate = loop.rate(config.optim)
    np.testing.assert_allclose([rate(n) for n in (1, 2, 6, 9)], [0.0, 0.1, 0.5, 0.5])
