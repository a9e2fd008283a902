"""One run per folder."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from unireg_jax.errors import STORAGE, USAGE, UserError, shown


@contextlib.contextmanager
def lock(
    folder: Path | str, name: str = ".lock", *, shared: bool = False
) -> Iterator[None]:
    """Holds a folder. The kernel keeps the lock: it cannot be left behind.

    Args:
        folder: it must exist.
        name: of the file, which stays in it.
        shared: others that share may hold it, too.

    Raises:
        UserError: `storage`, exit code 2 at once when another run holds it; 6 when it
            cannot be written.
    """
    folder = Path(folder)
    try:
        file = open(folder / name, "a")
    except OSError as error:
        raise UserError(
            "storage",
            f"{shown(folder.name)}: {error.strerror}; give another folder",
            STORAGE,
        ) from error
    with file:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "storage",
                f"{shown(folder.name)}: another run is writing to it; wait for it, or "
                "give another folder",
                USAGE,
            ) from error
        yield
