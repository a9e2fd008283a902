"""Overlap and surfaces of labels against the definitions, written out slowly."""

import math

import numpy as np
import pytest
from scipy import ndimage

from tests.evaluation import slow
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import mapping, surface
from unireg_jax.imaging.nifti import Volume

SPACINGS = ((1.0, 1.0, 1.0), (0.7, 1.3, 2.5), (2.0, 2.0, 5.0))


def tiny_labels(rng):
    """Two label maps of at most 60 voxels; often empty, full, equal or far apart."""
    shape = tuple(rng.integers(1, (4, 5, 4)))
    density = rng.choice([0.0, 0.05, 0.3, 0.7, 1.0], size=2)
    maps = [
        (rng.random(shape) < share) * rng.integers(1, 3, shape) for share in density
    ]
    if rng.random() < 0.1:
        maps[1] = maps[0].copy()
    dtype = rng.choice([np.uint8, np.uint16, np.int64])
    return [labels.astype(dtype) for labels in maps]


def check_tiny(rng):
    a, b = tiny_labels(rng)
    spacing = SPACINGS[rng.integers(len(SPACINGS))]
    tolerance = float(rng.choice([0.0, 1.0, 1.3, 2.0, 2.5]))
    scores = metrics.label_scores(a, b, spacing, ids=[1, 2], tolerance_mm=tolerance)
    for label in (1, 2):
        one, other = slow.voxels(a, label), slow.voxels(b, label)
        expected = {
            "dsc": slow.dsc(one, other),
            "hd95_mm": slow.hd95(one, other, spacing),
            "nsd": slow.nsd(one, other, spacing, tolerance),
        }
        for name, value in expected.items():
            got = scores[label][name]
            if value is None:
                assert math.isnan(got), (name, a, b)
            else:
                # Sums of a few float64.
                assert got == pytest.approx(value, abs=1e-12), (name, a, b)


@pytest.mark.parametrize("seed", range(4))
def test_label_scores_equal_the_oracle_on_tiny_masks(seed):
    rng = np.random.default_rng(seed)
    for _ in range(750):
        check_tiny(rng)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_label_scores_equal_the_oracle_on_a_hundred_thousand_masks(seed):
    rng = np.random.default_rng(seed)
    for _ in range(5000):  # two labels each
        check_tiny(rng)


def test_label_scores_of_empty_labels():
    a = np.zeros((4, 5, 6), np.uint8)
    b = a.copy()
    b[1, 2, 3] = 7
    scores = metrics.label_scores(a, b, (1, 2, 3), ids=[7, 9])
    assert scores[7]["dsc"] == scores[7]["nsd"] == 0.0
    assert math.isnan(scores[7]["hd95_mm"])
    assert all(math.isnan(value) for value in scores[9].values())


def test_label_scores_report_what_is_there():
    a = np.zeros((4, 5, 6), np.uint16)
    b = a.copy()
    a[0, 0, 0], b[3, 4, 5] = 3, 60000
    assert set(metrics.label_scores(a, b, (1, 1, 1))) == {3, 60000}
    assert set(metrics.label_scores(a, b, (1, 1, 1), surface=False)[3]) == {"dsc"}


def test_nsd_tolerance_takes_float32_spacing():
    # What a header of 2 mm under an oblique matrix comes to.
    spacing = (2.0000001, 2.0, 2.0)
    a, b = np.zeros((2, 6, 5, 4), np.uint8)
    a[1, 2, 2] = b[2, 2, 2] = 1
    assert metrics.label_scores(a, b, spacing)[1]["nsd"] == 1.0
    scores = metrics.label_scores(a, b, spacing, tolerance_mm=1.99)
    assert scores[1]["nsd"] == 0.0


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # of the peer
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tolerance", [3.0, 5.0])
def test_nsd_agrees_with_surface_distance_package(seed, tolerance):
    peer = pytest.importorskip("surface_distance")
    rng, spacing = np.random.default_rng(seed), (2.0, 3.0, 2.5)
    noise = ndimage.gaussian_filter(rng.normal(size=(2, 40, 30, 36)), (0, 3, 3, 3))
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 30, 36)), indexing="ij")
    a, b = sum(g**2 for g in grid) + 6 * noise < 0.5
    found = surface.surface_distances(a, b, spacing)
    ours = surface.nsd(found, tolerance)
    theirs = peer.compute_surface_distances(a, b, spacing)
    theirs = peer.compute_surface_dice_at_tolerance(theirs, tolerance)
    # Its surface elements lie half a voxel off and weigh by area.
    assert ours == pytest.approx(theirs, abs=0.12)
    dice = peer.compute_dice_coefficient(a, b)
    scores = metrics.label_scores(a, b, spacing, surface=False)
    assert scores[1]["dsc"] == pytest.approx(dice, abs=1e-12)


def test_surface_distances_of_an_empty_mask_are_infinite():
    a = np.ones((3, 4, 5), bool)
    found = surface.surface_distances(a, ~a, (1, 1, 1))
    assert found.b_to_a.size == 0 and np.isinf(found.a_to_b).all()
    # Only one voxel has all six neighbours.
    assert found.a_to_b.size == 60 - 1 * 2 * 3


def test_nsd_rejects_a_negative_tolerance():
    a = np.ones((3, 4, 5), bool)
    found = surface.surface_distances(a, a, (1, 1, 1))
    with pytest.raises(ValueError, match="0 or more, got -1"):
        surface.nsd(found, -1)


@pytest.mark.parametrize("bad", [-1, 70000, 0.5])
def test_label_scores_reject_what_is_no_id(bad):
    a = np.full((3, 4, 5), bad)
    with pytest.raises(ValueError, match="whole numbers from 0 to 65535"):
        metrics.label_scores(a, a, (1, 1, 1))


def test_label_scores_reject_other_shapes():
    a = np.ones((3, 4, 5), np.uint8)
    with pytest.raises(ValueError, match="resample them onto the fixed grid"):
        metrics.label_scores(a, a[1:], (1, 1, 1))


# --- overlap ------------------------------------------------------------------------


def test_overlap_counts_what_is_undefined():
    place = np.diag([1.0, 2.0, 3.0, 1.0])
    fixed, moving = np.zeros((2, 4, 5, 6), np.uint8)
    fixed[0, 0, 0], fixed[1, 1, 1] = 1, 2
    moving[0, 0, 0], moving[3, 3, 3] = 1, 3
    found = metrics.overlap(
        Volume(fixed, place), Volume(moving, place), {"": moving, "lost": moving * 0}
    )
    assert found["n"] == {
        **{"dsc": 3, "hd95_mm": 1, "nsd": 3},
        **{"dsc_lost": 2, "hd95_mm_lost": 0, "nsd_lost": 2},
    }
    assert found["undefined"]["hd95_mm"] == {
        "2": "absent in warped",
        "3": "absent in fixed",
    }
    assert found["undefined"]["dsc_lost"] == {"3": "absent in fixed and warped"}
    assert found["labels"]["3"]["dsc"] == 0.0
    assert found["labels"]["3"]["dsc_lost"] is None
    assert found["mean"]["dsc"] == pytest.approx(1 / 3)
    assert found["mean"]["hd95_mm_lost"] is None


def test_overlap_of_maps_without_a_label_is_undefined():
    empty = np.zeros((4, 5, 6), np.uint8)
    volume = Volume(empty, np.eye(4))
    found = metrics.overlap(volume, volume, {"": empty, "before": empty})
    names = ["dsc", "hd95_mm", "nsd", "dsc_before", "hd95_mm_before", "nsd_before"]
    assert found["labels"] == {} and found["mean"] == dict.fromkeys(names)
    assert found["n"] == dict.fromkeys(names, 0)


# --- landmarks ----------------------------------------------------------------------


def test_landmark_errors_stop_where_the_field_does():
    place = np.diag([2.0, 3.0, 4.0, 1.0])
    disp_mm = np.full((5, 6, 7, 3), 1.0, np.float32)
    points = np.array([[2.0, 3.0, 4.0], [100.0, 3.0, 4.0]])
    before, after = metrics.landmark_errors(disp_mm, place, points, points + [3, 1, 1])
    np.testing.assert_allclose(before, np.sqrt(11))
    # Beyond the grid a field moves nothing, as in ITK.
    np.testing.assert_allclose(after, [2.0, np.sqrt(11)])


def test_landmark_errors_go_on_with_the_affine():
    """As a file of both parts does, where the field ends."""
    disp_mm = np.full((4, 4, 4, 3), [1.0, 0.0, 0.0], np.float32)
    shift = np.eye(4)
    shift[:3, 3] = [0, 2, 0]
    points = np.array([[1.0, 1, 1], [9, 9, 9]])
    place = disp_mm, np.eye(4), points, points
    assert metrics.landmark_errors(*place)[1].tolist() == [1.0, 0.0]
    assert metrics.landmark_errors(*place, shift)[1].tolist() == [1.0, 2.0]


def test_surface_distances_of_a_sheared_grid():
    """A tilted gantry: planes lie 2 mm apart, each shifted by 1.5 along y."""
    steps = np.array([[1.0, 0, 0], [0, 1.0, 1.5], [0, 0, 2.0]])
    labels = np.zeros((2, 5, 5, 5), np.uint8)
    labels[0, 2, 2, 1] = labels[1, 2, 3, 3] = 1
    scores = metrics.label_scores(*labels, steps)
    assert scores[1]["hd95_mm"] == pytest.approx(np.hypot(1 + 3.0, 4.0))
    place = np.eye(4)
    place[:3, :3] = steps
    fixed, moving = (Volume(a, place) for a in labels)
    found = metrics.overlap(fixed, moving, {"": moving.data})
    assert found["mean"]["hd95_mm"] == pytest.approx(np.hypot(4.0, 4.0))


@pytest.mark.parametrize("ids", [[0, 1], [-1], [65536]])
def test_label_scores_reject_ids_that_are_none(ids):
    a = np.zeros((3, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="ids must be from 1 to 65535"):
        metrics.label_scores(a, a, (1, 1, 1), ids=ids)


def test_target_errors_of_an_affine_reach_everywhere():
    shift = np.eye(4)
    shift[:3, 3] = 1.0
    points = np.array([[2.0, 3.0, 4.0], [1e4, 3.0, 4.0]])
    _, after = metrics.target_errors(mapping.affine(shift), points, points + 1)
    np.testing.assert_allclose(after, 0, atol=1e-9)


def test_landmark_errors_reject_other_counts():
    points = np.zeros((3, 3))
    with pytest.raises(ValueError, match="one row per fixed point"):
        metrics.target_errors(mapping.Mapping(()), points, points[1:])


def test_summarize_errors_of_one_point_has_no_spread():
    found = metrics.summarize_errors(np.array([3.0]), np.array([1.0]))
    assert found["tre_mm"] == found["tre_mm_max"] == 1.0
    assert math.isnan(found["tre_mm_std"])
    two = metrics.summarize_errors(np.array([3.0, 3.0]), np.array([1.0, 3.0]))
    assert two["tre_mm_std"] == pytest.approx(math.sqrt(2))
