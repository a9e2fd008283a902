"""Checkpoints of a run: state and data iterator together, config beside them.

Layout: <workdir>/config.json; <workdir>/checkpoints/<step>/ with Orbax's files and
manifest.json, see steps.py and manifest.py. What holds when: docs/reliability.md.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from unireg_jax.errors import CHECKPOINT, DATA_CHANGED, USAGE, UserError, shown, tell
from unireg_jax.registration import weights
from unireg_jax.training import manifest
from unireg_jax.training.state import TrainState
from unireg_jax.training.steps import Steps, first_line, storage

FOLDER = "checkpoints"  # in a work folder
_CONFIG = "config.json"
# What kills leave beside the checkpoints.
_TEMPORARY = (
    "config.json.tmp",
    "metrics.jsonl.tmp",
    "times.json.tmp",
    "nonfinite_step_*.json.tmp",
    ".unireg-*.tmp",
)


class Checkpoints:
    """Saves and restores a run; the same command continues where it stopped.

    Of several processes all save and restore together; the first alone tidies up.
    """

    def __init__(
        self,
        workdir: Path | str,
        *,
        keep: int = 2,
        run: Mapping[str, Any] | None = None,
        writes: bool = True,
    ):
        """Opens `workdir`/checkpoints.

        Args:
            workdir: the run's folder, under its lock if it `writes`.
            keep: how many of the newest steps stay.
            run: what steps are made with and from: `data`, `features` and `code` are
                compared on restoring. JSON.
            writes: False for one that only reads beside a run: nothing is made, swept
                or set aside.

        Raises:
            UserError: `storage`, exit code 6.
        """
        workdir = Path(workdir).resolve()
        self._run = dict(run or {})
        self._first = jax.process_index() == 0
        tidies = writes and self._first
        self._steps = Steps(workdir / FOLDER, keep=keep, tidies=tidies)
        self._began = (workdir / _CONFIG).exists()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        # Else a folder that cannot be made holds up the save for 20 minutes; the saver
        # makes the step's, the handler those of its items.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                "state",
                "data",
                composite_options=ocp.CompositeOptions(async_options=options),
            ),
            async_options=options,
        )
        if tidies:
            with storage(workdir):
                self._steps.sweep()
                for pattern in _TEMPORARY:
                    for path in workdir.glob(pattern):
                        path.unlink()
                if _layout(workdir) < manifest.VERSION:
                    self._steps.adopt()

    def latest(self) -> int | None:
        """Newest step that was saved whole, see `Steps.latest`; says if none."""
        found = self._steps.latest()
        if found is None and self._began and self._first:
            # Killed before its first save: told, so that it is no silent fresh start.
            tell("no step was saved yet: starts at step 0")
        return found

    def save(self, state: TrainState, iterator: Any) -> None:
        """Saves in the background; a save in flight is finished first.

        Raises:
            UserError: `storage`, exit code 6: this save or the one before failed;
                nothing of it counts, and the steps before are untouched.
        """
        self.wait()
        step = int(state.step)
        with storage(self._steps.folder):
            if step in self._steps.all():
                raise ValueError(f"step {step} is saved already")
            self._saver.save(
                self._steps.unfinished(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(iterator),
                ),
                force=True,  # over what a failed save has left
            )
        self._thread = threading.Thread(target=self._finish, args=(step,))
        self._thread.start()

    def check(self) -> None:
        """Says whether the save in flight has failed, without waiting for it.

        Raises:
            UserError: `storage`, exit code 6, once.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when the save in flight counts; raises as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def close(self) -> None:
        """Waits for the save in flight; raises as `check` does."""
        try:
            self.wait()
        finally:
            with storage(self._steps.folder):  # it may still be writing, too
                self._saver.close()

    def restore(
        self, state: TrainState, iterator: Any = None, *, changes: list | None = None
    ) -> TrainState:
        """Newest sound state, on the devices of `state`; moves `iterator` to its place.

        A step that is not what was saved is set aside, with a warning, and the one
        before it is taken.

        Args:
            state: a fresh state of the same model and optimiser.
            iterator: Grain iterator to set, or None to leave the data alone.
            changes: takes a line for what differs and may: the code.

        Raises:
            UserError: exit code 9: see `Steps.find_sound`; `checkpoint_other`, it is of
                another model, optimiser or features. 10: `checksum`, the data have
                changed.
        """
        step = self._sound_step()
        try:
            return self._load(step, state, iterator, changes)
        except (manifest.DamagedError, UserError):
            if self._steps[step].exists():
                raise
        # The run that is read beside has deleted it.
        return self.restore(state, iterator, changes=changes)

    def _load(
        self, step: int, state: TrainState, iterator: Any, changes: list | None
    ) -> TrainState:
        folder = self._steps[step]
        self._compare(folder, manifest.read(folder, step), changes)
        try:
            stored = ocp.StandardCheckpointHandler().metadata(folder / "state").tree
        except (ValueError, OSError) as error:
            raise _other(folder, first_line(error)) from error
        _check_shapes(folder, stored, state)
        # A field that is None may have been unknown when the step was saved.
        fields = {k: v for k, v in state._asdict().items() if k in stored}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fields)
        items = {"state": ocp.args.StandardRestore(abstract)}
        try:
            restored = self._saver.restore(folder, args=ocp.args.Composite(**items))
            if iterator is not None:
                _restore_stream(folder / "data", iterator)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise _other(folder, first_line(error)) from error
        return TrainState(**restored["state"])

    def _finish(self, step: int) -> None:
        """In a thread of its own: makes a save count once all of it is there."""
        try:
            with storage(self._steps.folder):
                self._saver.wait_until_finished()
                if self._first:
                    self._steps.acknowledge(step, self._run)
        except BaseException as error:  # for the thread that trains
            self._fault = error

    def _sound_step(self) -> int:
        """The same for all processes."""
        if jax.process_count() == 1:
            return self._steps.find_sound()
        found, fault = -1, None
        if self._first:
            try:
                found = self._steps.find_sound()
            except UserError as error:
                fault = error
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if fault is not None:
            raise fault
        if found < 0:
            raise UserError(
                "checkpoint_damaged", "no step can be used, see process 0", CHECKPOINT
            )
        return found

    def _compare(
        self, folder: Path, before: Mapping[str, Any], changes: list | None
    ) -> None:
        """Refuses other data and features; warns of other code."""
        differs = {
            name: f"{before[name]} then, {self._run[name]} now"
            for name in ("data", "features", "code")
            if name in before and before[name] != self._run.get(name, before[name])
        }
        if "data" in differs:
            raise UserError(
                "checksum",
                f"prepared data: changed since the run began: digest {differs['data']}"
                "; restore them, or start a new run",
                DATA_CHANGED,
            )
        if "features" in differs:
            raise _other(folder, f"feature weights: {differs['features']}")
        if "code" in differs:
            line = f"code: {differs['code']}"
            tell(f"warning: {line}; the run goes on")
            if changes is not None:
                changes.append(line)


def _restore_stream(folder: Path, iterator: Any) -> None:
    """Moves the iterator to its place.

    Grain writes a file per process and wants as many of them back. Here all say the
    same, because places are counted in steps of the whole batch: any will do.
    """
    files = sorted(folder.glob("process_*.json"))
    if not files:
        raise OSError(f"{folder}: the state of a data stream expected, none found")
    iterator.set_state(json.loads(files[0].read_text()))
    iterator.start_prefetch()


def _check_shapes(folder: Path, stored: Any, state: TrainState) -> None:
    """Refuses a checkpoint of another model before anything of it is read.

    Orbax compares only while it reads, and gives up on the first difference with all
    other reads still in flight: they then fail in threads of their own.
    """
    if wrong := weights.shape_faults(_shapes(state), _shapes(stored)):
        raise _other(folder, wrong)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _other(folder: Path, what: str) -> UserError:
    return UserError(
        "checkpoint_other",
        f"{folder}: does not fit this model and optimiser ({what}); use the config of "
        "the run, or another --workdir",
        CHECKPOINT,
    )


# Fields that may differ when a run is continued: they change no parameter, or (on_fault
# and skip_nonfinite) only where it would have stopped. data.root is only a path: the
# data iterator refuses a folder of other content.
_FREE = (
    "data.root",
    "data.on_fault",
    "data.read_timeout_s",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_pairs",
    "train.eval_batches",
    "train.image_every",
    "train.checkpoint_every",
    "train.skip_nonfinite",
    "train.watchdog_s",
    "train.change",
)
# What a field means in the config of a run that began before the field existed.
_NEUTRAL = {
    "loss.dice_counting": "scatter",
    "loss.ncc_scales": 1,
    "data.streams.phantoms": 0.0,
    "data.streams.painted": 0.0,
    "data.streams.deformed": 0.0,
    "data.augment.flip": 0.0,
    "data.augment.rotate_deg": 0.0,
    "data.augment.scale": 0.0,
    "data.augment.shift_mm": 0.0,
    "data.augment.elastic_mm": 0.0,
    "data.augment.elastic_spacing_mm": 40.0,
    "data.augment.cut": 0.0,
    "data.augment.gain": 0.0,
    "data.augment.shift_hu": 0.0,
    "data.augment.noise_hu": 0.0,
    "model.embedding": "",
    "model.combine": "concat",
    "model.precision": "default",
    "model.remat": "none",
    "train.init_from": "",
    "train.accumulate": 1,
    "train.passes": 1,
    "train.ema": 0.0,
    "train.space_devices": 1,
    "train.skip_nonfinite": 0,
}
# In config.json, beside the config.
_ORIGIN, _CHANGES, _LAYOUT = "started_from", "changes", "layout"

# What draws the pairs; an iterator that began with other values refuses its state.
_BOUND = ("seed", "data.batch_size", "data.weights", "data.streams", "data.augment")


def check_config(workdir: Path | str, config: Mapping[str, Any]) -> list[str]:
    """Refuses a config that differs from the one the run was started with.

    Args:
        workdir: the run's folder; of a new run, empty or absent.
        config: nested dict of numbers, strings and lists. Its train.change, if there,
            names fields that are to differ from now on, with commas between.

    Returns:
        A line for each field that does, for `write_config`.

    Raises:
        UserError: `schema`, exit code 2, naming every field that differs, or that
            train.change names though it draws the pairs; 9 when the work folder's own
            config cannot be read.
    """
    before = _read_config(workdir)
    if before is None:
        return []
    now = flat(json.loads(_text(config)))
    wanted = [x.strip() for x in now.get("train.change", "").split(",") if x.strip()]
    before = flat({k: v for k, v in before.items() if k in config})
    drift = {}
    for field in sorted(before.keys() | now.keys()):
        neutral = _NEUTRAL.get(field)
        old, new = before.get(field, neutral), now.get(field, neutral)
        if old != new and field not in _FREE:
            drift[field] = f"{field}: {old!r} -> {new!r}"
    if refused := [line for field, line in drift.items() if field not in wanted]:
        raise UserError(
            "schema",
            f"{shown(Path(workdir) / _CONFIG)}: this run was started with another "
            f"config ({'; '.join(refused)}); give the old values, or another --workdir",
            USAGE,
        )
    bound = [line for field, line in drift.items() if field.startswith(_BOUND)]
    if bound:
        raise UserError(
            "schema",
            "config.train.change: fields that the order of the pairs does not hang on "
            f"expected, got {'; '.join(bound)}; start another run from these weights "
            "with config.train.init_from",
            USAGE,
        )
    return list(drift.values())


def write_config(
    workdir: Path | str,
    config: Mapping[str, Any],
    started_from: Mapping[str, str] | None = None,
    changes: Sequence[str] = (),
) -> None:
    """Binds the work folder to a config, once a run with it is known to start.

    Args:
        workdir: the run's folder.
        config: see `check_config`.
        started_from: name and sha256 of the weights at step 0, or None.
        changes: lines that join those of before.

    Raises:
        UserError: `storage`, exit code 6.
    """
    own = {
        _ORIGIN: started_from,
        _CHANGES: [*_changes(workdir), *changes],
        _LAYOUT: manifest.VERSION,
    }
    with storage(Path(workdir)):
        text = _text({**config, **own}) + "\n"
        manifest.write_file(Path(workdir) / _CONFIG, text)


def started_from(workdir: Path | str) -> dict[str, str] | None:
    """The weights at step 0 of a run that is continued, see `write_config`."""
    return (_read_config(workdir) or {}).get(_ORIGIN)


def _changes(workdir: Path | str) -> list[str]:
    return (_read_config(workdir) or {}).get(_CHANGES, [])


def _layout(workdir: Path) -> int:
    """Version of the checkpoints of a work folder; a new one has ours."""
    before = _read_config(workdir)
    return manifest.VERSION if before is None else before.get(_LAYOUT, 1)


def _read_config(workdir: Path | str) -> dict[str, Any] | None:
    """The work folder's config.json, or None in a new one."""
    path = Path(workdir) / _CONFIG
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise UserError(
            "checkpoint_damaged",
            f"{shown(path)}: the config of the run expected as JSON, got something "
            "else; copy it back, or start anew with another --workdir",
            CHECKPOINT,
        )
    return found


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=1, sort_keys=True)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of a nested config by their dotted names."""
    fields = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields
