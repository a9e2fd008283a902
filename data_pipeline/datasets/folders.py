"""What the adapters share: finding the right folder, listing it, splitting subjects."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from unireg_jax.errors import USAGE, UserError
from unireg_jax.imaging.nifti import shown

NIFTI = (".nii.gz", ".nii")
_DEPTH = 3  # levels below a wrong folder that are searched for the right one
_VISITS = 2000  # folders looked at before giving up
_SHARE = 10  # one subject in so many is held out for val, as many for test


def check_root(folder: Path, expected: str, fits: Callable[[Path], bool]) -> Path:
    """Refuses a folder that does not have a dataset's layout.

    Args:
        folder: what the user named.
        expected: the layout in words.
        fits: whether a folder has it.

    Returns:
        The folder.

    Raises:
        UserError: exit code 2, naming the folder to pass where one is found above or
            below.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file; unpack it first" if folder.exists() else "nothing there"
        raise _refusal(folder, expected, found)
    if fits(folder):
        return folder
    for other in (*_below(folder), *folder.resolve().parents[:2]):
        if fits(other):
            inside = other.is_relative_to(folder)
            place = "below" if inside else "above"
            raise _refusal(folder, expected, f"it {place}; pass --raw {shown(other)}")
    names = [path.name for path in visible(folder)[:5]]
    found = f"{', '.join(map(shown, names))}, …" if names else "an empty folder"
    raise _refusal(folder, expected, f"{found}; pass the folder as it was unpacked")


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Lists what lies in a folder, sorted by name, without hidden entries.

    Args:
        folder: an absent one is empty.
        pattern: as in `Path.glob`, case-sensitive.

    Returns:
        Paths.
    """
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.glob(pattern) if not p.name.startswith("."))


def scans(
    folder: Path, pattern: str = "*", endings: Sequence[str] = NIFTI
) -> list[Path]:
    """Lists the scans of a folder.

    Args:
        folder: an absent one is empty.
        pattern: of the name without its ending.
        endings: of the names.

    Returns:
        Paths, sorted by name.
    """
    return sorted(p for end in endings for p in visible(folder, f"{pattern}{end}"))


def stem(path: Path | str) -> str:
    """Gives a file's name without .nii or .nii.gz.

    Args:
        path: of the file.

    Returns:
        The name.
    """
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def existing(folder: Path, name: str, endings: Sequence[str] = NIFTI) -> str | None:
    """Finds a scan by its name.

    Args:
        folder: where it should lie.
        name: without the ending.
        endings: that it may have, the first found counts.

    Returns:
        Its path, or None.
    """
    for ending in endings:
        path = folder / f"{name}{ending}"
        if path.is_file():
            return os.fspath(path)
    return None


def split_subjects(subjects: Iterable[str]) -> dict[str, str]:
    """Splits subjects where the dataset does not: all of one subject on one side.

    Of n subjects a tenth, at least 2, go to val and as many to test; of fewer than 8,
    none to test; of fewer than 4, all train. The order is that of a hash of the name.

    Args:
        subjects: names; repeats count once.

    Returns:
        subject -> "train", "val" or "test".
    """
    names = sorted(
        set(subjects),
        key=lambda name: hashlib.sha256(f"0/{name}".encode()).hexdigest(),
    )
    held = max(2, round(len(names) / _SHARE))
    val = held if len(names) >= 4 else 0
    test = held if len(names) >= 8 else 0
    return {
        name: "val" if i < val else "test" if i < val + test else "train"
        for i, name in enumerate(names)
    }


def refuse(folder: Path, expected: str, got: str) -> UserError:
    """Makes the UserError for a folder whose content does not fit.

    Args:
        folder: or the file in it.
        expected: what should be there.
        got: what is, and the remedy after a semicolon.

    Returns:
        UserError `schema`, exit code 2, to be raised by the caller.
    """
    line = f"{shown(folder)}: expected {expected}, got {got}"
    return UserError("schema", line, USAGE)


def _refusal(folder: Path, expected: str, found: str) -> UserError:
    line = f"--raw {shown(folder)}: expected {expected}; found {found}"
    return UserError("not_found", line, USAGE)


def _below(folder: Path) -> Iterable[Path]:
    """Folders below, the nearest first."""
    level, visits = [folder], 0
    for _ in range(_DEPTH):
        following = []
        for parent in level:
            for path in visible(parent):
                visits += 1
                if visits > _VISITS:
                    return
                if path.is_dir():
                    yield path
                    following.append(path)
        level = following
