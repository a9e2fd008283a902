"""Scalars of a run: one JSON object per line, and TensorBoard beside it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import tensorboardX


class Log:
    """Appends to `metrics.jsonl` and `tb/` of a work folder.

    Lines past `resume_step` are dropped on opening: a restarted run repeats them. From
    step 0 a run repeats everything. `silent` writes nothing: of several processes one
    keeps the log.
    """

    def __init__(
        self, workdir: Path | str, *, resume_step: int = 0, silent: bool = False
    ):
        self._silent = silent
        if silent:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [x for x in lines if resume_step and _step_of(x) <= resume_step]
            self._path.write_text("".join(line + "\n" for line in kept))
        self._file = open(self._path, "a")  # noqa: SIM115  closed in close()
        # TensorBoard hides what it has from purge_step on.
        self._board = tensorboardX.SummaryWriter(
            str(Path(workdir) / "tb"), purge_step=resume_step and resume_step + 1
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line; NaN becomes null, for strict readers."""
        if self._silent:
            return
        clean = {
            k: float(v) if math.isfinite(float(v)) else None for k, v in scalars.items()
        }
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for name, value in clean.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if self._silent:
            return
        self._file.close()
        self._board.close()


def _step_of(line: str) -> float:
    """Step of a line; a torn last line counts as past any step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
