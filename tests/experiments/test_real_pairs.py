"""Which real pairs there are, and that one function scores every kind of truth."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import conventional, real_pairs
from experiments.real_scans import HELD_OUT
from unireg_jax.imaging import mapping
from unireg_jax.imaging.mapping import Mapping
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.points import PointPairs

PLACE = np.diag([4.0, 5.0, 6.0, 1.0])
PLACE[:3, 3] = (-10, 3, 7)


def test_pairs_of_both_splits(tmp_path):
    val, train = (real_pairs.pairs(tmp_path, split) for split in ("val", "train"))
    assert (
        [p.name for p in val[-2:]] == ["liver", "lung"] == [p.name for p in train[4:]]
    )
    assert val[0].name == "headneck_0022_0061" and len({p.name for p in val}) == 14
    assert {c for p in val[:12] for c in p.patients} == set(HELD_OUT)
    # Defaults are not chosen on patients that results are told of.
    assert not {c for p in train[:4] for c in p.patients} & set(HELD_OUT)
    swapped = real_pairs.pairs(tmp_path, tasks=["lung", "headneck"])
    assert [p.task for p in swapped[:2]] == ["lung", "headneck"] and len(swapped) == 13


def test_settings_keep_the_pairs_type_without_network(tmp_path):
    lung = real_pairs.pairs(tmp_path, tasks=["lung"])[0]
    for network, task in ((True, "lung"), (False, "none")):
        asked = real_pairs.settings(lung, "coarse", network=network)
        assert (asked["task"], asked["pair_type"]) == (task, "intra")
        assert asked["affine"] == "coarse"


def test_own_start_is_of_the_pairs_own_task(tmp_path):
    """Without a region "auto" would take another one for the lung pair."""
    asked = []

    def prepare(fixed, moving, settings, *, clock):
        asked.append((fixed, moving, settings))
        return SimpleNamespace(matrix=np.eye(4))

    lung = real_pairs.pairs(tmp_path, tasks=["lung"])[0]
    session = SimpleNamespace(prepare=prepare)
    found = real_pairs.own_start(lung, ("fixed", "moving"), session).matrix
    ((*scans, settings),) = asked
    assert scans == ["fixed", "moving"] and (found == np.eye(4)).all()
    assert (settings["task"], settings["affine"]) == ("lung", "auto")


def test_landmarks_follow_displacement_then_alignment():
    matrix = np.array(
        [[0, -1, 0, 3.0], [1, 0, 0, -2.0], [0, 0, 1.1, 5.0], [0, 0, 0, 1]]
    )
    shift = np.array([2.0, -3.0, 1.5])  # voxels
    fixed = PLACE[:3, 3] + np.array([[5.0, 9, 11], [13, 8, 20], [9, 9, 15]])
    moving = (fixed + shift * (4, 5, 6)) @ matrix[:3, :3].T + matrix[:3, 3]
    moving[:, 0] += (0, 2.5, 0.5)
    field = conventional.from_voxels(np.broadcast_to(shift, (8, 7, 6, 3)), PLACE)
    truth = PointPairs(["1", "2", "3"], fixed, moving)
    found = real_pairs.scores(truth, Mapping((field, matrix)))
    np.testing.assert_allclose(found["errors_mm"], (0, 2.5, 0.5), atol=1e-4)
    assert found["tre_mm"] == pytest.approx(1, abs=1e-4)
    assert found["tre_median_mm"] == pytest.approx(0.5, abs=1e-4)
    assert real_pairs.told(found) == found["tre_mm"]


def test_labels_are_scored_after_the_map():
    fixed = np.zeros((8, 7, 6), np.uint8)
    fixed[2:4, 2:5, 1:4] = 1
    fixed[5:7, 2:5, 1:4] = 2
    truth = Volume(fixed, PLACE), Volume(np.roll(fixed, 1, axis=0), PLACE)
    still = real_pairs.scores(truth, Mapping(()))
    # One of two slices of each structure still overlaps.
    assert still == {"dsc": 0.5, "labels": {"1": 0.5, "2": 0.5}, "dsc_shared": 0.5}
    moved = np.eye(4)
    moved[0, 3] = 4  # mm: one voxel
    found = real_pairs.scores(truth, mapping.affine(moved), surface=True)
    whole = {"dsc": 1, "hd95_mm": 0, "labels": {"1": 1, "2": 1}, "dsc_shared": 1}
    assert found == whole
    assert real_pairs.told(found) == 100
    moved[2, 3] = 18  # past all slices of both
    assert real_pairs.scores(truth, mapping.affine(moved))["dsc_shared"] == 0
    moved = np.diag([0.2, 1, 1, 1])  # only the first structure's place is looked up
    moved[0, 3] = 0.8 * PLACE[0, 3] + 0.8 * 4 * 3.4
    found = real_pairs.scores(truth, mapping.affine(moved), surface=True)
    assert found["labels"]["1"] > 0 and found["labels"]["2"] == 0
    assert found["hd95_mm"] is None  # the mean of the other one would hide it


def test_real_pairs_are_read(data_root):
    every = real_pairs.pairs(data_root) + real_pairs.pairs(data_root, "train")
    for path in {p for pair in every for p in (pair.fixed, pair.moving, *pair.truth)}:
        assert path.is_file()
    for pair in (every[0], *every[12:14]):
        fixed, moving = real_pairs.read_scans(pair)
        truth = real_pairs.read_truth(pair)
        if pair.task == "headneck":
            for scan, labels in zip((fixed, moving), truth, strict=True):
                assert labels.data.shape == scan.data.shape
                np.testing.assert_allclose(labels.vox2world, scan.vox2world, atol=1e-3)
                assert set(np.unique(labels.data)) == set(range(8))
        else:
            assert len(truth.fixed) == {"liver": 327, "lung": 17}[pair.task]
            assert np.isfinite(real_pairs.scores(truth, Mapping(()))["tre_mm"])


def test_shared_slices_forgive_how_far_an_organ_was_drawn():
    fixed, warped = np.zeros((2, 6, 6, 10), np.uint8)
    fixed[1:4, 1:4, :6] = 1
    warped[1:4, 1:4, 3:] = 1
    fixed[5, 5, 0], warped[5, 5, 9] = 2, 2
    one, none = real_pairs.shared_slices(fixed, warped, [1, 2])
    assert one == 1 and np.isnan(none)
    warped[1] = 0  # a third of it
    assert real_pairs.shared_slices(fixed, warped, [1]) == [pytest.approx(0.8)]
