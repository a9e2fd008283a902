"""Checkpoints of a run: state and data iterator together, config beside them.

Layout: <workdir>/config.json, <workdir>/checkpoints/<step>/ (Orbax).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp

from unireg_jax.errors import CHECKPOINT, USAGE, UserError
from unireg_jax.registration import weights
from unireg_jax.training.state import TrainState


class Checkpoints:
    """Saves and restores a run; the same command continues where it stopped."""

    def __init__(self, workdir: Path | str, *, keep: int = 2):
        """Opens `workdir`/checkpoints, made if absent; the newest `keep` stay."""
        self._manager = ocp.CheckpointManager(
            Path(workdir).resolve() / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """Newest step that was saved whole."""
        return self._manager.latest_step()

    def save(self, state: TrainState, iterator: Any) -> None:
        """Saves in the background; a save in flight is finished first."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
        )

    def restore(self, state: TrainState, iterator: Any = None) -> TrainState:
        """Newest state, on the devices of `state`; moves `iterator` to its place.

        Args:
            state: a fresh state of the same model and optimiser.
            iterator: Grain iterator to set, or None to leave the data alone.

        Raises:
            UserError: exit code 9; `checkpoint_missing`, or `checkpoint_other` when it
                is of another model or optimiser.
        """
        step = self.latest()
        if step is None:
            raise UserError(
                "checkpoint_missing",
                f"{self._manager.directory}: no checkpoint; train first",
                CHECKPOINT,
            )
        folder = self._manager.directory / str(step)
        _check_shapes(folder, state)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = {"state": ocp.args.StandardRestore(abstract)}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            if iterator is not None:
                _restore_stream(folder / "data", iterator)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise _other(folder, str(error).splitlines()[0][:160]) from error
        return TrainState(*restored["state"])

    def close(self) -> None:
        """Waits for saves in flight."""
        self._manager.wait_until_finished()
        self._manager.close()


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


def _check_shapes(folder: Path, state: TrainState) -> None:
    """Refuses a checkpoint of another model before anything of it is read.

    Orbax compares only while it reads, and gives up on the first difference with all
    other reads still in flight: they then fail in threads of their own.
    """
    stored = ocp.StandardCheckpointHandler().metadata(folder / "state").tree
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


# Fields that may differ when a run is continued: they change no parameter. data.root is
# only a path: the data iterator refuses a folder of other content.
_FREE = (
    "data.root",
    "data.on_fault",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_pairs",
    "train.checkpoint_every",
    "train.watchdog_s",
)
_ORIGIN = "started_from"  # in config.json, beside the config


def check_config(workdir: Path | str, config: Mapping[str, Any]) -> None:
    """Refuses a config that differs from the one the run was started with.

    Args:
        workdir: the run's folder; of a new run, empty or absent.
        config: nested dict of numbers, strings and lists.

    Raises:
        UserError: `schema`, exit code 2, naming every field that differs.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        return
    before, now = json.loads(path.read_text()), json.loads(_text(config))
    before.pop(_ORIGIN, None)
    before, now = flat(before), flat(now)
    drift = [
        f"{k}: {before.get(k)!r} -> {now.get(k)!r}"
        for k in sorted(before.keys() | now.keys())
        if before.get(k) != now.get(k) and k not in _FREE
    ]
    if drift:
        raise UserError(
            "schema",
            f"{path}: this run was started with another config ("
            + "; ".join(drift)
            + "); give the old values, or another --workdir",
            USAGE,
        )


def write_config(
    workdir: Path | str,
    config: Mapping[str, Any],
    started_from: Mapping[str, str] | None = None,
) -> None:
    """Binds the work folder to a config, once a run with it is known to start.

    Args:
        workdir: the run's folder.
        config: see `check_config`.
        started_from: name and sha256 of the weights at step 0, or None.
    """
    path = Path(workdir) / "config.json"
    temp = path.with_suffix(".json.tmp")
    temp.write_text(_text({**config, _ORIGIN: started_from}) + "\n")
    temp.replace(path)


def started_from(workdir: Path | str) -> dict[str, str] | None:
    """The weights at step 0 of a run that is continued, see `write_config`."""
    path = Path(workdir) / "config.json"
    return json.loads(path.read_text()).get(_ORIGIN) if path.exists() else None


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
