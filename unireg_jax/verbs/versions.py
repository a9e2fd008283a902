"""Versions and memory of this process, for records and for `info`."""

import importlib.metadata
import sys

try:
    import resource
except ImportError:  # Windows
    resource = None

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "nibabel")


def version(name: str = "unireg-jax") -> str:
    """Installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def peak_mib() -> float | None:
    """Largest resident memory of this process, MiB; None where unknown."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
