"""Building blocks of the backbone: convolution block, pooling, up-sampling.

UniReg, Figure 4: every convolution is 3x3x3 with bias and a LeakyReLU of slope 0.2.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from unireg_jax.ops import conv

LEAK = 0.2


class Conv(nn.Module):
    """3x3x3 convolution of several maps as if they were concatenated.

    The convolution of a concatenation is the sum of the convolutions of its parts;
    summing saves the copy, which at full resolution is larger than any other buffer.

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
    def __call__(self, inputs: Sequence[jax.Array]) -> jax.Array:
        """Maps parts [B, X, Y, Z, C_i] to [B, X, Y, Z, features]."""
        channels = [x.shape[-1] for x in inputs]
        # He initialisation for a leaky rectifier: 2 / (1 + 0.2^2) / fan_in.
        init = nn.initializers.variance_scaling(
            2 / (1 + LEAK**2), "fan_in", "truncated_normal"
        )
        kernel = self.param("kernel", init, (3, 3, 3, sum(channels), self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = kernel.astype(self.dtype)
        y, start = None, 0
        for x, c in zip(inputs, channels, strict=True):
            part = kernel[:, :, :, start : start + c]
            z = conv.conv3d(x.astype(self.dtype), part, impl=self.impl)
            y = z if y is None else y + z
            start += c
        y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return nn.leaky_relu(y, LEAK) if self.activate else y


def max_pool(x: jax.Array) -> jax.Array:
    """2x2x2 maximum, stride 2: [B, X, Y, Z, C] -> [B, X/2, Y/2, Z/2, C].

    By reshape, because the gradient of a window reduction is a select-and-scatter,
    which no backend orders deterministically.
    """
    b, x_, y, z, c = x.shape
    return x.reshape(b, x_ // 2, 2, y // 2, 2, z // 2, 2, c).max(axis=(2, 4, 6))


def upsample_nearest(x: jax.Array) -> jax.Array:
    """Repeats every voxel twice along X, Y and Z."""
    b, nx, ny, nz, c = x.shape
    wide = jnp.broadcast_to(
        x[:, :, None, :, None, :, None], (b, nx, 2, ny, 2, nz, 2, c)
    )
    return wide.reshape(b, 2 * nx, 2 * ny, 2 * nz, c)
