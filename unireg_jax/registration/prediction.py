"""What the network says of a pair: in one pass or several, one way or both.

One pass one way is the paper's, u = f(fixed, moving). Both ways is the mean of the map
there and of the inverse of the map back,

    u = (f(fixed, moving) + f(moving, fixed)^-1) / 2

so that two equal scans stay where they are and most folds go. Every pass after the
first acts on the moving scan as warped so far; the fields are composed. Neither is in
the paper, and neither needs other weights.
"""

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unireg_jax.imaging import mapping
from unireg_jax.ops import intensity, warp
from unireg_jax.tasks import OUTSIDE_HU

Field = jax.Array | np.ndarray
PASSES, SYMMETRIC = 1, False  # of `register` and the command
MOST_PASSES = 8


def check(passes: int) -> int:
    """Refuses a number of passes.

    Args:
        passes: of the network; NumPy's integers too.

    Returns:
        The same, Python's own, as records need it.

    Raises:
        ValueError: no whole number from 1 to MOST_PASSES.
    """
    if not isinstance(passes, numbers.Integral) or not 1 <= passes <= MOST_PASSES:
        raise ValueError(f"passes must be 1 to {MOST_PASSES}, got {passes}")
    return int(passes)


def in_passes(
    moving_hu: np.ndarray,
    one_pass: Callable[[int, np.ndarray], Field],
    *,
    passes: int,
    start: Field | None = None,
) -> Field:
    """Composes the fields of several passes.

    u_k = one_pass(moving warped by the total of those before)
    total_k(x) = u_k(x) + total_{k-1}(x + u_k(x)),   total_0 = start

    Args:
        moving_hu: [X, Y, Z] int16, HU, pre-aligned; OUTSIDE_HU beyond the scan.
        one_pass: number from 1, a moving scan like moving_hu -> [1, X, Y, Z, 3]
            float32, voxels.
        passes: how many, at least 1.
        start: [1, X, Y, Z, 3] float32, voxels, on top of which the first one acts; None
            for moving_hu as it is.

    Returns:
        [1, X, Y, Z, 3] float32, voxels: the total.
    """
    total = start
    for number in range(1, passes + 1):
        seen = moving_hu if total is None else prewarp(moving_hu, total)
        found = one_pass(number, seen)
        total = found if total is None else jax.jit(warp.compose)(found, total)
    return jax.block_until_ready(total)


def mean_of_ways(there: jax.Array, back: jax.Array) -> jax.Array:
    """Averages a field with the inverse of the opposite one.

    Where `back` folds it has no inverse, and what the iteration ends at counts.

    Args:
        there: [1, X, Y, Z, 3] float32, voxels: fixed -> moving.
        back: the same, moving -> fixed.

    Returns:
        [1, X, Y, Z, 3] float32, voxels: fixed -> moving.
    """
    return (there + warp.invert(back)) / 2


def prewarp(hu: np.ndarray, disp: Field) -> np.ndarray:
    """Warps a scan that is on the network's grid.

    Args:
        hu: [X, Y, Z] int16, HU; OUTSIDE_HU beyond the scan.
        disp: [1, X, Y, Z, 3] float32, voxels.

    Returns:
        [X, Y, Z] int16, hu at x + disp(x); OUTSIDE_HU beyond the scan, and half a voxel
        or more beyond the grid, even where the scan goes on.
    """
    return np.asarray(jax.jit(_read)(hu, disp))


def _read(hu, disp):
    hu = hu[None, ..., None]
    coords = warp.identity_coords(hu.shape[1:4])[None] + disp
    # A voxel ends half a voxel beyond its centre. Lost by less, the outer slices of a
    # scan that goes on there would turn to air, which the network heeds.
    reached = warp.within(coords, hu.shape[1:4], margin=0.5)
    valid = intensity.valid(hu).astype(jnp.float32)
    reached &= warp.sample(valid, coords)[..., 0] > 0.5
    # The marker of what lies outside is no HU to interpolate.
    image = jnp.maximum(hu.astype(jnp.float32), mapping.AIR_HU)
    image = jnp.round(warp.sample(image, coords))[..., 0]
    return jnp.where(reached, image, OUTSIDE_HU).astype(jnp.int16)[0]
