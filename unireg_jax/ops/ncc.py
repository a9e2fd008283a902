"""Normalised cross-correlation of two images, local and global.

Always float32: the moments of a window cancel, which bfloat16 cannot follow.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from unireg_jax.ops import stencil


def local_ncc(
    fixed: jax.Array,
    moving: jax.Array,
    *,
    window: int = 9,
    mask: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """Mean squared local correlation coefficient of two images.

    cc(p) = c(p)^2 / (vf(p) vm(p) + eps), the sums running over the window at p:
    c = sum (f - mean f)(m - mean m), vf = sum (f - mean f)^2, vm alike.
    out[b] = sum_p mask(p) cc(p) / sum_p mask(p)          UniReg, eq. 6 (L_Sim)

    At the border the window is cut to the voxels inside the grid, means and sums
    counting those alone, so no padding value enters.

    Args:
        fixed: [B, X, Y, Z, 1] float, intensities of order 1 (see intensity.window).
        moving: [B, X, Y, Z, 1] float, already on the fixed grid.
        window: edge of the cubic window, odd, voxels.
        mask: [B, X, Y, Z] bool or float >= 0, weight of each voxel's cc (not of the
            intensities inside its window); None weighs all alike.
        eps: keeps flat windows at 0; added to a product of *summed* squares, hence
            small against (window^3 variance)^2.

    Returns:
        [B] float32 in [0, 1] up to rounding; 0 where the mask is empty. The gradient
        goes to `moving` only; `fixed` and `mask` get none.

    Raises:
        ValueError: shapes, dtypes or window are not as above.

    Fills in the paper, which names no form: squared and with window 9 as in the
    authors' later code, except that there zero padding enters the border windows.
    """
    _check_images(fixed, moving, mask)
    if not isinstance(window, int) or window < 3 or window % 2 == 0:
        raise ValueError(
            f"window must be an odd int >= 3 in voxels, got {window}; "
            "use an odd edge so that the window has a centre"
        )
    weight = _weights(fixed.shape[:-1], mask)
    fixed = fixed[..., 0].astype(jnp.float32)
    moving = moving[..., 0].astype(jnp.float32)
    return _local_ncc(fixed, moving, weight, window, eps) / _total(weight)


def global_ncc(
    fixed: jax.Array,
    moving: jax.Array,
    *,
    mask: jax.Array | None = None,
    eps: float = 1e-8,
) -> jax.Array:
    """Correlation coefficient of two whole images, signed, not squared.

    out[b] = cov(f, m) / sqrt(var f var m + eps), all weighted by the mask.

    Args:
        fixed: [B, X, Y, Z, 1] float, intensities of order 1.
        moving: [B, X, Y, Z, 1] float, already on the fixed grid.
        mask: [B, X, Y, Z] bool or float >= 0, weight of each voxel; None is all alike.
        eps: keeps constant images at 0; added to a product of variances.

    Returns:
        [B] float32 in [-1, 1] up to rounding; 0 where the mask is empty. The gradient
        goes to both images.

    Raises:
        ValueError: shapes or dtypes are not as above.
    """
    _check_images(fixed, moving, mask)
    weight = _weights(fixed.shape[:-1], mask)
    total = _total(weight)
    f = _demean(fixed[..., 0].astype(jnp.float32), weight, total)
    m = _demean(moving[..., 0].astype(jnp.float32), weight, total)
    covariance = _sum(weight * f * m) / total
    variances = (_sum(weight * f * f) / total) * (_sum(weight * m * m) / total)
    return covariance * lax.rsqrt(variances + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _local_ncc(fixed, moving, weight, window, eps):
    """Weighted sum of the cc map of [B, X, Y, Z] float32 images."""
    moments = _moments(fixed, moving, window)
    return _sum(weight * _cc_map(moments, eps))


def _local_ncc_forward(fixed, moving, weight, window, eps):
    """Value and, as the only residual, its gradient to the moving image.

    The cotangent is one number per example, so the gradient map can be formed here:
    one volume is kept instead of the five moments. The box sum is its own adjoint:
    with a = dcc/dc and b = dcc/dvm, each weighted,
    dcc/dm = f box(a) + 2 m box(b) - box((a sum_f + 2 b sum_m) / count).
    """
    moments = _moments(fixed, moving, window)
    count, sum_f, sum_m, c, vf, vm = moments
    denominator = vf * vm + eps
    a = weight * (2.0 * c / denominator)
    b = jnp.where(vm > 0.0, -(c * c) * vf / (denominator * denominator), 0.0) * weight
    gradient = (
        fixed * _box(a, window)
        + 2.0 * moving * _box(b, window)
        - _box((a * sum_f + 2.0 * b * sum_m) / count, window)
    )
    return _sum(weight * _cc_map(moments, eps)), gradient


def _local_ncc_backward(window, eps, gradient, cotangent):
    """Scales the stored gradient map; None is a zero cotangent."""
    del window, eps
    return (
        None,
        jnp.broadcast_to(jnp.expand_dims(cotangent, (1, 2, 3)), gradient.shape)
        * gradient,
        None,
    )


_local_ncc.defvjp(_local_ncc_forward, _local_ncc_backward)


def _cc_map(moments, eps):
    """c^2 / (vf vm + eps), [B, X, Y, Z]."""
    _, _, _, c, vf, vm = moments
    return c * c / (vf * vm + eps)


def _moments(fixed, moving, window):
    """Count, sums and centred second moments of every window.

    Five separate box sums: XLA fuses each product into its first pass. Stacked as
    channels they are several times slower, and a summed-area table cancels.
    """
    count = _window_count(fixed.shape, window)
    sum_f, sum_m = _box(fixed, window), _box(moving, window)
    c = _box(fixed * moving, window) - sum_f * sum_m / count
    # Rounding can make a flat window's variance negative.
    vf = jnp.maximum(_box(fixed * fixed, window) - sum_f * sum_f / count, 0.0)
    vm = jnp.maximum(_box(moving * moving, window) - sum_m * sum_m / count, 0.0)
    return count, sum_f, sum_m, c, vf, vm


def _box(volume, window):
    """Sum over a cubic window cut at the border, one axis after another."""
    for axis in (1, 2, 3):
        volume = stencil.box_sum(volume, window, axis)
    return volume


def _window_count(shape, window):
    """Voxels in the window around each voxel, [B, X, Y, Z] from three short vectors."""
    total = jnp.ones(shape, jnp.float32)
    for axis in (1, 2, 3):
        line = jnp.asarray(stencil.box_count(shape[axis], window), jnp.float32)
        total = total * lax.broadcast_in_dim(line, shape, (axis,))
    return total


def _weights(shape, mask):
    """Mask as float32 without gradient, ones when there is none."""
    if mask is None:
        return jnp.ones(shape, jnp.float32)
    return lax.stop_gradient(mask).astype(jnp.float32)


def _total(weight):
    """Sum of the weights, 1 where they are all 0: [B]."""
    total = _sum(weight)
    return jnp.where(total > 0.0, total, 1.0)


def _demean(image, weight, total):
    """Image minus its weighted mean."""
    mean = _sum(weight * image) / total
    return image - jnp.broadcast_to(jnp.expand_dims(mean, (1, 2, 3)), image.shape)


def _sum(volume):
    """Sum per example, axis by axis.

    One running float32 sum over 6 M voxels drifts by 1e-4 on near-constant maps; the
    barrier keeps XLA from merging the three sums into that one.
    """
    for _ in range(2):
        volume = lax.optimization_barrier(jnp.sum(volume, axis=1))
    return jnp.sum(volume, axis=1)


def _check_images(fixed, moving, mask):
    """Same shape [B, X, Y, Z, 1], float; mask [B, X, Y, Z]."""
    if fixed.ndim != 5 or fixed.shape[-1] != 1:
        raise ValueError(
            f"fixed must be (B, X, Y, Z, 1), got {fixed.shape}; one channel, last"
        )
    if moving.shape != fixed.shape:
        raise ValueError(
            f"moving must be {fixed.shape} as fixed, got {moving.shape}; "
            "warp it to the fixed grid first"
        )
    for name, image in (("fixed", fixed), ("moving", moving)):
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be float intensities, got {image.dtype}; "
                "apply intensity.window to HU first"
            )
    if mask is not None and mask.shape != fixed.shape[:-1]:
        raise ValueError(
            f"mask must be {fixed.shape[:-1]}, got {mask.shape}; "
            "drop the channel axis and repeat per example"
        )
