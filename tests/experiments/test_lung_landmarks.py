"""The search for tissue finds known shifts, and which real marks it contradicts."""

import numpy as np
import pytest
from scipy import ndimage

from experiments import figures, lung_landmarks, real_pairs
from unireg_jax.imaging.nifti import Volume

SPACING = np.array([2.0, 1.5, 3.0])


def scan(shift=(0, 0, 0)):
    """Blobs in HU on an anisotropic grid; `shift` voxels later along each axis."""
    noise = np.random.default_rng(0).normal(size=(40, 44, 32))
    hu = ndimage.shift(ndimage.gaussian_filter(noise, 1.5), shift, order=1)
    place = np.diag([*SPACING, 1.0])
    place[:3, 3] = (-30, 12, 100)
    return Volume((hu * 4000 - 400).astype(np.float32), place)


def at(*voxel):
    return np.array(voxel) * SPACING + (-30, 12, 100)


def test_match_finds_the_tissue_along_each_axis():
    shift = np.array([2, -3, 1])
    fixed, moving = scan(), scan(shift)
    true = at(18, 20, 15) + shift * SPACING
    start = true - (SPACING * (1, 2, -1)) / 2
    found = lung_landmarks.match(
        fixed, moving, at(18, 20, 15), start, others=[true, start], reach_mm=6
    )
    np.testing.assert_allclose(found.offset_mm, SPACING * (1, 2, -1) / 2)
    assert found.correlation == pytest.approx(1, abs=1e-4)
    assert found.others[0] == pytest.approx(1, abs=1e-4)
    assert found.others[1] < 0.9


def test_a_mark_is_doubtful_by_the_image_alone():
    fixed, moving = scan(), scan((0, 0, 2))
    point, true = at(18, 20, 14), at(18, 20, 16)
    right = lung_landmarks.check((fixed, moving), "1", point, true, at(18, 20, 20))
    wrong = lung_landmarks.check((fixed, moving), "2", point, at(18, 20, 14), true)
    assert not right.doubtful and right.matched_mm < 0.1 and right.apart_mm > 11
    assert right.mapped_mm == pytest.approx(12)
    assert wrong.doubtful and wrong.apart_mm < 0.1 and wrong.mapped_mm == 6
    assert wrong.correlations[0] < 0.9 < wrong.correlations[1]
    lines = lung_landmarks.table([right, wrong], SPACING).splitlines()
    assert lines[3].startswith("| 2, doubtful | 6.0 | 6.0 | 0.0 |")
    assert "all 2: mapped 9.00, best match 3.00 mm from the mark" in lines
    assert "1 not doubtful: mapped 12.00, best match 0.00 mm from the mark" in lines


def test_match_refuses_what_is_no_point():
    with pytest.raises(ValueError, match=r"points must be \(3,\) in mm, got \(3, 1\)"):
        lung_landmarks.match(scan(), scan(), at(18, 20, 14)[:, None], at(18, 20, 14))


def test_rounding_along_one_axis_is_a_quarter_of_the_step():
    assert lung_landmarks.rounding_mm((2, 0, 0)) == pytest.approx(0.5)
    assert 0.70 < lung_landmarks.rounding_mm((0.683, 0.683, 2.5)) < 0.71


def test_draw_shows_all_four_points_of_each(tmp_path, monkeypatch):
    drawn, save = [], figures.save_cuts

    def keep(path, cuts, **options):
        drawn.extend(cuts)
        save(path, cuts, **options)

    monkeypatch.setattr(figures, "save_cuts", keep)
    scans = scan(), scan((0, 0, 2))
    points = at(18, 20, 14), at(18, 20, 14), at(18, 20, 17)
    row = lung_landmarks.check(scans, "7", *points)
    lung_landmarks.draw(tmp_path / "marks.png", scans, [row, row])
    assert (tmp_path / "marks.png").is_file()
    titles = [title for title, _ in drawn]
    assert titles == 2 * ["7: fixed", "7: as marked", "7: as mapped", "7: best match"]
    places = (scans[0], 14), (scans[1], 14), (scans[1], 17), (scans[1], 16)
    for (_, cut), (one, z) in zip(drawn, 2 * places, strict=True):
        assert cut.shape == (61, 61)
        assert cut[30, 30] == pytest.approx(one.data[18, 20, z], abs=0.1)


def test_match_doubts_the_two_marks_of_the_lung(data_root):
    """Of the 17 both, and not the second and ninth, whose matches are next farthest."""
    (pair,) = real_pairs.pairs(data_root, tasks=["lung"])
    scans, truth = real_pairs.read_scans(pair), real_pairs.read_truth(pair)
    far = {}
    for i in (*real_pairs.DOUBTFUL["lung"], 1, 8):
        fixed, mark = truth.fixed[i], truth.moving[i]
        found = lung_landmarks.match(*scans, fixed, mark)
        far[i] = bool(np.linalg.norm(found.offset_mm) > lung_landmarks.DOUBTFUL_MM)
    assert far == {7: True, 11: True, 1: False, 8: False}
