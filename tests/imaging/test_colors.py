"""Colours of labels."""

import numpy as np

from unireg_jax.imaging.colors import label_colors

GROUND = (0x14, 0x17, 0x1B)  # of the pictures on a page


def light(colors):
    """Relative luminance of WCAG 2.2."""
    part = np.asarray(colors) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_label_colors_differ():
    colors = label_colors(40)
    assert colors.shape == (40, 3) and colors.dtype == np.uint8
    assert len({tuple(c) for c in colors}) == 40
    np.testing.assert_array_equal(colors[:7], label_colors(7))


def test_label_colors_are_seen_on_the_ground_of_a_page():
    contrast = (light(label_colors(120)) + 0.05) / (light(GROUND) + 0.05)
    assert contrast.min() >= 3


def test_label_colors_are_no_greys():
    colors = label_colors(120).astype(int)
    assert (colors.max(axis=1) - colors.min(axis=1)).min() > 80


def test_label_colors_of_none_are_none():
    assert label_colors(0).shape == (0, 3)
