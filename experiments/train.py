"""Trains UniReg: one compiled step, resumed exactly by the same command.

    python -m experiments.train --config=experiments/unireg.py:demo --workdir=runs/demo

Writes to the work folder: config.json, checkpoints/, metrics.jsonl, tb/ (TensorBoard),
and at the end weights.safetensors with its model card weights.json. The embedding that
it is trained on, if any, lies there from the start, as embedding.safetensors.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from data_pipeline import loader, store
from experiments import build, cli, launch, loop, recent, signals
from unireg_jax.errors import tell
from unireg_jax.registration import weights as released
from unireg_jax.tasks import TASKS
from unireg_jax.training import checkpoint, evaluate, images, log
from unireg_jax.training import mesh as train_mesh
from unireg_jax.training import state as train_state
from unireg_jax.training import step as train_step


def train(config, workdir: Path, *, stop: signals.Stop | None = None) -> Path:
    """Trains to config.train.steps and returns the path of the weights.

    Args:
        config: from experiments/unireg.py.
        workdir: the run's folder.
        stop: of the command that does nothing else; None: signals are heard once the
            steps begin.

    Raises:
        UserError: exit code 2, 3, 8, 9 or 10; SystemExit 75 after a signal.
    """
    workdir = Path(workdir)
    with launch.first_alone("data"):  # which may have to be made
        changes = checkpoint.check_config(workdir, config.to_dict())
        experiment = build.build(config, workdir)
    mesh, rows = build.devices(config, experiment)
    launch.compare(config, experiment.dataset.digest)
    experiment.dataset.limit(launch.volumes_gib())
    if config.train.eval_pairs:  # refuses a split without pairs, before any work
        loader.make_eval_batches(experiment.dataset, "val")
    state = train_state.make_state(
        experiment.model,
        experiment.tx,
        seed=config.seed,
        averaged=config.train.ema > 0,
    )
    pairs = loader.make_iterator(
        experiment.dataset,
        "train",
        batch_size=rows,
        shard=(jax.process_index(), jax.process_count()),
        seed=config.seed,
        weights=experiment.weights,
        augment=experiment.augment,
        on_fault=config.data.on_fault,
        streams=experiment.streams,
    )
    stream = recent.Followed(pairs)
    with contextlib.ExitStack() as stack:
        with launch.together("work folder"):
            if launch.is_first():
                stack.enter_context(store.lock(store.make_folders(workdir)))
        checkpoints = stack.enter_context(
            contextlib.closing(
                checkpoint.Checkpoints(
                    workdir,
                    run=launch.facts(
                        config,
                        data=experiment.dataset.digest,
                        features=experiment.extractor.digest,
                    ),
                )
            )
        )
        if continued := checkpoints.latest() is not None:
            origin = checkpoint.started_from(workdir)
        else:
            state, origin = _init_from(config.train.init_from, state, experiment.spec)
        state = train_mesh.put_same(state, train_mesh.replicated(mesh))
        if continued:
            state = checkpoints.restore(state, stream, changes=changes)
        changes = [f"step {int(state.step)}: {line}" for line in changes]
        launch.wait("restored")  # all have read the config before it is written
        with launch.together("work folder"):
            if launch.is_first():
                if experiment.embedding:  # the run and its embedding belong together
                    released.copy_weights(
                        experiment.embedding,
                        workdir / build.EMBEDDING,
                        sha256=experiment.extractor.digest,
                    )
                checkpoint.write_config(workdir, config.to_dict(), origin, changes)
            writer = stack.enter_context(
                contextlib.closing(
                    log.Log(
                        workdir,
                        resume_step=int(state.step),
                        silent=not launch.is_first(),
                    )
                )
            )
        # Once, for training and validation: an embedding's weights may be many.
        experiment = experiment._replace(
            extractor=train_mesh.put_same(
                experiment.extractor, train_mesh.replicated(mesh)
            )
        )
        state = loop.run(
            _step(config, experiment, mesh),
            state,
            stream,
            every=loop.every(config.train),
            names=_names(experiment, pairs),
            judge=_judge(config, experiment, mesh),
            checkpoints=checkpoints,
            writer=writer,
            shown=("loss", "ncc", "dice"),
            skip_nonfinite=config.train.skip_nonfinite,
            rate=loop.rate(config.optim),
            stop=stop,
        )
    path = workdir / "weights.safetensors"
    if not launch.is_first():
        return path
    training = {
        "steps": config.train.steps,
        "preset": config.preset,
        "seed": config.seed,
        "init_from": origin,
    }
    released.save_weights(path, state.weights, experiment.spec | {"training": training})
    return path


def _init_from(name: str, state: train_state.TrainState, card: dict[str, Any]):
    """The state at released weights, and their name and digest; as it is without."""
    if not name:
        return state, None
    # Not $UNIREG_WEIGHTS, which may be this user's last training.
    packaged = released.PACKAGE / released.DEFAULT
    path = released.find_weights(packaged if name == "package" else name)
    params, spec = released.load_weights(path)
    released.check_tensors(
        params,
        state.params,
        path,
        network="the network that is to start from them",
        remedy="set config.model as it was for them, or config.train.init_from",
    )
    theirs, ours = map(_features, (spec, card))
    if theirs != ours:  # may be meant
        tell(
            f"warning: {path.name}: these weights joined features {theirs}, this run "
            f"has {ours}: see config.model.features, .combine and .embedding"
        )
    origin = {"name": path.name, "sha256": spec["sha256"]}
    return state.start_from(params), origin


def _features(card: dict[str, Any]) -> str:
    """What a card says of them: "mind concat", "sam concat 16ca37baeaed18f6"."""
    digest = card.get("embedding", {}).get("sha256", "")
    words = [card["features"], card.get("combine", "concat"), digest[:16]]
    return " ".join(words).strip()


def _step(config, experiment: build.Experiment, mesh):
    """step(state, batch), this process's rows of the batch still on the host."""
    step_fn = train_step.make_train_step(
        experiment.loss,
        experiment.tx,
        mesh=mesh,
        accumulate=config.train.accumulate,
        ema=config.train.ema,
        precision=config.model.precision,
        skip_nonfinite=config.train.skip_nonfinite > 0,
    )
    split = train_mesh.pair_sharding(mesh)

    def step(state, batch):
        return step_fn(state, train_mesh.put(batch, split), experiment.extractor)

    return step


def _names(experiment: build.Experiment, stream: loader.PairIterator):
    """names(batch) -> a Row for each of its pairs, with those of other processes.

    Its own are checked against the task of their pair.
    """
    volumes = experiment.dataset.index["volumes"]
    pairs = experiment.dataset.pairs("train")
    made = [kind.name for kind in experiment.streams]

    def check(position, region, pair_type):
        if position >= len(pairs):
            return
        task = pairs[position].task
        if TASKS[task] != (region, pair_type):
            raise ValueError(
                f"pair {position}: region and pair type of {task} expected, got "
                f"{region} and {pair_type}"
            )

    def row(position):
        if position >= len(pairs):
            return recent.Row(f"pair {position}", made[position - len(pairs)])
        pair = pairs[position]
        ends = tuple(volumes[i]["id"] for i in (pair.fixed, pair.moving))
        return recent.Row(f"pair {position}", pair.task, ends)

    def names(batch):
        parts = (batch.pair, batch.region, batch.pair_type)
        for own in zip(*parts, strict=True):
            check(*map(int, own))
        alone = jax.process_count() == 1
        return [row(int(n)) for n in (batch.pair if alone else stream.last_pairs())]

    return names


def _judge(config, experiment: build.Experiment, mesh):
    """judge(params, border, brief) over pairs spread over those of `val`.

    The devices of training share the pairs; every process reads all of them. Pictures
    are of the first pair of each task. Without config.train.eval_pairs nothing is read.
    """
    dataset = experiment.dataset
    eval_step = train_step.make_eval_step(
        lambda params, *args: build.apply(experiment.model, params, *args),
        num_labels=experiment.num_labels,
        mesh=mesh,
        precision=config.model.precision,
        planes=config.train.image_every > 0,
    )
    split = train_mesh.pair_sharding(mesh)

    def batches(border, count):
        if not config.train.eval_pairs:
            return
        for example in loader.make_eval_batches(dataset, "val", pairs_per_task=count):
            border()
            yield example

    def judge(params, border, *, brief):
        rows = evaluate.evaluate(
            lambda params, batch, extractor: eval_step(
                params, train_mesh.put_same(batch, split), extractor
            ),
            params,
            experiment.extractor,
            batches(border, 1 if brief else config.train.eval_pairs),
            at_once=mesh.shape["data"],
        )
        scalars = {
            f"val/{name}/{task}": value
            for task, values in evaluate.summarize(rows).items()
            for name, value in values.items()
        }
        for task, values in evaluate.per_label(rows, dataset.label_names).items():
            scalars |= {f"val/dsc/{task}/{label}": v for label, v in values.items()}
        drawn = [row for row in rows if "planes" in row]
        return loop.Judged(
            scalars,
            {f"pair/{row['task']}": images.draw_pair(row["planes"]) for row in drawn},
        )

    return judge


def main(argv) -> None:
    del argv
    cli.setup()
    cli.keep_freed_memory()
    config = flags.FLAGS.config
    workdir = Path(flags.FLAGS.workdir)
    with signals.listening(loop.saved(workdir)) as stop:
        launch.begin(watchdog_s=config.train.watchdog_s)
        stop.listen()  # JAX has a handler of its own for several processes
        with launch.watched(config.train.watchdog_s):
            print(train(config, workdir, stop=stop))


if __name__ == "__main__":
    # Here, so that one script can import another.
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run; made if absent.")
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator("workdir", lambda x: x != "", "a folder expected")
    cli.run(main)
