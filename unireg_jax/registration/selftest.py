"""A small registration with a known answer: does this installation compute right?"""

import time
from typing import Any

import numpy as np

from unireg_jax.registration.network import Model
from unireg_jax.registration.pipeline import register

SHIFT_MM = (14.0, -10.0, 18.0)  # moving tissue against fixed, LPS
# Of the mean error over the body: a fifth of the shift's 25 mm, about a voxel.
LARGEST_ERROR_MM = 5.0
_SHAPE = (60, 46, 52)
_SPACING_MM = (6.0, 6.5, 7.0)


def torso(shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    """Paints a body with lungs, heart, liver and spine, moved by `shift_mm`.

    Args:
        shift_mm: LPS mm.

    Returns:
        [60, 46, 52] int16 HU, voxels of 6 x 6.5 x 7 mm about the origin.
    """
    axes = (
        (np.arange(n) - (n - 1) / 2) * s - d
        for n, s, d in zip(_SHAPE, _SPACING_MM, shift_mm, strict=True)
    )
    x = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)

    def ellipsoid(center, radii, soft):
        inside = 1 - np.square((x - center) / radii).sum(axis=-1)
        return 1 / (1 + np.exp(-np.clip(inside * soft, -40, 40)))

    hu = -1000 + 1030 * ellipsoid((0, 0, 0), (150, 105, 260), 12)
    for side in (-1, 1):
        lung = ellipsoid((side * 65, -5, 60), (48, 65, 95), 8)
        hu = hu * (1 - lung) - 850 * lung
    for center, radii, value in (
        ((-25, -25, 20), (42, 38, 45), 90),  # heart
        ((-70, -10, -80), (62, 65, 55), 110),  # liver
        ((75, 20, -75), (32, 38, 45), 120),  # spleen
        ((0, 62, 0), (17, 17, 240), 600),  # spine
    ):
        organ = ellipsoid(center, radii, 8)
        hu = hu * (1 - organ) + value * organ
    return np.rint(hu).astype(np.int16)


def vox2world() -> np.ndarray:
    """Grid of `torso`, voxel -> LPS mm, [4, 4] float64."""
    out = np.diag([*_SPACING_MM, 1.0])
    out[:3, 3] = -np.array(_SPACING_MM) * (np.array(_SHAPE) - 1) / 2
    return out


def self_test(model: Model) -> dict[str, Any]:
    """Registers the body to itself, moved by 25 mm.

    Args:
        model: from `load_model`; the whole way is gone, network included.

    Returns:
        error_mm, mean distance from the known answer over the fixed body after
        pre-alignment and network; expected_mm, the largest that passes; passed;
        seconds.

    Raises:
        UserError: see `register`.
    """
    started = time.perf_counter()
    fixed, moving = torso(), torso(SHIFT_MM)
    grid = vox2world()
    result = register(
        fixed,
        moving,
        task="chest",
        pair_type="intra",
        weights=model,
        affine="rigid",
        fixed_vox2world=grid,
        moving_vox2world=grid,
        fov="crop",
    )
    miss = np.linalg.norm(result.disp_mm - np.array(SHIFT_MM), axis=-1)
    error = float(miss[fixed > -500].mean())
    return {
        "error_mm": round(error, 3),
        "expected_mm": LARGEST_ERROR_MM,
        "passed": bool(error <= LARGEST_ERROR_MM),
        "seconds": round(time.perf_counter() - started, 1),
    }
