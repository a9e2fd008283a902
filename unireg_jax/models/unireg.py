"""The registration network: images, correlation and condition -> displacement.

UniReg, Figure 2 and section 3.1.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from unireg_jax.models import backbone
from unireg_jax.models.conditioning import HEADS
from unireg_jax.ops import integrate, resample


class UniReg(nn.Module):
    """One network for every body region and pair type.

    355 405 parameters and 470.1 GMACs at 192x192x160 with the defaults (paper, Table 2:
    0.36 M, 477 G).

    Attributes:
        conditioner: row of HEADS.
        svf_steps: 0 for a plain displacement; n for a stationary velocity field
            integrated in n squarings (diffeomorphic; 7 in the SAME baseline, whose
            smoothness is of the velocity: ours is of what it integrates to).
        encoder, decoder, remaining, field_level, dtype, conv_impl, remat: see Backbone.
    """

    conditioner: str = "dynamic"
    svf_steps: int = 0
    encoder: tuple[int, ...] = (16, 32, 32, 32)
    decoder: tuple[int, ...] = (32, 32, 32, 32)
    remaining: tuple[int, ...] = (32, 16, 16)
    field_level: int = 0
    dtype: str = "float32"
    conv_impl: str = "auto"
    remat: str = "none"

    def setup(self):
        self.backbone = backbone.Backbone(
            tuple(self.encoder),
            tuple(self.decoder),
            tuple(self.remaining),
            self.field_level,
            dtype=self.dtype,
            conv_impl=self.conv_impl,
            remat=self.remat,
        )
        self.head = HEADS[self.conditioner]()

    def __call__(
        self,
        fixed: jax.Array,
        moving: jax.Array,
        corr: jax.Array,
        region: jax.Array,
        pair_type: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Predicts the displacement of one batch of pairs: `decode` after `encode`.

        Args:
            fixed: [B, X, Y, Z, 1] float32 in [-1, 1]; X, Y, Z multiples of 16.
            moving: as fixed, pre-aligned on the fixed grid.
            corr: [B, X/2, Y/2, Z/2, 27] float32, feature correlation (Table 7).
            region: [B] int32, tasks.Region.
            pair_type: [B] int32, tasks.PairType.
            train: passed to the head.

        Returns:
            [B, X, Y, Z, 3] float32, voxels, pull-back: moving is read at x + disp(x).

        Raises:
            ValueError: a shape does not fit.
        """
        features = self.encode(fixed, moving, corr)
        return self.decode(features, region, pair_type, train=train)

    def encode(self, fixed: jax.Array, moving: jax.Array, corr: jax.Array) -> jax.Array:
        """Runs the backbone, which no condition reaches (section 3.1.1).

        Args:
            fixed, moving, corr: see `__call__`.

        Returns:
            E, [B, X/s, Y/s, Z/s, 8] float32, s = 2 ** field_level; one serves any
            number of conditions.

        Raises:
            ValueError: a shape does not fit.
        """
        _check(fixed, moving, corr)
        return self.backbone(moving, fixed, corr).astype(jnp.float32)

    def decode(
        self,
        features: jax.Array,
        region: jax.Array,
        pair_type: jax.Array,
        *,
        train: bool = False,
        unit_shape: tuple[int, int, int] | None = None,
    ) -> jax.Array:
        """Runs the head and turns its field into voxels (sections 3.1.2 and 3.1.3).

        Args:
            features: E, from `encode`.
            region: [B] int32, tasks.Region.
            pair_type: [B] int32, tasks.PairType.
            train: passed to the head.
            unit_shape: (X, Y, Z) voxels that the field's units span, those of the
                grid the network was trained on; None for this grid's own.

        Returns:
            [B, X, Y, Z, 3] float32, voxels, as `__call__`.
        """
        field = self.head(features, (region, pair_type), train=train)
        shape = tuple(n << self.field_level for n in features.shape[1:4])
        # [-1, 1] units are the same on every grid, so up-sampling rescales nothing;
        # 1 unit is (n - 1) / 2 voxels (align-corners).
        field = resample.resize_volume(field, shape)
        voxels_per_unit = (jnp.array(unit_shape or shape, jnp.float32) - 1) / 2
        disp = field * jnp.broadcast_to(voxels_per_unit, field.shape)
        if self.svf_steps:
            disp = integrate.integrate(disp, steps=self.svf_steps)
        return disp


def _check(fixed: jax.Array, moving: jax.Array, corr: jax.Array) -> None:
    if fixed.ndim != 5 or fixed.shape[-1] != 1 or fixed.shape != moving.shape:
        raise ValueError(
            f"fixed and moving must be [B, X, Y, Z, 1] of one shape, got {fixed.shape} "
            f"and {moving.shape}; channels go last"
        )
    if any(n % 16 for n in fixed.shape[1:4]):
        raise ValueError(
            f"X, Y, Z must be multiples of 16, got {fixed.shape[1:4]}; pad the volumes"
        )
    expected = (fixed.shape[0], *(n // 2 for n in fixed.shape[1:4]), 27)
    if corr.shape != expected:
        raise ValueError(
            f"corr must be {expected} (half resolution, 27 offsets), got {corr.shape}"
        )
