"""Colours of labels."""

import numpy as np

from unireg_jax.imaging.colors import label_colors


def test_label_colors_differ():
    colors = label_colors(40)
    assert colors.shape == (40, 3) and colors.dtype == np.uint8
    assert len({tuple(c) for c in colors}) == 40
    np.testing.assert_array_equal(colors[:7], label_colors(7))


def test_label_colors_of_none_are_none():
    assert label_colors(0).shape == (0, 3)
