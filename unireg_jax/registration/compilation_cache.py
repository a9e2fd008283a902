"""Compiled programs kept in the user's cache folder, for commands and experiments.

Called by `main` functions only. Whoever can write the folder can run code in the
process that reads it: it belongs to the user alone.
"""

import contextlib
import hashlib
import os
import platform
import stat
from pathlib import Path

import jax

VARIABLE = "UNIREG_CACHE"
# By default JAX keeps only what took a second; a CPU's start consists of much less.
_KEEP_ALL = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def use_compilation_cache() -> Path | None:
    """Makes JAX keep every compiled program, and find those kept before.

    The folder is `xla-<processor>` in $UNIREG_CACHE, else in `unireg_jax` of the user's
    cache folder ($XDG_CACHE_HOME, else ~/.cache), made with mode 0700. Programs of the
    CPU hold the instructions of one kind of processor: a home shared by unlike machines
    gets a folder for each. JAX's own variables come first: with
    $JAX_COMPILATION_CACHE_DIR set nothing is changed.

    Returns:
        The folder; None when there is none to write, or another user owns it: then
        everything is compiled anew.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    try:
        folder = cache_root() / f"xla-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)  # made with other rights, before or by a umask
    except (OSError, RuntimeError):  # the latter of a user without a home
        return None
    found = folder.stat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if not (mine and stat.S_ISDIR(found.st_mode) and os.access(folder, os.W_OK)):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in _KEEP_ALL.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder


def cache_root() -> Path:
    """Gives the folder of what may be deleted: $UNIREG_CACHE or the user's cache."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "unireg_jax"


def _processor() -> str:
    """Eight letters for the machine's kind and its instruction sets."""
    text = platform.machine()
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    text += " ".join(sorted(value.split()))
                    break
    return hashlib.sha256(text.encode()).hexdigest()[:8]
