"""Where compiled programs are kept, and with which rights."""

import stat
import subprocess
import sys

import jax
import pytest

from unireg_jax.registration import compilation_cache

REPORT = """
import os, sys
os.umask(0o002)
import jax, jax.numpy as jnp
from unireg_jax.registration.compilation_cache import use_compilation_cache
print(use_compilation_cache())
print(jax.config.jax_persistent_cache_min_compile_time_secs)
jax.jit(lambda x: x + 1)(jnp.zeros(3))
"""


def use(tmp_path, monkeypatch, **variables):
    """Asks a process of its own; its cache folder and its threshold in seconds."""
    for name in ("UNIREG_CACHE", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, str(value))
    run = subprocess.run(
        [sys.executable, "-c", REPORT], capture_output=True, text=True, check=True
    )
    folder, seconds = run.stdout.splitlines()
    return folder, float(seconds)


def test_cache_is_the_users_own_and_keeps_everything(tmp_path, monkeypatch):
    folder, seconds = use(tmp_path, monkeypatch)
    (found,) = (tmp_path / ".cache" / "unireg_jax").iterdir()
    assert str(found) == folder and found.name.startswith("xla-")
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert seconds == 0 and any(found.iterdir())
    # A folder that was open to a group is closed again.
    found.chmod(0o770)
    use(tmp_path, monkeypatch)
    assert stat.S_IMODE(found.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("variable", "place", "seconds"),
    [
        ("UNIREG_CACHE", "here", 0.0),
        ("XDG_CACHE_HOME", "here/unireg_jax", 0.0),
        ("JAX_COMPILATION_CACHE_DIR", "", 1.0),  # JAX's own threshold stays, too
    ],
)
def test_cache_goes_where_the_user_says(
    variable, place, seconds, tmp_path, monkeypatch
):
    folder, got = use(tmp_path, monkeypatch, **{variable: tmp_path / "here"})
    assert folder.startswith(str(tmp_path / (place or "here")))
    assert got == seconds
    assert not (tmp_path / ".cache").exists()


def test_cache_that_cannot_be_made_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    folder, seconds = use(tmp_path, monkeypatch, UNIREG_CACHE=tmp_path / "file")
    assert folder == "None" and seconds == 1.0


def test_user_without_a_home_compiles_anew(monkeypatch):
    """As in a container whose user is in no list."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("UNIREG_CACHE", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compilation_cache.Path, "home", homeless)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert compilation_cache.use_compilation_cache() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
