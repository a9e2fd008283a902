"""Manifest of a saved step: size and SHA-256 of every file, so that none is believed.

<step>/manifest.json is written last, when all else of the step is on the disk. It holds
a digest of itself, too: a flipped bit in it is found like one in the arrays.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unireg_jax.errors import CHECKPOINT, UserError, shown

NAME = "manifest.json"
VERSION = 2  # of the layout; 1: steps without a manifest


class DamagedError(Exception):
    """A step is not what was saved; the message names the first file at fault."""


def write(folder: Path, step: int, run: Mapping[str, Any]) -> None:
    """Flushes a step's files and folders to the disk, then writes their digests.

    Args:
        folder: of the step, complete but for the manifest.
        step: its number.
        run: what the step was made with and from; JSON.

    Raises:
        OSError: storage.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        flush(path)
        files[str(path.relative_to(folder))] = _state(path)
    content = {"version": VERSION, "step": step, "run": run, "files": files}
    content["sha256"] = _digest(content)
    write_file(folder / NAME, json.dumps(content, indent=1, sort_keys=True) + "\n")
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        flush(inner)
    flush(folder)


def read(folder: Path, step: int) -> dict[str, Any]:
    """Reads the manifest without looking at the files.

    Args:
        folder: of the step.
        step: its number, which the manifest must have, too.

    Returns:
        `run` as `write` took it.

    Raises:
        DamagedError: it is absent, changed or of another step.
        UserError: `checkpoint_newer`, exit code 9.
        OSError: the disk cannot be read.
    """
    return _read(folder, step)["run"]


def verify(folder: Path, step: int) -> dict[str, Any]:
    """Reads every file of the step; like `read`, but refuses also what differs."""
    content = _read(folder, step)
    for name, expected in content["files"].items():
        try:
            found = _state(folder / name)
        except FileNotFoundError as error:
            raise DamagedError(f"{name} is gone") from error
        if found != expected:
            raise DamagedError(
                f"{name}: {expected[0]} bytes with SHA-256 {expected[1][:12]}... "
                f"expected, {found[0]} with {found[1][:12]}... found"
            )
    return content["run"]


def write_file(path: Path, text: str) -> None:
    """Writes a file that is whole or not there, even after a power loss.

    Raises:
        OSError: storage.
    """
    temp = path.with_name(path.name + ".tmp")
    temp.write_text(text)
    flush(temp)
    temp.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Returns when a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: Path, step: int) -> dict[str, Any]:
    try:
        content = json.loads((folder / NAME).read_bytes())
        claimed = content.pop("sha256")
    except FileNotFoundError as error:
        raise DamagedError(f"{NAME} is gone") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{NAME} cannot be read") from error
    if claimed != _digest(content):
        raise DamagedError(f"{NAME} has changed")
    if content["version"] > VERSION:  # every version keeps the digest of itself
        raise UserError(
            "checkpoint_newer",
            f"{shown(folder)}: layout {VERSION} or older expected, {content['version']}"
            " found: made by a newer version; install that one",
            CHECKPOINT,
        )
    if content["step"] != step:
        raise DamagedError(f"{NAME} is that of step {content['step']}")
    return content


def _state(path: Path) -> list:
    """[bytes, SHA-256] of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [os.fstat(file.fileno()).st_size, digest]


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
