"""The loop that every training shares: steps, log lines, validation, checkpoints.

A signal ends it at the next step's end, with a checkpoint. Nothing in it waits for the
device but what needs its numbers: a log line, a validation, a checkpoint.
"""

import contextlib
import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import clock, launch, signals
from experiments.recent import Followed, Recent, Row
from unireg_jax.errors import PREEMPTED, USAGE, UserError, on_terminal, tell
from unireg_jax.training import checkpoint, log, optimizer
from unireg_jax.training.state import TrainState


class Every(NamedTuple):
    """Steps in all, and between two of each kind.

    Attributes:
        steps: in all.
        log: between two log lines.
        evaluate: between two validations; one more before the first step and after the
            last.
        save: between two checkpoints; one more at the end.
        draw: between two sets of pictures, from before the first step on; 0: none.
    """

    steps: int
    log: int
    evaluate: int
    save: int
    draw: int = 0


def every(train: Any) -> Every:
    """Reads it from the section `train` of a config."""
    return Every(
        train.steps,
        train.log_every,
        train.eval_every,
        train.checkpoint_every,
        train.get("image_every", 0),
    )


def rate(optim: Any) -> Callable[[int], float]:
    """rate(step) -> learning rate of the step, from the section `optim` of a config."""
    schedule = optimizer.make_schedule(optim.lr, optim.warmup_steps, optim.decay_steps)
    return lambda n: float(schedule(n - 1))


def saved(workdir: Path | str) -> Callable[[], bool]:
    """Whether a run has a checkpoint, asked of the disk alone, at any moment."""
    folder = Path(workdir) / checkpoint.FOLDER
    return lambda: any(path.name.isdigit() for path in folder.glob("*"))


class Judged(NamedTuple):
    """A validation.

    Attributes:
        scalars: for the log; names begin with `log.VALIDATION`.
        pictures: name -> [H, W, 3] uint8, if it can draw.
    """

    scalars: Mapping[str, float]
    pictures: Mapping[str, np.ndarray]


class _StoppedError(Exception):
    """A signal came within a validation."""


def run(
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    stream: Followed,
    *,
    every: Every,
    names: Callable[[Any], Sequence[Row]],
    judge: Callable[..., Judged],
    checkpoints: checkpoint.Checkpoints,
    writer: log.Log,
    shown: Sequence[str] = ("loss",),
    skip_nonfinite: int = 0,
    rate: Callable[[int], float] | None = None,
    stop: signals.Stop | None = None,
) -> TrainState:
    """Steps from where `state` is to the end, or to a signal.

    Args:
        step_fn: step(state, batch) -> (state, scalars); among the scalars loss,
            grad_norm and param_norm, and skipped where it may skip.
        state: where to start, on its devices.
        stream: at the state's step.
        every: how many steps, and when to do what.
        names: batch -> a Row for each of its rows.
        judge: judge(params, border, brief) -> Judged. It calls border() between two
            pieces of work, which may end it. If brief, pictures are enough.
        checkpoints: where state and stream are saved.
        writer: takes scalars, warnings and pictures.
        shown: scalars for the person who watches.
        skip_nonfinite: steps of the run that may be skipped, by `step_fn`.
        rate: step -> learning rate, for the dump of one that is not finite.
        stop: of the command that does nothing else; None: signals are heard from here
            on.

    Returns:
        The state at the end.

    Raises:
        UserError: `field_nonfinite`, exit code 8: nothing of that step was saved;
            `schema`, exit code 2: the state is beyond the last step.
        SystemExit: 75 after a signal; the state is saved. 128 + its number before the
            first step.
    """
    start = int(state.step)
    if start > every.steps:
        raise UserError(
            "schema",
            f"config.train.steps: {start} or more expected, as many as the run has "
            f"done, got {every.steps}; raise it, or give another --workdir",
            USAGE,
        )
    began = clock.process_began() if stop else None
    with contextlib.ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(signals.listening())
        stop.listen()
        recent = Recent(
            stream,
            writer,
            names=names,
            every=every.log,
            start=start,
            skip=skip_nonfinite,
            rate=rate,
        )
        times = stack.enter_context(
            contextlib.closing(clock.Clock(writer, step=start, began=began))
        )
        loop = _Loop(
            step_fn,
            stream,
            every,
            recent,
            judge,
            checkpoints,
            writer,
            shown,
            stop,
            launch.Stop(stop).agreed,
            times,
        )
        state, stopped = loop.steps(state)
    if stopped:
        text = f"stopped at step {int(state.step)}; run again to go on"
        tell(text)
        sys.exit(PREEMPTED if int(state.step) else 128 + stop.number)
    return state


class _Loop(NamedTuple):
    """What the steps need; see `run`."""

    step_fn: Callable
    stream: Followed
    every: Every
    recent: Recent
    judge: Callable
    checkpoints: checkpoint.Checkpoints
    writer: log.Log
    shown: Sequence[str]
    stop: signals.Stop
    agreed: Callable[[], bool]
    times: clock.Clock

    def steps(self, state: TrainState) -> tuple[TrainState, bool]:
        """The state at the end, and whether a signal ended it before."""
        every, recent, times = self.every, self.recent, self.times
        start, total = int(state.step), every.steps
        times.lap("startup")
        # What the run starts from, or what a signal kept it from.
        if self._judges(start) and recent.judged < start:
            # A process that was killed since the last save may have made up for it.
            self.writer.drop(start, log.VALIDATION)
            if not self._judge(start, state):
                return state, True
        with tqdm(total=total, initial=start, disable=not on_terminal()) as bar:
            for n in range(start + 1, total + 1):
                batch = next(self.stream)
                # Data that came while the device was busy cost nothing.
                waited = 0.0 if recent.busy() else times.lap("data")
                state, scalars = self.step_fn(state, batch)
                rows = recent.add(n, batch, scalars)
                logs = n % every.log == 0 or n == total
                # The previous step's numbers are fetched while this step runs; this
                # step's too before anything of it is written.
                recent.check(behind=0 if logs or self._judges(n) else 1)
                self.checkpoints.check()
                if n == start + 1:
                    recent.check(behind=0)
                    self.stop.started()
                times.step(n, rows * jax.process_count(), waited=waited)
                if logs:
                    self._log(bar, n, recent.flush())
                bar.update()
                finished = self._judge(n, state)
                last = self.agreed() or n == total
                if last or n % every.save == 0:
                    recent.check(behind=0)
                    self.writer.sync()  # a checkpoint has all lines up to it
                    self.checkpoints.save(state, self.stream)
                    times.lap("save")
                if last:
                    return state, n < total or not finished
        return state, False

    def _judges(self, n: int) -> bool:
        return n % self.every.evaluate == 0 or n in (0, self.every.steps)

    def _judge(self, n: int, state: TrainState) -> bool:
        """Validates and draws, if it is time; False: a signal came before the end."""
        judges = self._judges(n)
        draws = self.every.draw > 0 and n % self.every.draw == 0
        if not judges and not draws:
            return True
        try:
            judged = self.judge(state.weights, self._border, brief=not judges)
        except _StoppedError:
            return False
        if judges:
            self.writer.write(n, judged.scalars)
            self.recent.judged = n
        if draws:
            self.writer.draw(n, judged.pictures)
        self.times.lap("validation")
        return True

    def _border(self) -> None:
        # Several processes judge together, the same pairs: none leaves the others.
        if self.agreed():
            raise _StoppedError

    def _log(self, bar: tqdm, n: int, means: dict[str, float]) -> None:
        numbers = self.times.scalars()
        self.writer.write(n, means | numbers)
        shown = {k: means.get(f"train/{k}") for k in self.shown}
        prefix = "train/loss/"
        shown |= {k.removeprefix(prefix): v for k, v in means.items() if prefix in k}
        shown["pairs/s"] = numbers.get(f"{log.TIMES}pairs_per_s")
        shown["left"] = self.times.left(self.every.steps - n)
        _report(bar, n, self.every.steps, shown)


def _report(bar: tqdm, n: int, total: int, shown: dict[str, float | None]) -> None:
    """On the bar of a terminal, a log line elsewhere."""
    texts = {k: f"{v:.4f}" for k, v in shown.items() if v is not None}
    if shown.get("pairs/s") is not None:
        texts["pairs/s"] = f"{shown['pairs/s']:.3g}"
    if shown.get("left") is not None:
        texts["left"] = str(datetime.timedelta(seconds=round(shown["left"])))
    if bar.disable:
        text = " ".join(f"{k} {v}" for k, v in texts.items())
        tell(f"step {n}/{total} {text}")  # a dead pipe is no reason to end a run
    else:
        texts.pop("left", None)  # the bar's own
        bar.set_postfix(texts)
