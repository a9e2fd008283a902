"""A real scan and a deformed copy of it, related by a known field, both ways.

The field is smooth and without folds. With breathing, what lies at the diaphragm moves
most, the lung's apex, the pelvis, the spine and the body wall hardly. The copy gets
noise and a change of brightness of its own, so that the two are not the same picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data_pipeline import fields
from unireg_jax.tasks import OUTSIDE_HU

_AIR_HU = -1000


class DeformedPair(NamedTuple):
    """A scan, a deformed copy, and what relates them.

    Attributes:
        fixed: [X, Y, Z] int16, HU: the deformed copy; OUTSIDE_HU beyond the scan.
        moving: [X, Y, Z] int16, HU: the scan.
        fixed_labels: [X, Y, Z] uint8.
        moving_labels: [X, Y, Z] uint8.
        disp_fm: [X, Y, Z, 3] float32, voxels: fixed(x) shows moving(x + disp_fm(x)).
        disp_mf: [X, Y, Z, 3] float32, voxels: the way back.
    """

    fixed: np.ndarray
    moving: np.ndarray
    fixed_labels: np.ndarray
    moving_labels: np.ndarray
    disp_fm: np.ndarray
    disp_mf: np.ndarray


def deform(
    hu: np.ndarray,
    labels: np.ndarray | None,
    *,
    spacing_mm: Sequence[float],
    rng: np.random.Generator,
    breathing: bool,
    strength: float = 1.0,
) -> DeformedPair:
    """Makes a deformed copy of a scan.

    fixed(x) = moving(x + disp_fm(x)) + noise

    Args:
        hu: [X, Y, Z] int16, HU, along LPS axes; OUTSIDE_HU beyond the scan.
        labels: [X, Y, Z] uint8, or None.
        spacing_mm: (x, y, z) voxel edges, mm.
        rng: source of all choices.
        breathing: whether the diaphragm moves: torsos.
        strength: factor on the field; 1 moves the body by some 6 mm, and breathing
            by 6 to 22 mm more.

    Returns:
        DeformedPair.

    Raises:
        ValueError: hu or labels of the wrong dtype or shape; strength not positive.
    """
    if hu.dtype != np.int16 or hu.ndim != 3 or min(hu.shape) < 2:
        raise ValueError(
            f"hu must be [X, Y, Z] int16, two or more each way, got {hu.shape} "
            f"{hu.dtype}"
        )
    labels = np.zeros(hu.shape, np.uint8) if labels is None else labels
    if labels.dtype != np.uint8 or labels.shape != hu.shape:
        raise ValueError(
            f"labels must be {hu.shape} uint8 like hu, got {labels.shape} "
            f"{labels.dtype}"
        )
    if not strength > 0:
        raise ValueError(f"strength must be positive, got {strength}")
    disp_fm, disp_mf = random_fields(
        hu, spacing_mm=spacing_mm, rng=rng, breathing=breathing, strength=strength
    )
    at = np.indices(hu.shape, np.float32) + np.moveaxis(disp_fm, -1, 0)
    last = np.reshape(hu.shape, (3, 1, 1, 1)) - 1
    valid = np.all((at >= -0.5) & (at <= last + 0.5), axis=0)
    del at
    valid &= fields.warp(hu != OUTSIDE_HU, disp_fm, order=0)
    image = fields.warp(np.maximum(hu, _AIR_HU), disp_fm)
    image = np.where(valid, _other_scanner(image, rng), OUTSIDE_HU)
    moved = np.where(valid, fields.warp(labels, disp_fm, order=0), 0)
    return DeformedPair(
        image.astype(np.int16), hu, moved.astype(np.uint8), labels, disp_fm, disp_mf
    )


def random_fields(
    hu: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    rng: np.random.Generator,
    breathing: bool,
    strength: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the fields that `deform` uses; see there.

    Returns:
        disp_fm, disp_mf: [X, Y, Z, 3] float32, voxels.
    """
    knots, knot_mm = fields.coarse_grid(hu.shape, spacing_mm)
    velocity = np.zeros((*knots, 3), np.float32)
    for scale, rms in ((55.0, 4.0), (24.0, 1.6)):
        size = strength * rms * rng.uniform(0.5, 1.2)
        velocity += fields.random_velocity(
            rng, knots, knot_mm, scale_mm=scale, rms_mm=size
        )
    if breathing:
        coarse = _coarsened(hu, knots)
        velocity += np.float32(strength) * _breath(coarse, knot_mm, rng)
    return fields.flow(velocity, knot_mm, shape=hu.shape, spacing_mm=spacing_mm)


def _coarsened(hu: np.ndarray, knots: Sequence[int]) -> np.ndarray:
    """HU at the knots, blurred by about a knot."""
    solid = np.maximum(hu, _AIR_HU).astype(np.float32)
    ratio = np.asarray(hu.shape) / np.asarray(knots)
    solid = ndimage.uniform_filter(solid, np.maximum(1, ratio.round()).astype(int))
    return ndimage.zoom(solid, 1 / ratio, order=1, mode="nearest")


def _breath(
    hu: np.ndarray, knot_mm: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Velocity of breathing on the coarse grid, mm."""
    body = hu > -500
    filled = np.stack(
        [ndimage.binary_fill_holes(part) for part in np.moveaxis(body, 2, 0)], 2
    )
    lung = filled & (hu < -600)
    z = np.arange(hu.shape[2]) * knot_mm[2]
    area = lung.sum((0, 1))
    if lung.sum() > 0.03 * max(1, filled.sum()):
        dome = z[np.searchsorted(np.cumsum(area), 0.15 * area.sum())]
        above = 0.45 * max(80.0, z[-1] - dome)
    else:  # an abdomen: the diaphragm is near its upper end
        dome, above = z[-1] - 30.0, 90.0
    rise = np.exp(-(((z - dome) / np.where(z > dome, above, 110.0)) ** 2))
    # Depth in the body, and far from bone: what cannot follow the diaphragm.
    depth = ndimage.distance_transform_edt(filled, sampling=knot_mm)
    inner = ndimage.gaussian_filter(np.clip(depth / 40, 0, 1), 12 / knot_mm)
    bone = ndimage.gaussian_filter((hu > 220).astype(float), 10 / knot_mm)
    free = inner * np.clip(1 - 2 * bone, 0.15, 1)
    reach = rng.uniform(8, 24) * rng.choice([-1, 1])
    out = np.zeros((*hu.shape, 3), np.float32)
    out[..., 2] = reach * free * rise
    # The front of the chest goes up and down by a fraction of it.
    y = np.linspace(1, 0, hu.shape[1])[None, :, None]
    out[..., 1] = (
        reach
        / 6
        * y
        * rise
        * ndimage.gaussian_filter(filled.astype(float), 15 / knot_mm)
    )
    return ndimage.gaussian_filter(out, (*(8 / knot_mm), 0))


def _other_scanner(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same tissue in another acquisition: noise, and slightly other HU."""
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, 0.5)
    noise *= np.float32(rng.uniform(4, 14) / noise.std())
    gain, shift = 1 + 0.02 * rng.uniform(-1, 1), 8 * rng.uniform(-1, 1)
    tissue = np.clip((image + 900) / 300, 0, 1)  # air is air in every scan
    image = image + tissue * ((gain - 1) * image + shift) + noise
    return np.clip(np.rint(image), _AIR_HU, 3071)
