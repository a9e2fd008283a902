"""Trains UniReg: one compiled step, resumed exactly by the same command.

    python -m experiments.train --config=experiments/unireg.py:demo --workdir=runs/demo

Writes to the work folder: config.json, checkpoints/, metrics.jsonl, tb/ (TensorBoard),
and weights.safetensors with its model card weights.json at the end.
"""

import collections
import contextlib
import signal
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from data_pipeline import loader
from experiments import build, cli
from unireg_jax.errors import NUMERICAL, PREEMPTED, UserError
from unireg_jax.registration import weights as released
from unireg_jax.training import checkpoint, evaluate, log
from unireg_jax.training import state as train_state
from unireg_jax.training import step as train_step


def train(config, workdir: Path) -> Path:
    """Trains to config.train.steps and returns the path of the weights.

    Raises:
        UserError: exit code 2, 3, 8, 9 or 10; SystemExit 75 after a signal.
    """
    workdir = Path(workdir)
    checkpoint.check_config(workdir, config.to_dict())
    experiment = build.build(config, workdir)
    mesh = train_step.make_mesh()
    state = train_state.make_state(experiment.model, experiment.tx, seed=config.seed)
    stream = loader.make_iterator(
        experiment.dataset,
        "train",
        batch_size=config.data.batch_size * mesh.shape["data"],
        seed=config.seed,
        weights=experiment.weights,
    )
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            contextlib.closing(checkpoint.Checkpoints(workdir))
        )
        if continued := checkpoints.latest() is not None:
            origin = checkpoint.started_from(workdir)
        else:
            state, origin = _init_from(config.train.init_from, state)
        state = jax.device_put(state, train_step.replicated(mesh))
        if continued:
            state = checkpoints.restore(state, stream)
        checkpoint.write_config(workdir, config.to_dict(), origin)
        writer = stack.enter_context(
            contextlib.closing(log.Log(workdir, resume_step=int(state.step)))
        )
        stop = stack.enter_context(_stop_on_signal())
        state = _loop(
            config, experiment, mesh, state, stream, checkpoints, writer, stop
        )
    total = config.train.steps
    if int(state.step) < total:
        print(f"stopped at step {int(state.step)}; run again to go on", file=sys.stderr)
        sys.exit(PREEMPTED)
    path = workdir / "weights.safetensors"
    training = {
        "steps": total,
        "preset": config.preset,
        "seed": config.seed,
        "init_from": origin,
    }
    released.save_weights(path, state.params, experiment.spec | {"training": training})
    return path


def _init_from(name: str, state: train_state.TrainState):
    """The state at released weights, and their name and digest; as it is without."""
    if not name:
        return state, None
    path = released.find_weights(None if name == "package" else name)
    params, spec = released.load_weights(path)
    released.check_tensors(params, state.params, path)
    origin = {"name": path.name, "sha256": spec["sha256"]}
    return state._replace(params=params), origin


def _loop(config, experiment, mesh, state, stream, checkpoints, writer, stop):
    """Steps from where `state` is to the end, or to a signal."""
    step_fn = train_step.make_train_step(experiment.loss, experiment.tx, mesh=mesh)
    validate = _validator(config, experiment)
    recent = _Recent([pair.task for pair in experiment.dataset.pairs("train")])
    start, total = int(state.step), config.train.steps
    extractor = jax.device_put(experiment.extractor, train_step.replicated(mesh))
    if start == 0:  # what the run starts from
        writer.write(0, validate(state.params))
    with tqdm(total=total, initial=start, disable=not sys.stderr.isatty()) as bar:
        for n in range(start + 1, total + 1):
            batch = next(stream)
            state, scalars = step_fn(
                state, jax.device_put(batch, train_step.batch_sharding(mesh)), extractor
            )
            recent.add(n, batch.pair, scalars)
            last = n == total or stop.is_set()
            logs = n % config.train.log_every == 0 or last
            validates = n % config.train.eval_every == 0 or n == total
            saves = n % config.train.checkpoint_every == 0 or last
            # The previous step's numbers are fetched while this step runs; this
            # step's too before anything of it is written.
            recent.check(behind=0 if logs or validates or saves else 1)
            if logs:
                means = recent.flush()
                writer.write(n, means)
                _report(bar, n, total, means)
            bar.update()
            if validates:
                writer.write(n, validate(state.params))
            if saves:
                checkpoints.save(state, stream)
            if last:
                break
    return state


class _Recent:
    """Means over the steps since the last line, overall and per task."""

    def __init__(self, tasks: list[str]):
        self._tasks = tasks
        self._waiting: collections.deque = collections.deque()
        self._values: dict[str, list[float]] = {}

    def add(self, n, pairs, scalars) -> None:
        """Takes a step's scalars, which may still be computed."""
        self._waiting.append((n, pairs, scalars))

    def check(self, *, behind: int) -> None:
        """Fetches all but the last `behind` steps and refuses what is not finite."""
        while len(self._waiting) > behind:
            self._fetch(*self._waiting.popleft())

    def _fetch(self, n, pairs, scalars) -> None:
        scalars = {k: float(v) for k, v in jax.device_get(scalars).items()}
        loss, gradient, size = (scalars[k] for k in ("loss", "grad_norm", "param_norm"))
        if not np.isfinite([loss, gradient, size]).all():
            where = ", ".join(f"{p} ({self._tasks[p]})" for p in pairs)
            raise UserError(
                "field_nonfinite",
                f"step {n}: loss {loss}, norm of the gradient {gradient}, of the "
                f"parameters {size} on pair {where}; nothing of it was saved: lower "
                "optim.lr or set optim.clip_norm, with another --workdir",
                NUMERICAL,
            )
        for name, value in scalars.items():
            if not np.isnan(value):
                self._values.setdefault(f"train/{name}", []).append(value)
        for task in {self._tasks[p] for p in pairs}:
            self._values.setdefault(f"train/loss/{task}", []).append(scalars["loss"])

    def flush(self) -> dict[str, float]:
        means = {k: float(np.mean(v)) for k, v in self._values.items()}
        self._values.clear()
        return means


@contextlib.contextmanager
def _stop_on_signal():
    """An Event that SIGTERM or SIGINT sets: the loop saves at the next step's end."""
    stop = threading.Event()
    before = {}

    def handle(number, frame):
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # a second signal acts at once

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _validator(config, experiment: build.Experiment):
    """validate(params) -> scalars per task, over pairs spread over those of `val`."""
    dataset = experiment.dataset
    eval_step = train_step.make_eval_step(
        lambda params, *args: build.apply(experiment.model, params, *args),
        num_labels=experiment.num_labels,
    )

    def validate(params):
        batches = loader.make_eval_batches(
            dataset, "val", pairs_per_task=config.train.eval_pairs
        )
        rows = evaluate.evaluate(eval_step, params, experiment.extractor, batches)
        scalars = {
            f"val/{name}/{task}": value
            for task, values in evaluate.summarize(rows).items()
            for name, value in values.items()
        }
        for task, values in evaluate.per_label(rows, dataset.label_names).items():
            scalars |= {f"val/dsc/{task}/{label}": v for label, v in values.items()}
        return scalars

    return validate


def _report(bar: tqdm, n: int, total: int, means: dict[str, float]) -> None:
    """Loss on the bar of a terminal, a log line elsewhere."""
    shown = {
        k.removeprefix("train/"): f"{v:.4f}"
        for k, v in means.items()
        if k in ("train/loss", "train/ncc", "train/dice")
    }
    if bar.disable:
        text = " ".join(f"{k} {v}" for k, v in shown.items())
        print(f"step {n}/{total} {text}", file=sys.stderr, flush=True)
    else:
        bar.set_postfix(shown)


def main(argv) -> None:
    del argv
    cli.setup()
    print(train(flags.FLAGS.config, Path(flags.FLAGS.workdir)))


if __name__ == "__main__":
    # Here, so that one script can import another.
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run; made if absent.")
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator("workdir", lambda x: x != "", "a folder expected")
    cli.run(main)
