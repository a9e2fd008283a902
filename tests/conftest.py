"""Settings and fixtures of the whole suite.

Ranks are never promoted silently, compiled programs are kept between runs, and the CPU
is used unless JAX_PLATFORMS says otherwise.
"""

import os
from pathlib import Path

import jax
import pytest

REPO = Path(__file__).resolve().parents[1]

if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(REPO / ".cache" / "jax"))
# Keeps the folder small: single operations are not worth a file each.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_configure(config):
    if "not slow" in config.option.markexpr:
        # Half the time of compiling, and programs as fast at these sizes. What is slow
        # is compiled as users' programs are.
        level = "--xla_backend_optimization_level=1"
        os.environ["XLA_FLAGS"] = f"{level} {os.environ.get('XLA_FLAGS', '')}".strip()
    # Another run may be writing the same entry: then jax compiles, and says so.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error .* persistent compilation cache entry"
    )


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """Compiled programs of a module go with it: a worker stays small."""
    yield
    jax.clear_caches()


@pytest.fixture
def key() -> jax.Array:
    """The root random key; fold or split it, never change the seed per test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real scans, $UNIREG_DATA or a checkout's neighbour; skips without."""
    root = Path(os.environ.get("UNIREG_DATA") or REPO.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real data at {root}: set UNIREG_DATA")
    return root
