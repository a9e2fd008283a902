"""What the loop knows of its steps: means, spread of the losses, what was not finite.

All of it is in the stream's memory, which is saved with every checkpoint: a continued
run has the means, warnings and counts of one that was never stopped.
"""

import collections
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from unireg_jax.errors import NUMERICAL, UserError, tell
from unireg_jax.training import log, manifest

_SIGMAS = 6  # beyond them a loss is an explosion
_LEARN = 20  # losses of a task before one is judged
_RATE = 0.02  # weight of the newest loss in mean and variance
_LEAST = 0.01  # of the mean, the least standard deviation that is believed


class Row(NamedTuple):
    """What a row of a batch holds, for messages, dumps and means.

    Attributes:
        name: of the pair or volume.
        task: its task, or the stream of made pairs.
        volumes: ids of its volumes.
    """

    name: str
    task: str
    volumes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({', '.join((self.task, *self.volumes))})"


class Followed(grain.DatasetIterator):
    """A stream of batches that carries the loop's memory in its state.

    Attributes:
        memory: of JSON's types; empty at the start of a run.
    """

    def __init__(self, stream: grain.DatasetIterator):
        super().__init__(stream)
        self.memory: dict[str, Any] = {}

    def __next__(self) -> Any:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        """The stream's state and the memory as it is now."""
        memory = json.loads(json.dumps(self.memory, allow_nan=False))
        return {**self._parent.get_state(), "loop": memory}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state; one without memory, of an earlier release, has none."""
        own = dict(state)
        self.memory = own.pop("loop", {})
        self._parent.set_state(own)


class Recent:
    """The steps since the last log line."""

    def __init__(
        self,
        stream: Followed,
        writer: log.Log,
        *,
        names: Callable[[Any], Sequence[Row]],
        every: int,
        start: int = 0,
        skip: int = 0,
        rate: Callable[[int], float] | None = None,
    ):
        """Goes on from what the stream remembers.

        Args:
            stream: with the memory.
            writer: takes warnings; its folder the dumps.
            names: batch -> a Row for each of its rows, in all processes.
            every: steps of a log interval: in one of them, one warning.
            start: steps done.
            skip: steps of the run that may be skipped because they are not finite.
            rate: step -> learning rate, for dumps.
        """
        self._memory = stream.memory
        for key, value in _NOTHING.items():
            self._memory.setdefault(key, type(value)(value))
        self._memory.setdefault("judged", start or -1)
        self._writer, self._names, self._every = writer, names, every
        self._skip, self._rate = skip, rate
        self._waiting: collections.deque = collections.deque()

    def add(self, n: int, batch: Any, scalars: dict[str, jax.Array]) -> int:
        """Takes a step's scalars, which may still be computed.

        Returns:
            The rows of this process.
        """
        rows = self._names(batch)
        self._waiting.append((n, rows, scalars))
        return len(rows) // jax.process_count()

    def busy(self) -> bool:
        """Whether the newest step is still being computed; does not wait."""
        return bool(self._waiting) and not self._waiting[-1][2]["loss"].is_ready()

    def check(self, *, behind: int) -> None:
        """Fetches all but the last `behind` steps and refuses what is not finite.

        Raises:
            UserError: `field_nonfinite`, exit code 8.
        """
        while len(self._waiting) > behind:
            self._fetch(*self._waiting.popleft())

    def flush(self) -> dict[str, float]:
        """Means since the last call, and the running mean and spread of the losses."""
        means = {k: total / n for k, (total, n) in self._memory["sums"].items()}
        for task, (mean, variance, _) in self._memory["spread"].items():
            means[f"train/ema/{task}"] = mean
            means[f"train/ema_sigma/{task}"] = math.sqrt(variance)
        if self._skip:
            means["train/skipped"] = float(self._memory["skipped"])
        if self._memory["exploded"]:
            means["train/exploded"] = float(self._memory["exploded"])
        self._memory["sums"].clear()
        self._memory["exploded"] = 0
        return means

    @property
    def judged(self) -> int:
        """Step of the last validation; -1: none yet."""
        return self._memory["judged"]

    @judged.setter
    def judged(self, step: int) -> None:
        self._memory["judged"] = step

    def _fetch(self, n: int, rows: Sequence[Row], scalars) -> None:
        scalars = {k: float(v) for k, v in jax.device_get(scalars).items()}
        skipped = scalars.pop("skipped", 0.0) > 0
        numbers = [scalars[k] for k in ("loss", "grad_norm", "param_norm")]
        if skipped or not np.isfinite(numbers).all():
            self._refuse(n, rows, scalars, skipped)
            return
        for name, value in scalars.items():
            if not math.isnan(value):
                self._add(f"train/{name}", value)
        for task in dict.fromkeys(row.task for row in rows):
            self._add(f"train/loss/{task}", scalars["loss"])
            if self._explodes(task, scalars["loss"]):
                self._warn(n, rows, task, scalars["loss"])
            self._learn(task, scalars["loss"])

    def _add(self, name: str, value: float) -> None:
        total, count = self._memory["sums"].get(name, (0.0, 0))
        self._memory["sums"][name] = (total + value, count + 1)

    def _limit(self, task: str) -> float:
        """The greatest loss of a task that is no explosion."""
        mean, variance, count = self._memory["spread"].get(task, (0.0, 0.0, 0))
        sigma = max(math.sqrt(variance), _LEAST * abs(mean))
        return mean + _SIGMAS * sigma if count >= _LEARN else math.inf

    def _explodes(self, task: str, loss: float) -> bool:
        return loss > self._limit(task)

    def _learn(self, task: str, loss: float) -> None:
        """Moves mean and variance; an explosion counts only as far as the limit."""
        loss = min(loss, self._limit(task))
        mean, variance, count = self._memory["spread"].get(task, (loss, 0.0, 0))
        rate = max(_RATE, 1 / (count + 1))
        change = loss - mean
        variance = (1 - rate) * (variance + rate * change * change)
        self._memory["spread"][task] = (mean + rate * change, variance, count + 1)

    def _warn(self, n: int, rows: Sequence[Row], task: str, loss: float) -> None:
        self._memory["exploded"] += 1
        interval = (n - 1) // self._every
        if self._memory["warned"] == interval:
            return
        self._memory["warned"] = interval
        mean, variance, _ = self._memory["spread"][task]
        message = (
            f"step {n}: loss {loss:.4g} of {task} is an explosion: its mean is "
            f"{mean:.4g}, its standard deviation {math.sqrt(variance):.2g}; on "
            f"{_listed(rows)}"
        )
        tell(f"warning: {message}")
        self._writer.warn(n, message)

    def _refuse(self, n, rows, scalars, skipped) -> None:
        """Dumps a step that is not finite; ends the run unless it may be skipped."""
        what = (
            f"step {n}: loss {scalars['loss']}, norm of the gradient "
            f"{scalars['grad_norm']}, of the parameters {scalars['param_norm']} on "
            f"{_listed(rows)}; nothing of it was saved"
        )
        where = self._dump(n, rows, scalars, skipped)
        if skipped:
            self._memory["skipped"] += 1
            count = self._memory["skipped"]
            if count <= self._skip:
                message = f"{what}: skipped, {count} of {self._skip} ({where})"
                tell(f"warning: {message}")
                self._writer.warn(n, message)
                return
            what += f", and {self._skip} steps were skipped already"
        raise UserError(
            "field_nonfinite",
            f"{what} ({where}): go on past it with --config.train.skip_nonfinite="
            f"{self._skip + 1}, or lower optim.lr or set optim.clip_norm, with another "
            "--workdir",
            NUMERICAL,
        )

    def _dump(self, n, rows, scalars, skipped) -> str:
        """Writes all that is known of a step; returns where, for the message."""
        process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        name = f"nonfinite_step_{n}{process}.json"
        finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        content = {
            "step": n,
            "skipped": skipped,
            "rows": [row._asdict() for row in rows],
            "scalars": finite,
            "nonfinite": {k: str(scalars[k]) for k, v in finite.items() if v is None},
            "learning_rate": self._rate(n) if self._rate else None,
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        try:
            manifest.write_file(Path(self._writer.workdir) / name, text)
        except OSError as error:
            return f"{name} cannot be written: {error.strerror}"
        return f"see {name}"


# What a stream remembers at the start.
_NOTHING = {
    "sums": {},  # since the last log line: name -> (sum, count)
    "spread": {},  # task -> (mean, variance, count) of its losses
    "exploded": 0,  # steps since the last log line
    "warned": -1,  # log interval of the last warning
    "skipped": 0,  # steps of the run
}


def _listed(rows: Sequence[Row]) -> str:
    return ", ".join(map(str, rows))
