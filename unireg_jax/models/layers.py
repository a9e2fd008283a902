"""Building blocks of the backbone: convolution block and pooling.

A LeakyReLU as in UniReg, Figure 4; 3x3x3, bias and slope 0.2 as in SAME's public code.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from unireg_jax.ops import conv

LEAK = 0.2


class Conv(nn.Module):
    """3x3x3 convolution of several maps as if they were concatenated.

    Attributes:
        features: channels out.
        activate: apply LeakyReLU(0.2).
        dtype: of the convolution; parameters stay float32.
        impl: formulation, see ops/conv.py.
    """

    features: int
    activate: bool = True
    dtype: str = "float32"
    impl: str = "auto"

    @nn.compact
    def __call__(
        self, inputs: Sequence[jax.Array], coarse: jax.Array | None = None
    ) -> jax.Array:
        """Maps parts [B, X, Y, Z, C_i] to [B, X, Y, Z, features].

        `coarse` [B, X/2, Y/2, Z/2, C] comes first, up-sampled to the nearest voxel.
        """
        maps = [*inputs] if coarse is None else [coarse, *inputs]
        channels = sum(x.shape[-1] for x in maps)
        # He initialisation for a leaky rectifier: 2 / (1 + 0.2^2) / fan_in.
        init = nn.initializers.variance_scaling(
            2 / (1 + LEAK**2), "fan_in", "truncated_normal"
        )
        kernel = self.param("kernel", init, (3, 3, 3, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv.conv3d(
            [x.astype(self.dtype) for x in inputs],
            kernel.astype(self.dtype),
            bias.astype(self.dtype),
            coarse=None if coarse is None else coarse.astype(self.dtype),
            slope=LEAK if self.activate else 1.0,
            impl=self.impl,
        )


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """2x2x2 maximum, stride 2: [B, X, Y, Z, C] -> [B, X/2, Y/2, Z/2, C].

    The gradient goes to the first of equal maxima, whose place among the eight is kept
    as a byte. The gradient of a window reduction would be a select-and-scatter, which
    no backend orders deterministically; that of a maximum over reshaped axes shares
    among equal ones, in passes over the full grid that take twice as long.
    """
    return _eighths(x).max(axis=(2, 4, 6))


def _eighths(x):
    """[B, X/2, 2, Y/2, 2, Z/2, 2, C]."""
    b, x_, y, z, c = x.shape
    return x.reshape(b, x_ // 2, 2, y // 2, 2, z // 2, 2, c)


def _max_pool_forward(x):
    cells = _eighths(x)
    largest = cells[:, :, 0, :, 0, :, 0]
    place = jnp.zeros(largest.shape, jnp.int8)
    for k in range(1, 8):
        other = cells[:, :, k >> 2, :, k >> 1 & 1, :, k & 1]
        # A NaN may go unseen here, but not in the skip of the same map. To look for it
        # would cost what the whole pass does.
        better = other > largest
        largest = jnp.where(better, other, largest)
        place = jnp.where(better, jnp.int8(k), place)
    return largest, place


def _max_pool_backward(place, slope):
    b, x, y, z, c = place.shape
    cells = (b, x, 2, y, 2, z, 2, c)

    def spread(coarse):
        return jnp.broadcast_to(jnp.expand_dims(coarse, (2, 4, 6)), cells)

    own = sum(
        jax.lax.broadcasted_iota(jnp.int8, cells, axis) * jnp.int8(weight)
        for axis, weight in ((2, 4), (4, 2), (6, 1))
    )
    fine = jnp.where(spread(place) == own, spread(slope), 0)
    return (fine.reshape(b, 2 * x, 2 * y, 2 * z, c),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
