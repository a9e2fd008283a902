"""Surface distances."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from unireg_jax.imaging import surface

SPACING = (2.0, 3.0, 5.0)


def blob(seed, shape=(25, 26, 27), shift=(0, 0, 0)):
    """A smooth random shape about the middle."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise = ndimage.gaussian_filter(noise, 2)
    grid = np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij")
    far = sum(((g - s) / 9) ** 2 for g, s in zip(grid, shift, strict=True))
    return (far + 3 * noise < 0.6).astype(np.uint8)


def brute_force(a, b, spacing):
    def surface_points(mask):
        padded = np.pad(mask, 1)
        inner = np.ones_like(mask)
        for axis in range(3):
            for step in (-1, 1):
                inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
        return np.argwhere(mask & ~inner) * np.array(spacing)

    distances = cdist(surface_points(a), surface_points(b))
    return max(
        np.percentile(distances.min(axis=1), 95),
        np.percentile(distances.min(axis=0), 95),
    )


def hd95(a, b, spacing=SPACING):
    return surface.hd95(surface.surface_distances(a > 0, b > 0, spacing))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hd95_of_single_voxels_is_their_distance(axis):
    a, b = np.zeros((5, 6, 7), np.uint8), np.zeros((5, 6, 7), np.uint8)
    a[1, 1, 1] = 4
    b[tuple(3 if n == axis else 1 for n in range(3))] = 4
    assert hd95(a, b) == 2 * SPACING[axis]


def test_hd95_of_equal_labels_is_zero():
    assert hd95(blob(0), blob(0)) == 0


def test_hd95_absent_label_is_nan():
    a = np.ones((5, 6, 7), np.uint8)
    for pair in ((a, a * 0), (a * 0, a), (a * 0, a * 0)):
        assert np.isnan(hd95(*pair))


def test_hd95_full_arrays_have_their_border_as_surface():
    a = np.ones((5, 6, 7), bool)
    assert hd95(a, a) == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hd95_equals_brute_force(seed):
    a, b = blob(seed), blob(seed + 10, shift=(2, -1, 3))
    expected = brute_force(a > 0, b > 0, SPACING)
    # float64 distances
    assert hd95(a, b) == pytest.approx(expected, abs=1e-9)
    assert hd95(b, a) == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # of the peer
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hd95_agrees_with_surface_distance_package(seed):
    peer = pytest.importorskip("surface_distance")
    a, b = blob(seed), blob(seed + 10, shift=(2, -1, 3))
    distances = peer.compute_surface_distances(a > 0, b > 0, SPACING)
    expected = peer.compute_robust_hausdorff(distances, 95)
    # It weighs surface elements, which lie half a voxel off, by their area.
    got = hd95(a, b)
    assert got == pytest.approx(expected, abs=max(SPACING))


def test_hd95_rejects():
    a = np.zeros((5, 6, 7), np.uint8)
    with pytest.raises(ValueError, match="labels must be two equal"):
        hd95(a, a[1:])
    with pytest.raises(ValueError, match="three positive mm, got .0.0, 1.0, 1.0."):
        hd95(a, a, (0.0, 1.0, 1.0))
