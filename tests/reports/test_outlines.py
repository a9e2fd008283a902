"""Outlines: closed paths around the right pixels."""

import re

import numpy as np
import pytest
from scipy import ndimage

from unireg_jax.reports import outlines


def corners(path):
    """[n, 2] x and y in pixels, of every closed part of a path."""
    parts = []
    for x, y, moves in re.findall(r"M(-?\d+) (-?\d+)l([^z]*)z", path):
        steps = np.array(re.findall(r"-?\d+", moves), int).reshape(-1, 2)
        points = np.cumsum([[int(x), int(y)], *steps], axis=0)
        parts.append(points / outlines.UNITS)
    assert re.fullmatch(r"(M-?\d+ -?\d+l[-\d ]+z)*", path), path
    return parts


def filled(path, shape):
    """[rows, columns] bool: pixels whose middle lies within, by the even-odd rule."""
    row, column = np.indices(shape) + 0.5
    inside = np.zeros(shape, bool)
    for points in corners(path):
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if y0 != y1:
                crosses = (y0 > row) != (y1 > row)
                inside ^= crosses & (column < x0 + (row - y0) / (y1 - y0) * (x1 - x0))
    return inside


def test_one_pixel_is_a_diamond():
    labels = np.zeros((3, 4), np.uint8)
    labels[1, 2] = 5
    assert outlines.trace(labels) == {5: "M10 5l1 1-1 1-1-1z"}


def test_straight_sides_and_stairs_have_points_at_their_ends_alone():
    labels = np.zeros((12, 15), np.uint16)
    labels[2:9, 3:13] = 300
    (path,) = outlines.trace(labels).values()
    (box,) = corners(path)
    assert len(box) == 8  # a box with its corners cut
    np.testing.assert_array_equal(box.min(axis=0), (3.25, 2.25))
    np.testing.assert_array_equal(box.max(axis=0), (12.75, 8.75))
    labels = np.tri(12, 15, k=-1, dtype=np.uint16)
    (stairs,) = outlines.trace(labels).values()
    assert len(corners(stairs)[0]) == 6


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_trace_encloses_the_pixels_of_each_label(sigma):
    """Blobs with holes, at the rim and touching, and single pixels."""
    noise = np.random.default_rng(0).normal(size=(41, 33))
    noise = ndimage.gaussian_filter(noise, sigma)
    labels = np.digitize(noise, np.quantile(noise, [0.4, 0.6, 0.8])).astype(np.uint8)
    paths = outlines.trace(labels)
    assert list(paths) == [1, 2, 3]
    for label, path in paths.items():
        np.testing.assert_array_equal(filled(path, labels.shape), labels == label)


def test_labels_that_touch_have_lines_of_their_own():
    labels = np.zeros((6, 8), np.uint8)
    labels[1:5, 1:4], labels[1:5, 4:7] = 1, 2
    left, right = (corners(path)[0] for path in outlines.trace(labels).values())
    assert left[:, 0].max() == 3.75 and right[:, 0].min() == 4.25


def test_pixels_that_share_a_corner_alone_are_two_parts():
    labels = np.array([[7, 0], [0, 7]], np.uint8)
    assert len(corners(outlines.trace(labels)[7])) == 2


def test_nothing_has_no_outline_and_noise_is_refused():
    assert outlines.trace(np.zeros((5, 6), np.uint8)) == {}
    noise = np.random.default_rng(0).integers(0, 9, (150, 160)).astype(np.uint16)
    assert outlines.trace(noise) is None
    assert outlines.trace(noise[:40, :40]) is not None
