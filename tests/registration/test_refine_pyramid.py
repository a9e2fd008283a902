"""Instance optimisation on the grid that large volumes have above the usual three."""

import functools

import jax
import numpy as np
import pytest
from scipy import ndimage

from unireg_jax.registration import refine
from unireg_jax.registration.refine import Plan, View

SHAPE = (160, 168, 160)  # 160 is the least edge with a grid of an eighth
PLAN = Plan(3, window=5)  # in the default's 3 what is far off is alike, too
PEAK = (15.0, -10.0, 8.6)  # voxels; 20 together


def texture():
    """Blobs of some 40 voxels with finer ones on them, within [-1, 1]."""
    rng, parts = np.random.default_rng(0), []
    for sigma, weight in ((16, 1.0), (6, 0.3)):
        noise = rng.normal(size=[n // 4 for n in SHAPE]).astype(np.float32)
        smooth = ndimage.gaussian_filter(noise, sigma / 4)
        parts.append(weight * ndimage.zoom(smooth / smooth.std(), 4, order=1))
    return np.clip(sum(parts) / 3, -1, 1).astype(np.float32)


@pytest.mark.slow  # compiles four grids of 160^3: half a minute on two cores
def test_refine_recovers_on_four_grids_what_three_cannot_reach():
    axes = [np.sin(np.pi * np.arange(n) / (n - 1)) ** 2 for n in SHAPE]
    bump = np.einsum("x,y,z->xyz", *axes)
    truth = (bump[..., None] * PEAK).astype(np.float32)
    moving = texture()
    coords = np.moveaxis(truth, -1, 0) + np.indices(SHAPE)
    fixed = ndimage.map_coordinates(moving, coords, order=1, mode="nearest")
    whole = np.ones((1, *SHAPE, 1), np.float32)
    views = [View(v[None, ..., None], whole) for v in (fixed, moving)]

    taken = refine.steps(PLAN, SHAPE)
    assert taken == [(8, 6), (4, 3), (2, 2), (1, 1)]
    # A grid less: the longest way that its steps can go, were all in one direction.
    usual = refine.steps(PLAN, [n // 2 for n in SHAPE])
    assert usual == [(4, 6), (2, 3), (1, 1)]
    reach = PLAN.step * sum(factor * count for factor, count in usual)
    length = np.linalg.norm(truth, axis=-1)
    assert reach < 0.8 * length.max()

    # Volumes as arguments: XLA would fold constants of this size for many minutes.
    run = jax.jit(functools.partial(refine.refine, plan=PLAN))
    out = jax.device_get(run(np.zeros((1, *SHAPE, 3), np.float32), *views))
    far = length > reach / 2
    gap = np.linalg.norm(out.disp[0] - truth, axis=-1)
    assert gap[far].mean() < 0.1 * length[far].mean()  # 0.05 when this was written
    assert np.linalg.norm(out.disp[0], axis=-1).max() > reach
    assert out.cost_after[0] < 0.1 * out.cost_before[0]
