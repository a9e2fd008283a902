"""Shared encoder-decoder of UniReg.

Section 3.1.1 tells of residual blocks of two convolutions and of strided ones between
levels; no network of that kind that we found has both of Table 2's 0.36 M parameters
and 477 G, and Figure 4, which gives channels, was not legible to us. This is the public
SAM-Deform U-Net, plain convolutions and max-pooling, with UniReg's 8-channel pre-head:
0.36 M, and within 1.5 % of 477 G.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from unireg_jax.models import layers

REMAT = ("none", "last", "all")


def _identity(features: jax.Array, level: int) -> jax.Array:
    del level
    return features


class Backbone(nn.Module):
    """Image pair and correlation -> the 8-channel map E that the head reads.

    level        0 (full)       1 (1/2)          2 (1/4)    3 (1/8)
    encoder      2 -> 16        16+27 -> 32      32 -> 32   32 -> 32   then pooled
    decoder                     32+32 -> 32      32+32->32  32+32->32  from 1/16: 32
    remaining    32+16 -> 32 -> 16 -> 16, then the pre-head 16 -> 8 without activation

    Attributes:
        encoder: channels out at levels 0 to 3.
        decoder: channels out at 1/16, 1/8, 1/4 and 1/2.
        remaining: channels of the convolutions after the last join.
        field_level: 0 joins the full-resolution level, as the paper; 1 stops at 1/2,
            where `remaining` then runs (not in paper: a fifth of the arithmetic, for
            training on CPUs).
        pre_head: channels of E (8, so that the head takes 171 numbers, eq. 5).
        modulate: hook (features, level) -> features, called once per decoder level,
            for conditioning schemes that act inside the backbone.
        dtype: of the convolutions.
        conv_impl: formulation, see ops/conv.py.
        remat: which maps the backward pass computes again instead of keeping them:
            none; last, those of the last stage (what follows the last join); all, those
            of every decoder stage. No effect on any number.
    """

    encoder: tuple[int, ...] = (16, 32, 32, 32)
    decoder: tuple[int, ...] = (32, 32, 32, 32)
    remaining: tuple[int, ...] = (32, 16, 16)
    field_level: int = 0
    pre_head: int = 8
    modulate: Callable[[jax.Array, int], jax.Array] = _identity
    dtype: str = "float32"
    conv_impl: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(
        self, moving: jax.Array, fixed: jax.Array, corr: jax.Array
    ) -> jax.Array:
        """Maps images [B, X, Y, Z, 1] and corr [B, X/2, Y/2, Z/2, 27] to E."""

        skips, parts, coarse = [], (moving, fixed), None
        for level, features in enumerate(self.encoder):
            skips.append(self._conv(features, f"encoder_{level}", parts))
            parts = (layers.max_pool(skips[-1]),)
            if level == 0:
                parts = (*parts, corr)
        stage = nn.remat(Backbone._conv, static_argnums=(1, 2))
        stage = stage if self.remat == "all" else Backbone._conv
        for i, features in enumerate(self.decoder):
            level = len(self.encoder) - i
            x = stage(self, features, f"decoder_{i}", parts, coarse)
            x = self.modulate(x, level)
            if level == self.field_level:
                parts, coarse = (x,), None
                break
            # Up-sampled by the next convolution, which never makes the large map.
            parts, coarse = (skips[level - 1],), x
        last = Backbone._last if self.remat == "none" else nn.remat(Backbone._last)
        return last(self, parts, coarse)

    def _last(self, parts, coarse):
        """The convolutions at the field's resolution, and the pre-head."""
        for i, features in enumerate(self.remaining):
            x = self._conv(features, f"remaining_{i}", parts, coarse)
            parts, coarse = (x,), None
        return self._conv(self.pre_head, "pre_head", parts, coarse, activate=False)

    def _conv(self, features, name, parts, coarse=None, activate=True):
        block = layers.Conv(features, activate, self.dtype, self.conv_impl, name=name)
        return block(parts, coarse)
