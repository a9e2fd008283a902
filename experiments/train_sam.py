"""Trains the anatomical embedding (SAM) on scans without labels.

    python -m experiments.train_sam --config=experiments/sam.py:lite \
        --config.data.root=PREPARED --workdir=runs/sam

The same command in the same work folder continues exactly where it stopped. Writes to
it: config.json, checkpoints/, metrics.jsonl, tb/ (TensorBoard), and at the end
weights.safetensors with its card weights.json, which `register` takes through
$UNIREG_SAM and the training of UniReg through --config.model.embedding.
"""

import contextlib
import functools
import itertools
import math
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from data_pipeline import loader, store, views
from experiments import cli, launch, loop, recent, settings, signals
from unireg_jax.errors import USAGE, UserError
from unireg_jax.models.features import sam
from unireg_jax.registration import weights as released
from unireg_jax.training import checkpoint, contrastive, embedding, log, optimizer
from unireg_jax.training import mesh as train_mesh
from unireg_jax.training.evaluate import nanmean


def train(config, workdir: Path, *, stop: signals.Stop | None = None) -> Path:
    """Trains to config.train.steps and returns the path of the weights.

    Args:
        config: from experiments/sam.py.
        workdir: the run's folder.
        stop: of the command that does nothing else; None: signals are heard once the
            steps begin.

    Raises:
        UserError: exit code 2, 3, 8, 9 or 10; SystemExit 75 after a signal.
    """
    workdir = Path(workdir)
    changes = checkpoint.check_config(workdir, config.to_dict())
    _check(config)
    dataset = _dataset(config)
    dataset.limit(launch.volumes_gib())
    try:
        network = sam.Sam(**config.model.to_dict(), norm="batch")
        tx = optimizer.make_optimizer(**config.optim.to_dict())
        recipe = contrastive.Recipe(**config.loss.to_dict())
        spec = views.ViewSpec(**config.views.to_dict())
    except (TypeError, ValueError) as error:
        raise UserError("schema", f"config: {error}", USAGE) from error
    mesh = train_mesh.make_mesh()
    keep, split = train_mesh.replicated(mesh), train_mesh.batch_sharding(mesh)
    stream_settings = {
        "batch_size": train_mesh.local_rows(mesh, config.data.batch_size),
        "spec": spec,
        "weights": config.data.weights.to_dict(),
    }
    stream = recent.Followed(
        views.make_view_iterator(dataset, "train", seed=config.seed, **stream_settings)
    )
    # Refuses a split without volumes, before any work.
    judge = _judge(config, dataset, network, recipe, stream_settings, split)
    step_fn = embedding.make_train_step(
        network,
        tx,
        recipe=recipe,
        mesh=mesh,
        skip_nonfinite=config.train.skip_nonfinite > 0,
    )
    state = embedding.make_state(network, tx, seed=config.seed)
    state = jax.device_put(state, keep)
    with contextlib.ExitStack() as stack:
        stack.enter_context(store.lock(store.make_folders(workdir)))
        checkpoints = stack.enter_context(
            contextlib.closing(
                checkpoint.Checkpoints(
                    workdir, run=launch.facts(config, data=dataset.digest)
                )
            )
        )
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state, stream, changes=changes)
        changes = [f"step {int(state.step)}: {line}" for line in changes]
        checkpoint.write_config(workdir, config.to_dict(), changes=changes)
        writer = stack.enter_context(
            contextlib.closing(log.Log(workdir, resume_step=int(state.step)))
        )
        volumes = dataset.index["volumes"]
        state = loop.run(
            lambda state, batch: step_fn(state, train_mesh.put(batch, split)),
            state,
            stream,
            every=loop.every(config.train),
            names=lambda batch: [
                recent.Row(volumes[v]["id"], volumes[v]["task"]) for v in batch.volume
            ],
            judge=judge,
            checkpoints=checkpoints,
            writer=writer,
            shown=("loss", "fine_hit", "coarse_hit"),
            skip_nonfinite=config.train.skip_nonfinite,
            rate=loop.rate(config.optim),
            stop=stop,
        )
    path = workdir / "weights.safetensors"
    released.save_weights(path, state.params, _card(config, dataset))
    return path


# The least value of numbers.
_LEAST = {
    "seed": 0,
    "data.batch_size": 1,
    "data.read_timeout_s": 1,
    "model.stem": 1,
    "model.channels": 1,
    "loss.anchors": 1,
    "loss.hard": 1,
    "loss.negatives": 1,
    "loss.coarse_hard": 1,
    "loss.coarse_negatives": 1,
    "loss.others": 0,
    "optim.weight_decay": 0,
    "train.steps": 0,
    "train.log_every": 1,
    "train.eval_every": 1,
    "train.eval_batches": 1,
    "train.checkpoint_every": 1,
    "train.skip_nonfinite": 0,
}
_POSITIVE = ("views.spacing_mm", "loss.temperature", "loss.positive_mm")


def _check(config) -> None:
    """Refuses values that no run can have, all at once and before anything is read."""
    fields = settings.flat(config, ("data", "views", "model", "loss", "optim", "train"))
    shape, scales = config.views.shape, config.views.scales
    divisors = (16, 16, 8)
    right_shape = len(shape) == 3 and not any(
        n < m or n % m for n, m in zip(shape, divisors, strict=True)
    )
    cells = math.prod(shape) // 8
    rules = {
        **settings.shared_rules(fields),
        **{f: (fields[f] >= n, f"{n} or more") for f, n in _LEAST.items()},
        **{f: (fields[f] > 0, "more than 0") for f in _POSITIVE},
        "views.shape": (right_shape, f"multiples of {divisors}"),
        "views.scales": (
            len(scales) == 2 and 0 < scales[0] <= scales[1],
            "(least, greatest), from more than 0",
        ),
        "views.apart": (0 <= config.views.apart <= 1, "a share from 0 to 1"),
        "model.stages": (
            len(config.model.stages) == 4 and min(config.model.stages) > 0,
            "four channel numbers",
        ),
        "model.last_stride": (
            len(config.model.last_stride) == 3
            and set(config.model.last_stride) <= {1, 2},
            "three of 1 or 2",
        ),
        "model.dtype": (
            config.model.dtype in ("float32", "bfloat16"),
            "float32 or bfloat16",
        ),
        "model.conv_impl": (
            config.model.conv_impl in ("auto", "direct"),
            "auto or direct",
        ),
    }
    if right_shape and config.loss.anchors > cells:
        rules["loss.anchors"] = (False, f"at most {cells}, the fine cells of a view")
    settings.refuse_faults(fields, rules)


def _dataset(config) -> loader.Dataset:
    if not config.data.root:
        raise UserError(
            "schema",
            "config.data.root expected, none given: a folder made by `python -m "
            "data_pipeline.prepare`",
            USAGE,
        )
    timeout = config.data.read_timeout_s
    return loader.Dataset(config.data.root, read_timeout_s=timeout)


def _judge(config, dataset, network, recipe, stream_settings, split):
    """judge(variables, border, brief): means over the same views of `val` every time.

    It draws nothing. Without such volumes it is refused.
    """
    evaluate = embedding.make_eval_step(network, recipe=recipe)
    stream = views.make_view_iterator(
        dataset, "val", seed=config.seed + 1, **stream_settings
    )

    @functools.cache
    def batches():
        return list(itertools.islice(stream, config.train.eval_batches))

    def judge(variables, border, *, brief):
        del brief
        rows = []
        for n, batch in enumerate(batches()):
            border()
            views_there = train_mesh.put(batch, split)
            rows.append(evaluate(variables, views_there, jax.random.key(n)))
        # Views may have no anchor to hit; a loss that is none shows.
        mean = {"fine_hit": nanmean, "coarse_hit": nanmean}
        means = {
            k: float(mean.get(k, np.mean)([row[k] for row in rows])) for k in rows[0]
        }
        return loop.Judged({f"val/{k}": v for k, v in means.items()}, {})

    return judge


def _card(config, dataset) -> dict:
    """What the weights are; see registration/embedding.py."""
    architecture = config.model.to_dict()
    for name in ("dtype", "conv_impl"):
        del architecture[name]
    return {
        "kind": "sam",
        "architecture": architecture,
        "features": "sam",
        # What the views showed, whatever the spacing of the volumes they were cut from.
        "preprocess": dataset.index["spec"]
        | {
            "spacing_mm": [config.views.spacing_mm] * 3,
            "hu_low": sam.HU_LOW,
            "hu_high": sam.HU_HIGH,
        },
        "training": {
            "preset": config.preset,
            "steps": config.train.steps,
            "seed": config.seed,
            "spacing_mm": config.views.spacing_mm,
            "data": dataset.digest,
        },
    }


def main(argv) -> None:
    del argv
    cli.setup()
    cli.keep_freed_memory()
    workdir = Path(flags.FLAGS.workdir)
    with signals.listening(loop.saved(workdir)) as stop:
        print(train(flags.FLAGS.config, workdir, stop=stop))


if __name__ == "__main__":
    # Here, so that one script can import another.
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run; made if absent.")
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator("workdir", lambda x: x != "", "a folder expected")
    cli.run(main)
