"""Frozen features behind one interface, and the correlation the backbone joins.

A backend maps a HU volume to a fine map at 1/2 and a coarse map below. The coarse maps
are resized to 1/2 and normalised; both are correlated over 27 offsets (UniReg, section
4.3 and Table 7).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unireg_jax.models.features import mind, none, sam
from unireg_jax.ops import correlation, intensity, resample

COMBINE = ("concat", "sum")
# From here on two correlations are faster than one of joined maps (12 channels: 0.058
# against 0.051 CPU s, 48: 0.19 against 0.22, 128: 0.48 against 0.64 at 48x48x40).
_WIDE = 32


class Maps(NamedTuple):
    """Features of a volume, each map on its own grid.

    Attributes:
        fine: [B, X/2, Y/2, Z/2, C] float32, of unit length at every voxel.
        coarse: [B, X', Y', Z', C'] float32; not normalised.
    """

    fine: jax.Array
    coarse: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extractor:
    """How features are made: names and numbers are static, parameters are arrays.

    Attributes:
        backend: row of FEATURES.
        window: lowest and highest HU of the image that `mind` and `none` describe.
        combine: "concat" correlates fine and resized coarse features together, as
            section 4.3; "sum" adds the correlations of the two grids, as the released
            SAME program: a coarse offset of 1 reaches further.
        network: of backend "sam", folded; None otherwise.
        params: of `network`.
        spacing_mm: voxel edges that `network` was trained at, mm; None for any.
        digest: SHA-256 of the file that holds `params`; empty without.
    """

    backend: str = dataclasses.field(metadata={"static": True})
    window: tuple[float, float] = dataclasses.field(
        default=(-800.0, 400.0), metadata={"static": True}
    )
    combine: str = dataclasses.field(default="concat", metadata={"static": True})
    network: sam.Sam | None = dataclasses.field(default=None, metadata={"static": True})
    params: Any = None
    spacing_mm: tuple[float, float, float] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    digest: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def label(self) -> str:
        """Backend, and which embedding: "mind", "sam 16ca37baeaed18f6"."""
        return f"{self.backend} {self.digest[:16]}".strip()


def _of_image(extract: Callable) -> Callable:
    """A backend that sees the network's own image."""

    def describe(hu, extractor):
        low, high = extractor.window
        fine, coarse = extract(intensity.window(hu, low=low, high=high))
        return normalize(fine), coarse

    return describe


FEATURES = {
    "mind": _of_image(mind.extract),
    "none": _of_image(none.extract),
    "sam": lambda hu, e: sam.extract(hu, e.params, e.network),
}


def describe(hu: jax.Array, extractor: Extractor) -> Maps:
    """Fine and coarse maps of HU volumes.

    Args:
        hu: [B, X, Y, Z, 1] HU, integer or float; X, Y, Z multiples of 4 (sam: of 16,
            16 and 8).
        extractor: what to compute.

    Returns:
        Maps.

    Raises:
        ValueError: unknown backend, or "sam" without its network.
    """
    backend = extractor.backend
    if backend not in FEATURES:
        raise ValueError(f"backend must be one of {sorted(FEATURES)}, got {backend!r}")
    if (backend == "sam") != (extractor.network is not None):
        raise ValueError(
            "backend 'sam', and no other, needs a network with its parameters, got "
            f"{backend!r} with {extractor.network}; load them with "
            "registration.load_extractor"
        )
    return Maps(*FEATURES[backend](hu, extractor))


def correlate(fixed: Maps, moving: Maps, *, combine: str = "concat") -> jax.Array:
    """Correlation of two volumes' features, without gradient.

    Args:
        fixed: from `describe`.
        moving: as fixed, pre-aligned on the fixed grid.
        combine: see Extractor.

    Returns:
        [B, X/2, Y/2, Z/2, 27] float32, cosine at offsets -1, 0, 1, row-major; with
        "sum" the sum of two cosines.

    Raises:
        ValueError: unknown `combine`.
    """
    fixed, moving = jax.lax.stop_gradient((fixed, moving))
    shape = fixed.fine.shape[1:4]
    if combine == "sum":
        corr = correlation.correlation(fixed.fine, moving.fine)
        coarse = correlation.correlation(fixed.coarse, moving.coarse)
        corr = corr + resample.resize_volume(coarse, shape)
    elif combine == "concat" and fixed.fine.shape[-1] < _WIDE:
        f, m = (joined(maps) for maps in (fixed, moving))
        corr = correlation.correlation(f, m)
    elif combine == "concat":
        # Of unit vectors side by side, the cosine is the mean of the two cosines. At
        # 192x192x160 joined maps of 2 x 128 channels would take 1.4 GiB.
        wide = (resample.resize_volume(m.coarse, shape) for m in (fixed, moving))
        corr = correlation.correlation(fixed.fine, moving.fine)
        corr = 0.5 * (corr + correlation.correlation(*wide))
    else:
        raise ValueError(f"combine must be one of {COMBINE}, got {combine!r}")
    return jax.lax.stop_gradient(corr)


def joined(maps: Maps) -> jax.Array:
    """Fine and resized coarse features in one map.

    Args:
        maps: from `describe`.

    Returns:
        [B, X/2, Y/2, Z/2, C + C'] float32; each part has unit length at every voxel, so
        that half the product of two voxels is the mean of two cosines.
    """
    coarse = resample.resize_volume(maps.coarse, maps.fine.shape[1:4])
    return jnp.concatenate([maps.fine, normalize(coarse)], axis=-1)


def normalize(features: jax.Array) -> jax.Array:
    """Scales features to unit length at every voxel; 0 stays 0.

    Args:
        features: [..., C] float.

    Returns:
        As features.
    """
    norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.broadcast_to(jnp.maximum(norm, 1e-6), features.shape)
