"""One run per folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from unireg_jax.errors import STORAGE, USAGE, UserError, shown


def no_link(path: str, flags: int) -> int:
    """Opens a file unless its name is a link: `opener` of `open`.

    A file that grows or is locked in a folder that others can write to must not be one
    elsewhere that they chose.

    Args:
        path: of the file.
        flags: of os.open.

    Returns:
        Descriptor; the umask decides the mode.

    Raises:
        OSError: ELOOP for a link.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


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
            cannot be written or locked.
    """
    folder = Path(folder)
    try:
        # To be read, too: NFS shares no lock of a file that is only written.
        file = open(folder / name, "a+", opener=no_link)
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
        except BlockingIOError as error:
            raise UserError(
                "storage",
                f"{shown(folder.name)}: another run is writing to it; wait for it, or "
                "give another folder",
                USAGE,
            ) from error
        except OSError as error:
            raise UserError(
                "storage",
                f"{shown(folder.name)}: it cannot be locked ({error.strerror}); give a "
                "folder on another file system",
                STORAGE,
            ) from error
        yield
