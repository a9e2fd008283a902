"""What became of every pair, one line of JSON each, on disk before the next is told."""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unireg_jax.locks import lock, no_link
from unireg_jax.verbs import outputs


class Journal:
    """A file that only grows; the last line of an id is what holds.

    One process writes it, from one thread. A line that a crash cut short is taken away
    when the file is opened again.
    """

    def __init__(self, path: Path):
        """Opens or makes the file, and finds the last whole line of every id.

        Args:
            path: of the file; its folder exists.

        Raises:
            UserError: `storage`, exit code 6.
        """
        self._path = path
        self._lines: dict[str, tuple[int, int]] = {}  # id -> offset, bytes
        try:
            # Without a buffer: what a full disk refused must not be written again,
            # and refused again, when the file is closed.
            self._file = open(path, "a+b", buffering=0, opener=no_link)
        except OSError as error:
            raise outputs.storage_fault(path, error) from error
        try:
            self._size = self._scan()
            self._file.truncate(self._size)
            outputs.sync(path.parent)
        except OSError as error:
            self._file.close()
            raise outputs.storage_fault(path, error) from error

    def _scan(self) -> int:
        """Bytes of the whole lines."""
        self._file.seek(0)
        offset = 0
        lines = io.BufferedReader(self._file)
        for line in lines:
            if not line.endswith(b"\n"):
                break
            item = _parse(line)
            if item is not None:
                self._lines[item["id"]] = (offset, len(line))
            offset += len(line)
        lines.detach()  # the file stays open
        return offset

    def add(self, item: Mapping[str, Any]) -> None:
        """Appends a line and waits until it is on disk.

        Args:
            item: has an `id`; strict JSON.

        Raises:
            UserError: `storage`, exit code 6.
        """
        line = json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n"
        data = line.encode()
        try:
            left = data
            while left:  # of a disk that fills up, a part first and then the error
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise outputs.storage_fault(self._path, error) from error
        self._lines[item["id"]] = (self._size, len(data))
        self._size += len(data)

    def last(self, name: str) -> dict[str, Any] | None:
        """What was last said of an id, or None."""
        if name not in self._lines:
            return None
        offset, size = self._lines[name]
        self._file.seek(offset)
        return _parse(self._file.read(size))

    def close(self) -> None:
        """Closes the file; one to which nothing was said goes."""
        self._file.close()
        if not self._size:
            with contextlib.suppress(OSError):
                self._path.unlink()


@contextlib.contextmanager
def open_alone(path: Path) -> Iterator[Journal]:
    """Opens a journal while no other run writes to it, or beside it.

    Args:
        path: of the file; its folder is made if absent.

    Yields:
        Journal; the folder is held until the block ends.

    Raises:
        UserError: `storage`, exit code 2 at once when another run holds the folder, or
            it is a file; 6 when it cannot be written.
    """
    outputs.make_out(path.parent)
    with (
        lock(path.parent, f".unireg-{path.stem}.lock"),
        contextlib.closing(Journal(path)) as journal,
    ):
        yield journal


def read(path: Path, offset: int) -> Iterator[dict[str, Any]]:
    """Reads the items of a journal that another process may be writing.

    Args:
        path: of the file.
        offset: bytes before the first line that is read.

    Yields:
        Each item, in the order in which they were added.

    Raises:
        OSError: no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        yield from filter(None, map(_parse, file))


def _parse(line: bytes) -> dict[str, Any] | None:
    """An item; None for a line that is none."""
    try:
        item = json.loads(line)
        return item if isinstance(item["id"], str) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
