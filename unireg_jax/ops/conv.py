"""Three-dimensional convolution block: one signature, one formulation per backend.

3x3x3, stride 1, zero padding, with what surrounds it in the network: several inputs as
if concatenated, one of them up-sampled, bias, LeakyReLU. On accelerators these are
XLA's own operations, which it fuses. XLA's CPU backend has no fast 3-D kernel; there,
four output slices at a time are made from the six input slices that they see:

- along X by Winograd F(4, 3): six 2-D convolutions instead of twelve, each of which the
  backend runs as a matrix product near the machine's peak (Lavin and Gray, "Fast
  Algorithms for Convolutional Neural Networks", 2016, eq. 8 for F(2, 3); F(4, 3) from
  the points 0, 1, -1, 2, -2, infinity);
- the up-sampled input is never made: along each axis, a neighbour either equals the
  voxel or differs from it by one difference of the coarse map, which leaves 27 products
  per coarse voxel for its eight fine ones, an eighth of the arithmetic;
- concatenation, bias and activation happen on those slices, so that no other map of
  the size of the volume exists, forward or backward.

Few input channels are not worth Winograd's sums: in the forward pass the three slices
that an output slice sees are one 2-D convolution. Small maps cost more to trace and to
compile so than they ever take: there the slices along X and the two beside each are one
batch of 2-D convolutions.

Timings: docs/performance.md, experiments/benchmark.py.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unireg_jax.ops import spatial

# Output slices per Winograd tile, and slices read per tile.
_TILE = 4
_TAPS = _TILE + 2
# Up to so many input channels, Winograd's sums take longer than the products that they
# save; forward only: its gradients are faster for these, too.
_THIN = 16
# Below this many voxels a form that compiles faster is fast enough.
_SMALL = 16**3

IMPLS = ("auto", "direct", "winograd", "planes", "cpu")

# Winograd F(4, 3): transforms of input [6, 6], kernel [6, 3] and output [4, 6].
_DATA = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_WEIGHT = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def conv3d(
    inputs: jax.Array | Sequence[jax.Array],
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    coarse: jax.Array | None = None,
    slope: float = 1.0,
    impl: str = "auto",
) -> jax.Array:
    """Correlates maps with a 3x3x3 kernel, stride 1, zeros beyond the border.

    out = leaky_relu(kernel * concatenate([upsample_nearest(coarse), *inputs]) + bias)

    Args:
        inputs: [B, X, Y, Z, C] floating, or several, which count as concatenated.
        kernel: [3, 3, 3, sum of all C, K], dtype of inputs.
        bias: [K], dtype of inputs; None for none.
        coarse: [B, X/2, Y/2, Z/2, C], up-sampled by two; None for none.
        slope: of LeakyReLU below zero; 1 leaves the result linear.
        impl: "direct" is XLA's convolution, "winograd" and "planes" are the CPU forms,
            "cpu" chooses among these by size. "auto" chooses by the platform that the
            program is compiled for, too, and traces the forms of all.

    Returns:
        [B, X, Y, Z, K], dtype of inputs. Winograd computes in float32 and differs from
        direct in float32 by about 1e-5 of the largest value.

    Raises:
        ValueError: a shape does not fit, or `impl` is unknown.
    """
    parts = tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
    _check(parts, coarse, kernel, bias)
    if bias is None:
        bias = jnp.zeros(kernel.shape[4], kernel.dtype)
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    small = math.prod(parts[0].shape[1:4]) < _SMALL
    if small and impl == "auto":
        impl = "direct"
    if impl == "cpu":
        impl = "planes" if small else "winograd"
    if spatial.splits(*parts):
        return _by_slabs(parts, coarse, kernel, bias, slope=slope, impl=impl)
    return _formulated((parts, coarse, kernel, bias), impl, slope=slope, halo=0)


def _formulated(args, impl, *, slope, halo):
    direct = functools.partial(_direct, slope=slope, halo=halo)
    tiled = functools.partial(_tiled, slope=slope, halo=halo)
    if impl == "direct":
        return direct(*args)
    if impl == "winograd":
        return tiled(*args)
    if impl == "planes":
        return _planes(*args, slope=slope, halo=halo)
    return lax.platform_dependent(*args, cpu=tiled, default=direct)


def _by_slabs(parts, coarse, kernel, bias, *, slope, impl):
    """Every device convolves its slices and one of either neighbour.

    Left to XLA, the loop over tiles would gather all maps on every device.
    """
    if coarse is not None and not spatial.splits(coarse):
        parts, coarse = (upsample_nearest(coarse), *parts), None

    def slab(parts, coarse, kernel, bias):
        around = [spatial.with_halo(p, 1) for p in parts]
        around_coarse = None if coarse is None else spatial.with_halo(coarse, 1)
        args = (tuple(around), around_coarse, kernel, bias)
        return _formulated(args, impl, slope=slope, halo=1)

    return spatial.over_slabs(slab, (parts, coarse), (kernel, bias))


def strided_conv3d(
    inputs: jax.Array,
    kernel: jax.Array,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    halo: bool = False,
    impl: str = "auto",
) -> jax.Array:
    """Correlates a map with a kernel of odd size, any stride, zeros beyond the border.

    out[x] = sum_k kernel[k] inputs[stride x + k - size // 2]          as in PyTorch

    On a CPU as 2-D convolutions of planes: the kernel's taps along X count as channels.

    Args:
        inputs: [B, X, Y, Z, C] floating.
        kernel: [kx, ky, kz, C, K], dtype of inputs.
        stride: along X, Y, Z.
        halo: inputs already hold the kx // 2 planes before and after along X.
        impl: "direct" is XLA's 3-D convolution, "auto" chooses by the platform that
            the program is compiled for, all others are the CPU form.

    Returns:
        [B, ceil(X / sx), ceil(Y / sy), ceil(Z / sz), K], dtype of inputs; X without
        the halo.

    Raises:
        ValueError: a shape does not fit, or `impl` is unknown.
    """
    sizes = kernel.shape[:3]
    if inputs.ndim != 5 or kernel.ndim != 5 or any(n % 2 == 0 for n in sizes):
        raise ValueError(
            "strided_conv3d takes inputs [B, X, Y, Z, C] and a kernel of odd sizes "
            f"[kx, ky, kz, C, K], got {inputs.shape} and {kernel.shape}; channels go "
            "last"
        )
    if inputs.shape[4] != kernel.shape[3]:
        raise ValueError(
            f"kernel must take {inputs.shape[4]} channels, got {kernel.shape[3]}; its "
            "fourth axis is the input channel"
        )
    pads = [(n // 2, n // 2) for n in sizes]
    if halo:
        pads[0] = (0, 0)
    direct = functools.partial(_strided_direct, stride=stride, pads=pads)
    planes = functools.partial(_strided_planes, stride=stride, pads=pads)
    if impl == "direct":
        return direct(inputs, kernel)
    if impl in ("planes", "winograd", "cpu"):
        return planes(inputs, kernel)
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    return lax.platform_dependent(inputs, kernel, cpu=planes, default=direct)


def _strided_direct(x, kernel, *, stride, pads):
    return lax.conv_general_dilated(
        x, kernel, stride, pads, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _strided_planes(x, kernel, *, stride, pads):
    taps = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), pads[0], (0, 0), (0, 0), (0, 0)))
    count = (x.shape[1] - taps) // stride[0] + 1
    last = stride[0] * (count - 1) + 1
    near = [lax.slice_in_dim(x, k, k + last, stride[0], axis=1) for k in range(taps)]
    x = near[0] if taps == 1 else jnp.concatenate(near, axis=-1)
    # [kx, ky, kz, C, K] -> [ky, kz, kx C, K]
    flat = jnp.moveaxis(kernel, 0, 2)
    flat = flat.reshape(*flat.shape[:2], -1, flat.shape[-1])
    b, n, *rest = x.shape
    y = lax.conv_general_dilated(
        x.reshape(b * n, *rest),
        flat,
        stride[1:],
        pads[1:],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(b, n, *y.shape[1:])


def upsample_nearest(x: jax.Array) -> jax.Array:
    """Repeats every voxel twice along X, Y and Z.

    Args:
        x: [B, X, Y, Z, C], any dtype.

    Returns:
        [B, 2 X, 2 Y, 2 Z, C].
    """
    b, nx, ny, nz, c = x.shape
    wide = jnp.broadcast_to(
        x[:, :, None, :, None, :, None], (b, nx, 2, ny, 2, nz, 2, c)
    )
    return wide.reshape(b, 2 * nx, 2 * ny, 2 * nz, c)


def _check(parts, coarse, kernel, bias):
    first = parts[0].shape
    if (
        any(p.ndim != 5 or p.shape[:4] != first[:4] for p in parts)
        or kernel.ndim != 5
        or kernel.shape[:3] != (3, 3, 3)
    ):
        raise ValueError(
            "conv3d takes inputs [B, X, Y, Z, C] on one grid and a kernel "
            f"[3, 3, 3, C, K], got {[p.shape for p in parts]} and {kernel.shape}; "
            "channels go last"
        )
    channels = sum(p.shape[4] for p in parts)
    if coarse is not None:
        half = (first[0], *(n / 2 for n in first[1:4]))
        if coarse.ndim != 5 or coarse.shape[:4] != half:
            raise ValueError(
                f"coarse must be [B, X/2, Y/2, Z/2, C] for inputs {first}, got "
                f"{coarse.shape}"
            )
        channels += coarse.shape[4]
    if channels != kernel.shape[3]:
        raise ValueError(
            f"kernel must take {channels} channels, got {kernel.shape[3]}; its "
            "fourth axis is the input channel"
        )
    if bias is not None and bias.shape != kernel.shape[4:]:
        raise ValueError(f"bias must be {kernel.shape[4:]}, got {bias.shape}")


def _split(kernel, parts, coarse):
    """The kernel's input channels by map: (of coarse or None, of each part)."""
    widths = [] if coarse is None else [coarse.shape[-1]]
    widths += [p.shape[-1] for p in parts]
    kernels = jnp.split(kernel, np.cumsum(widths)[:-1], axis=3)
    return (None, kernels) if coarse is None else (kernels[0], kernels[1:])


def _direct(parts, coarse, kernel, bias, *, slope, halo):
    """The convolution of a concatenation is the sum of the convolutions: no copy.

    halo: slices that the maps hold beyond either end of X, 0 or 1.
    """
    coarse_kernel, kernels = _split(kernel, parts, coarse)
    if coarse is not None:
        parts = (_upsampled_whole(coarse, halo), *parts)
        kernels = [coarse_kernel, *kernels]
    pads = [(0, 0) if halo else (1, 1), (1, 1), (1, 1)]
    y = functools.reduce(
        jnp.add,
        [
            lax.conv_general_dilated(
                x, k, (1, 1, 1), pads, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
            )
            for x, k in zip(parts, kernels, strict=True)
        ],
    )
    return _activate(y + jnp.broadcast_to(bias, y.shape), slope)


def _upsampled_whole(coarse, halo):
    """The up-sampled map; of a halo of one coarse slice, one fine one."""
    fine = upsample_nearest(coarse)
    return fine[:, 1:-1] if halo else fine


def _activate(y, slope):
    return y if slope == 1 else jnp.where(y > 0, y, slope * y)


def _planes(parts, coarse, kernel, bias, *, slope, halo):
    """All slices at once; the taps along X count as channels. float32 within."""
    if coarse is not None:
        parts = (_upsampled_whole(coarse, halo), *parts)
    x = jnp.concatenate(parts, axis=-1).astype(jnp.float32)
    if not halo:
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    size = x.shape[1] - 2
    x = jnp.concatenate([x[:, i : i + size] for i in range(3)], axis=-1)
    # [3, 3, 3, C, K] -> [3, 3, 3 C, K]
    flat = jnp.moveaxis(kernel.astype(jnp.float32), 0, 2)
    flat = flat.reshape(3, 3, -1, kernel.shape[4])
    # vmap keeps the batch an axis of its own: split over devices, no example moves.
    y = jax.vmap(_conv2d, in_axes=(0, None))(x, flat)
    y = _activate(y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape), slope)
    return y.astype(parts[0].dtype)


# --- four slices at a time ----------------------------------------------------------


def _tiled(parts, coarse, kernel, bias, *, slope, halo):
    size = parts[0].shape[1] - 2 * halo
    if tail := -size % _TILE:  # of the network's maps only slabs of coarse levels
        if coarse is not None:
            parts = (_upsampled_whole(coarse, halo), *parts)
        pad = ((0, 0), (0, tail), (0, 0), (0, 0), (0, 0))
        parts = tuple(jnp.pad(p, pad) for p in parts)
        return _tiled(parts, None, kernel, bias, slope=slope, halo=halo)[:, :size]
    # vmap keeps the batch an axis of its own: split over devices, no example moves.
    single = functools.partial(_block, slope, halo)
    return jax.vmap(single, in_axes=(0, 0, None, None))(parts, coarse, kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _block(slope, halo, parts, coarse, kernel, bias):
    """One example: parts [X, Y, Z, C], coarse [X/2, Y/2, Z/2, C] -> [X, Y, Z, K].

    halo: slices that both maps hold beyond either end of X, the result none.
    """
    thin = coarse is None and kernel.shape[3] <= _THIN
    tile, kernels = (
        (_thin_tile, kernel) if thin else (_tile, _transform(kernel, coarse))
    )
    shape, dtype = _result_shape(parts, halo), parts[0].dtype
    wide = bias.astype(jnp.float32)

    def step(t, y):
        rows = jnp.stack(tile(*_read(parts, coarse, t, halo), kernels))
        rows = _activate(rows + jnp.broadcast_to(wide, rows.shape), slope)
        return lax.dynamic_update_slice_in_dim(y, rows.astype(dtype), _TILE * t, 0)

    empty = _zeros((*shape, kernel.shape[-1]), dtype, after=parts[0])
    return lax.fori_loop(0, shape[0] // _TILE, step, empty)


def _result_shape(parts, halo):
    """(X, Y, Z) of what `_block` makes."""
    x, y, z = parts[0].shape[:3]
    return x - 2 * halo, y, z


def _block_fwd(slope, halo, parts, coarse, kernel, bias):
    y = _block(slope, halo, parts, coarse, kernel, bias)
    return y, (parts, coarse, kernel, bias, y)


def _block_bwd(slope, halo, residuals, grad):
    """The tile is linear in slices and kernels; its own gradient is taken tile by tile.

    Each tile adds to two slices of the one before it; all other slices it writes first.
    """
    parts, coarse, kernel, bias, y = residuals
    wide_bias = bias.astype(jnp.float32)
    kernels, pull_kernels = jax.vjp(lambda k: _transform(k, coarse), kernel)
    ends = np.cumsum([p.shape[-1] for p in parts])[:-1]

    def step(t, carry):
        d_parts, d_coarse, d_kernels, d_bias = carry
        rows = []
        for i in range(_TILE):
            g = _at(grad, _TILE * t + i).astype(jnp.float32)
            rows.append(
                g if slope == 1 else jnp.where(_at(y, _TILE * t + i) > 0, g, slope * g)
            )
        slices, coarse_slices = _read(parts, coarse, t, halo)
        _, pull = jax.vjp(_tile, slices, coarse_slices, kernels)
        d_slices, d_coarse_slices, d_kernels_here = pull(rows)
        of_parts = zip(*(jnp.split(s, ends, axis=-1) for s in d_slices), strict=True)
        d_parts = [
            _accumulate(d, s, _TILE * t + halo - 1)
            for d, s in zip(d_parts, of_parts, strict=True)
        ]
        if coarse is not None:
            d_coarse = _accumulate(d_coarse, d_coarse_slices, _TILE // 2 * t + halo - 1)
        d_kernels = jax.tree.map(jnp.add, d_kernels, d_kernels_here)
        d_bias = d_bias + sum(row.sum((0, 1)) for row in rows)
        return d_parts, d_coarse, d_kernels, d_bias

    start = jax.tree.map(
        lambda x: _zeros(x.shape, x.dtype, after=grad),
        (list(parts), coarse, kernels, wide_bias),
    )
    d_parts, d_coarse, d_kernels, d_bias = lax.fori_loop(
        0, y.shape[0] // _TILE, step, start
    )
    (d_kernel,) = pull_kernels(d_kernels)
    return tuple(d_parts), d_coarse, d_kernel, d_bias.astype(bias.dtype)


_block.defvjp(_block_fwd, _block_bwd)


def _zeros(shape, dtype, *, after):
    """Zeros that exist only once `after` does.

    XLA makes constants at the start of the program and shares one among all loops,
    with a copy each: every buffer of the network would live through the whole step.
    """
    return jnp.broadcast_to((after[(0,) * after.ndim] * 0).astype(dtype), shape)


def _at(x, index):
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def _write(x, row, index):
    return lax.dynamic_update_index_in_dim(x, row.astype(x.dtype), index, 0)


def _read(parts, coarse, t, halo):
    """Slices that tile t sees, float32: six of the parts, four of the coarse map."""

    def around(x, first, count):
        n = x.shape[0]
        slices = []
        for i in range(count):
            index = first + i
            inside = (index >= 0) & (index < n)
            s = _at(x, jnp.clip(index, 0, n - 1)).astype(jnp.float32)
            slices.append(jnp.where(inside, s, 0.0))
        return slices

    each = [around(p, _TILE * t + halo - 1, _TAPS) for p in parts]
    slices = [jnp.concatenate(same, axis=-1) for same in zip(*each, strict=True)]
    if coarse is None:
        return slices, []
    return slices, around(coarse, _TILE // 2 * t + halo - 1, _TILE // 2 + 2)


def _accumulate(total, slices, first):
    """Adds the first two slices to what stands there and writes the others.

    Slices beyond the border vanish: the one before it is added as zero, the one after
    it is overwritten by its neighbour.
    """
    n = total.shape[0]
    for i in reversed(range(2, len(slices))):
        total = _write(total, slices[i], jnp.minimum(first + i, n - 1))
    for i in range(2):
        index = jnp.maximum(first + i, 0)
        here = jnp.where(first + i >= 0, slices[i], 0.0)
        total = _write(total, _at(total, index) + here.astype(total.dtype), index)
    return total


def _transform(kernel, coarse):
    """Kernels as `_tile` uses them, float32: (of coarse or None, of the parts).

    As products with constant matrices: spelled out, term by term, they and their
    gradients were half of what tracing the network took.
    """
    kernel = kernel.astype(jnp.float32)
    of_coarse, width = None, 0
    if coarse is not None:
        width = coarse.shape[-1]
        of_coarse = _differences(kernel[..., :width, :])
    return of_coarse, list(_along(np.array(_WEIGHT), kernel[..., width:, :]))


def _along(matrix, array):
    """The product along the array's first axis, in full precision."""
    return jnp.tensordot(
        jnp.asarray(matrix, jnp.float32), array, 1, precision=lax.Precision.HIGHEST
    )


def _tile(slices, coarse_slices, kernels):
    """Four output slices [Y, Z, K] of one tile, linear in slices and in kernels."""
    of_coarse, transformed = kernels
    products = [
        _conv2d(_combine(row, slices)[None], k)[0]
        for row, k in zip(_DATA, transformed, strict=True)
    ]
    rows = [_combine(row, products) for row in _OUTPUT]
    if coarse_slices:
        rows = _add(rows, _upsampled(coarse_slices, of_coarse))
    return rows


def _thin_tile(slices, coarse_slices, kernel):
    """`_tile` by the definition; the taps along X count as channels."""
    del coarse_slices
    flat = jnp.moveaxis(kernel.astype(jnp.float32), 0, 2)
    flat = flat.reshape(3, 3, -1, kernel.shape[4])
    near = [jnp.concatenate(slices[i : i + 3], axis=-1) for i in range(_TILE)]
    return [_conv2d(x[None], flat)[0] for x in near]


def _add(some, others):
    return [a + b for a, b in zip(some, others, strict=True)]


def _combine(coefficients, arrays):
    """Linear combination that spells out its terms, so that XLA fuses them."""
    terms = [
        a if c == 1 else a * float(c)
        for c, a in zip(coefficients, arrays, strict=True)
        if c
    ]
    return functools.reduce(jnp.add, terms)


# --- 2-D convolution of a slice -----------------------------------------------------


@jax.custom_vjp
def _conv2d(x, kernel):
    """[N, Y, Z, C] with [3, 3, C, K] -> [N, Y, Z, K]."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _conv2d_fwd(x, kernel):
    return _conv2d(x, kernel), (x, kernel)


def _conv2d_bwd(residuals, grad):
    """XLA's own CPU gradient to the kernel is two to four times slower than a product.

    (3C x N)(N x 3K): Z shifts stacked on the input, Y shifts on the output.
    """
    x, kernel = residuals
    c, k = kernel.shape[2:]
    flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    lhs = jnp.concatenate(_shifts(x, axis=2), -1).reshape(-1, 3 * c)
    rhs = jnp.concatenate(_shifts(grad, axis=1)[::-1], -1).reshape(-1, 3 * k)
    product = lax.dot_general(lhs, rhs, (((0,), (0,)), ((), ())))
    return (
        _conv2d(grad, flipped),
        product.reshape(3, c, 3, k).transpose(2, 0, 1, 3),
    )


_conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)


def _shifts(x, *, axis):
    """x at index -1, 0 and +1 along `axis`, zeros beyond the border."""
    n = x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (1, 1)
    padded = jnp.pad(x, pad)
    return [lax.slice_in_dim(padded, o, o + n, axis=axis) for o in range(3)]


# --- an up-sampled input ------------------------------------------------------------
#
# Along one axis, with taps w, coarse values l and differences e[i] = l[i - 1] - l[i],
#     out[2 i]     = w0 l[i - 1] + (w1 + w2) l[i] = s l[i] + w0 e[i],
#     out[2 i + 1] = (w0 + w1) l[i] + w2 l[i + 1] = s l[i] - w2 e[i + 1],
# s = w0 + w1 + w2. So l meets the kernel s, and e the kernels w0 and -w2: three
# products per coarse voxel and axis, and 27 in three dimensions.

# Taps to (s, w0, -w2).
_GROUPS = ((1, 1, 1), (1, 0, 0), (0, 0, -1))
# Groups of (Y, Z) that meet the same data: values or differences along either axis.
_SHARED = (
    ((0, 0),),
    ((0, 1), (0, 2)),
    ((1, 0), (2, 0)),
    ((1, 1), (1, 2), (2, 1), (2, 2)),
)


def _differences(kernel):
    """[3, 3, 3, C, K] -> [group of X][row of _SHARED], [C, K per group of (Y, Z)]."""
    taps = np.array(_GROUPS)
    wanted = np.array(
        [
            np.multiply.outer(taps[gx], np.multiply.outer(taps[gy], taps[gz]))
            for gx in range(3)
            for shared in _SHARED
            for gy, gz in shared
        ]
    )
    c, k = kernel.shape[3:]
    groups = _along(wanted.reshape(27, 27), kernel.reshape(27, c, k))
    groups = jnp.moveaxis(groups.reshape(3, 9, c, k), 1, 2).reshape(3, c, 9 * k)
    ends = k * np.cumsum([len(shared) for shared in _SHARED])
    return [jnp.split(plane, ends[:-1], axis=1) for plane in groups]


def _upsampled(slices, kernels):
    """Four output slices [2 Y, 2 Z, K] from four coarse slices [Y, Z, C]."""
    before, left, right, after = slices
    values = _products(jnp.stack([left, right]), kernels[0])
    low, high = before - left, right - after
    middle = left - right
    rows = [
        _interleave(_add(values, _products(jnp.stack(steps), kernel)))
        for steps, kernel in (((low, middle), kernels[1]), ((middle, high), kernels[2]))
    ]
    return [rows[odd][i] for i in range(2) for odd in range(2)]


def _products(x, kernels):
    """[N, Y, Z, C] -> for each row of _SHARED its groups side by side.

    Shapes [N, Y + 1, Z + 1, K per group]: a line of voxels has one difference more.
    """
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    along_y = (padded[:, 1:], padded[:, :-1] - padded[:, 1:])
    data = [d for v in along_y for d in (v[:, :, 1:], v[:, :, :-1] - v[:, :, 1:])]
    return [
        jnp.einsum("nyzc,ck->nyzk", d, k) for d, k in zip(data, kernels, strict=True)
    ]


@jax.custom_vjp
def _interleave(products):
    """Products on the coarse grid, as `_products` -> fine slices [N, 2 Y, 2 Z, K].

    Group s reaches both voxels of a pair, w0 the even one, w2, from one step on, the
    odd one.
    """
    n, ny, nz, k = products[0].shape
    ny, nz = ny - 1, nz - 1
    groups = {
        group: product[..., i * k : (i + 1) * k]
        for product, shared in zip(products, _SHARED, strict=True)
        for i, group in enumerate(shared)
    }

    def near(gy, gz):
        y, z = int(gy == 2), int(gz == 2)
        return groups[gy, gz][:, y : y + ny, z : z + nz]

    def sums(y, z):
        reaching = [near(gy, gz) for gy in (0, 1 + y) for gz in (0, 1 + z)]
        return functools.reduce(jnp.add, reaching)

    # Stacked, the four sums are made by all threads; masks over a broadcast, which take
    # one operation, are made by the one that writes the result.
    lines = [jnp.stack([sums(y, z) for z in range(2)], axis=3) for y in range(2)]
    return jnp.stack(lines, axis=2).reshape(n, 2 * ny, 2 * nz, k)


def _interleave_fwd(products):
    return _interleave(products), None


def _interleave_bwd(_, grad):
    """Adds up, for every group, the fine voxels that it reaches."""
    n, ny, nz, k = grad.shape
    pairs = grad.reshape(n, ny // 2, 2, nz // 2, 2, k)

    def reached(gy, gz):
        ys, zs = ((0, 1), (0,), (1,))[gy], ((0, 1), (0,), (1,))[gz]
        parts = [pairs[:, :, y, :, z] for y in ys for z in zs]
        edges = [(1, 0) if g == 2 else (0, 1) for g in (gy, gz)]
        return jnp.pad(functools.reduce(jnp.add, parts), ((0, 0), *edges, (0, 0)))

    return ([jnp.concatenate([reached(*g) for g in shared], -1) for shared in _SHARED],)


_interleave.defvjp(_interleave_fwd, _interleave_bwd)
