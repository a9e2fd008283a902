"""Building blocks of the backbone: convolution block and pooling.

UniReg, Figure 4: every convolution is 3x3x3 with bias and a LeakyReLU of slope 0.2.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

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


def max_pool(x: jax.Array) -> jax.Array:
    """2x2x2 maximum, stride 2: [B, X, Y, Z, C] -> [B, X/2, Y/2, Z/2, C].

    By reshape, because the gradient of a window reduction is a select-and-scatter,
    which no backend orders deterministically.
    """
    b, x_, y, z, c = x.shape
    return x.reshape(b, x_ // 2, 2, y // 2, 2, z // 2, 2, c).max(axis=(2, 4, 6))
