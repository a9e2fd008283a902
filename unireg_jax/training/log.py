"""Log of a run: one JSON object per line, and TensorBoard beside it.

A log that cannot be written never ends a run: what has happened is said once, lines
wait in memory, and the run goes on.
"""

import contextlib
import errno
import io
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from unireg_jax.errors import STORAGE, UserError, shown, tell
from unireg_jax.training import images, manifest

NAME = "metrics.jsonl"
TIMES = "time/"  # prefix of what differs between two runs that are otherwise the same
VALIDATION = "val/"  # prefix of what a validation found


class Log:
    """Appends to `metrics.jsonl` and `tb/` of a work folder.

    Lines past `resume_step` are dropped on opening: a restarted run repeats them. From
    step 0 a run repeats everything. `silent` writes nothing: of several processes one
    keeps the log.

    Attributes:
        workdir: the run's folder.
        silent: whether it writes nothing.
        times: the last `time/` numbers of the lines that were kept.
    """

    def __init__(
        self, workdir: Path | str, *, resume_step: int = 0, silent: bool = False
    ):
        """Opens the log.

        Raises:
            UserError: `storage`, exit code 6.
        """
        self.workdir = Path(workdir)
        self.times: dict[str, float] = {}
        self.silent = silent
        if silent:
            return
        with _refused(self.workdir):
            self._lines = _Lines(self.workdir / NAME, self._keep(resume_step))
            self._board = _Board(self.workdir / "tb", resume_step)

    def _keep(self, resume_step: int) -> str | None:
        """The lines that stay, or None where all do."""
        path = self.workdir / NAME
        if not path.exists():
            return None
        text = path.read_text(encoding="utf-8", errors="replace")
        kept = ""
        for line in text.splitlines():
            found = _parse(line)
            if resume_step and found is not None and found["step"] <= resume_step:
                kept += line + "\n"
                times = {k: v for k, v in found.items() if k.startswith(TIMES)}
                self.times = times or self.times
        return None if kept == text else kept

    def drop(self, step: int, prefix: str) -> None:
        """Takes back the lines of a step that have such a key; TensorBoard's stay.

        Raises:
            UserError: `storage`, exit code 6; the file is as it was.
        """
        if not self.silent:
            with _refused(self.workdir):
                self._lines.drop(step, prefix)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line; NaN becomes null, for strict readers."""
        if self.silent:
            return
        clean = {
            k: float(v) if math.isfinite(float(v)) else None for k, v in scalars.items()
        }
        self._lines.add({"step": step, **clean})
        known = {k: v for k, v in clean.items() if v is not None}
        self._board.add("scalars", step, known)

    def warn(self, step: int, message: str) -> None:
        """Writes a line with the key `warning`."""
        if self.silent:
            return
        self._lines.add({"step": step, "warning": message})
        self._board.add("text", step, "warning", message)

    def draw(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Gives TensorBoard pictures [H, W, 3] uint8."""
        if self.silent:
            return
        for name, rgb in pictures.items():
            png = images.encode_png(rgb)
            self._board.add("image", step, name, png)

    def sync(self) -> None:
        """Returns when all lines are on the disk, as far as it takes them."""
        if not self.silent:
            self._lines.sync()
            self._board.sync()

    def close(self) -> None:
        """Flushes both."""
        if not self.silent:
            self._lines.close()
            self._board.close()


class _Lines:
    """Appends whole lines to a file; those that cannot be written wait."""

    def __init__(self, path: Path, instead: str | None):
        self._path = path
        if instead is not None:
            manifest.write_file(path, instead)
        self._waiting: list[bytes] = []
        self._failed = False
        self._file = self._open()

    def _open(self) -> io.FileIO:
        return open(self._path, "ab", buffering=0)

    def add(self, line: Mapping) -> None:
        self._waiting.append((json.dumps(line, allow_nan=False) + "\n").encode())
        try:
            if not self._is_there():  # moved away by log rotation, or deleted
                self._file.close()
                self._file = self._open()
            _append(self._file, b"".join(self._waiting))
        except OSError as error:
            if not self._failed:
                _warn(f"{NAME} cannot be written ({error.strerror}); its lines wait")
            self._failed = True
            return
        self._waiting.clear()
        if self._failed:
            _warn(f"{NAME} can be written again; nothing of it was lost")
        self._failed = False

    def drop(self, step: int, prefix: str) -> None:
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if not _is_of(line, step, prefix)]
        if len(kept) < len(lines):
            manifest.write_file(self._path, "".join(kept))  # `add` will open it

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def sync(self) -> None:
        _sync(self._file, NAME)

    def close(self) -> None:
        self.sync()
        self._file.close()


class _Board:
    """TensorBoard's file, begun with the first event.

    What makes the events is imported then: tensorboardX imports PyTorch wherever it is
    installed, which would be a tenth of the time to the first step.
    """

    def __init__(self, folder: Path, resume_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # A name of its own for every start, and for two within a second.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._path = folder / name
        self._resume_step = resume_step
        self._file: io.FileIO | None = None
        self._failed = False

    def add(self, kind: str, step: int, *content) -> None:
        """Writes an event, by the function of events.py; lost where that fails."""
        from unireg_jax.training import events

        event = getattr(events, kind)(time.time(), step, *content)
        try:
            if self._file is None:
                self._begin(events)
            _append(self._file, events.record(event))
        except OSError as error:
            if not self._failed:
                _warn(f"tb cannot be written ({error.strerror}); steps are missing")
            self._failed = True

    def _begin(self, events) -> None:
        now, after = time.time(), self._resume_step + 1
        first = [events.version(now)]
        if self._resume_step:
            first += [events.version(now, step=after), events.restart(now, step=after)]
        file = open(self._path, "wb", buffering=0)
        _append(file, b"".join(map(events.record, first)))
        self._file = file

    def sync(self) -> None:
        if self._file is not None:
            _sync(self._file, "tb")

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def _refused(workdir: Path) -> Iterator[None]:
    """Makes a fault of the storage the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "storage",
            f"{shown(workdir)}: the log of the run cannot be written: "
            f"{error.strerror}; free space, or give another --workdir",
            STORAGE,
        ) from error


def _append(file: io.FileIO, content: bytes) -> None:
    """Writes all or nothing: a reader finds no half line or record."""
    size = os.fstat(file.fileno()).st_size
    written = 0
    try:
        written = file.write(content)
    finally:
        if written < len(content):
            os.ftruncate(file.fileno(), size)
            file.seek(size)
    if written < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync(file: io.FileIO, name: str) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        _warn(f"{name} cannot be flushed ({error.strerror})")


def _warn(what: str) -> None:
    tell(f"warning: storage: {what}; the run goes on")


def _is_of(line: str, step: int, prefix: str) -> bool:
    """Whether a line is of a step and has a key that begins so."""
    found = _parse(line) or {}
    return found.get("step") == step and any(k.startswith(prefix) for k in found)


def _parse(line: str) -> dict | None:
    """A line of the log; None for one that is torn."""
    try:
        found = json.loads(line)
        return found if isinstance(found["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None
