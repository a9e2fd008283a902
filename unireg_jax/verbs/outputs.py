"""Names of cases, folders that appear whole or not at all, digests."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unireg_jax.errors import STORAGE, USAGE, Note, UserError, shown
from unireg_jax.manifest import stem
from unireg_jax.verbs.messages import warn

OUTPUTS = (  # the record comes last: it says that a case is whole
    "warped.nii.gz",
    "1Warp.nii.gz",
    "1InverseWarp.nii.gz",
    "0GenericAffine.txt",
    "Composite.h5",
    "warped_label.nii.gz",
    "run.json",
)
PAGE = "qc.html"  # of a case, a view of the rest
INDEX = "index.html"  # of a batch
PAGES = 200  # that it draws unless told otherwise
_OWN = re.compile(
    r"index\.html|(batch|failed)(-\d+-of-\d+)?\.(csv|json|jsonl|log)", re.IGNORECASE
)
REJECTED = "rejected"  # folder in OUT of cases that the gate holds back
SUPERSEDED = "superseded"  # folder in OUT of results whose case failed when done again
_LITTER_S = 86400  # after which a file that no run of `batch` marked is one
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # none of reading


def check_out(out: Path) -> None:
    """Refuses a file as --out."""
    # Path's own raise where os.path's say no; making it tells what is wrong.
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError("storage", f"--out {shown(out)}: a folder expected", USAGE)


def make_out(out: Path) -> None:
    """Makes the folder for results.

    Args:
        out: its parents are made too.

    Raises:
        UserError: `storage`, exit code 2 when it is a file, 6 when it cannot be made.
    """
    check_out(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_fault(out, error) from error


@contextlib.contextmanager
def case_folder(
    out: Path,
    case: str,
    overwrite: bool,
    *,
    tag: str = "",
    claim: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """A temporary folder whose files reach OUT/CASE when the block ends well.

    Results of the same case that were held back or set aside before are removed then.
    What ends it otherwise gets a Note if whole results of before are there:
    they stay whole.

    Args:
        out: folder, made if absent.
        case: name of the folder inside.
        overwrite: whether results there are replaced.
        tag: of temporary folders, for `sweep`.
        claim: called before anything appears under its final name; may raise.

    Yields:
        Path of the temporary folder.

    Raises:
        UserError: `id_duplicate`, exit code 2; `storage`, exit code 2 or 6.
    """
    final = out / case
    check_out(out)
    # A link would lead the results, and what is deleted first, out of the folder.
    mine = os.path.isdir(final) and not os.path.islink(final)
    if os.path.lexists(final) and not (overwrite and mine):
        found, remedy = "exists", "pass --overwrite to replace its results"
        if overwrite:
            found, remedy = "is a link or a file, not a folder", "remove it"
        raise UserError(
            "id_duplicate",
            f"{shown(final)} {found}; {remedy}, or --case NAME",
            USAGE,
        )
    made = not os.path.exists(out)
    temp = out / f".unireg-{tag}{uuid.uuid4().hex}.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        temp.mkdir()
    except OSError as error:
        raise storage_fault(out, error) from error
    try:
        try:
            yield temp
        except OSError as error:
            if error.errno in _FULL:  # of a page or a record, say
                raise storage_fault(final, error) from error
            raise
        claim()
        try:
            _publish(temp, final, case)
            mine = False  # from here on they are the new ones
            sync(final.parent)
        except OSError as error:
            raise storage_fault(final, error) from error
        for held in (REJECTED, SUPERSEDED):
            _release(out / held / case, case)
    except BaseException as error:
        if _left(temp):
            kept = shown(temp / "earlier")
            error.add_note(Note(f"some earlier results are left in {kept}"))
        elif mine and os.path.exists(final / _names(case)[-1]):
            error.add_note(Note(f"earlier results stay in {shown(final)}"))
        raise
    finally:
        if not _left(temp):
            shutil.rmtree(temp, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()  # only if empty


def sweep(out: Path, tag: str, whole: bool = False) -> None:
    """Removes what killed runs left, in OUT and among its rejected cases.

    Not what holds the only copy of earlier results: of that it warns.

    Args:
        out: folder; its lock is held, so no other run of `tag` is at work.
        tag: of temporary folders, as in `case_folder`.
        whole: no run of any part is at work either: what starts with `tag` goes, too,
            and what has no tag, of `register` or a table, once it is a day old; a
            younger one may be in work.
    """
    name = f"{'?' * len(uuid.uuid4().hex)}.tmp"
    for folder in (out, out / REJECTED):
        if folder.is_symlink() and folder != out:
            continue
        found = set(folder.glob(f".unireg-{tag}{'*' if whole else ''}{name}"))
        if whole:
            found |= {p for p in folder.glob(f".unireg-{name}") if _is_old(p)}
        for temp in found:
            if not _left(temp):
                _remove(temp)
                continue
            warn(
                f"{shown(temp / 'earlier')}: earlier results that an interrupted run "
                "could not put back; move them where you want them, then remove it"
            )


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > _LITTER_S
    except OSError:  # gone meanwhile
        return False


def _remove(temp: Path) -> None:
    if temp.is_dir() and not temp.is_symlink():
        shutil.rmtree(temp, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            temp.unlink()


def _publish(temp: Path, final: Path, case: str) -> None:
    """Moves results to their final names; the record goes first and comes last."""
    if not final.exists():
        sync(temp)
        os.rename(temp, final)
    else:
        _replace(temp, final, _names(case))


def _replace(temp: Path, final: Path, names: Sequence[str]) -> None:
    """Puts new results in the place of others, all or none of them."""
    there = {name for name in names if (final / name).exists()}
    earlier = temp / "earlier"
    try:
        earlier.mkdir()
        for name in reversed(names):
            if name in there:
                os.replace(final / name, earlier / name)
        for name in names:
            if (temp / name).exists():
                os.replace(temp / name, final / name)
        sync(final)
    except BaseException:
        for name in names:
            with contextlib.suppress(OSError):  # the others, all the same
                if (earlier / name).exists():
                    os.replace(earlier / name, final / name)
                elif name not in there:
                    (final / name).unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):
        os.rename(earlier, temp / "replaced")  # in one go: no longer the only copy


def _left(temp: Path) -> bool:
    """Whether earlier results could not be put back, and lie there alone."""
    try:
        return any((temp / "earlier").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # perhaps


def _names(case: str) -> tuple[str, ...]:
    """Files of a case, the record last."""
    return PAGE, *(f"{case}_{name}" for name in OUTPUTS)


def set_aside(out: Path, case: str) -> bool:
    """Moves results out of OUT/CASE, where they would be taken for current ones.

    Args:
        out: folder of results.
        case: done again, and failed.

    Returns:
        Whether there were any; they are in OUT/superseded/CASE then.

    Raises:
        UserError: `storage`, exit code 6.
    """
    final, aside = out / case, out / SUPERSEDED / case
    if final.is_symlink() or not final.is_dir() or aside.parent.is_symlink():
        return False
    _release(aside, case)
    try:
        aside.mkdir(parents=True, exist_ok=True)
        for name in reversed(_names(case)):  # the record first: none without its files
            with contextlib.suppress(FileNotFoundError):
                os.replace(final / name, aside / name)
        sync(aside)
        with contextlib.suppress(OSError):
            final.rmdir()  # only if empty
        sync(out)
    except OSError as error:
        raise storage_fault(aside, error) from error
    return True


def _release(held: Path, case: str) -> None:
    """Removes results that an earlier run kept apart, of a case that is published."""
    if held.is_symlink() or held.parent.is_symlink():
        return
    with contextlib.suppress(OSError):
        for name in reversed(_names(case)):
            (held / name).unlink(missing_ok=True)
        held.rmdir()  # only if empty


def sync(folder: Path) -> None:
    """Flushes a folder, and the record in it, to disk."""
    for path in (*folder.glob("*_run.json"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def storage_fault(path: Path, error: OSError) -> UserError:
    """Makes the UserError of what could not be written, exit code 6."""
    return UserError(
        "storage",
        f"{shown(path)}: cannot be written: {error.strerror or error}; check the "
        "folder's rights and the space left",
        STORAGE,
    )


def digest(path: Path) -> dict[str, Any]:
    """SHA-256 and size of a file."""
    with open(path, "rb") as file:
        return {
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "bytes": os.fstat(file.fileno()).st_size,
        }


def digest_of(files: Sequence[Path]) -> dict[str, Any]:
    """Of one file its own digest; of several that of their digests, in their order."""
    found = [digest(file) for file in files]
    if len(found) == 1:
        return found[0]
    together = "".join(one["sha256"] for one in found)
    return {
        "sha256": hashlib.sha256(together.encode()).hexdigest(),
        "bytes": sum(one["bytes"] for one in found),
        "files": len(found),
    }


def case_name(given: str | None, fixed: str, moving: str) -> str:
    """`given`, or FIXED__MOVING; safe as one folder name.

    Raises:
        UserError: `id_invalid`, exit code 2.
    """
    case = f"{stem(fixed)}__{stem(moving)}" if given is None else given
    bad = case.strip(". ") == "" or case[0] in "-." or {"/", "\\", "\0"} & set(case)
    if bad or len(os.fsencode(case)) > 200:
        raise UserError(
            "id_invalid",
            f"case {shown(case)[:60]}: a name of 1 to 200 bytes without a slash and "
            "without a leading dot or dash expected; pass --case NAME",
            USAGE,
        )
    check_free(case)
    return case


def check_free(case: str) -> None:
    """Refuses a name that OUT has for folders and files of its own.

    Raises:
        UserError: `id_invalid`, exit code 2.
    """
    if case in (REJECTED, SUPERSEDED) or _OWN.fullmatch(case):
        raise UserError(
            "id_invalid",
            "id_invalid: a name other than those of tables and folders of OUT expected "
            f"of a case, got {case}; rename it",
            USAGE,
        )
