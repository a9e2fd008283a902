"""The loop that every training shares: steps, log lines, validation, checkpoints.

A signal ends it at the next step's end, with a checkpoint.
"""

import collections
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import launch
from unireg_jax.errors import NUMERICAL, PREEMPTED, USAGE, UserError
from unireg_jax.training import checkpoint, log
from unireg_jax.training.state import TrainState


class Every(NamedTuple):
    """Steps in all, and between two of each kind.

    Attributes:
        steps: in all.
        log: between two log lines.
        evaluate: between two validations; one more before the first step and after the
            last.
        save: between two checkpoints; one more at the end.
    """

    steps: int
    log: int
    evaluate: int
    save: int


def every(train: Any) -> Every:
    """Reads it from the section `train` of a config."""
    return Every(train.steps, train.log_every, train.eval_every, train.checkpoint_every)


def run(
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    stream: Any,
    *,
    every: Every,
    names: Callable[[Any], Sequence[tuple[str, str]]],
    validate: Callable[[Any], dict[str, float]],
    checkpoints: checkpoint.Checkpoints,
    writer: log.Log,
    shown: Sequence[str] = ("loss",),
) -> TrainState:
    """Steps from where `state` is to the end, or to a signal.

    Args:
        step_fn: step(state, batch) -> (state, scalars); among the scalars loss,
            grad_norm and param_norm.
        state: where to start, on its devices.
        stream: Grain iterator, at the state's step.
        every: how many steps, and when to do what.
        names: batch -> what it holds, as (name, task), for messages and means.
        validate: validate(params) -> scalars.
        checkpoints: where state and stream are saved.
        writer: takes the scalars.
        shown: scalars for the person who watches.

    Returns:
        The state at the end.

    Raises:
        UserError: `field_nonfinite`, exit code 8: nothing of that step was saved;
            `schema`, exit code 2: the state is beyond the last step.
        SystemExit: 75 after a signal; the state is saved.
    """
    start = int(state.step)
    if start > every.steps:
        raise UserError(
            "schema",
            f"config.train.steps: {start} or more expected, as many as the run has "
            f"done, got {every.steps}; raise it, or give another --workdir",
            USAGE,
        )
    with _stop_on_signal() as stop:
        state = _steps(
            step_fn,
            state,
            stream,
            every,
            _Recent(names),
            validate,
            checkpoints,
            writer,
            shown,
            stop,
        )
    if (n := int(state.step)) < every.steps and n >= start:
        print(f"stopped at step {n}; run again to go on", file=sys.stderr)
        sys.exit(PREEMPTED)
    return state


def _steps(
    step_fn, state, stream, every, recent, validate, checkpoints, writer, shown, stop
):
    start, total = int(state.step), every.steps
    stop = launch.Stop(stop)
    if start == 0:  # what the run starts from
        writer.write(0, validate(state.weights))
    with tqdm(total=total, initial=start, disable=not sys.stderr.isatty()) as bar:
        for n in range(start + 1, total + 1):
            batch = next(stream)
            state, scalars = step_fn(state, batch)
            recent.add(n, batch, scalars)
            last = n == total or stop.agreed()
            logs = n % every.log == 0 or last
            validates = n % every.evaluate == 0 or n == total
            saves = n % every.save == 0 or last
            # The previous step's numbers are fetched while this step runs; this
            # step's too before anything of it is written.
            recent.check(behind=0 if logs or validates or saves else 1)
            if logs:
                means = recent.flush()
                writer.write(n, means)
                _report(bar, n, total, {k: means.get(f"train/{k}") for k in shown})
            bar.update()
            if validates:
                writer.write(n, validate(state.weights))
            if saves:
                checkpoints.save(state, stream)
            if last:
                break
    return state


class _Recent:
    """Means over the steps since the last line, overall and per task."""

    def __init__(self, names: Callable[[Any], Sequence[tuple[str, str]]]):
        self._names = names
        self._waiting: collections.deque = collections.deque()
        self._values: dict[str, list[float]] = {}

    def add(self, n, batch, scalars) -> None:
        """Takes a step's scalars, which may still be computed."""
        self._waiting.append((n, self._names(batch), scalars))

    def check(self, *, behind: int) -> None:
        """Fetches all but the last `behind` steps and refuses what is not finite."""
        while len(self._waiting) > behind:
            self._fetch(*self._waiting.popleft())

    def _fetch(self, n, names, scalars) -> None:
        scalars = {k: float(v) for k, v in jax.device_get(scalars).items()}
        loss, gradient, size = (scalars[k] for k in ("loss", "grad_norm", "param_norm"))
        if not np.isfinite([loss, gradient, size]).all():
            where = ", ".join(f"{name} ({task})" for name, task in names)
            raise UserError(
                "field_nonfinite",
                f"step {n}: loss {loss}, norm of the gradient {gradient}, of the "
                f"parameters {size} on {where}; nothing of it was saved: lower "
                "optim.lr or set optim.clip_norm, with another --workdir",
                NUMERICAL,
            )
        for name, value in scalars.items():
            if not np.isnan(value):
                self._values.setdefault(f"train/{name}", []).append(value)
        for task in {task for _, task in names}:
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


def _report(bar: tqdm, n: int, total: int, scalars: dict[str, float | None]) -> None:
    """On the bar of a terminal, a log line elsewhere."""
    shown = {k: f"{v:.4f}" for k, v in scalars.items() if v is not None}
    if bar.disable:
        text = " ".join(f"{k} {v}" for k, v in shown.items())
        print(f"step {n}/{total} {text}", file=sys.stderr, flush=True)
    else:
        bar.set_postfix(shown)
