"""Windows over scans larger than the network's grid, and how their fields meet."""

import numpy as np
import pytest

from unireg_jax.imaging import preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.registration import tiles

SPEC = PreprocessSpec(shape=(48, 32, 48), spacing_mm=(8.0, 9.0, 8.0))


def column(height_mm, *, width_mm=(300.0, 220.0), spacing=(9.0, 8.0, 10.0)):
    """An elliptic column of soft tissue in air, along z."""
    shape = (44, 36, round(height_mm / spacing[2]) + 4)
    vox2world = np.diag([*spacing, 1.0])
    vox2world[:3, 3] = (-150.0, -320.0, 400.0)
    x, y = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape[:2]), indexing="ij")
    inside = (x * spacing[0] / width_mm[0] * 2) ** 2 + (
        y * spacing[1] / width_mm[1] * 2
    ) ** 2 < 1
    data = np.full(shape, -1000, np.int16)
    data[inside, 2:-2] = 40
    return Volume(data, vox2world)


@pytest.mark.parametrize("fov", tiles.FOVS)
def test_a_body_that_fits_has_one_window_whatever_is_asked(fov):
    volume = column(300.0)
    layout = tiles.lay_out(volume, SPEC, fov)
    grid = preprocess.network_grid(volume, SPEC)
    assert layout.starts == ((0, 0, 0),)
    assert layout.grid.shape == layout.window == SPEC.shape
    np.testing.assert_array_equal(layout.grid.vox2world, grid.vox2world)
    assert layout.covered == 1.0
    assert layout.fov == ("crop" if fov == "auto" else fov)


def test_auto_takes_tiles_where_the_crop_would_lose_much():
    # The window is 384 mm high: 410 mm lose 6 %, 700 mm lose 45 %.
    assert tiles.lay_out(column(410.0), SPEC).fov == "crop"
    layout = tiles.lay_out(column(700.0), SPEC)
    assert layout.fov == "tiles"
    assert layout.covered == 1.0
    assert tiles.lay_out(column(700.0), SPEC, "crop").covered < 0.6


@pytest.mark.parametrize(("seen", "used"), [(0.71, "crop"), (0.69, "tiles")])
def test_auto_takes_tiles_below_seven_tenths(seen, used):
    # 384 mm are in the window, of a body as high as leaves that share.
    volume = column(384.0 / seen, spacing=(9.0, 8.0, 2.0))
    layout = tiles.lay_out(volume, SPEC)
    assert tiles.lay_out(volume, SPEC, "crop").covered == pytest.approx(seen, abs=5e-3)
    assert layout.fov == used


def test_tiles_lie_on_the_lattice_of_the_crop_and_cover_the_body():
    volume = column(700.0)
    crop = tiles.lay_out(volume, SPEC, "crop").grid
    layout = tiles.lay_out(volume, SPEC, "tiles")
    between = np.linalg.inv(layout.grid.vox2world) @ crop.vox2world
    np.testing.assert_allclose(between[:3, :3], np.eye(3), atol=1e-12)
    np.testing.assert_allclose(between[:3, 3], np.rint(between[:3, 3]), atol=1e-9)
    assert layout.window == SPEC.shape
    assert {(x, y) for x, y, _ in layout.starts} == {(0, 0)}
    heights = sorted(z for _, _, z in layout.starts)
    assert heights[0] == 0 and heights[-1] + 48 == layout.grid.shape[2]
    assert len(heights) == 3
    whole = tiles.lay_out(volume, SPEC, "whole")
    assert whole.window == whole.grid.shape == layout.grid.shape
    assert all(n % 16 == 0 for n in whole.window)


@pytest.mark.parametrize("total", [48, 49, 64, 80, 96, 97, 112, 160, 333])
def test_windows_share_a_quarter_and_weights_sum_to_one(total):
    starts = tiles.window_starts(total, 48)
    assert starts[0] == 0 and starts[-1] + 48 == total
    assert all(12 <= a + 48 - b for a, b in zip(starts, starts[1:], strict=False))
    weights = tiles.blend_weights(starts, 48)
    summed = np.zeros(total)
    for start, weight in zip(starts, weights, strict=True):
        summed[start : start + 48] += weight
    np.testing.assert_allclose(summed, 1.0, atol=1e-6)  # float32 weights
    assert weights.min() >= 0
    # No step where a window begins: half a cosine over three voxels or more.
    assert np.abs(np.diff(weights, axis=1)).max() < 0.45
    for left, right in zip(weights, weights[1:], strict=False):
        assert left[-1] == right[0] == 0.0


def layout_of(shape):
    places = [tiles.window_starts(n, w) for n, w in zip(shape, SPEC.shape, strict=True)]
    starts = [(x, y, z) for x in places[0] for y in places[1] for z in places[2]]
    grid = preprocess.Grid(shape, np.eye(4))
    return tiles.Layout(grid, SPEC.shape, tuple(starts), "tiles", 1.0)


def test_windows_of_one_field_blend_to_that_field():
    layout = layout_of((64, 48, 112))
    disp = np.random.default_rng(0).normal(size=(64, 48, 112, 3)).astype(np.float32)
    blend = tiles.Blend(layout)
    for start in layout.starts:
        blend.add(start, disp[layout.part(start)])
    np.testing.assert_allclose(blend.disp, disp, atol=2e-6)  # sums of float32 weights


def test_windows_that_differ_blend_without_a_seam():
    layout = layout_of((48, 32, 128))
    blend = tiles.Blend(layout)
    for number, start in enumerate(layout.starts):
        blend.add(start, np.full((*SPEC.shape, 3), 5.0 * number, np.float32))
    steps = np.abs(np.diff(blend.disp, axis=2))
    # 5 voxels apart over a ramp of 6 voxels or more: pi / 2 * 5 / 6 at the steepest.
    assert 0 < steps.max() < 1.32
    assert np.abs(np.diff(blend.disp, axis=0)).max() == 0.0


def test_refusals():
    with pytest.raises(ValueError, match="fov must be one of"):
        tiles.lay_out(column(300.0), SPEC, "patches")
    with pytest.raises(ValueError, match="at most 40"):
        tiles.window_starts(40, 48)
