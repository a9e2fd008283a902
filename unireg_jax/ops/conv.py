"""Three-dimensional convolution: one signature, one formulation per backend.

Stride 1, zero padding, 3x3x3. On accelerators this is XLA's own convolution. XLA's CPU
backend has no fast 3-D kernel: there, one-dimensional Winograd F(4, 3) along X turns
four output slices into six 2-D convolutions instead of twelve, each of which the
backend runs as a matrix product (Lavin and Gray, "Fast Algorithms for Convolutional
Neural Networks", 2016, eq. 8 for F(2, 3); F(4, 3) from the points 0, 1, -1, 2, -2,
infinity). Timings: docs/performance.md, experiments/benchmark_conv.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Output slices per Winograd tile, and slices read per tile.
_TILE = 4
_TAPS = _TILE + 2
# Below this many voxels XLA's own kernel is fast enough, and it compiles faster.
_SMALL = 16**3


def conv3d(x: jax.Array, kernel: jax.Array, *, impl: str = "auto") -> jax.Array:
    """Correlates `x` with a 3x3x3 kernel, stride 1, zeros beyond the border.

    Args:
        x: [B, X, Y, Z, C] floating.
        kernel: [3, 3, 3, C, K], dtype of x.
        impl: "direct" is XLA's convolution, "winograd" the CPU form, "auto" chooses
            by the platform that the program is compiled for, and by size.

    Returns:
        [B, X, Y, Z, K], dtype of x. Winograd in float32 differs from direct by about
        1e-5 of the largest value.

    Raises:
        ValueError: a shape does not fit, or `impl` is unknown.
    """
    if x.ndim != 5 or kernel.shape[:3] != (3, 3, 3) or kernel.ndim != 5:
        raise ValueError(
            f"conv3d takes x [B, X, Y, Z, C] and a kernel [3, 3, 3, C, K], got "
            f"{x.shape} and {kernel.shape}; channels go last"
        )
    if x.shape[-1] != kernel.shape[3]:
        raise ValueError(
            f"kernel must take {x.shape[-1]} channels, got {kernel.shape[3]}; its "
            "fourth axis is the input channel"
        )
    if impl == "direct":
        return _direct(x, kernel)
    if impl == "winograd":
        return _winograd(x, kernel)
    if impl != "auto":
        raise ValueError(f"impl must be auto, direct or winograd, got {impl!r}")
    if math.prod(x.shape[1:4]) < _SMALL:
        return _direct(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_winograd, default=_direct)


def _direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Winograd F(4, 3): input [6, 6], kernel [6, 3] and output [4, 6] transforms."""
    data = [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
    weight = [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
    output = [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 0],
        [0, 1, 1, 4, 4, 0],
        [0, 1, -1, 8, -8, 1],
    ]
    return np.array(data, float), np.array(weight, float), np.array(output, float)


def _combine(coefficients: np.ndarray, arrays: list[jax.Array]) -> jax.Array:
    """Linear combination that spells out its terms, so that XLA fuses them."""
    terms = [
        a if c == 1 else a * float(c)
        for c, a in zip(coefficients, arrays, strict=True)
        if c
    ]
    return functools.reduce(jnp.add, terms)


def _tiles(x: jax.Array, count: int, offsets: range) -> list[jax.Array]:
    """Slices offset, offset + 4, ... of X, each [B * count, Y, Z, C]."""
    b, _, y, z, c = x.shape
    stop = _TILE * (count - 1) + 1
    return [
        lax.slice_in_dim(x, o, o + stop, _TILE, 1).reshape(b * count, y, z, c)
        for o in offsets
    ]


def _input_transform(x: jax.Array) -> list[jax.Array]:
    """Six transformed stacks of slices, each [B * tiles, Y, Z, C]."""
    data, _, _ = _matrices()
    count = -(-x.shape[1] // _TILE)
    tail = count * _TILE - x.shape[1]
    padded = jnp.pad(x, ((0, 0), (1, 1 + tail), (0, 0), (0, 0), (0, 0)))
    slices = _tiles(padded, count, range(_TAPS))
    return [_combine(row, slices) for row in data]


def _kernel_transform(kernel: jax.Array) -> jax.Array:
    """[3, 3, 3, C, K] -> [6, 3, 3, C, K]; float32 at least, and exact products."""
    _, weight, _ = _matrices()
    return jnp.stack([_combine(row, list(kernel)) for row in weight])


@jax.custom_vjp
def _winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    _, _, output = _matrices()
    b, nx, y, z, _ = x.shape
    stacks, kernels = _input_transform(x), _kernel_transform(kernel)
    products = [
        lax.conv_general_dilated(
            s, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for s, k in zip(stacks, kernels, strict=True)
    ]
    rows = [_combine(row, products) for row in output]
    rows = [r.reshape(b, -1, y, z, kernel.shape[-1]) for r in rows]
    return jnp.stack(rows, axis=2).reshape(b, -1, y, z, kernel.shape[-1])[:, :nx]


def _winograd_fwd(x, kernel):
    return _winograd(x, kernel), (x, kernel)


def _winograd_bwd(residuals, grad):
    x, kernel = residuals
    flipped = jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)
    return _winograd(grad, flipped), _kernel_gradient(x, grad)


def _kernel_gradient(x: jax.Array, grad: jax.Array) -> jax.Array:
    """Adjoint of the kernel transform over six 2-D kernel gradients.

    Each of the six is one product (3C x N)(N x 3K): Z shifts stacked on the input,
    Y shifts on the output. XLA's own CPU kernel gradient is two to four times slower.
    """
    _, weight, output = _matrices()
    c, k = x.shape[-1], grad.shape[-1]
    count = -(-grad.shape[1] // _TILE)
    tail = count * _TILE - grad.shape[1]
    padded = jnp.pad(grad, ((0, 0), (0, tail), (0, 0), (0, 0), (0, 0)))
    rows = _tiles(padded, count, range(_TILE))
    kernels = []
    for stack, column in zip(_input_transform(x), output.T, strict=True):
        z_shifts = _shifts(stack, axis=2)
        y_shifts = _shifts(_combine(column, rows), axis=1)[::-1]
        lhs = jnp.concatenate(z_shifts, -1).reshape(-1, 3 * c)
        rhs = jnp.concatenate(y_shifts, -1).reshape(-1, 3 * k)
        product = lax.dot_general(lhs, rhs, (((0,), (0,)), ((), ())))
        kernels.append(product.reshape(3, c, 3, k).transpose(2, 0, 1, 3))
    return jnp.stack([_combine(column, kernels) for column in weight.T])


def _shifts(x: jax.Array, *, axis: int) -> list[jax.Array]:
    """x at index -1, 0 and +1 along `axis`, zeros beyond the border."""
    n = x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (1, 1)
    padded = jnp.pad(x, pad)
    return [lax.slice_in_dim(padded, o, o + n, axis=axis) for o in range(3)]


_winograd.defvjp(_winograd_fwd, _winograd_bwd)
