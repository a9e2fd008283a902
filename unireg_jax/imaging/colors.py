"""Colours of labels, so that a label looks alike in every picture of them."""

import colorsys

import numpy as np


def label_colors(count: int) -> np.ndarray:
    """Gives colours that differ between neighbours in a list.

    Args:
        count: how many.

    Returns:
        [count, 3] uint8, RGB: hues a golden section apart.
    """
    hues = [(i * 0.618034) % 1 for i in range(count)]
    # Strong, pale and dark in turn: hues come close to one another after some steps.
    kinds = ((0.8, 1.0), (0.4, 1.0), (0.9, 0.7))
    colors = [colorsys.hsv_to_rgb(hue, *kinds[i % 3]) for i, hue in enumerate(hues)]
    return (255 * np.array(colors).reshape(-1, 3)).astype(np.uint8)
