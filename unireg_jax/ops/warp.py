"""Sampling volumes at displaced positions: identity grid, warp, compose, invert.

Every displacement is a pull-back in voxels of the grid it lives on: x -> x + disp(x).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


def identity_coords(shape: tuple[int, int, int]) -> jax.Array:
    """Returns the voxel position of every voxel.

    coords[x, y, z] = (x, y, z)

    Args:
        shape: (X, Y, Z), the grid.

    Returns:
        [X, Y, Z, 3] float32, voxels.

    Raises:
        ValueError: shape has not three axes.
    """
    _check_shape(shape)
    return jnp.stack(_positions(shape), axis=-1)


def sample(volume: jax.Array, coords: jax.Array, *, order: int = 1) -> jax.Array:
    """Samples `volume` at absolute positions.

    out[b, s, c] = volume[b, coords[b, s], c]

    Outside the grid the edge value holds. The gradient to `coords` needs no scatter as
    long as `volume` is not differentiated (`jax.lax.stop_gradient`); on the border
    itself it is the one-sided derivative from inside, beyond it zero.

    Args:
        volume: [B, X, Y, Z, C]; floating for order 1, any dtype for order 0.
        coords: [B, *S, 3] float32, voxels of volume's grid.
        order: 1 trilinear, 0 nearest (halves round up).

    Returns:
        [B, *S, C], dtype of volume.

    Raises:
        ValueError: wrong shape, dtype or order.
    """
    _check_volume(volume, order)
    _check_float32("coords", coords)
    batch = volume.shape[0]
    if coords.ndim < 2 or coords.shape[0] != batch or coords.shape[-1] != 3:
        raise ValueError(
            f"coords must be ({batch}, ..., 3) in voxels, got {coords.shape}; "
            "batch goes first, components last"
        )
    return _sample(volume, coords, order, from_voxel=False)


def warp(volume: jax.Array, disp: jax.Array, *, order: int = 1) -> jax.Array:
    """Samples `volume` at x + disp(x) (pull-back).

    out[b, x, c] = volume[b, x + disp[b, x], c]

    The backward pass keeps only `volume` and `disp`. See `sample` for borders and
    gradients.

    Args:
        volume: [B, X, Y, Z, C]; floating for order 1, any dtype for order 0.
        disp: [B, X, Y, Z, 3] float32, voxels, on volume's grid (else resize it first
            with ops/resample.py).
        order: 1 trilinear, 0 nearest (halves round up).

    Returns:
        [B, X, Y, Z, C], dtype of volume.

    Raises:
        ValueError: wrong shape, dtype or order.
    """
    _check_volume(volume, order)
    check_disp(disp, grid=volume.shape[:4])

    def pull(volume, disp):
        return _sample(volume, disp, order, from_voxel=True)

    # Only volume and disp are kept between the passes: that bounds the memory of scans
    # over warps. No barrier (prevent_cse): the slopes fuse into the backward pass.
    return jax.checkpoint(pull, prevent_cse=False)(volume, disp)


def inside(disp: jax.Array, *, shape: tuple[int, int, int] | None = None) -> jax.Array:
    """Says which voxels point into the volume.

    out[b, x] = 0 <= x + disp[b, x] <= n - 1 on every axis, n the volume's shape

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.
        shape: grid that disp points into, by default its own.

    Returns:
        [B, X, Y, Z] bool.

    Raises:
        ValueError: wrong shape or dtype.
    """
    check_disp(disp)
    shape = disp.shape[1:4] if shape is None else shape
    _check_shape(shape)
    x, y, z = (
        (coord >= 0.0) & (coord <= float(size - 1))
        for coord, size in zip(_displaced(disp), shape, strict=True)
    )
    return x & y & z


def within(
    coords: jax.Array, shape: tuple[int, int, int], *, margin: float = 0.0
) -> jax.Array:
    """Says which positions lie on a grid.

    out[b, x] = -margin <= coords[b, x] <= n - 1 + margin on every axis, n the shape

    Args:
        coords: [..., 3] float32, voxels of the grid.
        shape: (X, Y, Z), the grid.
        margin: how far beyond the centres of the outermost voxels it ends, voxels: 0.5
            is their outer faces.

    Returns:
        [...] bool.

    Raises:
        ValueError: wrong shape of the grid.
    """
    _check_shape(shape)
    last = jnp.broadcast_to(jnp.array(shape, jnp.float32) - 1, coords.shape)
    return ((coords >= -margin) & (coords <= last + margin)).all(-1)


def compose(first: jax.Array, second: jax.Array) -> jax.Array:
    """Composes two displacements: x goes through `first`, then through `second`.

    total(x) = first(x) + second(x + first(x))

    warp(v, total) is warp(warp(v, second), first) up to interpolation, and samples the
    image only once. Beyond the grid `second` keeps its edge value.

    Args:
        first: [B, X, Y, Z, 3] float32, voxels.
        second: [B, X, Y, Z, 3] float32, voxels of the same grid.

    Returns:
        [B, X, Y, Z, 3] float32, voxels.

    Raises:
        ValueError: wrong shape or dtype, or different grids.
    """
    check_disp(first, "first")
    check_disp(second, "second", grid=first.shape[:4])
    return first + warp(second, first)


def invert(disp: jax.Array, *, iterations: int = 20) -> jax.Array:
    """Inverts a displacement by fixed-point iteration.

    v_0 = 0,   v_{k+1}(x) = -disp(x + v_k(x))

    Converges where disp is a contraction: its Lipschitz constant L (largest norm of
    its Jacobian) is below 1; the error then shrinks by L per iteration. A map that
    folds has no inverse, and one with L >= 1 may diverge or oscillate: check
    `residual`. Where x + v leaves the grid the edge value of disp stands in.

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.
        iterations: number of steps, at least 1.

    Returns:
        [B, X, Y, Z, 3] float32, voxels; compose(inverse, disp) is about 0.

    Raises:
        ValueError: wrong shape or dtype, or fewer than one iteration.
    """
    check_disp(disp)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")

    def step(_, inverse):
        return -warp(disp, inverse)

    return lax.fori_loop(0, iterations, step, jnp.zeros_like(disp))


def residual(disp: jax.Array, inverse: jax.Array) -> jax.Array:
    """Measures how far `inverse` is from inverting `disp`.

    out[b, x] = |inverse(x) + disp(x + inverse(x))|

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.
        inverse: [B, X, Y, Z, 3] float32, voxels of the same grid.

    Returns:
        [B, X, Y, Z] float32, voxels.

    Raises:
        ValueError: wrong shape or dtype, or different grids.
    """
    check_disp(disp)
    check_disp(inverse, "inverse", grid=disp.shape[:4])
    return jnp.sqrt(jnp.sum(jnp.square(compose(inverse, disp)), axis=-1))


def affine_coords(matrix: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Maps every voxel position of a grid through an affine.

    coords[b, x] = matrix[b] (x, 1)

    Args:
        matrix: [B, 4, 4] float32, voxels of this grid -> voxels of the other one,
            acting on column vectors; the last row is not read.
        shape: (X, Y, Z), the grid.

    Returns:
        [B, X, Y, Z, 3] float32, voxels of the other grid.

    Raises:
        ValueError: wrong shape or dtype.
    """
    _check_matrix(matrix)
    _check_shape(shape)
    return _affine(matrix[:, :3, :3], matrix[:, :3, 3], shape)


def affine_disp(matrix: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Returns the displacement of an affine: warp(v, disp) samples v at matrix (x, 1).

    disp[b, x] = matrix[b] (x, 1) - x

    Args:
        matrix: [B, 4, 4] float32, fixed voxels -> moving voxels, acting on column
            vectors; the last row is not read.
        shape: (X, Y, Z), the fixed grid.

    Returns:
        [B, X, Y, Z, 3] float32, voxels.

    Raises:
        ValueError: wrong shape or dtype.
    """
    _check_matrix(matrix)
    _check_shape(shape)
    # Subtracting the identity from the matrix, not from the positions, keeps the
    # identity exactly 0 and loses no digits far from the origin.
    linear = matrix[:, :3, :3] - jnp.eye(3, dtype=matrix.dtype)[None]
    return _affine(linear, matrix[:, :3, 3], shape)


def check_disp(
    disp: jax.Array,
    name: str = "disp",
    *,
    grid: tuple[int, ...] | None = None,
    least: int = 0,
) -> None:
    """Raises ValueError unless disp is [B, X, Y, Z, 3] float32, on (B, X, Y, Z)."""
    _check_float32(name, disp)
    if disp.ndim != 5 or disp.shape[-1] != 3:
        raise ValueError(
            f"{name} must be (B, X, Y, Z, 3) in voxels, got {disp.shape}; "
            "batch goes first, channels go last"
        )
    if grid is not None and disp.shape[:4] != tuple(grid):
        raise ValueError(
            f"{name} must be {(*grid, 3)} in voxels, got {disp.shape}; "
            "resize it to the same grid first"
        )
    if min(disp.shape[1:4]) < least:
        raise ValueError(
            f"{name} must have at least {least} voxels along each axis, got "
            f"{disp.shape}"
        )


def working_dtype(volume: jax.Array) -> jax.typing.DTypeLike:
    """Halves are blended and summed in float32."""
    return jnp.float32 if volume.dtype.itemsize < 4 else volume.dtype


def _sample(volume, vectors, order, *, from_voxel):
    """Samples each volume of the batch; see _coords for the vectors."""
    # vmap, not one flat index over the batch, so that a batch split over devices needs
    # no communication.
    if order == 0:
        return jax.vmap(lambda v, u: _nearest(v, _coords(u, from_voxel)))(
            volume, vectors
        )
    return jax.vmap(lambda v, u: _linear(v, u, from_voxel))(volume, vectors)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _linear(volume, vectors, from_voxel):
    """Blends the eight corners: volume [X, Y, Z, C], vectors [*S, 3] -> [*S, C].

    For one channel the halves of a cell along X are summed by a reduction, over an axis
    that is never stored. One more blend is as fast alone, but as soon as two operations
    read the result (NCC reads it three times), XLA:CPU stores all eight corners instead
    of the result: 3 times the time of warp, NCC and gradient. With more channels the
    reduction itself costs a fifth or more.
    """
    if volume.shape[3] > 1:
        return _blend(volume, vectors, from_voxel)
    index, offsets, (fraction, *others) = _cells(volume, _coords(vectors, from_voxel))
    dtype = working_dtype(volume)
    shape = (2, *index.shape)
    upper = lax.broadcasted_iota(jnp.int32, shape, 0)
    index = jnp.broadcast_to(index, shape) + upper * offsets[0][1]
    fraction = jnp.broadcast_to(fraction.astype(dtype), shape)
    weight = jnp.where(upper == 1, fraction, 1.0 - fraction)[..., None]
    corners = _gather(volume, index, offsets[1:])
    for fraction in others:
        fraction = jnp.broadcast_to(fraction.astype(dtype), shape)[..., None]
        corners = _along_axis(corners, 1.0 - fraction, fraction)
    return jnp.sum(corners[0] * weight, axis=0).astype(volume.dtype)


@functools.partial(_linear.defjvp, symbolic_zeros=True)
def _linear_jvp(from_voxel, primals, tangents):
    """Tangents of the blend: slopes times that of the vectors, blend of the volume's.

    XLA's own derivative stores all eight corners and computes each in a pass of its
    own. Here they are gathered again for each of the three slopes, in one loop without
    scratch, which is faster: docs/performance.md.
    """
    volume, vectors = primals
    volume_dot, vectors_dot = tangents
    out, out_dot = _linear(volume, vectors, from_voxel), None
    if not isinstance(vectors_dot, SymbolicZero):
        slopes = _slopes(volume, vectors, from_voxel)
        weighted = slopes * vectors_dot[..., None].astype(slopes.dtype)
        out_dot = jnp.sum(weighted, axis=-2).astype(out.dtype)
    if not isinstance(volume_dot, SymbolicZero):
        blended = _blend(volume_dot, vectors, from_voxel)
        out_dot = blended if out_dot is None else out_dot + blended
    return out, jnp.zeros_like(out) if out_dot is None else out_dot


def _blend(volume, vectors, from_voxel):
    """Linear interpolation by XLA's own operations, hence differentiable by them."""
    index, offsets, fractions = _cells(volume, _coords(vectors, from_voxel))
    corners = _gather(volume, index, offsets)
    for fraction in fractions:
        fraction = fraction[..., None].astype(working_dtype(volume))
        # Two products, not a + f (b - a): exact at f = 1, the far edge.
        corners = _along_axis(corners, 1.0 - fraction, fraction)
    return corners[0].astype(volume.dtype)


def _slopes(volume, vectors, from_voxel):
    """Derivative of the blend along each axis, [*S, 3, C], 0 outside the grid.

    One value per position and axis: the blend with weights -1 and 1 along that axis.
    """
    coords = _coords(vectors, from_voxel)
    index, offsets, fractions = _cells(volume, coords)
    dtype = working_dtype(volume)
    shape = (*index.shape, 3, 1)
    axes = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    index = jnp.broadcast_to(index[..., None], shape[:-1])
    corners = _gather(volume, index, offsets)
    outside = jnp.zeros(shape, bool)
    for axis, (coord, size) in enumerate(zip(coords, volume.shape[:3], strict=True)):
        fraction = fractions[axis][..., None, None].astype(dtype)
        low = jnp.where(axes == axis, -1.0, 1.0 - fraction).astype(dtype)
        high = jnp.where(axes == axis, 1.0, fraction).astype(dtype)
        corners = _along_axis(corners, low, high)
        beyond = ((coord < 0.0) | (coord > float(size - 1)))[..., None, None]
        outside |= (axes == axis) & beyond
    return jnp.where(outside, 0.0, corners[0]).astype(dtype)


def _cells(volume, coords):
    """Flat index of the lowest corner, offsets of the others, fractions per axis."""
    shape = volume.shape[:3]
    strides = (shape[1] * shape[2], shape[2], 1)
    # One flat index for the lowest corner; the others lie at constant offsets, which
    # lets the compiler fuse all eight gathers into one loop without scratch.
    index, fractions = 0, []
    for coord, size, stride in zip(coords, shape, strides, strict=True):
        coord = _clamp(coord, size)
        # The base stops at n - 2, so that all corners exist and the far edge is reached
        # with weight 1: no special case at the border.
        base = jnp.minimum(jnp.floor(coord), float(max(size - 2, 0)))
        index = index + base.astype(jnp.int32) * stride
        fractions.append(coord - base)
    # An axis of one voxel is its own neighbour.
    offsets = [(0, s if n > 1 else 0) for n, s in zip(shape, strides, strict=True)]
    return index, offsets, fractions


def _gather(volume, index, offsets):
    """The corners of every cell, each [*S, C] in working precision, X slowest."""
    rows, dtype = volume.reshape(-1, volume.shape[3]), working_dtype(volume)
    return [
        jnp.take(rows, index + sum(offset), axis=0, mode="clip").astype(dtype)
        for offset in itertools.product(*offsets)
    ]


def _along_axis(corners, low, high):
    """Weighs the lower half of the corners against the upper half."""
    half = len(corners) // 2
    pairs = zip(corners[:half], corners[half:], strict=True)
    return [a * low + b * high for a, b in pairs]


def _nearest(volume, coords):
    """Takes the nearest voxel: volume [X, Y, Z, C], coords three arrays [*S]."""
    shape, channels = volume.shape[:3], volume.shape[3]
    x, y, z = (
        jnp.floor(_clamp(c, n) + 0.5).astype(jnp.int32)
        for c, n in zip(coords, shape, strict=True)
    )
    index = (x * shape[1] + y) * shape[2] + z
    return jnp.take(volume.reshape(-1, channels), index, axis=0, mode="clip")


def _clamp(coord, size):
    """Clamps to [0, n - 1] with derivative 1 on the border (jnp.clip has 1/2)."""
    coord = jnp.where(coord < 0.0, 0.0, coord)
    return jnp.where(coord > float(size - 1), float(size - 1), coord)


def _positions(shape):
    """Returns the three components of the voxel positions, each float32 of `shape`."""
    return tuple(
        lax.broadcasted_iota(jnp.float32, tuple(shape), axis) for axis in range(3)
    )


def _coords(vectors, from_voxel):
    """Components of the positions [*S, 3]; from_voxel: of x + vectors(x), on a grid."""
    parts = tuple(vectors[..., axis] for axis in range(3))
    if not from_voxel:
        return parts
    return tuple(
        lax.broadcasted_iota(part.dtype, part.shape, axis) + part
        for axis, part in enumerate(parts)
    )


def _displaced(disp):
    """Returns the three components of x + disp(x), each [B, X, Y, Z]."""
    return tuple(
        lax.broadcasted_iota(disp.dtype, disp.shape[:4], axis + 1) + disp[..., axis]
        for axis in range(3)
    )


def _affine(linear, offset, shape):
    """Evaluates linear [B, 3, 3] x + offset [B, 3] on the grid, by component."""
    x, y, z = (position[None] for position in _positions(shape))

    def spread(value):
        return value[:, None, None, None]

    # Written out: a matrix unit could round positions to ten bits.
    return jnp.stack(
        [
            spread(linear[:, i, 0]) * x
            + spread(linear[:, i, 1]) * y
            + spread(linear[:, i, 2]) * z
            + spread(offset[:, i])
            for i in range(3)
        ],
        axis=-1,
    )


def _check_volume(volume, order):
    if order not in (0, 1):
        raise ValueError(f"order must be 1 (linear) or 0 (nearest), got {order!r}")
    if volume.ndim != 5 or 0 in volume.shape[1:4]:
        raise ValueError(
            f"volume must be (B, X, Y, Z, C), got {volume.shape}; "
            "batch goes first, channels go last"
        )
    if order == 1 and not jnp.issubdtype(volume.dtype, jnp.floating):
        raise ValueError(
            f"volume must be floating for order=1, got {volume.dtype}; "
            "cast it, or use order=0 for labels"
        )
    size = volume.shape[1] * volume.shape[2] * volume.shape[3]
    if size > 2**31 - 1:
        raise ValueError(
            f"volume must have fewer than 2^31 voxels, got {volume.shape}; "
            "the flat index is int32, so sample it in parts"
        )


def _check_shape(shape):
    if len(shape) != 3:
        raise ValueError(f"shape must be (X, Y, Z), got {tuple(shape)}")


def _check_matrix(matrix):
    _check_float32("matrix", matrix)
    if matrix.ndim != 3 or matrix.shape[1:] != (4, 4):
        raise ValueError(f"matrix must be (B, 4, 4), got {matrix.shape}")


def _check_float32(name, array):
    """Half precision cannot hold a position: 11 bits end at 2048 with no fraction."""
    if array.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"{name} must be float32, got {array.dtype}; cast it first")
