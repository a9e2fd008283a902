"""Body mask, network grid, resampling."""

import itertools
import json

import numpy as np
import pytest
from scipy import ndimage

from tests.grids import oblique, positions
from unireg_jax.imaging import orientation, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import Grid, PreprocessSpec
from unireg_jax.tasks import OUTSIDE_HU

SHAPE = (5, 6, 7)
SPACING = (3.0, 2.5, 4.0)


def straight(spacing=SPACING, origin=(0.0, 0.0, 0.0)):
    affine = np.diag([*map(float, spacing), 1.0])
    affine[:3, 3] = origin
    return affine


def ellipsoid(points, center, radii):
    return (((points - center) / np.array(radii)) ** 2).sum(axis=-1) <= 1


def person(vox2world, shape=(80, 62, 30), center=(0.0, 0.0, 0.0), table="solid"):
    """CT of a trunk with lungs open at the top, on a table, with a wire aside."""
    points = positions(Grid(shape, vox2world)) - center
    x, y, z = np.moveaxis(points, -1, 0)
    hu = np.full(shape, -1000.0)
    trunk = (x / 140) ** 2 + (y / 90) ** 2 <= 1
    hu[trunk] = 40
    for side in (-60, 60):
        lung = ((x - side) / 45) ** 2 + ((y + 10) / 60) ** 2 <= 1
        hu[lung & (z > -20)] = -850
    if table == "solid":
        hu[(np.abs(y - 98) < 5) & (np.abs(x) < 180)] = -200  # touches the back
    else:
        shell = (np.abs(y - 106) < 15) & (np.abs(x) < 180)
        hu[shell] = 100
        hu[shell & (np.abs(y - 106) < 10) & (np.abs(x) < 170)] = -950
    hu[(np.abs(x + 165) < 7) & (np.abs(y) < 7)] = 500  # wire beside the patient
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 20, shape)
    return Volume((hu + noise).round().astype(np.int16), vox2world), trunk


PERSON_SPACING = (5.0, 4.0, 6.0)


def centred(spacing, shape=(80, 62, 30)):
    affine = straight(spacing)
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * spacing
    return affine


# --- spec ---------------------------------------------------------------------------


def test_spec_survives_json():
    spec = PreprocessSpec(shape=(96, 80, 64), spacing_mm=(4.0, 3.0, 2.0), codes="RAS")
    again = PreprocessSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and hash(again) == hash(spec)
    assert PreprocessSpec.from_json({}) == PreprocessSpec()


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"shape": (96, 80)}, "shape must be 3 positive voxel counts"),
        ({"shape": (96, 80, 0)}, "shape must be 3 positive voxel counts"),
        ({"spacing_mm": (2, 2, -1)}, "spacing_mm must be 3 positive mm"),
        ({"spacing_mm": (2, 2, float("nan"))}, "spacing_mm must be 3 positive mm"),
        ({"hu_low": 400.0}, "hu_low must be below hu_high"),
        ({"codes": "LPP"}, "one each of L/R, P/A, I/S"),
        ({"version": 2}, "version must be at most 1, got 2; update the package"),
        ({"shpae": (1, 2, 3)}, r"got \['shpae'\]"),
    ],
)
def test_spec_rejects(fields, match):
    with pytest.raises(ValueError, match=match):
        PreprocessSpec.from_json(fields)


# --- body mask ----------------------------------------------------------------------


@pytest.mark.parametrize("table", ["solid", "hollow"])
def test_body_mask_is_the_trunk_without_table_and_wire(table):
    volume, trunk = person(centred(PERSON_SPACING), table=table)
    mask = preprocess.body_mask(volume)
    assert mask.shape == trunk.shape and mask.dtype == bool
    overlap = 2 * (mask & trunk).sum() / (mask.sum() + trunk.sum())
    assert overlap > 0.96  # where the table touches, 8 mm of it may stay
    assert (mask & trunk).sum() > 0.995 * trunk.sum()  # lungs are filled
    assert not mask[:10].any()  # the wire and the ends of the table


def test_body_mask_does_not_depend_on_storage_order():
    volume, _ = person(centred(PERSON_SPACING))
    mask = preprocess.body_mask(volume)
    for codes in ("RAI", "SLP", "AIR"):
        data, vox2world = orientation.reorient(volume.data, volume.vox2world, codes)
        turned = preprocess.body_mask(Volume(data, vox2world))
        back, _ = orientation.reorient(turned, vox2world)
        # At 4 to 6 mm no voxel is skipped, so the same ones are looked at.
        np.testing.assert_array_equal(back, mask)


@pytest.mark.parametrize("shape", [(9, 10, 11), (13, 17, 7)])
def test_body_mask_of_fine_voxels_keeps_the_shape(shape):
    data = np.full(shape, -1000, np.int16)
    data[2:7, 3:8, 1:6] = 0
    mask = preprocess.body_mask(Volume(data, straight((1.0, 0.7, 3.0))))
    assert mask.shape == shape and mask.any()


def test_body_mask_keeps_two_legs():
    grid = Grid((80, 62, 30), centred(PERSON_SPACING))
    x, y, _ = np.moveaxis(positions(grid), -1, 0)
    legs = [((x - side) / 60) ** 2 + (y / 70) ** 2 <= 1 for side in (-90, 90)]
    data = np.where(legs[0] | legs[1], 30, -1000).astype(np.int16)
    mask = preprocess.body_mask(Volume(data, grid.vox2world))
    assert (mask & legs[0]).sum() > 0.95 * legs[0].sum()
    assert (mask & legs[1]).sum() > 0.95 * legs[1].sum()


@pytest.mark.parametrize("value", [-1000, 50])
def test_body_mask_of_constant_is_all(value):
    volume = Volume(np.full(SHAPE, value, np.int16), straight())
    assert preprocess.body_mask(volume).all()
    center = preprocess.body_center_mm(volume)
    np.testing.assert_allclose(center, (np.array(SHAPE) - 1) / 2 * SPACING)


def test_body_mask_rejects_batch():
    with pytest.raises(ValueError, match=r"volume.data must be \(X, Y, Z\)"):
        preprocess.body_mask(Volume(np.zeros((1, *SHAPE)), straight()))


@pytest.mark.parametrize("threshold_hu, filled", [(-500.0, False), (-900.0, True)])
def test_body_mask_threshold(threshold_hu, filled):
    data = np.full((20, 21, 22), -1000, np.int16)
    data[5:15, 5:15, 5:15] = 0
    data[5:15, 5:15, :5] = -800
    volume = Volume(data, straight((4.0, 4.0, 4.0)))
    mask = preprocess.body_mask(volume, threshold_hu=threshold_hu)
    assert mask[10, 10, 2] == filled


# --- network grid -------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLP"])
@pytest.mark.parametrize("turned", [False, True])
def test_network_grid_is_centred_on_the_body(codes, turned):
    center = np.array([50.0, -30.0, 700.0])
    vox2world = centred(PERSON_SPACING)
    if turned:
        vox2world = oblique(PERSON_SPACING)
        half = (np.array((80, 62, 30)) - 1) / 2
        vox2world[:3, 3] = -vox2world[:3, :3] @ half
    vox2world[:3, 3] += center
    points = positions(Grid((80, 62, 30), vox2world))
    body = ellipsoid(points, center, (90, 60, 50))
    data, vox2world = orientation.reorient(
        np.where(body, 40, -1000).astype(np.int16), vox2world, codes
    )
    spec = PreprocessSpec(shape=(49, 41, 33), spacing_mm=(4.0, 5.0, 6.0))
    grid = preprocess.network_grid(Volume(data, vox2world), spec)
    assert grid.shape == spec.shape
    np.testing.assert_array_equal(grid.vox2world[:3, :3], np.diag(spec.spacing_mm))
    middle = grid.vox2world[:3, :3] @ (24, 20, 16) + grid.vox2world[:3, 3]
    # Faces of the bounding box fall between voxels of 4 to 6 mm.
    np.testing.assert_allclose(middle, center, atol=4)


def test_network_grid_follows_the_codes_of_the_spec():
    spec = PreprocessSpec(shape=(9, 8, 7), spacing_mm=(4.0, 5.0, 6.0), codes="SRA")
    volume = Volume(np.zeros(SHAPE, np.int16), oblique())
    grid = preprocess.network_grid(volume, spec)
    assert orientation.axis_codes(grid.vox2world) == "SRA"
    assert orientation.spacing_mm(grid.vox2world) == (4.0, 5.0, 6.0)


# --- resampling ---------------------------------------------------------------------


def oracle(volume, grid, order):
    """One map_coordinates per grid point, no smoothing."""
    to_voxel = np.linalg.inv(volume.vox2world)
    coords = positions(grid) @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    out = ndimage.map_coordinates(
        volume.data.astype(np.float64),
        np.moveaxis(coords, -1, 0),
        order=order,
        mode="nearest",
    )
    inside = (coords >= -0.5) & (coords <= np.array(volume.data.shape) - 0.5)
    return out, inside.all(axis=-1)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    "vox2world, grid_affine",
    [
        (straight(), straight((2.0, 2.0, 3.0), (1.0, -1.5, 4.0))),
        (straight(), straight((-2.0, 2.0, -3.0), (13.0, 0.0, 22.0))),
        (oblique(), straight((2.0, 2.0, 3.0), (-22.0, 30.0, -105.0))),
        (oblique(), oblique((2.0, 2.1, 3.3))),
    ],
)
def test_resample_equals_oracle(vox2world, grid_affine, order):
    data = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    volume, grid = Volume(data, vox2world), Grid((8, 9, 10), grid_affine)
    expected, inside = oracle(volume, grid, order)
    out = preprocess.resample(volume, grid, fill=-7.0, order=order)
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(out[inside], expected[inside], atol=1e-5)  # float32
    assert (out[~inside] == -7).all()
    assert out.dtype == np.float32 and out.shape == grid.shape


def test_resample_own_grid_is_identity():
    data = np.random.default_rng(0).integers(-1000, 500, SHAPE).astype(np.int16)
    volume = Volume(data, oblique())
    for order in (0, 1):
        out = preprocess.resample(
            volume, Grid(SHAPE, volume.vox2world), fill=0, order=order
        )
        np.testing.assert_allclose(out, data, atol=1e-3)  # float32 of 1000 HU


def test_resample_matrix_goes_from_grid_to_volume():
    # A ramp of LPS mm: the value at x must be that of matrix @ x.
    big = Grid((30, 31, 32), straight((4.0, 4.5, 5.0), (-60.0, -60.0, -70.0)))
    weights = np.array([1.0, 10.0, 100.0])
    volume = Volume(positions(big) @ weights, big.vox2world)
    matrix = oblique((1.0, 1.0, 1.0), (3.0, -4.0, 5.0))
    grid = Grid(SHAPE, straight((3.0, 2.5, 4.0)))
    out = preprocess.resample(volume, grid, fill=np.nan, matrix=matrix)
    moved = positions(grid) @ matrix[:3, :3].T + matrix[:3, 3]
    np.testing.assert_allclose(out, moved @ weights, atol=1e-2)  # float32 of 5000


@pytest.mark.parametrize("turned", [False, True])
def test_resample_smooths_before_it_skips_voxels(turned):
    # Coarser by 4, 3 and 1.1: the same numbers as filter, then interpolation.
    shape, ratios = (40, 30, 20), (4.0, 3.0, 1.1)
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    base = oblique((1.0, 2.0, 3.0)) if turned else straight((1.0, 2.0, 3.0))
    place = np.diag([*ratios, 1.0])
    place[:3, 3] = (1.3, 0.4, -0.2)
    if turned:  # within the plane of x and y, so that the ratios mix
        place[:2, :2] = np.array([[0.8, -0.6], [0.6, 0.8]]) @ place[:2, :2]
        place[0, 3] = 9.0
    grid = Grid((8, 7, 6), base @ place)
    sigma = [
        np.sqrt(r**2 - 1) / 2.355 if r > 1.2 else 0.0
        for r in np.linalg.norm(place[:3, :3], axis=1)
    ]
    smooth = ndimage.gaussian_filter(data, sigma, mode="nearest", truncate=3.0)
    expected, inside = oracle(Volume(smooth, base), grid, 1)
    out = preprocess.resample(Volume(data, base), grid, fill=0.0)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(out[inside], expected[inside], atol=1e-5)  # float32


def test_resample_removes_what_the_grid_cannot_hold():
    data = np.tile([1000.0, -1000.0], (24, 26, 12)).astype(np.float32)
    volume = Volume(data, straight((1.0, 1.0, 1.0)))
    out = preprocess.resample(
        volume, Grid((5, 6, 6), straight((4.0, 4.0, 4.0), (2, 2, 2))), fill=0.0
    )
    # At the ends the edge value holds. Every fourth voxel alone would give 1000.
    assert np.abs(out[:, :, 1:-1]).max() < 50


def test_resample_beyond_the_scan_is_fill():
    volume = Volume(np.ones(SHAPE, np.uint8), straight())
    grid = Grid((4, 3, 2), straight((2.0, 2.0, 2.0), (500.0, 0.0, 0.0)))
    for order, dtype in ((1, np.float32), (0, np.uint8)):
        out = preprocess.resample(volume, grid, fill=9, order=order)
        assert (out == 9).all() and out.dtype == dtype


def test_resample_edge_voxels_reach_to_their_outer_faces():
    volume = Volume(np.full(SHAPE, 5.0), straight())
    coords = np.array([-0.6, -0.4, 0.0])
    grid = Grid((3, 1, 1), np.diag([0.6, 1.0, 1.0, 1.0]))
    for shift, expected in zip(coords, (False, True, True), strict=True):
        grid.vox2world[0, 3] = shift * SPACING[0]
        out = preprocess.resample(volume, grid, fill=0.0)
        assert (out[0, 0, 0] == 5) == expected


def test_resample_one_slice_and_flips():
    data = np.arange(30.0).reshape(5, 6, 1)
    volume = Volume(data, straight())
    back = np.diag([-3.0, -2.5, 4.0, 1.0])
    back[:3, 3] = (12.0, 12.5, 0.0)
    out = preprocess.resample(volume, Grid((5, 6, 1), back), fill=0.0)
    np.testing.assert_allclose(out, data[::-1, ::-1], atol=1e-5)  # float32


def test_resample_rejects():
    volume, grid = Volume(np.zeros(SHAPE), straight()), Grid(SHAPE, straight())
    with pytest.raises(ValueError, match="order must be 0 or 1, got 3"):
        preprocess.resample(volume, grid, fill=0, order=3)
    for bad in (np.eye(3), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match=r"matrix must be a finite \(4, 4\)"):
            preprocess.resample(volume, grid, fill=0, matrix=bad)


def test_prepare_image_clips_and_marks_the_outside():
    data = np.zeros(SHAPE, np.int16)
    data[0], data[4] = -3024, 30000
    volume = Volume(data, straight())
    grid = Grid((7, 6, 7), straight(SPACING, (-3.0, 0.0, 0.0)))
    out = preprocess.prepare_image(volume, grid, PreprocessSpec())
    assert out.dtype == np.int16
    expected = [OUTSIDE_HU, OUTSIDE_HU, 0, 0, 0, 3071, OUTSIDE_HU]
    np.testing.assert_array_equal(out[:, 2, 3], expected)


def test_prepare_image_of_nothing_but_padding_is_air():
    volume = Volume(np.full(SHAPE, -2000, np.int16), straight())
    grid = Grid(SHAPE, straight())
    out = preprocess.prepare_image(volume, grid, PreprocessSpec())
    np.testing.assert_array_equal(out, -1000)


def test_prepare_image_beyond_all_but_padding_is_outside():
    """What lies there is no air, even where the grid meets nothing else."""
    data = np.full(SHAPE, -3024, np.int16)
    data[:2] = 40
    grid = Grid((SHAPE[0] - 4, *SHAPE[1:]), straight(origin=(4 * SPACING[0], 0, 0)))
    out = preprocess.prepare_image(Volume(data, straight()), grid, PreprocessSpec())
    np.testing.assert_array_equal(out, OUTSIDE_HU)


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ((0, 1), "32 grey levels or more"),
        ((-1000, 1500), None),
        ((0, 255), None),
        ((0, 20_000), "were clipped"),
        ((40.2, 40.4), "got 40 HU alone"),
    ],
)
def test_contrast_fault_of_images_that_are_not_in_hu(ends, told):
    rng = np.random.default_rng(0)
    image = rng.uniform(*ends, (16, 16, 16)).astype(np.float32)
    grid = Grid(image.shape, straight())
    hu = preprocess.prepare_image(Volume(image, straight()), grid, PreprocessSpec())
    why = preprocess.contrast_fault(hu)
    assert (why is None) if told is None else told in why
    hu[:, :, 1:] = OUTSIDE_HU  # too little to tell
    assert preprocess.contrast_fault(hu) is None


def test_prepare_image_takes_padding_for_no_air():
    """A round field of view, filled around: neither air nor a mixture with it."""
    fine, coarse = (1.0, 1.0, 2.0), (4.0, 4.0, 4.0)
    x, y, _ = np.indices((64, 64, 12))
    radius = np.hypot(x - 31.5, y - 31.5)
    data = np.full(radius.shape, 40, np.int16)
    data[radius > 26] = -2000
    data[32, 32, 6] = -1800  # noise of one voxel, in streaks of metal
    turned = straight(coarse, (1.5, 1.5, 1.0))
    turned[:2, :2] = 4 * np.array([[0.8, -0.6], [0.6, 0.8]])
    for place in (straight(coarse, (1.5, 1.5, 1.0)), turned):
        grid = Grid((16, 16, 6), place)
        volume = Volume(data, straight(fine))
        out = preprocess.prepare_image(volume, grid, PreprocessSpec())
        points = np.indices(grid.shape).reshape(3, -1)
        at = (place[:3, :3] @ points + place[:3, 3:])[:2]
        distance = np.hypot(*(at - 31.5)).reshape(grid.shape)
        assert (out[distance > 27] == OUTSIDE_HU).all()
        inside = out[distance < 22]
        assert inside.size and (inside != OUTSIDE_HU).all()
        # A tenth of air from -1000 HU on is the most that mixes in.
        assert (out[out != OUTSIDE_HU] > -1000 * 0.1 + 40 * 0.9 - 25).all()


@pytest.mark.parametrize("codes", ["RAI", "SLP", "AIR", "LAS"])
def test_prepare_image_is_the_same_for_every_storage_order(codes):
    volume, _ = person(oblique(PERSON_SPACING))
    spec = PreprocessSpec(shape=(48, 41, 30), spacing_mm=(8.0, 8.5, 9.0))
    grid = preprocess.network_grid(volume, spec)
    expected = preprocess.prepare_image(volume, grid, spec)
    data, vox2world = orientation.reorient(volume.data, volume.vox2world, codes)
    other = Volume(data, vox2world)
    again = preprocess.network_grid(other, spec)
    np.testing.assert_allclose(again.vox2world, grid.vox2world, atol=1e-9)
    out = preprocess.prepare_image(other, grid, spec)
    # Rounding at faces of the scan and at halves of HU.
    assert (np.abs(out.astype(int) - expected) > 1).mean() < 1e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_prepare_labels_is_nearest(dtype):
    data = np.random.default_rng(0).integers(0, 200, SHAPE).astype(dtype)
    volume, grid = Volume(data, oblique()), Grid((8, 9, 10), straight((2.0, 2.1, 3.0)))
    grid.vox2world[:3, 3] = (-22.0, 30.0, -105.0)
    expected, inside = oracle(volume, grid, 0)
    out = preprocess.prepare_labels(volume, grid)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, np.where(inside, expected, 0))


def test_prepare_labels_rejects_floats():
    volume = Volume(np.zeros(SHAPE), straight())
    with pytest.raises(ValueError, match="uint8 or uint16, got float64; use read_lab"):
        preprocess.prepare_labels(volume, Grid(SHAPE, straight()))


def test_corners_of_the_grid_agree_with_the_spec():
    # The first and last voxel lie symmetrically about the centre of the body.
    volume = Volume(np.zeros(SHAPE, np.int16), straight())
    spec = PreprocessSpec(shape=(9, 8, 7), spacing_mm=(4.0, 5.0, 6.0))
    grid = preprocess.network_grid(volume, spec)
    corners = np.array(list(itertools.product((0, 8), (0, 7), (0, 6))))
    points = corners @ grid.vox2world[:3, :3].T + grid.vox2world[:3, 3]
    np.testing.assert_allclose(
        points.mean(axis=0), preprocess.body_center_mm(volume), atol=1e-9
    )
