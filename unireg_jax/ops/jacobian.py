"""Jacobian of x + disp(x): determinant, folding fraction and SDlogJ.

Derivatives are central differences in voxel units, taken at interior voxels only: on
the border every tool has its own rule, and the statistics would differ by it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from unireg_jax.ops.stencil import central_difference, crop_interior
from unireg_jax.ops.warp import check_disp

_SPACE = (1, 2, 3)


def determinant(disp: jax.Array) -> jax.Array:
    """Determinant of the Jacobian of x + disp(x) at interior voxels.

    detj = det(I + d disp_i / d x_j)

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.

    Returns:
        [B, X-2, Y-2, Z-2] float32, no unit; entry i belongs to voxel i + 1.

    Raises:
        ValueError: wrong shape or dtype, or fewer than 3 voxels along an axis.
    """
    check_disp(disp, least=3)

    def derivative(component, axis):
        others = tuple(other for other in _SPACE if other != axis)
        field = crop_interior(disp[..., component], others)
        return central_difference(field, axis)

    xx, xy, xz = (derivative(0, axis) for axis in _SPACE)
    yx, yy, yz = (derivative(1, axis) for axis in _SPACE)
    zx, zy, zz = (derivative(2, axis) for axis in _SPACE)
    xx, yy, zz = xx + 1.0, yy + 1.0, zz + 1.0
    # Written out by component, so that it fuses into one pass over disp.
    return (
        xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx) + xz * (yx * zy - yy * zx)
    )


def folding_fraction(disp: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Share of voxels where the map folds.

    #(detj <= 0) / #voxels, over the interior voxels inside the mask

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.
        mask: [B, X, Y, Z] bool on the full grid; None counts every interior voxel.

    Returns:
        [B] float32 in [0, 1]; NaN where the mask holds no interior voxel.

    Raises:
        ValueError: wrong shape or dtype.
    """
    check_disp(disp)
    weight = _interior_mask(mask, disp, 1)
    detj = determinant(disp)
    return _mean((detj <= 0.0).astype(detj.dtype), weight)


def sdlogj(disp: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Standard deviation of the log-Jacobian, without offset.

    std(log max(detj, 1e-9)), over the interior voxels inside the mask

    The only definition under which values of several units are possible, as the UniReg
    paper reports them: each folded voxel enters as log 1e-9 = -20.7, so the share of
    folds rather than their depth sets the value. Population form (divides by the
    count).

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.
        mask: [B, X, Y, Z] bool, the fixed foreground, on the full grid; None counts
            every interior voxel.

    Returns:
        [B] float32, no unit; NaN where the mask holds no interior voxel.

    Raises:
        ValueError: wrong shape or dtype.
    """
    check_disp(disp)
    weight = _interior_mask(mask, disp, 1)
    return _std(jnp.log(jnp.maximum(determinant(disp), 1e-9)), weight)


def sdlogj_l2r(disp: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Standard deviation of the log-Jacobian as the Learn2Reg challenge computes it.

    std(log clip(detj + 3, 1e-9, 1e9)), 2 voxels dropped at every side, inside the mask

    The offset hides most folds and shrinks the value; it is not comparable with
    `sdlogj`. Population form (divides by the count).

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.
        mask: [B, X, Y, Z] bool, the fixed foreground, on the full grid; None counts
            every voxel left.

    Returns:
        [B] float32, no unit; NaN where the mask holds none of these voxels.

    Raises:
        ValueError: wrong shape or dtype, or fewer than 5 voxels along an axis.
    """
    check_disp(disp, least=5)
    weight = _interior_mask(mask, disp, 2)
    # The determinant drops one voxel per side itself.
    detj = determinant(crop_interior(disp, _SPACE))
    return _std(jnp.log(jnp.clip(detj + 3.0, 1e-9, 1e9)), weight)


def _interior_mask(mask, disp, width):
    """Returns the mask as weights on the voxels left after cropping, or None."""
    if mask is None:
        return None
    if mask.shape != disp.shape[:4] or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be bool {disp.shape[:4]}, got {mask.dtype} {mask.shape}; "
            "it covers the full grid, without a channel axis"
        )
    return crop_interior(mask, _SPACE, width=width).astype(disp.dtype)


def _mean(values, weight):
    """Mean over space, weighted if asked; 0 / 0 = NaN for an empty mask."""
    if weight is None:
        return _sum(values) / math.prod(values.shape[1:])
    return _sum(values * weight) / _sum(weight)


def _sum(values):
    """Sum over space, [B].

    Along Z by a product with ones: XLA:CPU adds a reduction's terms one by one, which
    takes several times as long as the determinant. Also keeps the partial sums short.
    """
    ones = jnp.ones(values.shape[3], values.dtype)
    lines = jnp.dot(values, ones, precision=lax.Precision.HIGHEST)
    return jnp.sum(lines, axis=(1, 2))


def _std(values, weight):
    # Two passes: the difference of moments cancels in float32 once |mean| >> std.
    centre = _mean(values, weight)[:, None, None, None]
    return jnp.sqrt(_mean(jnp.square(values - centre), weight))
