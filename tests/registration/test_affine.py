"""Pre-alignment: known maps are found, and nothing is ever made worse."""

import numpy as np
import pytest

from data_pipeline import synthetic
from unireg_jax.imaging import preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration import affine
from unireg_jax.registration.affine import Plan, affine_align
from unireg_jax.tasks import OUTSIDE_HU, PairType, Region

SHAPE = (60, 48, 56)
SPACING = (6.0, 5.0, 5.5)
# One plan for most tests: one compilation.
PLAN = Plan(starts=8, finalists=2, fine_steps=50)


def world_map(*, angle_deg=12.0, shift_mm=(25.0, -10.0, 15.0), scale=1.05):
    """Rotation about an oblique axis, shift and uniform scale, [4, 4] mm."""
    axis = np.array([0.8, 0.36, 0.48])
    cross = np.cross(np.eye(3), axis)
    angle = np.deg2rad(angle_deg)
    turn = np.eye(3) + np.sin(angle) * -cross + (1 - np.cos(angle)) * cross @ cross
    matrix = np.eye(4)
    matrix[:3, :3] = scale * turn
    matrix[:3, 3] = shift_mm
    return matrix


@pytest.fixture(scope="module")
def scan():
    """A head-neck phantom and the positions of its organs, LPS mm."""
    phantom = synthetic.phantom("headneck", shape=SHAPE, spacing_mm=SPACING, seed=3)
    points = np.argwhere(phantom.labels > 0)
    points = points @ phantom.vox2world[:3, :3].T + phantom.vox2world[:3, 3]
    return phantom.hu, phantom.vox2world, points


def moved(scan, matrix, *, shape=(56, 60, 50), spacing=(6.0, 6.0, 6.0)):
    """The scan as it looks from a world where x lies at matrix @ x, on its own grid."""
    hu, vox2world, _ = scan
    place = np.diag([*spacing, 1.0])
    # Where the body lands, near enough, and far from the fixed grid's own centre.
    place[:3, 3] = matrix[:3, 3] - (np.array(shape) - 1) / 2 * spacing
    grid = preprocess.Grid(shape, place)
    out = preprocess.resample(
        Volume(hu, vox2world), grid, matrix=np.linalg.inv(matrix), fill=OUTSIDE_HU
    )
    return np.rint(out).astype(np.int16), place


def error_mm(found, truth, points):
    """Mean distance of where two maps send points, mm."""
    gap = points @ (found - truth)[:3, :3].T + (found - truth)[:3, 3]
    return float(np.linalg.norm(gap, axis=1).mean())


def align(scan, moving, kind, plan=PLAN, **kwargs):
    return affine_align(
        scan[0],
        moving[0],
        fixed_vox2world=scan[1],
        moving_vox2world=moving[1],
        kind=kind,
        plan=plan,
        **kwargs,
    )


def test_affine_align_recovers_a_known_affine(scan):
    truth = world_map()
    found = align(scan, moved(scan, truth), "affine")
    assert found.dtype == np.float64
    # A quarter of the 8 mm voxels in which the search runs.
    assert error_mm(found, truth, scan[2]) < 2.0


def test_affine_align_recovers_a_known_rigid_motion(scan):
    truth = world_map(scale=1.0)
    found = align(scan, moved(scan, truth), "rigid")
    assert error_mm(found, truth, scan[2]) < 2.0
    # A rotation and nothing else.
    np.testing.assert_allclose(found[:3, :3].T @ found[:3, :3], np.eye(3), atol=1e-6)


def test_affine_align_recovers_from_a_scan_of_the_upper_half(scan):
    truth = world_map(angle_deg=6.0)
    hu, place = moved(scan, truth)
    hu[:, :, :22] = OUTSIDE_HU
    assert error_mm(align(scan, (hu, place), "affine"), truth, scan[2]) < 4.0


@pytest.mark.parametrize("kept", ["lower", "upper"])
def test_affine_align_finds_the_third_that_two_scans_share(scan, kept):
    """Each without two fifths, at opposite ends; the fixed scan keeps the named one.

    With noise, as two patients are: their cubes correlate little even where they meet.
    """
    truth = world_map(angle_deg=6.0)
    rng = np.random.default_rng(0)
    scans = []
    for hu, vox2world in (scan[:2], moved(scan, truth)):
        hu, body = hu.copy(), hu > -500
        hu[body] = np.clip(hu[body] + rng.normal(0, 200, body.sum()), -400, 1000)
        low = (kept == "lower") == bool(scans)
        first, last = (2, 5) if low else (0, 3)
        first, last = (round(n * hu.shape[2] / 5) for n in (first, last))
        vox2world = vox2world.copy()
        vox2world[:3, 3] += first * vox2world[:3, 2]
        scans.append((hu[:, :, first:last], vox2world))
    fixed, moving = scans
    # No plain start is near, nor any 105 mm of it: two fifths are 123 mm.
    found = align((*fixed, scan[2]), moving, "affine")
    low, high = (scan[1][2, 3] + f * SHAPE[2] * SPACING[2] for f in (0.4, 0.6))
    shared = scan[2][(scan[2][:, 2] > low) & (scan[2][:, 2] < high)]
    # Half of the 8 mm voxels in which the search runs. A search that takes the missing
    # overlap off the similarity is 50 mm off.
    assert error_mm(found, truth, shared) < 4.0


@pytest.mark.parametrize("thin", [0, 1])
def test_affine_align_of_a_scan_of_two_slices_finds_it(scan, thin):
    """They fill no voxel of the search by more than a half."""
    truth = world_map(angle_deg=0.0, shift_mm=(15.0, 10.0, -10.0), scale=1.0)
    scans = [scan[:2], moved(scan, truth, shape=SHAPE, spacing=SPACING)]
    hu = scans[thin][0].copy()
    hu[:, :25] = hu[:, 27:] = OUTSIDE_HU
    scans[thin] = (hu, scans[thin][1])
    found = align(*scans, "rigid")
    # Half of the 8 mm voxels in which the search runs; the identity is 21 mm off.
    assert error_mm(found, truth, scan[2]) < 4.0


def test_affine_align_of_equal_scans_is_the_identity(scan):
    np.testing.assert_array_equal(align(scan, scan[:2], "affine"), np.eye(4))


def test_affine_align_never_scores_below_its_plain_starts(scan):
    # Steps of metres lose the image at once: what remains must be a plain start.
    wild = Plan(
        starts=1, finalists=1, coarse_steps=2, fine_steps=2, coarse_mm=3e3, fine_mm=3e3
    )
    truth = world_map(angle_deg=0.0, shift_mm=(40.0, 30.0, 20.0), scale=1.0)
    moving = moved(scan, truth)
    before = error_mm(align(scan, moving, "com", wild), truth, scan[2])
    assert error_mm(align(scan, moving, "affine", wild), truth, scan[2]) <= before + 8


def test_affine_align_none_and_com_need_no_search(scan):
    truth = world_map(angle_deg=0.0, scale=1.0)
    moving = moved(scan, truth)
    np.testing.assert_array_equal(align(scan, moving, "none"), np.eye(4))
    com = align(scan, moving, "com")
    np.testing.assert_array_equal(com[:3, :3], np.eye(3))
    # What leaves the field of view moves the centroid by some voxels.
    assert error_mm(com, truth, scan[2]) < 15.0


def test_affine_align_of_nothing_but_air_is_finite(scan):
    air = np.full(SHAPE, -1000, np.int16)
    found = align((air, *scan[1:]), (air, scan[1]), "rigid")
    # Nothing is more like than the worlds as they are.
    np.testing.assert_array_equal(found, np.eye(4))


def test_best_map_takes_no_given_map_that_is_no_better(scan):
    air = np.full(SHAPE, -1000, np.int16)
    places = {"fixed_vox2world": scan[1], "moving_vox2world": scan[1]}
    name, found, scores = affine.best_map(air, air, {"odd": world_map()}, **places)
    assert name == "none" and scores["odd"] == scores["none"] == 0
    np.testing.assert_array_equal(found, np.eye(4))


def test_affine_align_looks_only_inside_the_mask(scan):
    hu, vox2world, points = scan
    truth = world_map(angle_deg=4.0, scale=1.0, shift_mm=(0.0, 0.0, 10.0))
    moving, place = moved(scan, truth)
    # The upper third moves as `truth`, the rest is another body.
    mask = np.zeros(SHAPE, bool)
    mask[:, :, 30:] = True
    spoiled = hu.copy()
    spoiled[:, :, :26] = spoiled[::-1, ::-1, :26]
    found = align((spoiled, vox2world), (moving, place), "rigid", fixed_mask=mask)
    high = points[points[:, 2] > vox2world[2, 3] + 32 * SPACING[2]]
    assert error_mm(found, truth, high) < 4.0


def test_com_is_of_the_bodies_whatever_the_mask(scan):
    """An organ beside the middle is no reason to move a scan onto itself."""
    hu, vox2world, _ = scan
    mask = np.zeros(SHAPE, bool)
    mask[:, :, 30:] = True
    found = align((hu, vox2world), (hu, vox2world), "com", fixed_mask=mask)
    np.testing.assert_allclose(found, np.eye(4), atol=1e-9)
    places = {"fixed_vox2world": vox2world, "moving_vox2world": vox2world}
    _, _, scores = affine.best_map(hu, hu, {}, fixed_mask=mask, **places)
    assert scores["com"] == pytest.approx(scores["none"])


def test_affine_align_compiles_once_per_shape(scan, monkeypatch):
    traces = []
    search = affine._search

    def counted(*args, **kwargs):
        traces.append(1)
        return search(*args, **kwargs)

    monkeypatch.setattr(affine, "_search", counted)
    plan = Plan(starts=1, finalists=1, coarse_steps=1, fine_steps=1)
    for shift in (0.0, 10.0):
        truth = world_map(angle_deg=shift, scale=1.0)
        for kind in ("rigid", "affine"):
            align(scan, moved(scan, truth), kind, plan)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "elastic"}, "kind must be one of"),
        ({"fixed_hu": np.zeros((1, 4, 5, 6))}, r"fixed_hu must be \(X, Y, Z\)"),
        ({"moving_vox2world": np.zeros((4, 4))}, "moving_vox2world must be"),
        ({"fixed_mask": np.ones((4, 4, 4), bool)}, "fixed_mask must be"),
        ({"fixed_mask": np.zeros((4, 5, 6), bool)}, "within the scan and the mask;"),
        ({"moving_hu": np.full((4, 5, 6), OUTSIDE_HU)}, "is within the scan;"),
        ({"plan": Plan(shared=0.0)}, r"plan.shared must be in \(0, 1\]"),
    ],
)
def test_affine_align_rejects(change, match):
    arguments = {
        "fixed_hu": np.zeros((4, 5, 6), np.int16),
        "moving_hu": np.zeros((4, 5, 6), np.int16),
        "fixed_vox2world": np.eye(4),
        "moving_vox2world": np.eye(4),
        "kind": "affine",
    } | change
    fixed, moving = arguments.pop("fixed_hu"), arguments.pop("moving_hu")
    with pytest.raises(ValueError, match=match):
        affine_align(fixed, moving, **arguments)


@pytest.mark.parametrize(
    ("shift", "region", "pair_type", "kind"),
    [
        ((0, 0, 0), Region.LIVER, PairType.INTER, "affine"),
        ((0, 0, 29), Region.CHEST, PairType.INTRA, "none"),
        ((0, 0, 31), Region.CHEST, PairType.INTRA, "affine"),
        ((0, 0, 31), Region.LIVER, PairType.INTRA, "rigid"),
        # Centres 28 mm apart, but only 8 of 36 mm of the smaller scan shared.
        ((0, 28, 0), Region.LIVER, PairType.INTRA, "rigid"),
    ],
)
def test_choose_kind_follows_patients_distance_and_shared_space(
    shift, region, pair_type, kind
):
    vox2world = np.diag([2.0, 3.0, 10.0, 1.0])
    fixed = affine.scan_box(vox2world, (0, 0, 0), (9, 11, 9))
    np.testing.assert_array_equal(fixed, [(-1, -1.5, -5), (19, 34.5, 95)])
    moving = fixed + np.array(shift)
    got, why = affine.choose_kind(fixed, moving, region=region, pair_type=pair_type)
    assert got == kind
    assert pair_type == PairType.INTER or "% of the smaller scan" in why


def test_choose_kind_of_a_small_scan_within_a_large_one():
    large = np.array([(0.0, 0, 0), (400, 400, 500)])
    small = np.array([(150.0, 150, 200), (250, 250, 300)])
    for boxes in ((large, small), (small, large)):
        got, why = affine.choose_kind(
            *boxes, region=Region.LIVER, pair_type=PairType.INTRA
        )
        assert got == "none" and "100 % of the smaller" in why
