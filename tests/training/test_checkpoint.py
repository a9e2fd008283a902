"""Saved steps: whole or not there, verified, tidied up; configs that may differ."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_pipeline import synthetic
from experiments import cli, sam, train, unireg
from unireg_jax.errors import (
    CHECKPOINT,
    DATA_CHANGED,
    NOTHING,
    STORAGE,
    USAGE,
    UserError,
)
from unireg_jax.training import checkpoint, manifest
from unireg_jax.training.state import TrainState
from unireg_jax.training.steps import Steps

RUN = {"data": "d1", "features": "f1", "code": "0.1.0 c1", "config": {"seed": 0}}


class Stream(grain.DatasetIterator):
    """The smallest iterator with a place."""

    place = 0

    def __init__(self):
        super().__init__()

    def __next__(self):
        self.place += 1
        return self.place

    def get_state(self):
        return {"next_index": self.place}

    def set_state(self, state):
        self.place = state["next_index"]


def _state(step, *, width=3, ema=True):
    """Another one for every step, and what it is like: float32, uint32 and int32."""
    params = {"a": {"w": jnp.arange(2.0 * width).reshape(2, width) + step}}
    mean = jax.tree.map(lambda x: x / 2, params) if ema else None
    moments = (jax.tree.map(jnp.square, params), jnp.int32(step))
    key = jnp.array([0, step], jnp.uint32)
    return TrainState(jnp.int32(step), params, moments, key, mean)


def _assert_same(found, step):
    jax.tree.map(np.testing.assert_array_equal, found, _state(step))


@contextlib.contextmanager
def _opened(workdir, **kwargs):
    with contextlib.closing(checkpoint.Checkpoints(workdir, **kwargs)) as opened:
        yield opened


def _save(workdir, *steps, **kwargs):
    stream = Stream()
    with _opened(workdir, **kwargs) as checkpoints:
        for step in steps:
            stream.place = step
            checkpoints.save(_state(step), stream)


def _restore(workdir, **kwargs):
    with _opened(workdir, **kwargs) as checkpoints:
        return checkpoints.restore(_state(0))


def _names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def _largest(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != manifest.NAME]
    return max(files, key=lambda path: path.stat().st_size)


def _flip(path, bit=12345):
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# --- saving ---


def test_steps_restore_as_saved_and_only_the_newest_stay(tmp_path):
    _save(tmp_path, 2, 4, 6)
    assert _names(tmp_path) == ["4", "6"]
    stream = Stream()
    with _opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 6
        _assert_same(checkpoints.restore(_state(0), stream), 6)
    assert next(stream) == 7


def test_every_file_is_in_the_manifest_with_what_made_it(tmp_path):
    _save(tmp_path, 2, run=RUN)
    folder = tmp_path / "checkpoints" / "2"
    content = json.loads((folder / manifest.NAME).read_text())
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert content["files"].keys() == files - {manifest.NAME}
    assert content["run"] == RUN and content["step"] == 2


def test_a_step_is_flushed_before_it_counts(tmp_path, monkeypatch):
    """Every file, every folder, then the manifest, then the name; the folder last."""
    events = []
    fsync, rename = os.fsync, os.rename

    def flushed(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source, target, **kwargs):
        events.append((str(source), str(target)))
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    _save(tmp_path, 2)
    root = tmp_path / "checkpoints"
    named = events.index((str(root / "unfinished-2"), str(root / "2")))
    before, after = events[:named], events[named + 1 :]
    assert after == [str(root)]
    for path in [root / "2", *(root / "2").rglob("*")]:
        inner = str(root / "unfinished-2" / path.relative_to(root / "2"))
        wanted = inner + ".tmp" if path.name == manifest.NAME else inner
        assert wanted in before, path
    files = [p for p in (root / "2").rglob("*") if p.is_file()]
    written = before.index(f"{root}/unfinished-2/{manifest.NAME}.tmp")
    for path in files:
        inner = str(root / "unfinished-2" / path.relative_to(root / "2"))
        assert path.name == manifest.NAME or before.index(inner) < written


def test_saving_goes_on_beside_the_caller(tmp_path, monkeypatch):
    """`save` returns before the step counts; the step before stays till then."""
    wait, acknowledge = threading.Event(), Steps.acknowledge

    def late(self, step, run):
        wait.wait()
        acknowledge(self, step, run)

    _save(tmp_path, 2, keep=1)
    monkeypatch.setattr(Steps, "acknowledge", late)
    with _opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save(_state(4), Stream())
        checkpoints.check()
        assert checkpoints.latest() == 2
        wait.set()
        checkpoints.wait()
        assert checkpoints.latest() == 4
    assert _names(tmp_path) == ["4"]


def test_a_failed_save_is_told_by_the_next_check_and_counts_for_nothing(
    tmp_path, monkeypatch
):
    _save(tmp_path, 2)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with _opened(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write", full)
            checkpoints.save(_state(4), Stream())
            checkpoints._thread.join()
            with pytest.raises(UserError, match="No space left") as caught:
                checkpoints.check()
        assert (caught.value.reason, caught.value.exit_code) == ("storage", STORAGE)
        assert checkpoints.latest() == 2
        checkpoints.check()  # told once
        checkpoints.save(_state(4), Stream())  # over what has been left
    assert _names(tmp_path) == ["2", "4"]
    _assert_same(_restore(tmp_path), 4)


def test_a_save_into_a_folder_that_is_gone_is_a_storage_fault(tmp_path):
    """Not after minutes: Orbax would wait for a folder that cannot be made."""
    with _opened(tmp_path) as checkpoints:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("a file in its place")
        with pytest.raises(UserError) as caught:
            checkpoints.save(_state(2), Stream())
            checkpoints.wait()
        assert caught.value.exit_code == STORAGE


@pytest.mark.parametrize("folder", ["unfinished-4.", "state.", "data."])
def test_a_folder_of_a_save_that_cannot_be_made_fails_it_at_once(
    tmp_path, monkeypatch, folder
):
    _save(tmp_path, 2)
    make = os.mkdir

    def full(path, *args, **kwargs):
        if os.path.basename(path).startswith(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", full)
    # One that waits for the folder gives up after this, and with another line.
    monkeypatch.setattr(ocp.multihost, "coordination_timeout", lambda: 1)
    with _opened(tmp_path) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.save(_state(4), Stream())
        checkpoints.wait()
    assert caught.value.exit_code == STORAGE
    assert "No space left" in str(caught.value)
    monkeypatch.undo()
    _save(tmp_path, 4)
    _assert_same(_restore(tmp_path), 4)


def test_what_kills_have_left_is_swept_and_nothing_else(tmp_path):
    _save(tmp_path, 2)
    root = tmp_path / "checkpoints"
    for name in (
        "unfinished-4",
        "unfinished-4.orbax-checkpoint-tmp",
        "deleted-1",
        "6.orbax-checkpoint-tmp-17",
        "damaged-3-1",
        "notes",
    ):
        (root / name / "state").mkdir(parents=True)
    (tmp_path / "config.json.tmp").write_text("{")
    (tmp_path / ".unireg-1.tmp").write_text("")
    with _opened(tmp_path, writes=False):
        assert len(_names(tmp_path)) == 7  # one that only reads leaves it
    with _opened(tmp_path):
        assert _names(tmp_path) == ["2", "damaged-3-1", "notes"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints"]


# --- restoring ---


def test_a_damaged_step_is_set_aside_and_the_one_before_used(tmp_path, capsys):
    _save(tmp_path, 2, 4)
    _flip(_largest(tmp_path / "checkpoints" / "4"))
    with _opened(tmp_path, writes=False) as reader:
        _assert_same(reader.restore(_state(0)), 2)
    assert _names(tmp_path) == ["2", "4"]
    capsys.readouterr()
    stream = Stream()
    with _opened(tmp_path) as checkpoints:
        _assert_same(checkpoints.restore(_state(0), stream), 2)
        said = capsys.readouterr().err
        checkpoints.save(_state(4), stream)  # its number is free again
    assert said.startswith("warning: checkpoint_damaged: ") and said.count("\n") == 1
    assert "SHA-256" in said and "set aside as damaged-4-1, step 2 is used" in said
    assert stream.place == 2
    assert _names(tmp_path) == ["2", "4", "damaged-4-1"]


def test_all_steps_damaged_is_refused_and_nothing_moved(tmp_path):
    _save(tmp_path, 2, 4)
    for step in (2, 4):
        _flip(_largest(tmp_path / "checkpoints" / str(step)))
    for _ in range(2):  # a second start does not begin anew
        with _opened(tmp_path) as checkpoints:
            with pytest.raises(UserError, match="none found.*4: .*; 2: ") as caught:
                checkpoints.restore(_state(0))
        assert (caught.value.reason, caught.value.exit_code) == (
            "checkpoint_damaged",
            CHECKPOINT,
        )
        assert _names(tmp_path) == ["2", "4"]


def test_only_steps_set_aside_are_no_fresh_start(tmp_path):
    _save(tmp_path, 2)
    root = tmp_path / "checkpoints"
    (root / "2").rename(root / "damaged-2-1")
    with _opened(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="damaged-2-1") as caught:
            checkpoints.latest()
    assert caught.value.exit_code == CHECKPOINT


def test_nothing_saved_is_missing(tmp_path, capsys):
    with _opened(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="train first") as caught:
            checkpoints.restore(_state(0))
    assert caught.value.reason == "checkpoint_missing"
    assert capsys.readouterr().err == ""
    checkpoint.write_config(tmp_path, {"seed": 0})  # it had begun
    with _opened(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
    assert "no step was saved yet: starts at step 0" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["delete", "empty", "halve", "swap", "flip"])
def test_any_file_damaged_is_seen(tmp_path, damage):
    _save(tmp_path, 2, 4)
    root = tmp_path / "checkpoints"
    count = 0
    for path in sorted(p for p in (root / "4").rglob("*") if p.is_file()):
        content = path.read_bytes()
        other = root / "2" / path.relative_to(root / "4")
        match damage:
            case "delete":
                path.unlink()
            case "empty":
                path.write_bytes(b"")
            case "halve":
                path.write_bytes(content[: len(content) // 2])
            case "swap":
                path.write_bytes(other.read_bytes() if other.exists() else b"other")
            case "flip" if content:
                _flip(path)
        if not path.exists() or path.read_bytes() != content:
            count += 1
            with pytest.raises(manifest.DamagedError):
                manifest.verify(root / "4", 4)
        path.write_bytes(content)
        manifest.verify(root / "4", 4)
    assert count >= 5


def test_every_bit_of_a_manifest_counts_or_changes_nothing(tmp_path):
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "array").write_bytes(b"numbers")
    run = {"data": "d", "rate": 1e-5}
    manifest.write(folder, 7, run)
    path = folder / manifest.NAME
    content = path.read_bytes()
    harmless = 0
    for bit in range(8 * len(content)):
        _flip(path, bit)  # not flushed: that would take most of the time
        try:
            assert manifest.verify(folder, 7) == run
            harmless += 1
        except manifest.DamagedError:
            pass
        path.write_bytes(content)
    assert harmless < 8  # the e of a number, and the like


def test_a_step_under_the_name_of_another_is_damaged(tmp_path):
    _save(tmp_path, 2)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "2", root / "9")
    _assert_same(_restore(tmp_path), 2)
    assert _names(tmp_path) == ["2", "damaged-9-1"]


def test_a_step_of_a_newer_layout_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "VERSION", manifest.VERSION + 1)
        _save(tmp_path, 2)
    with pytest.raises(UserError, match="made by a newer version") as caught:
        _restore(tmp_path)
    assert (caught.value.reason, caught.value.exit_code) == (
        "checkpoint_newer",
        CHECKPOINT,
    )


def _as_layout_1(workdir):
    """What releases without manifests wrote, with Orbax's manager."""
    manager = ocp.CheckpointManager(
        workdir / "checkpoints", options=ocp.CheckpointManagerOptions(create=True)
    )
    state = _state(2, ema=False)._asdict()
    del state["ema"]  # nor did they know a running mean
    stream = Stream()
    stream.place = 2
    manager.save(
        2,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(stream),
        ),
    )
    manager.wait_until_finished()
    manager.close()
    (workdir / "config.json").write_text(json.dumps({"seed": 0, "started_from": None}))


def test_a_run_of_an_older_layout_goes_on(tmp_path):
    _as_layout_1(tmp_path)
    stream = Stream()
    with _opened(tmp_path) as checkpoints:
        found = checkpoints.restore(_state(0, ema=False), stream)
        jax.tree.map(np.testing.assert_array_equal, found, _state(2, ema=False))
    assert stream.place == 2
    checkpoint.write_config(tmp_path, {"seed": 0})
    # From now on a step without a manifest is one that has lost it.
    (tmp_path / "checkpoints" / "2" / manifest.NAME).unlink()
    with pytest.raises(UserError, match="manifest.json is gone"):
        _restore(tmp_path)


@pytest.mark.parametrize(
    ("field", "reason", "code"),
    [
        ("data", "checksum", DATA_CHANGED),
        ("features", "checkpoint_other", CHECKPOINT),
    ],
)
def test_other_data_or_features_are_refused(tmp_path, field, reason, code):
    _save(tmp_path, 2, run=RUN)
    other = RUN | {field: "other"}
    with pytest.raises(UserError, match="1 then, other now") as caught:
        _restore(tmp_path, run=other)
    assert (caught.value.reason, caught.value.exit_code) == (reason, code)
    _assert_same(_restore(tmp_path, run=RUN), 2)


def test_other_code_is_warned_of_and_recorded(tmp_path, capsys):
    _save(tmp_path, 2, run=RUN)
    changes = []
    with _opened(tmp_path, run=RUN | {"code": "0.2.0 c2"}) as checkpoints:
        _assert_same(checkpoints.restore(_state(0), changes=changes), 2)
    assert changes == ["code: 0.1.0 c1 then, 0.2.0 c2 now"]
    assert f"warning: {changes[0]}" in capsys.readouterr().err


def test_a_step_of_another_model_is_refused_by_names_and_shapes(tmp_path):
    _save(tmp_path, 2)
    with _opened(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"a/w: \(2, 4\) expected, got \(2, 3\)"):
            checkpoints.restore(_state(0, width=4))


def test_one_that_reads_beside_a_run_sees_whole_steps_or_none(tmp_path):
    """While the run saves and deletes, a reader opens, verifies and restores."""
    _save(tmp_path, 1)
    seen = []

    def write():
        _save(tmp_path, *range(2, 12))

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        with _opened(tmp_path, writes=False) as reader:
            found = reader.restore(_state(0))
        _assert_same(found, int(found.step))
        seen.append(int(found.step))
    writer.join()
    assert seen == sorted(seen) and len(seen) > 2


# --- configs ---


def test_fields_that_did_not_exist_have_their_neutral_value(tmp_path):
    config = unireg.get_config("real_small").to_dict()
    old = json.loads(json.dumps(config))
    for section, names in {
        "data": ("streams", "augment", "on_fault"),
        "model": ("precision", "remat", "embedding", "combine"),
        "train": (
            *("accumulate", "passes", "ema"),
            *("space_devices", "watchdog_s", "init_from"),
        ),
    }.items():
        for name in names:
            del old[section][name]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert checkpoint.check_config(tmp_path, config) == []
    config["train"]["ema"] = 0.99
    config["data"]["augment"]["flip"] = 0.5
    wanted = "data.augment.flip: 0.0 -> 0.5; train.ema: 0.0 -> 0.99"
    with pytest.raises(UserError, match=wanted):
        checkpoint.check_config(tmp_path, config)


def test_a_named_field_may_change_and_is_recorded(tmp_path):
    config = unireg.get_config("real_small").to_dict()
    checkpoint.write_config(tmp_path, config, {"name": "w"})
    config["optim"]["lr"] = 5e-4
    config["seed"] = 3
    config["train"]["change"] = "optim.lr"
    with pytest.raises(UserError, match=r"\(seed: 0 -> 3\)") as caught:
        checkpoint.check_config(tmp_path, config)
    assert caught.value.exit_code == USAGE
    config["seed"] = 0
    lines = checkpoint.check_config(tmp_path, config)
    assert lines == ["optim.lr: 0.001 -> 0.0005"]
    checkpoint.write_config(tmp_path, config, {"name": "w"}, lines)
    assert checkpoint.started_from(tmp_path) == {"name": "w"}
    config["train"]["change"] = ""
    assert checkpoint.check_config(tmp_path, config) == []  # it has become the run's
    checkpoint.write_config(tmp_path, config, {"name": "w"}, ["code: a then, b now"])
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["changes"] == [*lines, "code: a then, b now"]


def test_configs_of_both_trainings_know_the_field_of_changes():
    for module in (unireg, sam):
        assert module.get_config("paper").train.change == ""


def test_a_config_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0, "tr')
    with pytest.raises(UserError, match="config.json: .* expected as JSON") as caught:
        checkpoint.check_config(tmp_path, {"seed": 0})
    assert caught.value.exit_code == CHECKPOINT


# --- the last line of a command ---


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_a_disk_refuses_is_one_line_and_exit_code_6(capsys, number):
    def main():
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    with pytest.raises(SystemExit) as stopped:
        cli.one_line_errors(main)()
    assert stopped.value.code == STORAGE
    said = capsys.readouterr().err
    assert said.startswith("error: storage: metrics.jsonl: ") and said.count("\n") == 1


def test_a_mistake_in_a_path_is_not_called_storage():
    def main():
        raise FileNotFoundError(errno.ENOENT, "No such file", "here")

    with pytest.raises(FileNotFoundError):
        cli.one_line_errors(main)()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is full")
def test_a_disk_that_holds_the_log_of_stderr_too_ends_a_command_with_6():
    code = "from experiments import cli; import sys\n"
    code += "def main(argv): print('step 1/10', file=sys.stderr, flush=True)\n"
    code += "cli.run(main)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stderr=full, check=False)
    assert done.returncode == STORAGE


def test_ctrl_c_before_anything_is_done_leaves_with_130():
    code = "from experiments import cli\ndef main(argv): raise KeyboardInterrupt\n"
    code += "cli.run(main)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
    )
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr


# --- through the command's own function ---


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Prepared folder of tiny phantoms of two tasks."""
    return synthetic.write_dataset(
        tmp_path_factory.mktemp("phantoms"),
        shape=(32, 16, 16),
        spacing_mm=12.0,
        subjects_per_task=4,
        tasks=("headneck", "lung"),
    )


def _config(root):
    """The network of test_training.py, so that its compiled programs serve here."""
    config = unireg.get_config("demo")
    with config.unlocked():
        config.data.update({"root": str(root), "shape": (32, 16, 16)})
        config.data.spacing_mm = 12.0
        config.data.weights.headneck = 1.0
        config.model.update(
            {"encoder": (4, 4, 4, 4), "decoder": (4, 4, 4, 4), "remaining": (4,)}
        )
        config.model.conv_impl = "direct"
        config.train.update({"init_from": "", "steps": 1, "eval_pairs": 1})
    return config


def test_a_split_without_pairs_is_told_before_the_folder_is_bound(phantoms, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(phantoms, root)
    index = json.loads((root / "index.json").read_text())
    for volume in index["volumes"]:
        volume["split"] = "train"
    (root / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        train.train(_config(root), tmp_path / "run")
    assert caught.value.exit_code == NOTHING
    assert not (tmp_path / "run").exists()


def test_a_run_says_of_its_steps_how_they_were_made(phantoms, tmp_path):
    """And goes on neither with other data nor, unless it is named, other settings."""
    config = _config(phantoms)
    train.train(config, tmp_path / "run")
    steps = Steps(tmp_path / "run" / "checkpoints", keep=2, tidies=False)
    made = manifest.verify(steps[1], 1)
    assert made.keys() == {"config", "data", "features", "code"}
    assert made["config"]["data"]["shape"] == [32, 16, 16]
    other = tmp_path / "other"
    synthetic.write_dataset(
        other,
        shape=(32, 16, 16),
        spacing_mm=12.0,
        subjects_per_task=4,
        tasks=("headneck", "lung"),
        seed=7,
    )
    config.data.root = str(other)
    with pytest.raises(UserError, match="changed since the run began") as caught:
        train.train(config, tmp_path / "run")
    assert caught.value.exit_code == DATA_CHANGED
    config.data.root = str(phantoms)
    config.train.steps = 2
    config.optim.lr = 1e-5
    with pytest.raises(UserError, match="optim.lr: 0.0005 -> 1e-05"):
        train.train(config, tmp_path / "run")
    config.train.change = "optim.lr,data.weights.lung"
    lung, config.data.weights.lung = config.data.weights.lung, 3.0
    with pytest.raises(
        UserError, match=r"got data.weights.lung: .*init_from"
    ) as caught:
        train.train(config, tmp_path / "run")
    assert caught.value.exit_code == USAGE
    config.data.weights.lung = lung
    train.train(config, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "step 1: optim.lr: 0.0005 -> 1e-05" in found["changes"]
    assert steps.all() == [1, 2]
