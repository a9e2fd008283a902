"""Colours of labels, so that a label looks alike in every picture of them."""

import colorsys

import numpy as np

# Least luminance, of 1: three times as light as the ground of a page, #14171b, with the
# 0.05 that WCAG 2.2 adds to both.
_LEAST = 0.13


def label_colors(count: int) -> np.ndarray:
    """Gives the colours of labels 1 to `count`, which differ between neighbours.

    Args:
        count: the highest label.

    Returns:
        [count, 3] uint8, RGB, label i in row i - 1: hues a golden section apart.
    """
    hues = [(i * 0.618034) % 1 for i in range(count)]
    # Strong, pale and dark in turn: hues come close to one another after some steps.
    kinds = ((0.8, 1.0), (0.4, 1.0), (0.9, 0.7))
    colors = [colorsys.hsv_to_rgb(hue, *kinds[i % 3]) for i, hue in enumerate(hues)]
    light = np.array(colors).reshape(-1, 3) ** 2.2  # nearly sRGB, which has a toe
    luminance = light @ np.array([[0.2126], [0.7152], [0.0722]])
    # White is mixed into the ones that are too dark.
    white = np.maximum(0, (_LEAST - luminance) / (1 - luminance))
    return np.rint(255 * (light + white * (1 - light)) ** (1 / 2.2)).astype(np.uint8)
