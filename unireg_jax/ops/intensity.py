"""Hounsfield units to the network's intensities, and which voxels a scan covers.

Runs on the device inside the compiled step: int16 HU is half the transfer of float32.
"""

import jax
import jax.numpy as jnp

from unireg_jax.tasks import OUTSIDE_HU


def window(hu: jax.Array, *, low: float = -800.0, high: float = 400.0) -> jax.Array:
    """Clips to a HU window and scales it linearly to [-1, 1].

    out = 2 (clip(hu, low, high) - low) / (high - low) - 1          UniReg, section 4.3

    Args:
        hu: [...] integer or float, HU. OUTSIDE_HU lies below every window: it gives -1.
        low: HU that becomes -1.
        high: HU that becomes +1.

    Returns:
        [...] float32 in [-1, 1], no unit.

    Raises:
        ValueError: hu is not numeric, or not OUTSIDE_HU < low < high.
    """
    _check_numeric(hu)
    if not OUTSIDE_HU < low < high:
        raise ValueError(
            f"low and high must satisfy {OUTSIDE_HU} < low < high in HU, got "
            f"{low} and {high}; give the lower end of the window first"
        )
    clipped = jnp.clip(hu.astype(jnp.float32), low, high)
    return (clipped - low) * (2.0 / (high - low)) - 1.0


def valid(hu: jax.Array) -> jax.Array:
    """Marks the voxels that lie inside the scan's own field of view.

    Args:
        hu: [...] integer or float, HU, not interpolated since it was prepared.

    Returns:
        [...] bool, True where hu is not OUTSIDE_HU.

    Raises:
        ValueError: hu is not numeric.
    """
    _check_numeric(hu)
    return hu != OUTSIDE_HU


def _check_numeric(hu):
    """Rejects bool, complex, and integers too narrow to hold OUTSIDE_HU."""
    kind = jnp.issubdtype(hu.dtype, jnp.floating)
    if jnp.issubdtype(hu.dtype, jnp.signedinteger):
        kind = jnp.iinfo(hu.dtype).min <= OUTSIDE_HU
    if not kind:
        raise ValueError(
            f"hu must be int16, int32 or float in HU, got {hu.dtype}; "
            "pass HU as stored, before windowing"
        )
