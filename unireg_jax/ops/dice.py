"""Overlap of label maps: soft Dice for training, hard DSC for evaluation.

Both count in integers, per (slice, label). One float32 bin per label drifts by 1e-3 at
192 x 192 x 160, and float atomics on a GPU add in another order at every run; integer
sums are exact and the same whatever their order, so a resumed run stays bit-equal.

Organs that overlap come in further layers of the same voxels. A voxel belongs to label
k if any layer says so; no two layers of a map say the same of a voxel, so that sums
over layers count it once.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Voxels handled at once: bounds the scratch to some 15 MiB whatever the volume.
_CHUNK_VOXELS = 2**18


def soft_dice(
    fixed_labels: jax.Array,
    moving_labels: jax.Array,
    disp: jax.Array,
    *,
    num_labels: int,
    fixed_more: jax.Array | None = None,
    moving_more: jax.Array | None = None,
    mask: jax.Array | None = None,
    counting: str = "scatter",
) -> tuple[jax.Array, jax.Array]:
    """Dice of the fixed map and the linearly warped one-hot of the moving map.

    dice_k = 2 sum_p [F(p) = k] W_k(p) / (sum_p [F(p) = k] + sum_p W_k(p)),
    W_k(p) = [M = k] sampled at p + disp(p)          UniReg, section 3.2

    No one-hot channel exists: W_k(p) is the sum of the trilinear weights of those of
    the 8 corners around p + disp(p) whose id is k. Outside the grid the edge value
    holds, as in ops/warp.py, and there the gradient is 0. Counted by scatter, the cost
    does not depend on num_labels; the gradient to `disp` only gathers.

    Args:
        fixed_labels: [B, X, Y, Z] integer; ids outside 1 ... num_labels - 1 are
            background.
        moving_labels: [B, X, Y, Z] integer, on a grid of the same shape.
        disp: [B, X, Y, Z, 3] float32, voxels.
        num_labels: K, background included; static.
        fixed_more: [B, L, X, Y, Z] integer, further layers of fixed_labels, or None.
        moving_more: [B, M, X, Y, Z] integer, further layers of moving_labels, or None.
        mask: [B, X, Y, Z] bool, the fixed voxels p to sum over; None for all.
        counting: "scatter" adds integers into bins, exact in any order; "compare" tests
            every voxel for every label, for devices or flags under which a scatter is
            serial. Both give the same bits.

    Returns:
        dice: [B, K - 1] float32 in [0, 1], labels 1 ... K - 1; 0 for an empty label.
        present: [B, K - 1] bool, the label has voxels in both fixed (of those that
            count) and (unwarped) moving. Average dice over these.

    Raises:
        ValueError: shapes, dtypes or num_labels are not as above.
    """
    _check_labels("moving_labels", fixed_labels, moving_labels, num_labels)
    if disp.shape != (*fixed_labels.shape, 3) or disp.dtype != jnp.float32:
        raise ValueError(
            f"disp must be {(*fixed_labels.shape, 3)} float32 in voxels, got "
            f"{disp.shape} {disp.dtype}; components go last, on the fixed grid"
        )
    if counting not in COUNTING:
        raise ValueError(
            f"counting must be one of {sorted(COUNTING)}, got {counting!r}"
        )
    if mask is None:
        mask = jnp.ones(fixed_labels.shape, bool)
    if mask.shape != fixed_labels.shape or mask.dtype != bool:
        raise ValueError(
            f"mask must be {fixed_labels.shape} bool like fixed_labels, got "
            f"{mask.shape} {mask.dtype}"
        )
    # vmap keeps the batch an axis of its own: split over devices, no example moves.
    overlap, warped, fixed, moving = jax.vmap(
        lambda f, m, d, w: _soft_sums(f, m, d, w, num_labels, counting)
    )(
        _layers("fixed_more", fixed_labels, fixed_more),
        _layers("moving_more", moving_labels, moving_more),
        disp,
        mask,
    )
    return _ratio(overlap, fixed + warped, 0.0), (fixed > 0.0) & (moving > 0.0)


def dsc(
    fixed_labels: jax.Array,
    warped_labels: jax.Array,
    *,
    num_labels: int,
    fixed_more: jax.Array | None = None,
    warped_more: jax.Array | None = None,
) -> jax.Array:
    """Dice similarity coefficient of two integer label maps (evaluation).

    dsc_k = 2 |F_k and W_k| / (|F_k| + |W_k|)

    Args:
        fixed_labels: [B, X, Y, Z] integer; ids outside 1 ... num_labels - 1 are
            background.
        warped_labels: [B, X, Y, Z] integer, sampled to the fixed grid (order 0).
        num_labels: K, background included; static.
        fixed_more: [B, L, X, Y, Z] integer, further layers of fixed_labels, or None.
        warped_more: [B, M, X, Y, Z] integer, further layers of warped_labels, or None.

    Returns:
        [B, K - 1] float32 in [0, 1], labels 1 ... K - 1; NaN where a label is absent
        in both maps, 0 where it is absent in one.

    Raises:
        ValueError: shapes, dtypes or num_labels are not as above.
    """
    _check_labels("warped_labels", fixed_labels, warped_labels, num_labels)

    fixed, warped, overlap = jax.vmap(
        lambda f, w: _hard_sums(f, w, num_labels), out_axes=1
    )(
        _layers("fixed_more", fixed_labels, fixed_more),
        _layers("warped_more", warped_labels, warped_more),
    )
    total = (fixed + warped).astype(jnp.float32)
    return _ratio(overlap.astype(jnp.float32), total, jnp.nan)


def _layers(name, labels, more):
    """Labels and their further layers as a tuple of arrays [B, X, Y, Z]."""
    if more is None:
        return (labels,)
    wanted = (labels.shape[0], *more.shape[1:2], *labels.shape[1:])
    if more.shape != wanted or not jnp.issubdtype(more.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integer ids (B, L, X, Y, Z) on the grid of its labels "
            f"{labels.shape}, got {more.shape} {more.dtype}; layers come second"
        )
    return (labels, *(more[:, i] for i in range(more.shape[1])))


def _hard_sums(fixed, warped, num_labels):
    """Voxels per label of fixed, warped and both, [3, K - 1] int32; one example."""

    def count(start, slices):
        f, w = (_chunks(a, start, slices, num_labels) for a in (fixed, warped))
        both = (jnp.where(a == b, a, 0) for a in f for b in w)
        bins = _bins(slices, 3, num_labels)
        for row, maps in enumerate((f, w, both)):
            for label in maps:
                bins = _add(bins, row, label, jnp.ones(label.shape, jnp.int32))
        return bins

    return jnp.sum(_in_chunks(count, fixed[0].shape), axis=0)[:, 1:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _soft_sums(fixed, moving, disp, mask, num_labels, counting):
    """Overlap, warped, fixed and moving sums, each [K - 1] float32; one example.

    fixed and moving are tuples of layers [X, Y, Z].
    """
    add = COUNTING[counting]
    scale = _fixed_point(fixed[0].shape, len(moving))

    def count(start, slices):
        f, m = (_chunks(a, start, slices, num_labels) for a in (fixed, moving))
        coords = _coords(_chunk(disp, start, slices), start, moving[0].shape)
        counts = _chunk(mask, start, slices)

        def add_corner(bins, corner):
            x, y, z = _corner_weights(coords, corner)
            share = jnp.round(x * y * z * scale).astype(jnp.int32)
            share = jnp.where(counts, share, 0)
            for layer in moving:
                label = _corner_label(layer, coords, corner, num_labels)
                differs = functools.reduce(jnp.logical_and, [label != a for a in f])
                # Row 0 where fixed agrees, row 1 where not: one addition feeds both.
                bins = add(bins, differs.astype(jnp.int32), label, share)
            return bins, None

        # A loop over the corners: laid side by side in one array they take 4 times as
        # long on CPU.
        bins, _ = lax.scan(add_corner, _bins(slices, 4, num_labels), _corner_numbers())
        one = jnp.full(f[0].shape, scale, jnp.int32)
        for row, maps, each in ((2, f, jnp.where(counts, one, 0)), (3, m, one)):
            for label in maps:
                bins = add(bins, row, label, each)
        return bins

    sums = _sum_slices(_in_chunks(count, fixed[0].shape)) / scale
    agree, differ, fixed, moving = sums[:, 1:]
    return agree, agree + differ, fixed, moving


def _soft_sums_forward(fixed, moving, disp, mask, num_labels, counting):
    """Keeps the inputs alone: gathering again costs less than storing 8 corners."""
    sums = _soft_sums(fixed, moving, disp, mask, num_labels, counting)
    return sums, (fixed, moving, disp, mask)


def _soft_sums_backward(num_labels, counting, residuals, cotangents):
    """Gradient of trilinear sampling, with the cotangents as the sampled values.

    A corner of id k is worth dL/dwarped_k, and dL/doverlap_k more where fixed is k.
    """
    del counting  # of the forward pass
    fixed, moving, disp, mask = residuals
    # Background is worth nothing.
    worth_overlap, worth_warped = (jnp.pad(c, (1, 0)) for c in cotangents[:2])

    def gradient(start, slices):
        f = _chunks(fixed, start, slices, num_labels)
        coords = _coords(_chunk(disp, start, slices), start, moving[0].shape)
        bonuses = [worth_overlap[a] for a in f]

        def add_corner(gradients, corner):
            value = 0.0
            for layer in moving:
                label = _corner_label(layer, coords, corner, num_labels)
                value = value + worth_warped[label]
                for a, bonus in zip(f, bonuses, strict=True):
                    value = value + jnp.where(label == a, bonus, 0.0)
            x, y, z = _corner_weights(coords, corner)
            slopes = (y * z * value, x * z * value, x * y * value)
            signs = ((2 * bit - 1).astype(jnp.float32) for bit in _bits(corner))
            added = zip(gradients, signs, slopes, strict=True)
            return tuple(g + sign * slope for g, sign, slope in added), None

        zeros = (jnp.zeros(f[0].shape, jnp.float32),) * 3
        sums, _ = lax.scan(add_corner, zeros, _corner_numbers())
        counts = _chunk(mask, start, slices)
        inside = zip(coords.inside, sums, strict=True)
        return jnp.stack([jnp.where(i & counts, g, 0.0) for i, g in inside], axis=-1)

    return None, None, _in_chunks(gradient, fixed[0].shape), None


_soft_sums.defvjp(_soft_sums_forward, _soft_sums_backward)


class _Coords(NamedTuple):
    """Where a chunk of voxels samples; tuples run over X, Y, Z."""

    low: tuple  # lower corner
    fraction: tuple  # distance from it, [0, 1]
    inside: tuple  # False where clamped: no gradient along this axis


def _coords(disp, start, shape):
    """x + disp(x) from slice `start` on, clamped to the grid as ops/warp.py does."""
    low, fraction, inside = [], [], []
    for axis, size in enumerate(shape):
        index = lax.broadcasted_iota(jnp.int32, disp.shape[:-1], axis)
        index = index + start if axis == 0 else index
        position = index.astype(jnp.float32) + disp[..., axis]
        clamped = jnp.clip(position, 0.0, size - 1.0)
        # The lower corner stops one short of the edge, so that both are valid.
        corner = jnp.clip(jnp.floor(clamped).astype(jnp.int32), 0, max(size - 2, 0))
        low.append(corner)
        fraction.append(clamped - corner.astype(jnp.float32))
        inside.append(position == clamped)
    return _Coords(tuple(low), tuple(fraction), tuple(inside))


def _corner_numbers():
    """0 ... 7; the bits of a number say low or high along X, Y, Z."""
    return jnp.arange(8, dtype=jnp.int32)


def _bits(corner):
    """The three bits of a corner's number, X first."""
    return tuple((corner >> shift) & 1 for shift in (2, 1, 0))


def _corner_weights(coords, corner):
    """Linear weight of a corner along each axis."""
    pairs = zip(coords.fraction, _bits(corner), strict=True)
    return tuple(jnp.where(bit == 1, f, 1.0 - f) for f, bit in pairs)


def _corner_label(labels, coords, corner, num_labels):
    """Label id at a corner, as int32."""
    flat = 0
    for low, bit, size in zip(coords.low, _bits(corner), labels.shape, strict=True):
        # Along an axis of one voxel both corners are that voxel.
        flat = flat * size + low + jnp.minimum(bit, size - 1)
    return _foreground(jnp.take(labels.reshape(-1), flat, mode="clip"), num_labels)


def _bins(slices, rows, num_labels):
    """Empty counters, [slices, rows, K] int32; background included."""
    return jnp.zeros((slices, rows, num_labels), jnp.int32)


def _add(bins, row, labels, values):
    """Adds values [slices, Y, Z] to bins[slice, row, label]: one scatter."""
    slices, rows, num_labels = bins.shape
    first = lax.broadcasted_iota(jnp.int32, labels.shape, 0) * rows + row
    index = (first * num_labels + labels).reshape(-1)
    # Background is counted too: without it each addition would need a bounds check,
    # several times dearer on CPU than the addition.
    flat = bins.reshape(-1).at[index].add(values.reshape(-1), mode="promise_in_bounds")
    return flat.reshape(slices, rows, num_labels)


def _add_compared(bins, row, labels, values):
    """The same without a scatter: every value against every bin of its slice."""
    _, rows, num_labels = bins.shape
    index = (row * num_labels + labels)[..., None]
    numbers = lax.broadcasted_iota(jnp.int32, (1, 1, 1, rows * num_labels), 3)
    added = jnp.sum(jnp.where(index == numbers, values[..., None], 0), axis=(1, 2))
    return bins + added.reshape(bins.shape)


COUNTING = {"scatter": _add, "compare": _add_compared}


def _in_chunks(function, shape):
    """function(start, slices) on one chunk of X slices after another; [X, ...]."""
    most = max(1, _CHUNK_VOXELS // (shape[1] * shape[2]))
    size = max(n for n in range(1, min(most, shape[0]) + 1) if shape[0] % n == 0)
    starts = jnp.arange(0, shape[0], size, dtype=jnp.int32)
    chunks = lax.map(lambda start: function(start, size), starts)
    return chunks.reshape(shape[0], *chunks.shape[2:])


def _chunk(array, start, slices):
    """X slices start ... start + slices - 1."""
    return lax.dynamic_slice_in_dim(array, start, slices)


def _chunks(layers, start, slices, num_labels):
    """The ids of some X slices of every layer, as int32."""
    return [_foreground(_chunk(a, start, slices), num_labels) for a in layers]


def _foreground(labels, num_labels):
    """Ids as int32, everything outside 1 ... K - 1 as 0."""
    # Compared after widening: K may not fit the labels' own type.
    ids = labels.astype(jnp.int32)
    return jnp.where((ids > 0) & (ids < num_labels), ids, 0)


def _fixed_point(shape, layers):
    """Largest power of two whose sums over a slice fit int32; float32 holds 2^23.

    Each of the 8 corners of each layer rounds by 1/2 at most.
    """
    room = (2**31 - 1) / (shape[1] * shape[2]) - 4 * layers
    return 2.0 ** min(23, math.floor(math.log2(room)))


def _sum_slices(bins):
    """Sums [X, ...] int32, none negative, over X to float32.

    In two halves of 16 bits, which stay whole numbers: a float sum over slices would
    depend on the order in which a compiled program adds them, which is another for
    another way of counting and on another processor.
    """
    high, low = (jnp.sum(part, axis=0) for part in (bins >> 16, bins & 0xFFFF))
    return high.astype(jnp.float32) * 2.0**16 + low.astype(jnp.float32)


def _ratio(overlap, total, empty):
    """2 overlap / total, `empty` where total is 0."""
    safe = jnp.where(total > 0.0, total, 1.0)
    return jnp.where(total > 0.0, 2.0 * overlap / safe, empty)


def _check_labels(name, fixed_labels, other_labels, num_labels):
    """Two integer maps [B, X, Y, Z] of one shape; at least one foreground label."""
    if fixed_labels.ndim != 4:
        raise ValueError(
            f"fixed_labels must be (B, X, Y, Z), got {fixed_labels.shape}; "
            "no channel axis, ids instead of one-hot"
        )
    if other_labels.shape != fixed_labels.shape:
        raise ValueError(
            f"{name} must be {fixed_labels.shape} as fixed_labels, got "
            f"{other_labels.shape}; resample it to a grid of that shape"
        )
    for key, labels in (("fixed_labels", fixed_labels), (name, other_labels)):
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"{key} must be integer ids, got {labels.dtype}; cast it")
    if not isinstance(num_labels, int) or num_labels < 2:
        raise ValueError(
            f"num_labels must be an int >= 2, got {num_labels}; it counts background"
        )
